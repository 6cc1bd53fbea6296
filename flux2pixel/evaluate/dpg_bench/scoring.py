"""DPG-Bench's arithmetic: from yes and no to item scores, categories and the total.

Protocol: TencentQQGYLab/ELLA at 3c228f1, ``dpg_bench/compute_dpg_bench.py``. Its published figures contain three
defects; ``official=True`` keeps the two that one process shows, ``official=False`` repairs them:

1. the first row of the csv is never read, so its item fails if another of its questions depends on it;
2. categories use the answers of the last crop alone, before dependencies are applied;
3. (several processes only) categories are scrambled between ranks: never reproduced here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flux2pixel.runtime.errors import UsageError

YES = "yes"
Answers = Mapping[Any, str]  # question id, as a number or its text -> answer


@dataclass(frozen=True)
class Question:
    """One question of an item: its id, the ids it depends on (0 is none), the category and the words."""

    id: int
    parents: tuple[int, ...]
    category: str  # L2, such as "entity - whole"
    text: str


@dataclass(frozen=True)
class ItemScore:
    """One image's scores: each crop's share of questions answered yes, and their mean."""

    crops: tuple[float, ...]
    average: float


@dataclass(frozen=True)
class Score:
    """The figures of a run.

    ``items`` in [0, 1]; ``l1``, ``l2`` and ``total`` in percent; ``failed`` says why an item could not be scored;
    ``values`` are what the categories average: item -> L1 category -> a value a question (and crop, if repaired).
    """

    items: dict[str, ItemScore]
    l1: dict[str, float]
    l2: dict[str, float]
    total: float | None
    failed: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def parse(rows: Iterable[Mapping[str, Any]], official: bool = True) -> dict[str, list[Question]]:
    """Sort csv rows into items, in order; the first row is left out if ``official``.

    Where an item has two blocks of rows, or an id twice, the last wins in the official script and so if ``official``;
    else UsageError. UsageError too for a row without the columns or with ids that are not numbers.
    """
    items: dict[str, dict[int, Question]] = {}
    previous = None
    for number, row in enumerate(rows):
        if official and number == 0:
            continue
        try:
            item, parents = str(row["item_id"]), str(row["dependency"]).split(",")
            question = Question(
                int(row["proposition_id"]),
                tuple(int(part.strip()) for part in parents),
                str(row["tuple"]).split("(")[0].strip(),
                str(row["question_natural_language"]),
            )
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"DPG-Bench questions, row {number + 1}: {error}; want the columns of dpg_bench.csv"
            ) from error
        if item != previous:
            if item in items and not official:
                raise UsageError(
                    f"DPG-Bench questions, row {number + 1}: a second block of item {item}; put them together"
                )
            items[item] = {}
        previous = item
        if question.id in items[item] and not official:
            raise UsageError(
                f"DPG-Bench questions, row {number + 1}: item {item} has question {question.id} twice; drop one"
            )
        items[item][question.id] = question
    return {item: list(asked.values()) for item, asked in items.items()}


def gate(questions: Sequence[Question], answers: Answers) -> dict[int, float]:
    """Score one crop's questions: 1 for exactly "yes", then 0 for those with a parent at 0, in the csv's order.

    Zeros cascade where parents come first; a parent that comes later is seen before its own gating. KeyError for a
    parent that has no question.
    """
    scores = {question.id: float(answer(answers, question.id) == YES) for question in questions}
    for question in questions:
        if any(parent != 0 and scores[parent] == 0 for parent in question.parents):
            scores[question.id] = 0.0
    return scores


def answer(answers: Answers, question: int) -> str:
    """Look an answer up by its question's number or the text of it; UsageError if there is none."""
    if question in answers:
        return answers[question]
    if str(question) in answers:
        return answers[str(question)]
    raise UsageError(f"no answer to question {question}; answer every question of an item for every crop")


def score_item(
    questions: Sequence[Question], crops: Sequence[Answers], pic_num: int
) -> tuple[ItemScore, list[dict[int, float]]]:
    """Score the first ``pic_num`` crops of an item; also the gated score of each question for each crop."""
    gated = [gate(questions, answers) for answers in crops[:pic_num]]
    shares = tuple(sum(scores.values()) / len(scores) for scores in gated)
    return ItemScore(shares, sum(shares) / len(shares)), gated


def score(
    questions: Iterable[Mapping[str, Any]],
    answers: Mapping[str, Sequence[Answers]],
    pic_num: int = 4,
    official: bool = True,
) -> Score:
    """Score answers by DPG-Bench's rules.

    ``questions`` are rows of dpg_bench.csv; ``answers`` maps an item to one ``{question id: text}`` for each crop, in
    the crops' order. ``official`` gives the published figure, defects included; otherwise the repaired one. An item
    without answers is not counted; one that cannot be scored is in ``failed`` and not counted. UsageError for fewer
    crops than ``pic_num``.
    """
    if pic_num < 1:
        raise UsageError(f"pic_num = {pic_num} must be at least 1")
    items = parse(questions, official)
    scored: dict[str, ItemScore] = {}
    by_category: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    by_item: dict[str, dict[str, list[float]]] = {}
    for item, crops in answers.items():
        if len(crops) < pic_num:
            raise UsageError(f"{item}: answers for {len(crops)} crops, but pic_num is {pic_num}")
        try:
            if item not in items:
                raise KeyError(item)
            result, gated = score_item(items[item], crops, pic_num)
        except KeyError as error:
            failed[item] = f"no question {error.args[0]}" if item in items else "no such item in the questions"
            continue
        scored[item] = result
        for question in items[item]:
            if official:
                values = [float(answer(crops[pic_num - 1], question.id) == YES)]
            else:
                values = [scores[question.id] for scores in gated]
            by_category.setdefault(question.category, []).extend(values)
            by_item.setdefault(item, {}).setdefault(_broad(question.category), []).extend(values)
    total = 100 * sum(result.average for result in scored.values()) / len(scored) if scored else None
    return Score(scored, _percent(_merge(by_category)), _percent(by_category), total, failed, by_item)


def _merge(by_category: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """L2 categories into L1: the part before the hyphen."""
    merged: dict[str, list[float]] = {}
    for name, values in by_category.items():
        merged.setdefault(_broad(name), []).extend(values)
    return merged


def _broad(category: str) -> str:
    return category.split("-")[0].strip()


def _percent(by_category: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: 100 * sum(values) / len(values) for name, values in sorted(by_category.items())}
