"""flux2pixel: turn a pretrained latent flow model into a pixel-space one, finetune it, and prove the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux2pixel.asymflow.method import AsymFlow as AsymFlow
    from flux2pixel.pipelines.flux2_klein import AsymFlowPipeline as AsymFlowPipeline

__version__ = "0.2.0"
__all__ = ["AsymFlow", "AsymFlowPipeline", "__version__"]


def __getattr__(name: str):
    # torch takes seconds to import; `flux2pixel --help` must not pay for it.
    if name == "AsymFlow":
        from flux2pixel.asymflow.method import AsymFlow

        return AsymFlow
    if name == "AsymFlowPipeline":
        from flux2pixel.pipelines.flux2_klein import AsymFlowPipeline

        return AsymFlowPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
