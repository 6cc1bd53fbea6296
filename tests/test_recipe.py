"""The recipe: what it accepts, what it refuses, and in which words."""

import tomllib
from pathlib import Path

import pytest

from flux2pixel.families.known import base_names
from flux2pixel.recipe import Recipe, as_dict, dumps, load, setting
from flux2pixel.runtime.errors import UsageError

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


def test_defaults_round_trip(tmp_path: Path) -> None:
    for comments in (False, True):
        path = tmp_path / "recipe.toml"
        path.write_text(dumps(Recipe(), comments=comments))
        assert load(path) == Recipe() == load()
    assert tomllib.loads(dumps(Recipe())) == as_dict(Recipe())


def test_changed_recipe_round_trips(tmp_path: Path) -> None:
    odd = setting("base", 'a "b"\\ü\n\x7f')
    recipe = load(None, ["sample.orthogonal=false", "finetune.lr=1e-5", 'eval.suite=["geneval"]', "seed=7", odd])
    path = tmp_path / "recipe.toml"
    path.write_text(dumps(recipe), encoding="utf-8")
    assert load(path) == recipe != Recipe()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert load(path).base in base_names()


def test_klein_tiny_states_every_default() -> None:
    path = next(path for path in RECIPES if path.stem == "klein-tiny")
    assert tomllib.loads(path.read_text()) == as_dict(Recipe())
    assert path.read_text().endswith(dumps(Recipe(), comments=True))


def test_overrides_are_toml_or_bare_words() -> None:
    recipe = load(None, ["sample.solver=heun", "finetune.clip = 2", "base=2024", 'fit_subspace.source="a=b"'])
    assert recipe.sample.solver == "heun"
    assert isinstance(recipe.finetune.clip, float) and recipe.finetune.clip == 2.0
    assert recipe.base == "2024"
    assert recipe.fit_subspace.source == "a=b"


def test_later_overrides_win_over_earlier_and_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 1\n[sample]\nsteps = 4\n")
    assert load(path).sample.steps == 4
    assert load(path, ["sample.steps=5", "sample.steps=6"]).sample.steps == 6
    assert load(path, ["sample.steps=5"]).seed == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("finetune.stesp=3", ["finetune.stesp", "did you mean finetune.steps?"]),
        ("finetun.steps=3", ["finetun", "did you mean finetune?"]),
        ("solver=heun", ["solver", "did you mean sample.solver?"]),
        ("zzz=1", ["zzz", "known here", "fit_subspace"]),
        ("finetune.steps.x=1", ["finetune.steps", "whole number"]),
        ("finetune=3", ["finetune is a section"]),
        ("finetune.steps=1.5", ["finetune.steps", "whole number"]),
        ("finetune.steps=true", ["finetune.steps", "whole number"]),
        ("finetune.steps=0", ["finetune.steps", "at least 1"]),
        ("finetune.lr=0", ["finetune.lr", "above 0"]),
        ("finetune.lr=nan", ["finetune.lr", "finite"]),
        ("finetune.lr=fast", ["finetune.lr", "a number"]),
        ("finetune.lr=", ["finetune.lr", "a number"]),
        ("finetune.caption_dropout=1.1", ["finetune.caption_dropout", "at most 1"]),
        ("sample.solver=eulr", ["sample.solver", "did you mean euler?"]),
        ("sample.orthogonal=1", ["sample.orthogonal", "true or false"]),
        ("eval.suite=[]", ["eval.suite", "list of strings"]),
        ('eval.suite=["genevla"]', ["eval.suite", "did you mean geneval?"]),
        ('base=""', ["base", "empty"]),
        ("finetune.solver=heun", ["finetune.solver", "did you mean sample.solver?"]),
        ("sample.steps", ["--set sample.steps", "section.key=value"]),
        ("=3", ["--set", "section.key=value"]),
        ("seed=1\nthreads=9", ["seed", "whole number"]),
    ],
)
def test_wrong_overrides_name_the_key(override: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        load(None, [override])
    for word in words:
        assert word in str(error.value)
    assert str(error.value).startswith(("command line: ", "--set "))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[sample]\nguidence = 3.0\n", ["sample.guidence", "did you mean sample.guidance?"]),
        ("[smaple]\nsteps = 3\n", ["smaple", "did you mean sample?"]),
        ("sample = 3\n", ["sample is a section"]),
        ("[sample\n", ["not valid TOML"]),
        ("seed = 1\nseed = 2\n", ["not valid TOML"]),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_missing_and_binary_files_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        load(tmp_path / "absent.toml")
    with pytest.raises(UsageError, match="no such recipe"):
        load(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid TOML"):
        load(binary)
