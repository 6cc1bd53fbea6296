"""GenEval: does the image show the objects, counts, colours and places that its prompt names?

Protocol: djghosh13/geneval at af4902f. `judge` is the pure logic; `GenEval` scores images with a detector.
"""

from flux2pixel.evaluate.geneval.promptset import CLASSES, TAGS, metadata, prompts
from flux2pixel.evaluate.geneval.scorer import Detector, GenEval, Seen, summarise
from flux2pixel.evaluate.geneval.verdict import COLORS, Verdict, iou, judge, keep, relations

__all__ = [
    "CLASSES",
    "COLORS",
    "TAGS",
    "Detector",
    "GenEval",
    "Seen",
    "Verdict",
    "iou",
    "judge",
    "keep",
    "metadata",
    "prompts",
    "relations",
    "summarise",
]
