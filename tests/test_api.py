"""The package as a notebook uses it: the names, and the flow of its docstring on the miniature."""

import subprocess
import sys
from pathlib import Path

import pytest

import flux2pixel
from flux2pixel.runtime.errors import UsageError

TINY = {
    "fit_subspace": {"images": 300},
    "convert": {"verify_steps": 2},
    "finetune": {"steps": 2, "images": 48, "batch": 8, "validation_images": 4, "save_every": 2, "warmup": 1},
    "sample": {"steps": 2},
    "eval": {"prompts": 6, "samples": 1, "fidelity_images": 12},
}


def test_every_public_name_is_listed_and_there() -> None:
    names = {"AsymFlow", "AsymFlowPipeline", "Recipe", "Finetune", "load_recipe", "open_model"}
    assert names | {"fit_subspace", "convert", "finetune", "evaluate"} <= set(dir(flux2pixel))
    for name in dir(flux2pixel):
        assert callable(getattr(flux2pixel, name)) or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flux2pixel.nothing  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    script = "import sys, flux2pixel as f; dir(f); f.load_recipe(base='flux2-dev'); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_verb_is_a_function_and_a_package() -> None:
    import flux2pixel.convert.plan
    import flux2pixel.finetune.loss

    assert flux2pixel.finetune.loss.variance_reduction and flux2pixel.convert.plan
    with pytest.raises(UsageError, match="convert"):
        flux2pixel.finetune(flux2pixel.load_recipe(data={"source": "absent"}), Path("nowhere"))


def test_the_flow_of_the_docstring(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = flux2pixel.load_recipe(base="klein-tiny", threads=1, **TINY)
    assert isinstance(recipe, flux2pixel.Recipe) and recipe.finetune.trainable == "full"
    flux2pixel.fit_subspace(recipe, run)
    converted = flux2pixel.convert(recipe, run)
    finetuned = flux2pixel.finetune(recipe, run)
    assert flux2pixel.evaluate(recipe, run).is_file()
    for folder in (converted, finetuned):
        images = flux2pixel.open_model(folder, flux2pixel.Sample(steps=2)).generate("a photo of a red circle", seed=0)
        assert [image.size for image in images] == [(32, 32)]
    assert not (run / "recipe.toml").exists(), "a run's recipe is a file of the user's"
