import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux2pixel.evaluate.report import tables
from flux2pixel.evaluate.report.build import Gallery, for_readers, write_report
from flux2pixel.evaluate.suite import Prompt, Sample
from flux2pixel.runtime.errors import Flux2PixelError
from flux2pixel.runtime.page import data_uri

MODELS = ("base", "converted", "finetuned")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MEASURES = {"patch_frechet": 0.21, "texture_frechet": 0.034, "spectrum_all": 0.4, "spectrum_high": -0.6,
            "blockiness": 1.08, "grain": 0.021, "colour_mean_error": 0.01, "colour_std_error": 0.02}  # fmt: skip
Shots = dict[tuple[str, str], dict[str, list[Sample]]]


def scene(seed: int) -> np.ndarray:
    """A coloured disc on a gradient, so that the demonstration looks like one."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    pixels = np.stack([x * 4 + 60, y * 3 + 80, x + y + 70], axis=-1) + rng.normal(0, 8, size=(32, 32, 3))
    centre = rng.integers(9, 23, size=2)
    pixels[np.hypot(x - centre[0], y - centre[1]) < rng.integers(5, 9)] = rng.integers(0, 255, size=3)
    return pixels.clip(0, 255).astype(np.uint8)


def pictures(folder: Path, count: int, side: int = 32) -> list[Path]:
    paths = [folder / f"{index}.png" for index in range(count)]
    folder.mkdir(exist_ok=True)
    for index, path in enumerate(paths):
        Image.fromarray(scene(index)).resize((side, side)).save(path)
    return paths


def demonstration(folder: Path, prompts: int = 24, side: int = 32) -> tuple[dict[str, Any], Gallery]:
    """A whole report of invented figures; its images are files of ``folder``, used again and again."""
    cell = {"score": 0.71, "low": 0.66, "high": 0.76}
    names = [
        f"a photo of {'a red cube and a blue ring' if i % 2 else 'three green discs'}, number {i}"
        for i in range(prompts)
    ]
    paths = pictures(folder / "images", 60, side)
    shots: Shots = {}
    for i, name in enumerate(names):
        prompt = Prompt(f"{i:05d}", name, TAGS[i % 6], 4)
        shots["geneval", prompt.id] = {
            model: [Sample(prompt, k, paths[(9 * i + 4 * j + k) % 60]) for k in range(4)]
            for j, model in enumerate(MODELS)
        }
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
            "converted-base": {"geneval": {"difference": 0.0, "low": -0.01, "high": 0.01}},
            "finetuned-base": {"geneval": {"difference": 0.02, "low": -0.012, "high": 0.05}},
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
            "vectors": [data_uri(Image.fromarray(scene(i)[:8, :8])) for i in range(16)],
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
        "comparable": {
            "geneval": {"statement": "Comparable with nothing.", "reasons": ["another detector"], "published": []}
        },
        "prompts": [
            {
                "suite": "geneval",
                "id": f"{i:05d}",
                "prompt": name,
                "tag": TAGS[i % 6],
                "held_out": i % 3 == 0,
                "verdicts": {
                    m: [{"correct": (i + k * j) % 3 > 0, "reason": "expected 3 discs, found 2"} for k in range(4)]
                    for j, m in enumerate(MODELS)
                },
            }
            for i, name in enumerate(names)
        ],
        "settings": {"seed": 0, "images_per_prompt": 4},
    }
    return report, Gallery(shots, folder / "sheets")


def page_of(report: dict[str, Any], gallery: Gallery | None, folder: Path) -> str:
    write_report(report, gallery, folder / "report.html")
    return (folder / "report.html").read_text("utf-8")


def test_nothing_in_the_page_points_outside_it(tmp_path: Path) -> None:
    report, gallery = demonstration(tmp_path)
    report["basis"]["vectors"].append("https://example.org/vector.png")
    page = page_of(report, gallery, tmp_path)
    assert not re.search(r"(?<!xmlns=\")https?://", page)
    sources = re.findall(r"<img[^>]*\ssrc=\"([^\"]*)", page)
    assert len(sources) == 36 + 16
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert page.count('<script type="text/plain" id="sheet-') == 24
    assert not re.search(r"@import|<link(?![^>]*href=\"data:)|<script[^>]+src", page)


def test_every_figure_of_the_report_is_on_the_page(tmp_path: Path) -> None:
    page = page_of(*demonstration(tmp_path), tmp_path)
    for figure in (
        "0.710",
        "[0.660, 0.760]",
        "vs base 0.020 [−0.012, 0.050]",
        "0.985",
        "3.10e−13",
        "procrustes",
        "0.962",
        "Images seen",
        "klein-tiny",
        "1 of 2 claims",
        "Comparable with nothing.",
    ):
        assert figure in page, figure


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    report, gallery = demonstration(tmp_path, 2)
    evil = '<script>alert("1")</script>\'">'
    report["prompts"].append(
        {"suite": evil, "id": evil, "prompt": evil, "tag": evil, "held_out": True,
         "verdicts": {"base": [{"correct": False, "reason": evil}]}}
    )  # fmt: skip
    report |= {"base": evil, "settings": {evil: evil}, "claims": [{"claim": evil, "holds": True, "figures": evil}]}
    page = page_of(report, gallery, tmp_path)
    assert page.count("<script>") == 1
    assert "<script>alert" not in page and "&lt;script&gt;alert(&#34;1&#34;)" in page


@pytest.mark.parametrize(
    "part", ["models", "fidelity_ceiling", "paired", "basis", "training", "claims", "comparable", "prompts", "versions"]
)
def test_any_part_may_be_missing(part: str, tmp_path: Path) -> None:
    report, gallery = demonstration(tmp_path, 2)
    del report[part]
    assert "</html>" in page_of(report, gallery, tmp_path)


def test_one_model_or_nothing_at_all_still_makes_a_page(tmp_path: Path) -> None:
    report, gallery = demonstration(tmp_path, 2)
    report["models"] = {"base": {"fidelity": {"grain": float("nan")}}}
    assert "Latent base" in page_of(report, gallery, tmp_path)
    assert "Nothing was compared" in page_of({}, None, tmp_path)


def test_a_failed_write_leaves_the_old_page_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page_of({"base": "a"}, None, tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Flux2PixelError, match="No space"):
        write_report({}, None, tmp_path / "report.html")
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text("utf-8") == before


def test_a_partial_run_shows_no_overall_and_a_second_page_decodes_no_image(tmp_path: Path) -> None:
    report, gallery = demonstration(tmp_path, 6)
    for model in report["models"].values():
        del model["geneval"]["overall"]
    first = page_of(report, gallery, tmp_path)
    assert first.count("partial: no overall") == 3
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(path.read_bytes()[:40])  # no longer an image, and its digest is another
    report["prompts"] = [item | {"id": "absent"} for item in report["prompts"]]
    assert 'id="sheet-' not in page_of(report, gallery, tmp_path)


def test_a_sheet_is_drawn_once(tmp_path: Path) -> None:
    report, gallery = demonstration(tmp_path, 3)
    page_of(report, gallery, tmp_path)
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "sheets").iterdir()}
    assert len(drawn) == 3
    page_of(report, gallery, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sheets").iterdir()} == drawn


def test_grids_are_cut_and_large_images_made_small(tmp_path: Path) -> None:
    from flux2pixel.evaluate.report.sheets import SIDE, thumbnail

    pixels = np.zeros((512, 512, 3), np.uint8)
    pixels[256:, :256] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "grid.png")
    prompt = Prompt("a", "a", "a", 4)
    shot = thumbnail(Sample(prompt, 2, tmp_path / "grid.png", (0, 256, 256, 512)), SIDE)
    assert shot.size == (SIDE, SIDE) and shot.getpixel((5, 5)) == (255, 0, 0)


def rows_of(report: dict[str, Any]) -> dict[str, tables.Row]:
    return {row.label: row for row in tables.summary(report)}


def test_only_what_leads_by_more_than_its_interval_is_bold(tmp_path: Path) -> None:
    report, _ = demonstration(tmp_path, 2)
    overall = "GenEval, overall"
    assert not any(cell.best for row in rows_of(report).values() for cell in row.cells), "every interval overlaps"
    report["paired"]["finetuned-base"]["geneval"]["low"] = 0.001
    assert not any(cell.best for cell in rows_of(report)[overall].cells), "not shown against the converted model"
    report["models"]["converted"]["geneval"]["overall"] = {"score": 0.6, "low": 0.55, "high": 0.65}
    report["models"]["finetuned"]["geneval"]["overall"]["low"] = 0.7
    assert [cell.best for cell in rows_of(report)[overall].cells] == [False, False, True]
    assert page_of(report, None, tmp_path).count('<td class="best">') == 1
    report["paired"] = {"converted-base": {"geneval": {"difference": -0.1, "low": -0.2, "high": -0.01}},
                        "finetuned-base": {"geneval": {"difference": -0.1, "low": -0.2, "high": -0.01}}}  # fmt: skip
    report["models"]["base"]["geneval"]["overall"]["score"] = 0.9
    assert [cell.best for cell in rows_of(report)[overall].cells] == [True, False, False]


def test_every_row_says_what_is_better_and_what_it_means(tmp_path: Path) -> None:
    report, _ = demonstration(tmp_path, 2)
    page = page_of(report, None, tmp_path)
    rows = [row for row in tables.summary(report) if row.kind in ("overall", "measure")]
    assert len(rows) == len(MEASURES) + 3
    for row in rows:
        assert row.better and row.meaning and row.number
        assert f'id="meaning-{row.number}"' in page and f'href="#meaning-{row.number}"' in page
        assert f'title="{row.meaning}"' in page
    assert {key: tables.MEASURES[key][1] for key in ("texture_frechet", "spectrum_high", "grain", "recall")} == {
        "texture_frechet": "↓", "spectrum_high": "→ 0", "grain": "→ true", "recall": "↑"
    }  # fmt: skip
    assert "needs JavaScript" in page_of(*demonstration(tmp_path, 2), tmp_path)


def test_any_base_is_headed_by_the_method(tmp_path: Path) -> None:
    report, gallery = demonstration(tmp_path, 2)
    page = page_of(report | {"base": "flux2-klein-9b"}, gallery, tmp_path)
    assert "<h1>AsymFlow: flux2-klein-9b, from latents to pixels</h1>" in page and "miniature" not in page


def test_no_path_of_the_authors_machine_is_shown(tmp_path: Path) -> None:
    report, gallery = demonstration(tmp_path, 2)
    home = Path("/home/somebody/models/klein-9b")
    report["base"] = str(home)
    report["models"]["base"]["path"] = str(home)
    report["models"]["finetuned"]["path"] = str(tmp_path / "finetuned")
    report["fidelity_reference"] = {"source": "/data/photos", "absent": [f"LPIPS: no {home}/alexnet.pth; `x` gets it"]}
    report["settings"] = {"data": {"source": "hf:owner/name"}, "eval": {"assets": "~/secret/assets", "judge": "a/b"}}
    found = for_readers(report, tmp_path)
    assert found["models"]["finetuned"]["path"] == "finetuned" and found["base"] == "klein-9b"
    assert found["fidelity_reference"] == {"source": "photos", "absent": ["LPIPS: no alexnet.pth; `x` gets it"]}
    assert found["settings"] == {"data": {"source": "hf:owner/name"}, "eval": {"assets": "assets", "judge": "a/b"}}
    assert found["prompts"] == report["prompts"] and found["exactness"] == report["exactness"]
    page = page_of(report, gallery, tmp_path)
    for secret in ("/home", "somebody", "/data/", "secret", str(tmp_path)):
        assert secret not in page, secret
