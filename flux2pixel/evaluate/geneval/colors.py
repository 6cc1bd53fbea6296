"""GenEval's colours: a masked crop against thirty texts, by CLIP.

Protocol: the official scorer's crops and clip_benchmark's zero-shot classifier with OpenAI's ViT-L/14 (QuickGELU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux2pixel.evaluate.geneval.verdict import COLORS, Box
from flux2pixel.evaluate.precision import exact_float32
from flux2pixel.evaluate.suite import Rgb

MODEL = "ViT-L-14-quickgelu"  # plain ViT-L-14 with these weights builds the wrong activation and only warns
BACKGROUND = (153, 153, 153)
TEMPLATES = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")


def texts(class_name: str) -> list[str]:
    """The thirty texts of a class, colour by colour, three templates each; the article is never changed."""
    return [template.format(c=color, name=class_name) for color in COLORS for template in TEMPLATES]


def classifier_weights(text_features: Tensor) -> Tensor:
    """Features of `texts` (30, d) -> classifier (d, 10): normalised, averaged over templates, normalised again."""
    normed = text_features.float() / text_features.float().norm(dim=-1, keepdim=True)
    mean = normed.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)  # (10, d)
    return (mean / mean.norm(dim=-1, keepdim=True)).T


def color_logits(image_features: Tensor, weights: Tensor) -> Tensor:
    """Features (n, d) and classifier (d, 10) -> 100 x cosine (n, 10)."""
    return 100.0 * (image_features.float() / image_features.float().norm(dim=-1, keepdim=True)) @ weights


def crop(
    image: Image.Image,
    box: Sequence[float],
    mask: np.ndarray | None,
    background: str | tuple[int, int, int] = BACKGROUND,
    to_box: bool = True,
) -> Image.Image:
    """Show one object alone: ``image`` where ``mask`` (H, W) bool holds, ``background`` elsewhere, cut to its box.

    ``background`` "original" leaves the image as it is. A fractional box is rounded as Pillow's crop does.
    """
    shown = image.convert("RGB")
    if mask is not None:
        if mask.shape != shown.size[::-1]:
            raise ValueError(f"mask: {mask.shape} for an image of {shown.size[::-1]}")
        blank = shown.copy() if background == "original" else Image.new("RGB", shown.size, background)
        shown = Image.composite(shown, blank, Image.fromarray(mask.astype(bool)))
    left, top, right, bottom = (float(v) for v in box[:4])
    return shown.crop((left, top, right, bottom)) if to_box else shown


def clip_transform(size: int = 224) -> Callable[[Image.Image], Tensor]:
    """open_clip's evaluation transform with OpenAI's mean and deviation: shorter side to ``size``, centre crop."""
    from open_clip.transform import image_transform

    transform: Callable[[Image.Image], Tensor] = image_transform(size, is_train=False)
    return transform


class ColorClassifier:
    """Names the colour of objects by CLIP; the classifier of each class is made once."""

    def __init__(self, model: Any, tokenize: Callable[[list[str]], Tensor], source: dict[str, Any]):
        self._model, self._tokenize, self._source = model, tokenize, source
        self._transform = clip_transform(model.visual.image_size[0])
        self._weights: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Rgb, class_name: str, found: Sequence[tuple[Box, np.ndarray | None]]) -> list[str]:
        """Name the colour of each ``(box, mask)`` of one image."""
        device = next(self._model.parameters()).device
        if class_name not in self._weights:
            tokens = self._tokenize(texts(class_name)).to(device)
            with exact_float32():
                self._weights[class_name] = classifier_weights(self._model.encode_text(tokens))
        picture = Image.fromarray(image)
        batch = torch.stack([self._transform(crop(picture, box, mask)) for box, mask in found]).to(device)
        with exact_float32():
            logits = color_logits(self._model.encode_image(batch), self._weights[class_name])
        return [COLORS[index] for index in logits.argmax(-1).tolist()]

    def provenance(self) -> dict[str, Any]:
        """Say which weights and library decide."""
        import open_clip

        return {"model": MODEL, "open_clip": open_clip.__version__, **self._source}
