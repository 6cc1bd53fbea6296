"""DPG-Bench in the miniature's world: true renders answer their own questions, grids of four included."""

import numpy as np
import pytest
from PIL import Image

from flux2pixel.evaluate.dpg_bench import DpgBench, prompts, summarise
from flux2pixel.evaluate.layout import ImageFile
from flux2pixel.miniature import questions, world


def renders(suite, folder, count):
    """A grid PNG of four true renders of each of the first ``count`` prompts of every tag."""
    by_tag = {}
    for number, (prompt, metadata) in enumerate(zip(suite.prompts, world.EVAL_METADATA, strict=True)):
        if by_tag.setdefault(metadata["tag"], 0) < count:
            by_tag[metadata["tag"]] += 1
            shots = [
                world.sample(6_000_000 + 4 * number + i, metadata=metadata, held_out=frozenset()).image
                for i in range(4)
            ]
            path = folder / f"{prompt.id}.png"
            Image.fromarray(np.concatenate([np.concatenate(shots[i : i + 2], 1) for i in (0, 2)], 0)).save(path)
            yield from ImageFile(path, prompt, (0, 1, 2, 3)).samples((world.SIZE, world.SIZE))


def test_true_renders_answer_their_own_questions(tmp_path):
    suite = DpgBench(prompts(questions.rows()), questions.Analytic(), "")
    assert len(suite.prompts) == len(world.EVAL_METADATA)
    records = list(suite.score(renders(suite, tmp_path, 2)))
    assert np.mean([record.score for record in records]) > 0.95
    summary = summarise(suite.prompts, records)
    assert set(summary["repaired"]["l1"]) == {"entity", "attribute", "relation", "other"}
    assert "overall" not in summary and len(summary["missing"]) == 4 * len(world.EVAL_METADATA) - len(records)
    assert suite.provenance()["judge"] == "miniature" and not suite.provenance()["questions_official"]


def test_a_blank_image_answers_no_and_a_strange_question_is_refused():
    judge = questions.Analytic()
    blank = np.full((32, 32, 3), 110, np.uint8)
    asked = [row["question_natural_language"] for row in questions.rows()]
    assert set(judge.ask([blank], [asked])[0]) == {"no"}
    with pytest.raises(ValueError, match="not a question"):
        judge.ask([blank], [["Is it art?"]])
