"""The scorers' common ground: records, figures, reading ahead."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2pixel.evaluate import statistics
from flux2pixel.evaluate.geneval import GenEval, prompts, summarise
from flux2pixel.evaluate.suite import Prompt, Record, Sample, read_ahead, read_rgb
from flux2pixel.miniature import judge, world
from flux2pixel.runtime.errors import Flux2PixelError, UsageError

PROMPTS = [Prompt("a", "one", "x", 2), Prompt("b", "two", "x", 2), Prompt("c", "three", "y", 1)]


def saved(path: Path, size=(8, 6)) -> Path:
    Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)).save(path)
    return path


def test_a_truncated_image_is_named(tmp_path):
    path = saved(tmp_path / "x.png", (200, 200))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(Flux2PixelError, match=r"x\.png: not a whole image"):
        read_rgb(Sample(PROMPTS[0], 0, path))
    with pytest.raises(Flux2PixelError, match=r"y\.png: no such image"):
        read_rgb(Sample(PROMPTS[0], 0, tmp_path / "y.png"))


def test_a_box_takes_its_part_and_never_pads(tmp_path):
    path = saved(tmp_path / "x.png")
    whole = read_rgb(Sample(PROMPTS[0], 0, path))
    assert np.array_equal(read_rgb(Sample(PROMPTS[0], 0, path, (4, 3, 8, 6))), whole[3:6, 4:8])
    with pytest.raises(Flux2PixelError, match=r"8x6, too small"):
        read_rgb(Sample(PROMPTS[0], 0, path, (4, 3, 12, 6)))


def test_exif_orientation_is_applied_on_request(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "x.png", exif=exif)
    sample = Sample(PROMPTS[0], 0, tmp_path / "x.png")
    assert read_rgb(sample).shape == (8, 6, 3)
    assert read_rgb(sample, orient=False).shape == (6, 8, 3)


def test_reading_ahead_keeps_order_and_asks_only_one_batch_ahead():
    asked = []

    def growing():
        for index in range(7):
            asked.append(index)
            yield Sample(PROMPTS[0], index, Path(str(index)))

    seen = []
    for group, values in read_ahead(growing(), lambda s: s.index, batch=2):
        seen += values
        assert [s.index for s in group] == values
        assert len(asked) <= len(seen) + 2
    assert seen == list(range(7))


def test_figures_name_what_is_missing_and_refuse_strangers_and_duplicates():
    records = [Record("a", 0, "x", 1.0), Record("a", 1, "x", 0.0), Record("c", 0, "y", 1.0)]
    grouped = statistics.by_prompt(PROMPTS, reversed(records))
    assert statistics.missing(PROMPTS, grouped) == [("b", 0), ("b", 1)]
    assert statistics.groups(PROMPTS, grouped)["x"]["score"] == 0.5
    assert statistics.mean_of_groups(PROMPTS, grouped)["score"] == 0.75
    for bad, message in (
        (records[0], "twice"),
        (Record("z", 0, "x", 1.0), "no such"),
        (Record("a", 2, "x", 1.0), "many"),
    ):
        with pytest.raises(UsageError, match=message):
            statistics.by_prompt(PROMPTS, [*records, bad])


def test_the_miniature_suite_scores_true_renders_and_withholds_a_partial_overall(tmp_path):
    rows = [next(m for m in world.EVAL_METADATA if m["tag"] == tag) for tag in world.TAGS]
    suite = GenEval(prompts(rows, 2), judge.Analytic())
    samples = []
    for number, prompt in enumerate(suite.prompts):
        for index in range(2):
            scene = world.sample(5_000_000 + 10 * number + index, metadata=prompt.data, held_out=frozenset())
            path = tmp_path / f"{prompt.id}-{index}.png"
            Image.fromarray(scene.image).save(path)
            samples.append(Sample(prompt, index, path))
    records = list(suite.score(samples))
    again = [Record(**json.loads(json.dumps(r.as_dict()))) for r in records]
    assert again == records
    summary = summarise(suite.prompts, again)
    assert summary["images"] == 12 and not summary["missing"]
    assert (
        summary["overall"]["score"] == pytest.approx(np.mean([r.score for r in records]))
        and summary["correct_images"] > 0.7
    )
    assert "overall" not in summarise(suite.prompts, records[:-1])
    assert summarise(suite.prompts, [])["groups"] == {}
    flipped = [replace(r, score=1.0) for r in records]
    assert summarise(suite.prompts, flipped)["overall"] == {"score": 1.0, "low": 1.0, "high": 1.0}
    assert not suite.provenance()["prompts_official"]
