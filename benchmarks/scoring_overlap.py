"""Scoring beside drawing against scoring after it: ``python benchmarks/scoring_overlap.py``.

The miniature's base draws GenEval images, its detector judges them, both for real: once as eval does it (`Task.run`,
images judged in a thread as they reach the disk), once in two passes. Medians of repeats in turn. ``waiting`` has a
drawer that waits as long as the real one took, as the processor does for a GPU: the most that overlap can give.

Two shared cores, 160 images: drawing 3.08 s against 3.01 s, 1.02 times (both sides want the processor); waiting 3.25 s
against 2.90 s, 1.12 times, where hiding all 0.49 s of judging would be 1.18.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from flux2pixel.evaluate.columns import candidate
from flux2pixel.evaluate.digests import Digests
from flux2pixel.evaluate.drawing import Drawer
from flux2pixel.evaluate.memo import Memo
from flux2pixel.evaluate.run_suite import Task
from flux2pixel.evaluate.suites import open_suites
from flux2pixel.evaluate.texts import Texts
from flux2pixel.models import base as bases
from flux2pixel.recipe import load
from flux2pixel.runtime import progress
from flux2pixel.runtime.processes import Team
from flux2pixel.weights.subspace import write_subspace

REPEATS = 5
BATCH = 16


class Waiting:
    """Draws nothing in ``seconds`` an image, without the processor."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def draw(self, prompts, keys, size):
        time.sleep(self._seconds * len(keys))
        return np.random.default_rng(0).integers(0, 256, (len(keys), size[1], size[0], 3), dtype=np.uint8)


def main() -> None:
    torch.set_num_threads(1)
    recipe = load(None, ["eval.prompts=40", "eval.samples=4", "sample.steps=4", f"eval.batch={BATCH}"])
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        base = bases.open_base("klein-tiny")
        basis = torch.eye(base.token_width)[:, : base.latent_width]
        write_subspace(run / "subspace.safetensors", basis, torch.tensor(1.0), {"method": "axes"})
        digests, texts = Digests(run / "digests.json"), Texts()
        (suite,) = open_suites(recipe, digests, Memo(run / "memo.json"), "cpu")
        one = candidate(str(base.folder), recipe, run, digests, texts)
        assert one.open is not None
        real = one.open()
        count = [0]

        def work(suite, home: Path, drawer: Drawer | None) -> float:
            task = Task(one, suite, recipe.seed, home, digests)
            plan = task.plan(Team(), BATCH)
            texts.expect(["", *(file.prompt.text for group in plan.draw for file in group)])
            began = time.perf_counter()
            task.run(plan, drawer, BATCH)
            return time.perf_counter() - began

        def compare(name: str, drawer: Drawer) -> float:
            rows = []
            for _ in range(REPEATS):
                count[0] += 2
                together = work(suite, run / f"{count[0]}", drawer)
                apart = run / f"{count[0] + 1}"
                rows.append((together, work(replace(suite, load=None), apart, drawer), work(suite, apart, None)))
            together, drawing, judging = (statistics.median(column) for column in zip(*rows, strict=True))
            apart_sum = drawing + judging
            print(
                f"{name:<8} one after the other {apart_sum:.2f} s (drawing {drawing:.2f}, judging {judging:.2f}) "
                f"against {together:.2f} s together: {apart_sum / together:.2f} times",
                flush=True,
            )
            return drawing

        work(suite, run / "warm", real)
        images = sum(min(recipe.eval.samples, prompt.samples) for prompt in suite.asked)
        compare("waiting", Waiting(compare("drawing", real) / images))


if __name__ == "__main__":
    progress.quiet_libraries()
    main()
