"""Everything that differs between base models, one module per family. Importing this package loads nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux2pixel.families.base import Family


def family_of(class_name: str | None) -> type[Family] | None:
    """The family of a stock transformer class."""
    match class_name:
        case "Flux2Transformer2DModel":
            from flux2pixel.families.flux2 import Flux2

            return Flux2
        case "FluxTransformer2DModel":
            from flux2pixel.families.flux1 import Flux1

            return Flux1
        case "SD3Transformer2DModel":
            from flux2pixel.families.sd3 import SD3

            return SD3
        case "QwenImageTransformer2DModel":
            from flux2pixel.families.qwen_image import QwenImage

            return QwenImage
        case "ZImageTransformer2DModel":
            from flux2pixel.families.z_image import ZImage

            return ZImage
        case "Flux3Transformer2DModel":
            from flux2pixel.families.flux3 import Flux3

            return Flux3
    return None
