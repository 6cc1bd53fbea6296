"""flux2pixel: turn a pretrained latent flow model into a pixel-space one, finetune it, and prove the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux2pixel.asymflow.method import AsymFlow as AsymFlow

__version__ = "0.1.0"
__all__ = ["AsymFlow", "__version__"]


def __getattr__(name: str):
    # torch takes seconds to import; `flux2pixel --help` must not pay for it.
    if name == "AsymFlow":
        from flux2pixel.asymflow.method import AsymFlow

        return AsymFlow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
