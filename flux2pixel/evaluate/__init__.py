"""``eval``: models and folders of images side by side, scored by suites and compared with true images.

The way of an image, file by file:

    run.py                  prompts are encoded, models draw, judges score; each is let go before the next is loaded
    suites.py               a suite: its prompts, at what size they are drawn, who judges, how records are summed up
    columns.py              a column: a model that draws, or images made elsewhere (latent, pixel, stock; LoRA on top)
    drawing.py              one order of images -> batches -> png files; the seed is that of (prompt's number, sample)
    layout.py               where the file lies: each suite's official folders, written and read back
    <suite>/scorer.py       a judge's record of each image: geneval, dpg_bench, hpsv3
    store.py                conditionings, digests and records on disk: what is there is never made again
    results.py, report/     records -> figures with intervals (statistics.py) -> report.json and report.html

``fidelity/`` compares sets of images with true ones; ``assets/`` gets and converts the judges' weights.
"""

import sys

from flux2pixel.runtime.verb import Verb

sys.modules[__name__].__class__ = Verb
