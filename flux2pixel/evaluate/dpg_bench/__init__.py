"""DPG-Bench: does the image show everything that its dense prompt says, question by question?

Protocol: TencentQQGYLab/ELLA at 3c228f1. `score` is the pure logic; `DpgBench` scores images with a judge.
"""

from flux2pixel.evaluate.dpg_bench.questions import prompts, read, read_texts
from flux2pixel.evaluate.dpg_bench.scorer import DpgBench, summarise
from flux2pixel.evaluate.dpg_bench.scoring import ItemScore, Score, score

__all__ = ["DpgBench", "ItemScore", "Score", "prompts", "read", "read_texts", "score", "summarise"]
