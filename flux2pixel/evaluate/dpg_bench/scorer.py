"""DPG-Bench as a suite: crops in, the judge's answers kept, the official and the repaired figures out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flux2pixel.evaluate import statistics
from flux2pixel.evaluate.dpg_bench.judges import Vqa
from flux2pixel.evaluate.dpg_bench.questions import CROPS, GIT_BLOB, TEXTS_SHA256, texts_digest
from flux2pixel.evaluate.dpg_bench.scoring import Score, parse, score, score_item
from flux2pixel.evaluate.statistics import mean_interval
from flux2pixel.evaluate.suite import Prompt, Record, Sample, read_ahead, read_rgb

PROTOCOL = "ELLA@3c228f1 dpg_bench"


class DpgBench:
    """The suite over ``prompts`` (`dpg_bench.prompts`) with a judge; a `Judge`.

    ``blob`` is the git blob id of the questions file. A record's score is the crop's share of questions answered yes,
    dependencies applied, in [0, 1], over all of its questions; the summary's figures are in percent.
    """

    suite = "dpg-bench"

    def __init__(self, prompts: Sequence[Prompt], judge: Vqa, blob: str, batch: int = 8):
        self.prompts = prompts
        self.judge = judge.name
        self._vqa, self._blob, self._batch = judge, blob, batch
        rows = [row for prompt in prompts for row in prompt.data["questions"]]
        self._items, self._questions = parse(rows, official=False), len(rows)

    def score(self, samples: Iterable[Sample]) -> Iterator[Record]:
        """Yield a record for each crop, in order; see `Judge`."""
        for group, images in read_ahead(samples, lambda s: read_rgb(s, orient=False), self._batch):
            asked = [self._items[sample.prompt.id] for sample in group]
            answers = self._vqa.ask(images, [[question.text for question in questions] for questions in asked])
            for sample, questions, texts in zip(group, asked, answers, strict=True):
                given = {str(q.id): text for q, text in zip(questions, texts, strict=True)}
                share = score_item(questions, [given], 1)[0].average
                yield Record(sample.prompt.id, sample.index, sample.prompt.group, share, details={"answers": given})

    def provenance(self) -> dict[str, Any]:
        """Say what decides the scores; ``questions_official`` and ``prompts_official`` hold for the protocol's own."""
        texts = json.dumps([[prompt.id, prompt.text] for prompt in self.prompts]).encode()
        return {
            "suite": self.suite,
            "judge": self.judge,
            "protocol": PROTOCOL,
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(texts).hexdigest(),
            "questions": self._questions,
            "questions_git_blob": self._blob,
            "questions_official": self._blob == GIT_BLOB,
            "prompts_official": self._official(),
            "vqa": self._vqa.provenance(),
        }

    def _official(self) -> bool:
        """Whether the images are of the protocol's prompts: the questions file's own texts, or the official .txt."""
        own = {p.id: str(p.data["questions"][0]["text"]) for p in self.prompts}
        given = {p.id: p.text for p in self.prompts}
        known = given == own or texts_digest(given) == TEXTS_SHA256
        return known and self._blob == GIT_BLOB and {p.samples for p in self.prompts} == {CROPS}


def summarise(prompts: Sequence[Prompt], records: Iterable[Record]) -> dict[str, Any]:
    """Sum up both ways, ``official`` (defects included, `scoring`) and ``repaired``, each total, L1 and L2.

    ``groups`` are the official L1 categories and ``overall`` the official total, with intervals over items, in
    percent; only items with all their crops count. See `suites.Suite`.
    """
    grouped = statistics.by_prompt(prompts, records)
    lost = statistics.missing(prompts, grouped)
    whole = {p.id: grouped[p.id] for p in prompts if len(grouped.get(p.id, ())) == p.samples}
    answers = {key: [record.details["answers"] for record in rows] for key, rows in whole.items()}
    summary: dict[str, Any] = {
        "prompts": len(grouped),
        "images": sum(map(len, grouped.values())),
        "missing": lost,
        "groups": {},
        "unit": "percent",
    }
    if answers:
        rows = [row for prompt in prompts for row in prompt.data["questions"]]
        both = {name: score(rows, answers, prompts[0].samples, name == "official") for name in ("official", "repaired")}
        summary |= {name: _figures(one, partial=bool(lost)) for name, one in both.items()}
        summary["groups"] = _groups(both["official"])
        if not lost and both["official"].items:
            summary["overall"] = _percent([[item.average] for item in both["official"].items.values()])
    return summary


def _figures(one: Score, partial: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"l1": one.l1, "l2": one.l2, "items": len(one.items), "failed": one.failed}
    return found if partial else {"total": one.total, **found}


def _groups(one: Score) -> dict[str, dict[str, Any]]:
    """L1 categories with 95 % intervals over items."""
    values: dict[str, list[list[float]]] = {}
    for by_category in one.values.values():
        for name, found in by_category.items():
            values.setdefault(name, []).append(found)
    return {name: {**_percent(rows), "prompts": len(rows)} for name, rows in sorted(values.items())}


def _percent(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    return {name: 100 * value for name, value in zip(("score", "low", "high"), mean_interval(rows), strict=True)}
