"""GenEval's logic on cached detections: verdicts, kept boxes and the summary with intervals, against a 2-second limit.

2212 images (553 prompts x 4), each with 100 synthetic detections, as many as the detector gives; colours are looked
up, not classified. No network, no images.

    python benchmarks/geneval_logic.py
"""

import statistics
import time

import numpy as np

from flux2pixel.evaluate.geneval import CLASSES, COLORS, prompts, summarise
from flux2pixel.evaluate.geneval.promptset import metadata
from flux2pixel.evaluate.geneval.scorer import judged

LIMIT = 2.0  # seconds
REPEATS = 5


class Cached:
    """What a detector saw, from memory."""

    def __init__(self, rng, wanted):
        corners = rng.uniform(0, 700, (100, 2)).astype(np.float32)
        boxes = np.concatenate([corners, corners + rng.uniform(20, 300, (100, 2)).astype(np.float32)], 1)
        scores = rng.beta(0.4, 0.6, 100).astype(np.float32)
        names = [*wanted, *wanted, *(CLASSES[i] for i in rng.integers(0, 80, 100 - 2 * len(wanted)))]
        self.detections = {}
        for name, box, score in zip(names, boxes.tolist(), scores.tolist(), strict=True):
            self.detections.setdefault(name, []).append((*box, score))
        self.named = {tuple(box): COLORS[i] for box, i in zip(boxes.tolist(), rng.integers(0, 10, 100), strict=True)}

    def colors(self, class_name, boxes):
        return [self.named[tuple(box)] for box in boxes]


def main():
    asked = prompts(metadata())
    rng = np.random.default_rng(0)
    images = [
        (prompt, index, Cached(rng, [clause["class"] for clause in prompt.data["include"]]))
        for prompt in asked
        for index in range(prompt.samples)
    ]
    taken = []
    for _ in range(REPEATS):
        begun, begun_cpu = time.perf_counter(), time.process_time()
        records = [judged(prompt, index, seen) for prompt, index, seen in images]
        judging = time.process_time() - begun_cpu
        summary = summarise(asked, records)
        taken.append((time.perf_counter() - begun, time.process_time() - begun_cpu, judging))
    wall, total, judging = (statistics.median(column) for column in zip(*taken, strict=True))
    print(f"{len(records)} images, 100 detections each, overall {summary['overall']['score']:.3f} (synthetic)")
    print(f"processor time, median of {REPEATS}: {total:.2f} s ({judging:.2f} s judging, the rest the summary)")
    print(f"ratio to the limit of {LIMIT:.0f} s: {total / LIMIT:.2f}; wall time, which others share: {wall:.2f} s")


if __name__ == "__main__":
    main()
