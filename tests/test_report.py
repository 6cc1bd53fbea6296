import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flux2pixel.evaluate.report import write_report
from flux2pixel.evaluate.report_page import picture

MODELS = ("base", "converted", "finetuned")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MEASURES = {"patch_frechet": 0.21, "texture_frechet": 0.034, "spectrum_all": 0.4, "spectrum_high": -0.6,
            "blockiness": 1.08, "grain": 0.021, "colour_mean_error": 0.01, "colour_std_error": 0.02}  # fmt: skip
Images = dict[str, dict[str, list[np.ndarray]]]


def scene(seed: int) -> np.ndarray:
    """A coloured disc on a gradient, so that the demonstration looks like one."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    pixels = np.stack([x * 4 + 60, y * 3 + 80, x + y + 70], axis=-1) + rng.normal(0, 8, size=(32, 32, 3))
    centre = rng.integers(9, 23, size=2)
    pixels[np.hypot(x - centre[0], y - centre[1]) < rng.integers(5, 9)] = rng.integers(0, 255, size=3)
    return pixels.clip(0, 255).astype(np.uint8)


def demonstration(prompts: int = 24) -> tuple[dict[str, Any], Images]:
    """A whole report of invented figures."""
    cell = {"score": 0.71, "low": 0.66, "high": 0.76}
    names = [
        f"a photo of {'a red cube and a blue ring' if i % 2 else 'three green discs'}, number {i}"
        for i in range(prompts)
    ]
    images = {name: {model: [scene(9 * i + k) for k in range(4)] for model in MODELS} for i, name in enumerate(names)}
    report: dict[str, Any] = {
        "base": "klein-tiny",
        "models": {
            model: {
                "geneval": {
                    "overall": cell | {"score": 0.71 + 0.01 * i},
                    "tags": {tag: cell | {"images": 96} for tag in TAGS},
                },
                "fidelity": {key: value * (1 - 0.3 * i) for key, value in MEASURES.items()},
                "steps": 28,
                "seconds_per_image": 0.041,
                "path": f"runs/demo/{model}",
            }
            for i, model in enumerate(MODELS)
        },
        "fidelity_ceiling": {
            "real": {key: value / 50 for key, value in MEASURES.items()} | {"grain": 0.03, "blockiness": 1.0},
            "vae": MEASURES,
        },
        "detector_ceiling": 0.985,
        "paired": {
            "converted-base": {"difference": 0.0, "low": -0.01, "high": 0.01},
            "finetuned-base": {"difference": 0.02, "low": -0.012, "high": 0.05},
        },
        "exactness": {"max_abs_error": 3.1e-13, "steps": 28, "dtype": "float64"},
        "basis": {
            "method": "procrustes",
            "rank": 16,
            "patch_dim": 192,
            "scale": 1.37,
            "captured_energy": 0.962,
            "alignment_residual": 0.21,
            "orthonormality_error": 2e-15,
            "half_split_angle_deg": 1.9,
            "spectrum": [math.exp(-i / 12) for i in range(192)],
            "vectors": [picture(scene(i)[:8, :8]) for i in range(16)],
        },
        "training": {
            "curve": [[10 * i, 0.2 + math.exp(-i / 15), min(1.0, i / 50)] for i in range(100)],
            "images_seen": 64000,
        },
        "claims": [
            {"claim": "Conversion is exact.", "holds": True, "figures": "largest error 3.1e-13 in float64"},
            {"claim": "Finetuning beats the base's fidelity.", "holds": False, "figures": "0.02 against 0.034"},
        ],
        "seconds": {"total": 712.3, "fit_subspace": 10.2, "convert": 1.1, "finetune": 360.0, "eval": 210.0},
        "versions": {"python": "3.11", "torch": "2.9"},
        "prompts": [
            {
                "prompt": name,
                "tag": TAGS[i % 6],
                "held_out": i % 3 == 0,
                "verdicts": {
                    m: [{"correct": (i + k + j) % 3 > 0, "reason": "expected 3 discs, found 2"} for k in range(4)]
                    for j, m in enumerate(MODELS)
                },
            }
            for i, name in enumerate(names)
        ],
        "settings": {"seed": 0, "images_per_prompt": 4},
    }
    return report, images


def page_of(report: dict[str, Any], images: Images, folder: Path) -> str:
    write_report(report, images, folder / "report.html")
    return (folder / "report.html").read_text("utf-8")


def test_nothing_in_the_page_points_outside_it(tmp_path: Path) -> None:
    report, images = demonstration()
    report["basis"]["vectors"].append("https://example.org/vector.png")
    page = page_of(report, images, tmp_path)
    assert not re.search(r"(?<!xmlns=\")https?://", page)
    sources = re.findall(r"<img[^>]*\ssrc=\"([^\"]*)", page)
    assert len(sources) == 24 * 12 + 36 + 16
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"@import|url\(|<link(?![^>]*href=\"data:)|<script[^>]+src", page)


def test_every_figure_of_the_report_is_on_the_page(tmp_path: Path) -> None:
    page = page_of(*demonstration(), tmp_path)
    for figure in (
        "0.710",
        "[0.660, 0.760]",
        "0.985",
        "3.10e−13",
        "procrustes",
        "0.962",
        "Images seen",
        "klein-tiny",
        "1 of 2 claims",
    ):
        assert figure in page, figure


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    report, images = demonstration(2)
    evil = '<script>alert("1")</script>\'">'
    images[evil] = {"base": [scene(0)]}
    report["prompts"].append(
        {"prompt": evil, "tag": evil, "held_out": True, "verdicts": {"base": [{"correct": False, "reason": evil}]}}
    )
    report |= {"base": evil, "settings": {evil: evil}, "claims": [{"claim": evil, "holds": True, "figures": evil}]}
    page = page_of(report, images, tmp_path)
    assert page.count("<script>") == 1
    assert 'alert("' not in page and "&lt;script&gt;alert(&quot;1&quot;)" in page


@pytest.mark.parametrize("part", demonstration(1)[0].keys())
def test_any_part_may_be_missing(part: str, tmp_path: Path) -> None:
    report, images = demonstration(2)
    del report[part]
    assert "</html>" in page_of(report, images, tmp_path)


def test_one_model_or_nothing_at_all_still_makes_a_page(tmp_path: Path) -> None:
    report, images = demonstration(2)
    report["models"] = {"base": {"fidelity": {"grain": float("nan")}}}
    only = {prompt: {"base": shots["base"]} for prompt, shots in images.items()}
    assert "Latent base" in page_of(report, only, tmp_path)
    assert "Nothing was compared" in page_of({}, {}, tmp_path)


def test_a_failed_write_leaves_the_old_page_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page_of(*demonstration(1), tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report({}, {}, tmp_path / "report.html")
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text("utf-8") == before
