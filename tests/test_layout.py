"""Folders of images made elsewhere: what is right is read, what is wrong has a line, what is missing is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2pixel.evaluate import layout, png
from flux2pixel.evaluate.run import evaluate
from flux2pixel.evaluate.store import Digests, Memo
from flux2pixel.evaluate.suite import Prompt
from flux2pixel.evaluate.suites import open_suites
from flux2pixel.miniature import world
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import UsageError

PROMPTS = [Prompt(f"{i:05d}", f"prompt {i}", "tag", 4, {"n": i}) for i in range(3)]
ITEMS = [Prompt(f"item{i}", f"prompt {i}", "tag", 4) for i in range(3)]
CARDS = [Prompt(f"{i}", f"prompt {i}", "Food", 1) for i in range(3)]
PIXELS = np.zeros((8, 8, 3), np.uint8)


def make(suite: str, folder: Path, prompts: list[Prompt], pixels: np.ndarray = PIXELS) -> None:
    layout.write_companions(suite, folder, prompts)
    for file in layout.image_files(suite, folder, prompts, 4):
        png.write(file.path, pixels, "x")


@pytest.mark.parametrize(("suite", "prompts"), [("geneval", PROMPTS), ("dpg-bench", ITEMS), ("hpsv3", CARDS)])
def test_what_was_written_is_read_back(tmp_path: Path, suite: str, prompts: list[Prompt]) -> None:
    make(suite, tmp_path, prompts)
    found = layout.read_folder(suite, tmp_path, prompts, size=(4, 4))
    assert found.files == layout.image_files(suite, tmp_path, prompts, 4)
    assert not found.missing and not found.faults


def faults(suite: str, folder: Path, prompts: list[Prompt]) -> list[str]:
    return layout.read_folder(suite, folder, prompts, size=(4, 4)).faults


def test_geneval_faults(tmp_path: Path) -> None:
    make("geneval", tmp_path, PROMPTS)
    inside = tmp_path / "00001" / "samples"
    for damage, said in [
        (lambda: Image.fromarray(PIXELS).save(inside / "0004.jpg"), "ignores all but .png"),
        (lambda: png.write(inside / "best.png", PIXELS, "x"), "not a number"),
        (lambda: png.write(inside / "0004.png", PIXELS, "x"), "5 images, the protocol has 4"),
        (lambda: png.write(inside / "1.png", PIXELS, "x"), "the same number"),
        (lambda: (inside / "0002.png").write_bytes((inside / "0002.png").read_bytes()[:60]), "is cut off"),
        (lambda: shutil.copytree(tmp_path / "00001", tmp_path / "00553"), "no such prompt"),
        (lambda: shutil.copytree(tmp_path / "00001", tmp_path / "1"), "the same prompt as"),
        (lambda: (tmp_path / "00001" / "metadata.jsonl").write_text(json.dumps({"prompt": "else"})), "is of 'else'"),
        (lambda: png.write(tmp_path / "loose.png", PIXELS, "x"), "outside the layout"),
    ]:
        shutil.rmtree(tmp_path)
        make("geneval", tmp_path, PROMPTS)
        damage()
        assert any(said in line for line in faults("geneval", tmp_path, PROMPTS)), said
    shutil.rmtree(tmp_path)
    make("geneval", tmp_path, PROMPTS)
    (inside / "0003.png").unlink()
    shutil.rmtree(tmp_path / "00002")
    found = layout.read_folder("geneval", tmp_path, PROMPTS, None)
    assert len(found.files) == 7 and not found.faults
    assert [line.rpartition(": ")[2] for line in found.missing] == ["3 of 4 images", "0 of 4 images"]


def test_grids_of_another_size_and_strangers_are_refused(tmp_path: Path) -> None:
    make("dpg-bench", tmp_path, ITEMS)
    png.write(tmp_path / "item0.png", PIXELS[:4, :4], "x")  # one sample, which a grid's cuts would quarter
    png.write(tmp_path / "item1.again.png", PIXELS, "x")
    png.write(tmp_path / "stranger.png", PIXELS, "x")
    lines = faults("dpg-bench", tmp_path, ITEMS)
    for said in ("is 4x4; a 2 x 2 grid of samples of 4x4 pixels is 8x8", "the same item as", "no item 'stranger'"):
        assert any(said in line for line in lines), said


def test_four_files_instead_of_a_grid(tmp_path: Path) -> None:
    for index in range(4):
        png.write(tmp_path / "item0" / f"{index}.png", PIXELS, "x")
    found = layout.read_folder("dpg-bench", tmp_path, ITEMS, (4, 4))
    assert [file.indices for file in found.files] == [(0,), (1,), (2,), (3,)] and len(found.missing) == 2


def test_hpsv3_finds_prompts_by_their_text(tmp_path: Path) -> None:
    make("hpsv3", tmp_path, CARDS)
    for suffix in (".png", ".txt"):
        (tmp_path / "Food" / f"0{suffix}").rename(tmp_path / "Food" / f"any{suffix}")
    (tmp_path / "Food" / "1.txt").write_text("prompt 1\n\nimages/1.jpg")  # as the official generator writes it
    (tmp_path / "Food" / "2.txt").write_text("another prompt")
    found = layout.read_folder("hpsv3", tmp_path, CARDS, None)
    assert sorted(file.prompt.id for file in found.files) == ["0", "1"]
    assert len(found.faults) == 1 and "neither its name nor 2.txt is a prompt of Food" in found.faults[0]


def test_a_folder_of_true_renders_is_scored_from_the_stage(tmp_path: Path) -> None:
    recipe = load(None, ["eval.prompts=6", "eval.fidelity_images=12"])
    (suite,) = open_suites(recipe, Digests(tmp_path / "d"), Memo(tmp_path / "m"), "cpu")
    folder = tmp_path / "renders"
    layout.write_companions("geneval", folder, suite.asked)
    for file in layout.image_files("geneval", folder, suite.asked, 4):
        seed = 100 + 10 * suite.places[file.prompt.id] + file.indices[0]
        png.write(file.path, world.sample(seed, metadata=dict(file.prompt.data), held_out=frozenset()).image, "x")
    evaluate(recipe, tmp_path / "run", images=[f"true={folder}"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(tag["score"] > 0.9 for tag in report["models"]["true"]["geneval"]["tags"].values())
    assert (
        report["models"]["true"]["kind"] == "images" and report["models"]["true"]["fidelity"]["texture_frechet"] < 0.05
    )
    Image.fromarray(PIXELS).save(folder / "00000" / "samples" / "0000.jpg")
    with pytest.raises(UsageError, match="1 files would be scored wrongly"):
        evaluate(recipe, tmp_path / "run", images=[f"true={folder}"])
