"""Images and records on disk: made once, for any batch and number of processes, and again when settings change."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.evaluate import columns as models
from flux2pixel.evaluate import drawing as generate
from flux2pixel.evaluate import layout, png
from flux2pixel.evaluate.columns import FlowDrawer
from flux2pixel.evaluate.drawing import Clock, Order
from flux2pixel.evaluate.run import evaluate
from flux2pixel.evaluate.store import CHUNK, Digests, Entry, Ledger, Texts
from flux2pixel.evaluate.suite import Prompt, Record
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.models.model import open_model
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import Flux2PixelError, UsageError

SMALL = ["eval.prompts=6", "eval.samples=2", "eval.fidelity_images=12", "sample.steps=2", "eval.batch=4", "threads=1"]
PROMPTS = [Prompt(f"{i:05d}", f"prompt {i}", "tag", 4, {"n": i}) for i in range(5)]


class Pencil:
    """Draws a function of prompt and key, and counts."""

    def __init__(self) -> None:
        self.images = 0

    def draw(self, prompts: Any, keys: Any, size: Any) -> np.ndarray:
        self.images += len(keys)
        rows = [
            np.random.default_rng([len(p), *key]).integers(0, 255, (*size, 3))
            for p, key in zip(prompts, keys, strict=True)
        ]
        return np.stack(rows).astype(np.uint8)

    def close(self) -> None:
        """Nothing was loaded."""


def order(**changes: Any) -> Order:
    places = {prompt.id: place for place, prompt in enumerate(PROMPTS)}
    what: dict[str, Any] = {"model": "m", "settings": {"steps": 4}, "seed": 0, "places": places}
    return Order(**what | {"size_of": lambda _: (8, 8)} | changes)


def make(folder: Path, suite: str, batch: int, **changes: Any) -> int:
    asked, pencil = order(**changes), Pencil()
    files = layout.image_files(suite, folder, PROMPTS, 4)
    work = generate.batches(asked, generate.stale(asked, files), batch)
    assert sum(generate.draw(asked, work, pencil, batch, Clock())) == pencil.images
    return pencil.images


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("suite", ["geneval", "dpg-bench", "hpsv3"])
def test_images_do_not_depend_on_the_batch_and_are_made_once(tmp_path: Path, suite: str) -> None:
    assert make(tmp_path / "a", suite, 1) == make(tmp_path / "b", suite, 7) == 20
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and contents(tmp_path / "a")
    assert make(tmp_path / "a", suite, 3) == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_is_missing_cut_off_or_of_other_settings_is_made_again(tmp_path: Path) -> None:
    make(tmp_path, "geneval", 4)
    whole = contents(tmp_path)
    first, second, third, *_ = sorted(tmp_path.rglob("*.png"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-20])
    Image.new("RGB", (8, 8)).save(third)  # somebody else's
    assert make(tmp_path, "geneval", 4) == 3
    assert contents(tmp_path) == whole
    for changes in ({"settings": {"steps": 5}}, {"model": "other"}, {"seed": 1}, {"size_of": lambda _: (4, 4)}):
        assert make(tmp_path, "geneval", 4, **changes) == 20


def test_a_grid_holds_its_samples_row_by_row(tmp_path: Path) -> None:
    make(tmp_path / "one", "geneval", 4)
    make(tmp_path / "grid", "dpg-bench", 4)
    for file in layout.image_files("dpg-bench", tmp_path / "grid", PROMPTS, 4):
        sheet = Image.open(file.path)
        for sample in file.samples((8, 8)):
            alone = Image.open(tmp_path / "one" / file.prompt.id / "samples" / f"{sample.index:04d}.png")
            assert np.array_equal(sheet.crop(sample.box), alone)


def test_a_png_says_what_made_it_and_whether_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    png.write(path, np.zeros((4, 6, 3), np.uint8), "digest")
    assert (png.read_digest(path), png.fault(path), png.size(path)) == ("digest", None, (4, 6))
    whole = path.read_bytes()
    path.write_bytes(whole[:-6])
    assert png.fault(path) == "is cut off" and png.read_digest(path) is None
    path.write_bytes(b"JFIF" + whole)
    assert png.fault(path) == "is not a png"


def test_a_ledger_drops_a_line_cut_off_and_keeps_the_rest(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "geneval.jsonl", process=1)
    for index in range(3):
        ledger.add(Entry("image", "scorer", Record("00000", index, "tag", 1.0, "why", {"boxes": {}})))
    part = tmp_path / "geneval.1.jsonl"
    part.write_bytes(part.read_bytes()[:-30])
    again = Ledger(tmp_path / "geneval.jsonl")
    known = [again.get(("image", "scorer", "00000", index)) for index in range(3)]
    assert known[2] is None and known[0] == Record("00000", 0, "tag", 1.0, "why", {"boxes": {}})
    assert again.get(("other image", "scorer", "00000", 0)) is None
    again.settle([("image", "scorer", "00000", index) for index in range(2)])
    assert [path.name for path in tmp_path.iterdir()] == ["geneval.jsonl"]
    assert Ledger(tmp_path / "geneval.jsonl").get(("image", "scorer", "00000", 1)) == known[1]


def test_digests_are_remembered_until_a_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("one")
    digests = Digests(tmp_path / "memory")
    one = digests.of_file(path)
    digests.save()
    path.write_text("two")
    os.utime(path, ns=(1, 1))
    assert Digests(tmp_path / "memory").of_file(path) != one
    assert Digests(tmp_path / "nothing").of_file(path) != one
    with pytest.raises(UsageError, match="no weights"):
        digests.of_model(tmp_path / "empty")


def test_sizes_are_height_and_width(tmp_path: Path) -> None:
    wide = {"size_of": lambda _: (4, 8)}
    make(tmp_path / "one", "geneval", 4, **wide)
    make(tmp_path / "grid", "dpg-bench", 4, **wide)
    for file in layout.image_files("dpg-bench", tmp_path / "grid", PROMPTS, 4):
        assert Image.open(file.path).size == (16, 8) and png.size(file.path) == (8, 16)
        for sample in file.samples((4, 8)):
            alone = Image.open(tmp_path / "one" / file.prompt.id / "samples" / f"{sample.index:04d}.png")
            assert alone.size == (8, 4) and np.array_equal(Image.open(file.path).crop(sample.box), alone)


def test_conditionings_are_kept_one_by_one_in_their_dtype(tmp_path: Path) -> None:
    asked: list[str] = []

    def encode(prompts: list[str]) -> dict[str, torch.Tensor]:
        asked.extend(prompts)
        return {"text": torch.tensor([[float(len(p))] for p in prompts], dtype=torch.bfloat16)}

    texts = Texts(tmp_path)
    many = ["x" * i for i in range(CHUNK + 1)]
    assert [len(chunk) for chunk in texts.missing("encoder", [*many, *many])] == [CHUNK, 1]
    for chunk in texts.missing("encoder", ["a", "bb", "a", "ccc"]):
        texts.add("encoder", chunk, encode)
    found = Texts(tmp_path).of("encoder", ["ccc", "a", "a"])["text"]
    assert found.flatten().tolist() == [3, 1, 1] and found.dtype == torch.bfloat16
    assert asked == ["a", "bb", "ccc"] and texts.missing("encoder", ["a", "d"]) == [["d"]]
    assert texts.missing("another encoder", ["a"]) == [["a"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a subspace and a converted model."""
    from flux2pixel.convert.run import convert
    from flux2pixel.subspace.run import fit_subspace

    folder = tmp_path_factory.mktemp("run")
    recipe = load(None, ["fit_subspace.images=300", "convert.verify_steps=2"])
    fit_subspace(recipe, folder)
    convert(recipe, folder)
    return folder


def test_a_rerun_does_no_model_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(None, SMALL)
    evaluate(recipe, run, out=run / "one.html")
    first = json.loads((run / "one.json").read_text())

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was opened, or an image judged or measured, again")

    for place in (
        "flux2pixel.evaluate.columns.FlowDrawer.open",
        "flux2pixel.evaluate.columns.FlowDrawer.encoder",
        "flux2pixel.miniature.detector.detect",
        "flux2pixel.evaluate.fidelity.truth.TrueSet.measure",
        "flux2pixel.evaluate.fidelity.truth.TrueSet.ceilings",
    ):
        monkeypatch.setattr(place, never)
    evaluate(recipe, run, out=run / "two.html")
    second = json.loads((run / "two.json").read_text())
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    changed = load(None, [*SMALL, "sample.steps=1"])
    with pytest.raises(AssertionError, match="a model was opened"):
        evaluate(changed, run)


def test_models_of_one_encoder_share_their_texts_and_nothing_is_loaded_together(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoder, models and judge in turn: what one needs is let go before the next is opened."""
    from flux2pixel.miniature import detector

    texts: list[str] = []
    drawing: set[FlowDrawer] = set()
    encoders: list[weakref.ref[Any]] = []
    order: list[str] = []
    text, detect, opened, closed = Base.text, detector.detect, FlowDrawer.open, FlowDrawer.close

    def count(self: Base, prompts: Any) -> Any:
        assert not drawing
        order.append("text")
        encoders.extend(weakref.ref(part) for part in self.text_parts.values() if isinstance(part, torch.nn.Module))
        texts.extend(prompts)
        return text(self, prompts)

    def start(self: FlowDrawer) -> FlowDrawer:
        assert not drawing and all(encoder() is None for encoder in encoders)
        order.append("draw")
        drawing.add(self)
        return opened(self)

    def end(self: FlowDrawer) -> None:
        drawing.remove(self)
        closed(self)

    def see(image: Any) -> Any:
        assert not drawing
        order.append("judge")
        return detect(image)

    monkeypatch.setattr(Base, "text", count)
    monkeypatch.setattr(FlowDrawer, "open", start)
    monkeypatch.setattr(FlowDrawer, "close", end)
    monkeypatch.setattr(detector, "detect", see)
    for name in ("subspace.safetensors", "converted"):
        (tmp_path / name).symlink_to(run / name)
    evaluate(load(None, [*SMALL, "eval.suite=['geneval']"]), tmp_path)
    assert len(texts) == len(set(texts)) == 7, "six prompts and the empty one, for both models"
    assert [name for name, _ in groupby(order)] == ["text", "draw", "judge"] and order.count("draw") == 2
    order.clear()
    evaluate(load(None, [*SMALL, "eval.suite=['geneval']", "sample.steps=3"]), tmp_path)
    assert [name for name, _ in groupby(order)] == ["draw", "judge"], "other steps, the same texts"


def test_an_image_that_is_not_finite_is_an_error_and_not_a_score(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(run / "converted", broken)
    (weights,) = (broken / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out.weight"][:] = float("nan")
    weights.unlink()
    save_file(tensors, weights)
    recipe = load(None, [*SMALL, "eval.suite=['geneval']"])
    with pytest.raises(Flux2PixelError, match=r"'a photo of .*', seed \d+, sample 0: .*not finite"):
        evaluate(recipe, tmp_path, [str(broken)])
    assert not list((tmp_path / "eval" / "images").rglob("*.png"))


def test_the_report_says_how_every_column_was_drawn(run: Path, tmp_path: Path) -> None:
    recipe = load(None, [*SMALL, "eval.suite=['geneval']", "sample.guidance=2"])
    stock = tmp_path / "stock"
    stock.symlink_to(bases.resolve("klein-tiny"))
    evaluate(recipe, tmp_path, [str(run / "converted"), str(stock)])
    rows = json.loads((tmp_path / "report.json").read_text())["models"]
    drawn = {name: row["generation"] for name, row in rows.items()}
    for one in drawn.values():
        assert (one["steps"], one["guidance"], one["seed"], one["sizes"]) == (2, 2.0, 0, {"geneval": {"32x32": 6}})
    scale = float(open_model(run / "converted").flow.scale)
    assert drawn["converted"]["shift"] == pytest.approx(scale * 1024 / 32, rel=1e-3), "the base's own shift of 1"
    assert "shift" not in drawn["stock"]


def test_a_model_on_the_hub_is_asked_for_and_a_mistyped_folder_is_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def resolve(repo: str, *_: Any) -> Path:
        asked.append(repo)
        return run / "converted"

    monkeypatch.setattr(models.bases, "resolve", resolve)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    words = ["eval", "--run", str(tmp_path / "run"), "--suite", "geneval", "--model"]
    mistyped = CliRunner().invoke(app, [*words, "runs/convertd"])
    assert mistyped.exit_code == 2 and "runs/convertd: no such folder" in mistyped.stderr and not asked
    settings = [word for setting in SMALL for word in ("--set", setting)]
    done = CliRunner().invoke(app, [*words, "hub=someone/pixels", *settings])
    assert done.exit_code == 0 and asked == ["someone/pixels"], done.output
    assert list(json.loads((tmp_path / "run" / "report.json").read_text())["models"]) == ["hub"]


def test_a_mistyped_run_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", "--run", str(tmp_path / "typo")])
    assert result.exit_code == 2 and "typo: no such run" in result.stderr
    assert not (tmp_path / "typo").exists()


def test_two_processes_equal_one_and_a_killed_run_goes_on(run: Path, tmp_path: Path) -> None:
    recipe = load(None, SMALL)
    evaluate(recipe, run, out=tmp_path / "one.html")
    images = contents(run / "eval" / "images")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("subspace.safetensors", "converted"):
        (other / name).symlink_to(run / name)
    words = [sys.executable, "-m", "flux2pixel", "eval", "--run", str(other), "--gpus", "2"]
    for setting in SMALL:
        words += ["--set", setting]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(other / "eval" / "images") == images
    one, two = (json.loads(path.read_text()) for path in (tmp_path / "one.json", other / "report.json"))
    for name in ("base", "converted"):
        assert one["models"][name]["geneval"] == two["models"][name]["geneval"]
        assert one["models"][name]["fidelity"] == two["models"][name]["fidelity"]
    assert one["prompts"] == two["prompts"] and one["paired"] == two["paired"]
    # A crash in the middle: some images and records are there, one file is half written.
    some = sorted((other / "eval" / "images" / "base").rglob("*.png"))
    some[0].write_bytes(some[0].read_bytes()[:50])
    some[1].unlink()
    scores = other / "eval" / "scores" / "base" / "geneval.jsonl"
    scores.write_text(scores.read_text()[:-40])
    evaluate(recipe, other)
    assert contents(other / "eval" / "images") == images
    assert json.loads((other / "report.json").read_text())["prompts"] == one["prompts"]


def test_any_pipeline_can_be_scored_beside_ours(run: Path, tmp_path: Path) -> None:
    stock = tmp_path / "pipeline"
    stock.symlink_to(bases.resolve("klein-tiny"))
    recipe = load(None, [*SMALL, "eval.prompts=2"])
    evaluate(recipe, tmp_path, [f"stock={stock}", f"ours={run / 'converted'}"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: row["kind"] for name, row in report["models"].items()} == {"stock": "stock", "ours": "pixel"}
    assert len(list((tmp_path / "eval" / "images" / "stock").rglob("*.png"))) == 4
    assert list(report["paired"]) == ["ours-stock"]


def test_models_that_cannot_be_told_apart_or_opened(run: Path, tmp_path: Path) -> None:
    recipe = load(None, SMALL)
    with pytest.raises(UsageError, match="both called converted"):
        evaluate(recipe, run, [str(run / "converted"), str(run / "converted")])
    with pytest.raises(UsageError, match=r"neither asymflow\.json nor"):
        evaluate(recipe, run, [str(tmp_path)])
    with pytest.raises(UsageError, match="no such adapter"):
        evaluate(recipe, run, [f"{run / 'converted'}+absent.safetensors"])
    with pytest.raises(UsageError, match="cannot name a column"):
        models.named("a/b=c")


def test_an_adapter_on_a_model(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    name = "transformer.single_transformer_blocks.0.attn.to_out"
    config = json.loads((run / "converted" / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    inside = width + int(width * config["mlp_ratio"])
    tensors = {
        f"{name}.lora_A.weight": torch.randn(4, inside, generator=generator),
        f"{name}.lora_B.weight": torch.randn(width, 4, generator=generator),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    recipe = load(None, [*SMALL, "eval.prompts=2"])
    evaluate(recipe, run, [str(run / "converted"), f"{run / 'converted'}+{tmp_path / 'lora.safetensors'}"])
    names = list(json.loads((run / "report.json").read_text())["models"])
    assert names == ["converted", "converted+lora"]
    plain, adapted = (contents(run / "eval" / "images" / name) for name in names)
    assert adapted and all(plain[key] != image for key, image in adapted.items())
    save_file({"x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "strange.safetensors")
    with pytest.raises(UsageError, match="not a LoRA of this transformer"):
        evaluate(recipe, run, [f"{run / 'converted'}+{tmp_path / 'strange.safetensors'}"])
