"""One candidate in one suite: find what is missing, draw it, score it beside, and read it all back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from flux2pixel.evaluate import drawing as generate
from flux2pixel.evaluate import layout
from flux2pixel.evaluate.columns import Candidate
from flux2pixel.evaluate.digests import Digests
from flux2pixel.evaluate.drawing import Clock, Drawer, Order
from flux2pixel.evaluate.layout import ImageFile
from flux2pixel.evaluate.ledger import Ledger
from flux2pixel.evaluate.scoring import Scoring, record_key
from flux2pixel.evaluate.suite import Record, Sample
from flux2pixel.evaluate.suites import Suite
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.processes import Team
from flux2pixel.runtime.progress import bar, log

SHOWN = 20  # faults printed one by one; the rest is counted


@dataclass
class Outcome:
    """A candidate's images in a suite and what they scored."""

    candidate: Candidate
    suite: Suite
    samples: list[Sample] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    seconds_per_image: float | None = None


@dataclass(frozen=True)
class Work:
    """What one process has to do: files to draw, in batches, and samples of whole files to score."""

    draw: list[list[ImageFile]]
    score: list[Sample]


class Task:
    """The work of one candidate in one suite; ``home`` holds images/ and scores/ of the run."""

    def __init__(
        self,
        candidate: Candidate,
        suite: Suite,
        seed: int,
        home: Path,
        digests: Digests,
        rank: int = 0,
        sized: bool = True,
    ):
        self.candidate, self.suite, self._digests = candidate, suite, digests
        self._scores = home / "scores" / candidate.name
        self._rank = rank
        self.ledger = Ledger(self._scores / f"{suite.name}.jsonl", rank)
        if candidate.open is None:
            self.order = None
            self.files = _foreign(candidate, suite, sized)
        else:
            self.order = Order(candidate.digest, candidate.settings, seed, suite.places, suite.size_of)
            folder = home / "images" / candidate.name / suite.name
            self.files = layout.image_files(suite.name, folder, suite.asked, suite.samples)
            self._folder = folder

    def samples(self, file: ImageFile) -> list[Sample]:
        """The samples in a file."""
        return file.samples(self.suite.size_of(file.prompt))

    def plan(self, team: Team, batch: int) -> Work:
        """What this process has to do. Its share of the files is fixed, so processes need not agree on what is done."""
        if self.order is None:
            mine = team.share([[file] for file in self.files])
            stale: set[Path] = set()
        else:
            mine = team.share(generate.batches(self.order, self.files, batch))
            stale = {file.path for file in generate.stale(self.order, [file for group in mine for file in group])}
        draw = [[file for file in group if file.path in stale] for group in mine]
        whole = [file for group in mine for file in group if file.path not in stale]
        return Work([group for group in draw if group], self._unscored(whole))

    def _unscored(self, whole: Sequence[ImageFile]) -> list[Sample]:
        if self.suite.load is None:
            return []
        found = [sample for file in whole for sample in self.samples(file)]
        return [s for s in found if self.ledger.get(record_key(s, self.suite.digest, self._digests)) is None]

    def run(self, work: Work, drawer: Drawer | None, batch: int) -> None:
        """Draw and score; ``drawer`` may be None if there is nothing to draw."""
        total = sum(len(file.indices) for group in work.draw for file in group)
        clock = Clock()
        with ExitStack() as stack:
            scoring = None
            if self.suite.load is not None and (work.score or total):
                scoring = stack.enter_context(Scoring(self.suite.scorer, self.suite.digest, self.ledger, self._digests))
                scoring.add(work.score)
            if total and drawer is not None and self.order is not None:
                progress = stack.enter_context(bar(f"{self.suite.name} {self.candidate.name}", total, unit="images"))
                layout.write_companions(self.suite.name, self._folder, [f.prompt for group in work.draw for f in group])
                for file in generate.draw(self.order, work.draw, drawer, batch, clock):
                    progress.advance(len(file.indices))
                    if scoring:
                        scoring.add(self.samples(file))
        if clock.images:
            speed = {"seconds_per_image": clock.seconds / clock.images, "images": clock.images}
            files.write_json(self._scores / f"{self.suite.name}.speed.{self._rank}.json", speed)

    def collect(self) -> Outcome:
        """Read back every sample and record, of all processes; the ledger is settled to what counts."""
        outcome = Outcome(self.candidate, self.suite)
        outcome.samples = [sample for file in self.files for sample in self.samples(file)]
        speeds = [json.loads(path.read_text()) for path in sorted(self._scores.glob(f"{self.suite.name}.speed.*.json"))]
        if images := sum(speed["images"] for speed in speeds):
            outcome.seconds_per_image = sum(s["seconds_per_image"] * s["images"] for s in speeds) / images
        if self.suite.load is None:
            return outcome
        ledger = Ledger(self._scores / f"{self.suite.name}.jsonl", self._rank)
        keys = [record_key(sample, self.suite.digest, self._digests) for sample in outcome.samples]
        found = [(key, record) for key in keys if (record := ledger.get(key)) is not None]
        ledger.settle([key for key, _ in found])
        outcome.records = [record for _, record in found]
        return outcome


def _foreign(candidate: Candidate, suite: Suite, sized: bool) -> list[ImageFile]:
    """Images made elsewhere, refused whole if any of them would be scored wrongly; ``sized``: eval.size was given."""
    if suite.name == "dpg-bench" and not sized:
        raise UsageError(
            f"--images {candidate.path}: say how many pixels a sample of the grids has, --set eval.size=1024"
        )
    folder = candidate.path / suite.name if (candidate.path / suite.name).is_dir() else candidate.path
    found = layout.read_folder(suite.name, folder, suite.asked, suite.side)
    for line in [*found.faults[:SHOWN], *found.missing[:SHOWN]]:
        log(line)
    for lines, what in ((found.faults, "faults"), (found.missing, "prompts with missing images")):
        if len(lines) > SHOWN:
            log(f"{folder}: {len(lines)} {what}, {len(lines) - SHOWN} not shown")
    if found.faults:
        raise UsageError(
            f"--images {folder}: {len(found.faults)} files would be scored wrongly (above); nothing was scored"
        )
    if not found.files:
        raise UsageError(f"--images {folder}: holds no image of {suite.name} in its official layout")
    if found.missing:
        log(f"{folder}: images are missing, so {suite.name} is partial and has no overall")
    return found.files
