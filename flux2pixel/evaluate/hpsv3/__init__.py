"""HPSv3: a learned human preference, raw mu of its reward model.

Protocol: the ``hpsv3`` 1.0.0 package and HPDv3's benchmark. It sees 448-pixel images and mostly quality: read it
beside GenEval and DPG-Bench, never in their place.
"""

from flux2pixel.evaluate.hpsv3.benchmark import CATEGORIES, aggregate, read, unchanged
from flux2pixel.evaluate.hpsv3.scorer import Hpsv3, summarise

__all__ = ["CATEGORIES", "Hpsv3", "aggregate", "read", "summarise", "unchanged"]
