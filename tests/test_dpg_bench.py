"""DPG-Bench: the arithmetic with and without its defects, the questions file, the suite."""

import csv

import numpy as np
import pytest
from parity import answers
from PIL import Image

from flux2pixel.evaluate import dpg_bench
from flux2pixel.evaluate.dpg_bench.questions import COLUMNS, git_blob
from flux2pixel.evaluate.dpg_bench.scoring import gate, parse
from flux2pixel.evaluate.layout import ImageFile
from flux2pixel.evaluate.suite import Record
from flux2pixel.runtime.errors import UsageError


def row(item, number, dependency="0", category="entity - whole (x)"):
    values = {"item_id": item, "proposition_id": str(number), "dependency": dependency, "tuple": category}
    return (
        dict.fromkeys(COLUMNS, "") | values | {"question_natural_language": f"{item} {number}?", "text": f"text {item}"}
    )


FIRST = row("zero", 1)
ROWS = [FIRST, row("a", 1), row("a", 2, "1", "attribute - color (x)"), row("a", 3, " 2 , 1"), row("b", 1)]


def crops(*texts):
    return [{str(i + 1): text for i, text in enumerate(answers)} for answers in texts]


def test_parity_of_the_official_figures():
    official = answers("dpg_bench.json")
    for run in official["runs"]:
        expected = run["expected"]
        got = dpg_bench.score(official["csv_rows"], official["answers"], run["pic_num"])
        assert got.items.keys() == expected["per_item"].keys() and len(got.items) == expected["num_scored_items"]
        for item, one in expected["per_item"].items():
            assert list(got.items[item].crops) == pytest.approx(one["scores"], abs=1e-12)
            assert got.items[item].average == pytest.approx(one["average"], abs=1e-12)
        assert got.l1 == pytest.approx(expected["L1"], abs=1e-12)
        assert got.l2 == pytest.approx(expected["L2"], abs=1e-12)
        assert got.total == pytest.approx(expected["dpg_bench_score"], abs=1e-12)
        assert got.failed == {"partiprompts97": "no question 1"}
        repaired = dpg_bench.score(official["csv_rows"], official["answers"], run["pic_num"], official=False)
        assert not repaired.failed and len(repaired.items) == len(got.items) + 1
        assert repaired.l1["entity"] < got.l1["entity"]  # dependencies applied


def test_zeros_cascade_in_the_order_of_the_csv():
    (questions,) = parse([row("a", 1), row("a", 2, "1"), row("a", 3, "2")], official=False).values()
    assert gate(questions, {1: "no", 2: "yes", 3: "yes"}) == {1: 0, 2: 0, 3: 0}
    backwards = parse([row("a", 1, "2"), row("a", 2, "3"), row("a", 3)], official=False)["a"]
    assert gate(backwards, {1: "yes", 2: "yes", 3: "no"}) == {1: 1, 2: 0, 3: 0}  # 2 was still right when 1 was asked


def test_only_yes_is_yes_and_both_kinds_of_id_work():
    (questions,) = parse([row("a", 1), row("a", 2), row("a", 3)], official=False).values()
    assert gate(questions, {1: "yes", 2: "Yes", 3: "yes."}) == gate(questions, {"1": "yes", "2": " yes", "3": ""})


def test_official_categories_take_the_last_crop_before_dependencies_and_repaired_ones_all_after():
    given = {"a": crops(("no", "yes", "yes"), ("yes", "yes", "no"), ("yes", "yes", "yes"), ("no", "yes", "no"))}
    official = dpg_bench.score(ROWS, given)
    assert official.l1 == {"attribute": 100.0, "entity": 0.0} and official.total == pytest.approx(
        100 * (0 + 2 + 3 + 0) / 12
    )
    repaired = dpg_bench.score(ROWS, given, official=False)
    assert repaired.l1 == {"attribute": 50.0, "entity": 100 * 3 / 8} and repaired.total == official.total
    assert dpg_bench.score(ROWS, given, pic_num=2).l1 == {"attribute": 100.0, "entity": 50.0}


def test_bad_questions_and_answers_have_messages():
    with pytest.raises(UsageError, match="answers for 1 crops, but pic_num is 4"):
        dpg_bench.score(ROWS, {"a": crops(("yes", "yes", "yes"))})
    with pytest.raises(UsageError, match="no answer to question 3"):
        dpg_bench.score(ROWS, {"a": crops(("yes", "yes"))}, pic_num=1)
    with pytest.raises(UsageError, match="pic_num = 0"):
        dpg_bench.score(ROWS, {}, pic_num=0)
    assert dpg_bench.score(ROWS, {"stranger": crops(("yes",))}, 1).failed == {
        "stranger": "no such item in the questions"
    }
    assert dpg_bench.score(ROWS, {}).total is None
    again = [*ROWS, row("a", 1)]
    with pytest.raises(UsageError, match="row 6: a second block of item a"):
        dpg_bench.score(again, {}, official=False)
    assert [q.id for q in parse(again)["a"]] == [1]  # the official script keeps the last block
    with pytest.raises(UsageError, match="item a has question 1 twice"):
        parse([row("a", 1), row("a", 1)], official=False)
    with pytest.raises(UsageError, match="row 2: 'tuple'"):
        parse([FIRST, {"item_id": "a", "dependency": "0", "proposition_id": "1"}])
    with pytest.raises(UsageError, match=r"row 2: invalid literal .* 'x'"):
        parse([FIRST, row("a", 1, "x")])


def test_the_questions_file_is_read_with_its_git_id(tmp_path):
    path = tmp_path / "dpg_bench.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*ROWS, row("c", 1) | {"text": 'two\nlines, "quoted"'}])
    rows, blob = dpg_bench.read(path)
    assert rows[:5] == ROWS and rows[5]["text"] == 'two\nlines, "quoted"' and blob == git_blob(path.read_bytes())
    assert git_blob(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's id of an empty file
    path.write_text("item_id,text\na,b\n")
    with pytest.raises(UsageError, match="lacks the columns keywords, proposition_id"):
        dpg_bench.read(path)
    path.write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(UsageError, match="holds no question"):
        dpg_bench.read(path)


def test_prompts_come_from_the_csv_or_byte_for_byte_from_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" leading and trailing\n")
    texts = dpg_bench.read_texts(tmp_path)
    first, second, third = dpg_bench.prompts(ROWS, texts)
    assert (first.text, second.text, third.text) == ("text zero", " leading and trailing\n", "text b")
    with pytest.raises(UsageError, match="1 prompts without questions, such as x"):
        dpg_bench.prompts(ROWS, {"x": ""})
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"id": "a", "prompt": "p"}\n{"id": "a", "prompt": "q"}\n')
    with pytest.raises(UsageError, match=":2: id a was there before"):
        dpg_bench.read_texts(lines)
    lines.write_text('{"name": "a"}\n')
    with pytest.raises(UsageError, match=":1: want an object with id and prompt"):
        dpg_bench.read_texts(lines)


class Brightness:
    """Answers yes where the crop is bright."""

    name = "brightness"

    def ask(self, images, questions):
        return [
            ["yes" if image.mean() > 127 else "no"] * len(asked) for image, asked in zip(images, questions, strict=True)
        ]

    def provenance(self):
        return {"name": self.name}


def test_the_suite_scores_grids_crop_by_crop(tmp_path):
    suite = dpg_bench.DpgBench(dpg_bench.prompts(ROWS), Brightness(), "blob", batch=3)
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, 8:] = 255  # crop 1
    samples = []
    for prompt in suite.prompts:
        Image.fromarray(pixels).save(tmp_path / f"{prompt.id}.png")
        samples += ImageFile(tmp_path / f"{prompt.id}.png", prompt, tuple(range(4))).samples((8, 8))
    records = list(suite.score(samples))
    assert [record.score for record in records] == [0, 1, 0, 0] * 3
    summary = dpg_bench.summarise(suite.prompts, (Record(**record.as_dict()) for record in records))
    assert summary["overall"]["score"] == summary["official"]["total"] == 25.0
    assert summary["official"]["items"] == 2 and summary["repaired"]["items"] == 3
    assert summary["official"]["failed"] == {"zero": "no such item in the questions"}
    assert summary["groups"]["entity"]["score"] == 0.0 and summary["repaired"]["l1"]["entity"] == 25.0
    partial = dpg_bench.summarise(suite.prompts, records[:-1])
    assert partial["missing"] == [("b", 3)] and "overall" not in partial and "total" not in partial["official"]
    assert not suite.provenance()["questions_official"]
