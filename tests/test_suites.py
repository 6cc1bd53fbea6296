"""The suites together from the command line, drawn by the miniature and judged by stand-ins that say so."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.evaluate import open_scorers
from flux2pixel.evaluate.dpg_bench.questions import COLUMNS
from flux2pixel.evaluate.hpsv3 import CATEGORIES, Hpsv3
from flux2pixel.models.base import resolve
from flux2pixel.recipe import load
from flux2pixel.subspace.run import fit_subspace

SMALL = ["eval.samples=4", "eval.fidelity_images=8", "sample.steps=2", "threads=1"]


class Brightness:
    """Rewards bright images: not HPSv3's model, and it says so."""

    def __call__(self, images: Any, prompts: Any) -> list[tuple[float, float]]:
        return [(float(np.mean(image)) / 10, 1.0) for image in images]

    def provenance(self) -> dict[str, Any]:
        return {"name": "brightness"}


def questions(path: Path, items: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for item in range(items):
            for number in (1, 2):
                row = dict.fromkeys(COLUMNS, "")
                row |= {"item_id": f"item{item}", "text": "a photo of a red circle", "proposition_id": str(number)}
                row |= {"dependency": str(number - 1), "tuple": "entity - whole (circle)"}
                writer.writerow(row | {"question_natural_language": "Is there a circle?"})


def benchmark(folder: Path) -> None:
    folder.mkdir(parents=True)
    for category in CATEGORIES:
        entries = [
            {"caption": f"{category} {number}", "image_file": f"{number}.jpg", "aspect_ratio": 1.0 + number}
            for number in range(2)
        ]
        (folder / f"benchmark_{category}.json").write_text(json.dumps(entries))


class Yes:
    """Answers yes where the image is bright: not mPLUG, and it says so."""

    name = "brightness"

    def ask(self, images: Any, asked: Any) -> list[list[str]]:
        return [["yes" if np.mean(image) > 100 else "no"] * len(own) for image, own in zip(images, asked, strict=True)]

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Judges without weights, over questions and prompts in the official files' form; lists what was opened."""
    from flux2pixel.evaluate.dpg_bench import DpgBench

    opened: list[str] = []

    def dpg(assets: Path, device: str, prompts: Any, blob: str, judge: str = "") -> DpgBench:
        opened.append("dpg-bench")
        return DpgBench(prompts, Yes(), blob)

    def hpsv3(assets: Path, device: str, prompts: Any, script: bool) -> Hpsv3:
        opened.append("hpsv3")
        return Hpsv3(prompts, Brightness(), script)

    monkeypatch.setattr(open_scorers, "dpg_bench", dpg)
    monkeypatch.setattr(open_scorers, "hpsv3", hpsv3)
    (tmp_path / "assets" / "dpg-bench").mkdir(parents=True, exist_ok=True)
    questions(tmp_path / "assets" / "dpg-bench" / "dpg_bench.csv", 5)
    benchmark(tmp_path / "assets" / "hpsv3" / "benchmark")
    return opened


def run_eval(folder: Path, *words: str, code: int = 0) -> Any:
    arguments = ["eval", "--run", str(folder / "run"), "--set", f"eval.assets={folder / 'assets'}", *words]
    for setting in SMALL:
        arguments += ["--set", setting]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result


def test_every_suite_in_one_report(tmp_path: Path, stand_ins: list[str]) -> None:
    """The miniature's folder under another name than its alias is a base like any other."""
    base = str(resolve("klein-tiny"))
    fit_subspace(load(None, ["fit_subspace.images=300", f"base={base}"]), tmp_path / "run")
    suites = ["--base", base, "--set", "eval.size=32", "--suite", "dpg-bench", "--suite", "hpsv3"]
    run_eval(tmp_path, *suites)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    row = report["models"]["base"]
    # The official script loses the first question, and with it item0: four items of four crops are left.
    assert row["dpg_bench"]["images"] == 20 and row["dpg_bench"]["overall"]["score"] * 16 / 100 in range(17)
    assert row["hpsv3"]["images"] == 24 and set(row["hpsv3"]["groups"]) == set(CATEGORIES)
    assert len(list((tmp_path / "run" / "eval" / "images" / "base" / "dpg-bench").glob("*.png"))) == 5
    assert {item["suite"] for item in report["prompts"]} == {"dpg-bench", "hpsv3"}
    for suite in ("dpg-bench", "hpsv3"):
        assert not report["comparable"][suite]["comparable"] and report["comparable"][suite]["reasons"]
    assert stand_ins == ["dpg-bench", "hpsv3"]
    run_eval(tmp_path, *suites)
    assert stand_ins == ["dpg-bench", "hpsv3"], "a rerun opens no judge"
    shutil.move(tmp_path / "run" / "eval" / "images" / "base" / "dpg-bench", tmp_path / "grids")
    made = ["--base", base, "--suite", "dpg-bench", "--images", f"elsewhere={tmp_path / 'grids'}", "--set"]
    assert "eval.size" in run_eval(tmp_path, *made, "eval.size=0", code=2).stderr
    run_eval(tmp_path, *made, "eval.size=32")
    again = json.loads((tmp_path / "run" / "report.json").read_text())["models"]["elsewhere"]["dpg_bench"]
    assert again["overall"] == row["dpg_bench"]["overall"]


def test_the_miniature_runs_dpg_bench_on_its_own_questions(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit_subspace(load(None, ["fit_subspace.images=300"]), run)
    run_eval(tmp_path, "--suite", "dpg-bench", "--suite", "geneval", "--suite", "fidelity", "--set", "eval.prompts=6")
    row = json.loads((run / "report.json").read_text())["models"]["base"]
    assert row["dpg_bench"]["protocol"]["judge"] == row["geneval"]["protocol"]["judge"] == "miniature"
    assert row["dpg_bench"]["images"] == 24 and "overall" not in row["dpg_bench"]
    assert {"fid", "kid", "precision", "recall", "patch_frechet"} <= row["fidelity"].keys()


def test_absent_weights_say_what_to_fetch(tmp_path: Path) -> None:
    for suite in ("dpg-bench", "hpsv3"):
        said = run_eval(tmp_path / suite, "--base", str(resolve("klein-tiny")), "--suite", suite, code=2)
        assert f"--suite {suite} --fetch" in said.stderr and len(said.stderr.splitlines()) == 1
