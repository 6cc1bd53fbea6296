"""flux2pixel: turn a pretrained latent flow model into a pixel-space one, finetune it, and prove the result.

Everything the command line does is a function here, so a notebook needs no shell::

    from pathlib import Path

    import flux2pixel

    run = Path("runs/first")
    recipe = flux2pixel.load_recipe(base="klein-tiny", finetune={"steps": 240}, eval={"prompts": 24})
    flux2pixel.fit_subspace(recipe, run)
    converted = flux2pixel.convert(recipe, run)
    finetuned = flux2pixel.finetune(recipe, run)
    flux2pixel.evaluate(recipe, run)
    images = flux2pixel.open_model(finetuned).generate("a photo of a red circle", seed=0)

``load_recipe`` gives the base's own defaults where nothing is said, and reads a recipe file as the command line does;
a ``Recipe`` made by hand, ``Recipe(base=..., finetune=Finetune(...))``, has the generic ones. torch and the rest are
imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flux2pixel.runtime.version import __version__

if TYPE_CHECKING:
    from flux2pixel.asymflow.method import AsymFlow as AsymFlow
    from flux2pixel.models.model import open_model as open_model
    from flux2pixel.pipelines.flux2_klein import AsymFlowPipeline as AsymFlowPipeline
    from flux2pixel.readout.run import fit_readout as fit_readout
    from flux2pixel.recipe import Convert as Convert
    from flux2pixel.recipe import Data as Data
    from flux2pixel.recipe import Eval as Eval
    from flux2pixel.recipe import Finetune as Finetune
    from flux2pixel.recipe import FitSubspace as FitSubspace
    from flux2pixel.recipe import Recipe as Recipe
    from flux2pixel.recipe import Sample as Sample
    from flux2pixel.recipe import load
    from flux2pixel.subspace.run import fit_subspace as fit_subspace

    load_recipe = load


_PUBLIC = {
    "AsymFlow": "asymflow.method:AsymFlow",
    "AsymFlowPipeline": "pipelines.flux2_klein:AsymFlowPipeline",
    "Recipe": "recipe:Recipe",
    "FitSubspace": "recipe:FitSubspace",
    "Convert": "recipe:Convert",
    "Data": "recipe:Data",
    "Finetune": "recipe:Finetune",
    "Sample": "recipe:Sample",
    "Eval": "recipe:Eval",
    "load_recipe": "recipe:load",
    "fit_subspace": "subspace.run:fit_subspace",
    "fit_readout": "readout.run:fit_readout",
    "open_model": "models.model:open_model",
}
_VERBS = ("convert", "finetune", "evaluate")
"""Functions that share their name with their package, which can therefore be called (runtime/verb.py)."""

__all__ = ["__version__", *_PUBLIC, *_VERBS]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `flux2pixel --help` must not pay for it.
    if name in _VERBS:
        return import_module(f"flux2pixel.{name}")
    if name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(import_module(f"flux2pixel.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
