"""Before and after GenEval's detector: mmdet 2.27's own test pipeline and instance post-processing.

Not transformers' image processor: it resizes, pads and thresholds differently. Legend of shapes: B images, Q queries,
H x W the original image, h x w the resized one, Hp x Wp the padded one; masks come at a quarter of the latter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flux2pixel.evaluate.geneval.colors import ColorClassifier
from flux2pixel.evaluate.geneval.promptset import CLASSES
from flux2pixel.evaluate.geneval.verdict import Box
from flux2pixel.evaluate.precision import exact_float32
from flux2pixel.evaluate.suite import Rgb
from flux2pixel.runtime.errors import UsageError

LONG, SHORT, DIVISOR, PADDING = 1333, 800, 32, 128
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, 8-bit levels
TOP = 100


@dataclass(frozen=True)
class Prepared:
    """A network input ``pixels`` (3, Hp, Wp) float32 with the sizes (height, width) that lead back to the image."""

    pixels: Tensor
    resized: tuple[int, int]
    original: tuple[int, int]


def preprocess(image: Rgb) -> Prepared:
    """Resize to 800 on the short side (1333 at most on the long), pad with grey 128 and normalise."""
    try:
        import cv2
    except ImportError as error:  # no other library's bilinear gives the same pixels
        raise UsageError("GenEval's detector needs OpenCV's resize: pip install 'flux2pixel[eval]'") from error

    height, width = image.shape[:2]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = cv2.resize(np.ascontiguousarray(image), (w, h), interpolation=cv2.INTER_LINEAR)
    padded = np.full((-h % DIVISOR + h, -w % DIVISOR + w, 3), PADDING, dtype=np.uint8)
    padded[:h, :w] = resized
    pixels = (padded.astype(np.float32) - np.array(MEAN, np.float32)) * (1 / np.array(STD)).astype(np.float32)
    return Prepared(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), (h, w), (height, width))


@dataclass(frozen=True)
class Found:
    """Detections of one image, best first: class indices (N,), boxes (N, 4), scores (N,), masks (N, H, W) bool."""

    labels: Tensor
    boxes: Tensor
    scores: Tensor
    masks: Tensor


def postprocess(
    class_logits: Tensor, mask_logits: Tensor, prepared: Prepared, floor: float = 0.0, limit: int = TOP
) -> Found:
    """Turn one image's class logits (Q, 81) and mask logits (Q, Hp/4, Wp/4) into scored boxes with masks.

    The ``limit`` best pairs of query and class are taken, so that a query may appear under several classes; nothing is
    suppressed. A pair whose class probability is not above ``floor`` is left out before its mask is drawn: the score
    is that probability times the mask's mean certainty, so it could not pass a threshold of ``floor`` either.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]  # (Q, 80)
    best, index = probabilities.flatten().topk(min(limit, probabilities.numel()))
    best, index = best[best > floor], index[best > floor]
    queries, place = (index // probabilities.shape[1]).unique(return_inverse=True)
    drawn = mask_logits.float()[queries][None]  # (1, q, Hp/4, Wp/4)
    if len(queries):
        drawn = F.interpolate(drawn, prepared.pixels.shape[-2:], mode="bilinear", align_corners=False)
        drawn = drawn[..., : prepared.resized[0], : prepared.resized[1]]
        drawn = F.interpolate(drawn, prepared.original, mode="bilinear", align_corners=False)
    else:
        drawn = drawn.new_zeros(1, 0, *prepared.original)
    logits = drawn[0]  # (q, H, W)
    masks = logits > 0
    certainty = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    scores = best * certainty[place]
    order = scores.argsort(descending=True, stable=True)
    place = place[order]
    return Found((index % probabilities.shape[1])[order], _boxes(masks)[place], scores[order], masks[place])


def _boxes(masks: Tensor) -> Tensor:
    """Tight boxes (q, 4) of masks (q, H, W): min x, min y, max x + 1, max y + 1; zeros for an empty mask."""
    boxes = torch.zeros(len(masks), 4, dtype=torch.float32, device=masks.device)
    for start, axis in ((0, 1), (1, 2)):
        line = masks.any(axis).to(torch.uint8)  # (q, W) or (q, H)
        if len(masks):
            boxes[:, start] = line.argmax(1).float()
            boxes[:, start + 2] = line.shape[1] - line.flip(1).argmax(1).float()
    boxes[~masks.flatten(1).any(1)] = 0
    return boxes


class SeenByMask2Former:
    """One image with what was found in it; a `geneval.Seen`."""

    def __init__(self, image: Rgb, found: Found, colors: ColorClassifier):
        self._image, self._colors = image, colors
        self.detections: dict[str, list[tuple[float, ...]]] = {}
        self._masks: dict[tuple[str, tuple[float, ...]], np.ndarray] = {}
        boxes, scores, masks = found.boxes.tolist(), found.scores.tolist(), found.masks.cpu().numpy()
        for label, box, score, mask in zip(found.labels.tolist(), boxes, scores, masks, strict=True):
            self.detections.setdefault(CLASSES[label], []).append((*box, score))
            self._masks.setdefault((CLASSES[label], tuple(box)), mask)  # the best of those that share a box

    def colors(self, class_name: str, boxes: Sequence[Box]) -> list[str]:
        """Name the colours of some of the detections, in one batch."""
        return self._colors(self._image, class_name, [(box, self._masks[class_name, tuple(box)]) for box in boxes])


class Mask2Former:
    """GenEval's official detector and colours: a `geneval.Detector` over a `checkpoint.load` model.

    Float32; on CUDA, TF32 is switched off around the network because scores near a threshold would move.
    """

    name = "official"

    def __init__(self, model: Any, colors: ColorClassifier, source: Mapping[str, str], floor: float = 0.3):
        self._model, self._colors, self._source, self._floor = model, colors, dict(source), floor

    @torch.inference_mode()
    def look(self, images: Sequence[Rgb]) -> list[SeenByMask2Former]:
        """Detect in a batch; images that come to the same padded size go through the network together."""
        ready = [preprocess(image) for image in images]
        seen: dict[int, SeenByMask2Former] = {}
        by_shape: dict[torch.Size, list[int]] = {}
        for index, prepared in enumerate(ready):
            by_shape.setdefault(prepared.pixels.shape, []).append(index)
        for indices in by_shape.values():
            batch = torch.stack([ready[i].pixels for i in indices]).to(self._model.device)
            with exact_float32():
                output = self._model(pixel_values=batch)
            for row, i in enumerate(indices):
                queries = output.class_queries_logits[row], output.masks_queries_logits[row]
                seen[i] = SeenByMask2Former(images[i], postprocess(*queries, ready[i], self._floor), self._colors)
        return [seen[index] for index in range(len(images))]

    def provenance(self) -> dict[str, Any]:
        """Say which weights, libraries and device decide."""
        import cv2
        import transformers

        return {
            "name": self.name,
            "weights": self._source,
            "colors": self._colors.provenance(),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "opencv": cv2.__version__,
            "device": str(self._model.device),
        }
