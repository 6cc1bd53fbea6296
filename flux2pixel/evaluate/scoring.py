"""Scoring beside generation: images are judged in a thread as they reach the disk, and each record is kept at once."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from flux2pixel.evaluate.digests import Digests
from flux2pixel.evaluate.ledger import Entry, Key, Ledger
from flux2pixel.evaluate.suite import Sample, Scorer


class Scoring:
    """Feed samples while they are made; ``with`` ends it and raises what went wrong in the thread.

    ``scorer_digest`` is that of the scorer's provenance: with the image's digest it is what a record is kept under.
    """

    def __init__(self, scorer: Scorer, scorer_digest: str, ledger: Ledger, digests: Digests):
        self._scorer, self._digest = scorer, scorer_digest
        self._ledger, self._digests = ledger, digests
        self._queue: queue.SimpleQueue[Sample | None] = queue.SimpleQueue()
        self._images: dict[tuple[str, int], str] = {}
        self._pool = ThreadPoolExecutor(1)
        self._work: Future[None] | None = None

    def add(self, samples: Sequence[Sample]) -> None:
        """Queue samples whose files are whole; raises what the scorer raised, if it stopped."""
        if self._work is None:
            self._work = self._pool.submit(self._run)
        elif self._work.done():
            self._work.result()
        for sample in samples:
            self._queue.put(sample)

    def _samples(self) -> Iterator[Sample]:
        while (sample := self._queue.get()) is not None:
            self._images[sample.prompt.id, sample.index] = self._digests.of_file(sample.path)
            yield sample

    def _run(self) -> None:
        for record in self._scorer.score(self._samples()):
            self._ledger.add(Entry(self._images[record.prompt, record.index], self._digest, record))

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.put(None)
        try:
            # What was drawn before a failure is still scored: nothing made is lost.
            if self._work is not None and (kind is None or not self._work.done()):
                self._work.result()
        finally:
            self._pool.shutdown()


def record_key(sample: Sample, scorer_digest: str, digests: Digests) -> Key:
    """What a sample's record is kept under."""
    return (digests.of_file(sample.path), scorer_digest, sample.prompt.id, sample.index)
