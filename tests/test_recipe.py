"""The recipe: what it accepts, what it refuses, and in which words."""

import os
import tomllib
from pathlib import Path

import pytest

from flux2pixel.families import registry
from flux2pixel.families.known import KNOWN
from flux2pixel.recipe import (
    FORMAT,
    Finetune,
    Recipe,
    as_dict,
    base_defaults,
    dumps,
    dumps_written,
    load,
    setting,
    template,
)
from flux2pixel.runtime.errors import UsageError

OLD_SAMPLE = {
    "steps": 16, "guidance": 3.0, "shift": 1.0, "solver": "euler", "orthogonal": False, "gamut_clamp": True,
}  # fmt: skip
RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


def test_defaults_round_trip(tmp_path: Path) -> None:
    for comments in (False, True):
        path = tmp_path / "recipe.toml"
        path.write_text(dumps(load(), comments=comments))
        assert load(path) == load()
    assert tomllib.loads(dumps(load())) == {"format": FORMAT} | as_dict(load())


def test_changed_recipe_round_trips(tmp_path: Path) -> None:
    odd = setting("base", 'a "b"\\ü\n\x7f')
    recipe = load(None, ["sample.orthogonal=false", "finetune.lr=1e-5", 'eval.suite=["geneval"]', "seed=7", odd])
    path = tmp_path / "recipe.toml"
    path.write_text(dumps(recipe), encoding="utf-8")
    assert load(path) == recipe != Recipe()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert load(path).base in (*registry.names(), *KNOWN)


def test_klein_tiny_states_every_key_and_its_default(tmp_path: Path) -> None:
    text = next(path for path in RECIPES if path.stem == "klein-tiny").read_text()
    body = text.split("\n\n", 1)[1]
    path = tmp_path / "recipe.toml"
    lines = [line.removeprefix("# ") for line in body.splitlines()]
    path.write_text("\n".join(line for line in lines if not line.split("  #")[0].endswith("= the model's own")))
    assert load(path) == load(None, ["base=klein-tiny"])
    given = {key for table in load(path).written.values() if isinstance(table, dict) for key in table}
    known = {key for table in as_dict(load()).values() if isinstance(table, dict) for key in table}
    assert given == known
    assert text.endswith(f"\n\n{template('klein-tiny')}")


def test_a_real_base_gets_no_default_of_the_miniature() -> None:
    for base in KNOWN:
        recipe = load(None, [f"base={base}"])
        assert recipe.data.source == recipe.fit_subspace.source == "" and recipe.data.resolution == 1024
        assert recipe.finetune == Finetune() and recipe.finetune.trainable == "lora"
        assert recipe.eval.suite == ("geneval", "dpg-bench", "hpsv3")


def test_a_base_folder_carries_its_defaults_and_what_is_written_wins(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "mine.toml"
    base.mkdir()
    (base / "flux2pixel.toml").write_text("[finetune]\nsteps = 7\nbatch = 5\n[sample]\nsteps = 3\n")
    path.write_text(f'base = "{base}"\n[finetune]\nbatch = 6\n')
    recipe = load(path, ["finetune.warmup=2"], sample={"guidance": 2.0})
    assert (recipe.finetune.steps, recipe.finetune.batch, recipe.finetune.warmup) == (7, 6, 2)
    assert recipe.written == {
        "base": str(base),
        "finetune": {"batch": 6, "warmup": 2},
        "sample": {"guidance": 2.0},
    }
    # How a model draws is the model's to say: the base's own word of it is there, but is not the user's.
    assert recipe.sample.steps is None and recipe.sample.guidance == 2.0
    assert base_defaults(str(base))["sample"] == {"steps": 3}
    (base / "flux2pixel.toml").write_text("[finetune]\nstesp = 7\n")
    with pytest.raises(UsageError, match=r"flux2pixel\.toml: unknown key 'finetune\.stesp'; did you mean"):
        load(path)


def test_what_was_written_reads_back(tmp_path: Path) -> None:
    recipe = load(None, ["seed=3", "sample.solver=heun", 'finetune.prompts=["a", "b"]'])
    path = tmp_path / "recipe.toml"
    path.write_text(dumps_written(recipe.written))
    assert load(path) == recipe and load(path).written == recipe.written and len(path.read_text().splitlines()) == 7


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('base = "flux2-klein-4b"\n[finetune]\nsteps = 3\nbatch = 8\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n[finetune]\nsteps = 4\n')
    recipe = load(tmp_path / "b.toml")
    assert recipe.written == {"base": "flux2-klein-4b", "finetune": {"steps": 4, "batch": 8}}
    (tmp_path / "c.toml").write_text('extends = "b.toml"\n')
    with pytest.raises(UsageError, match=r"c\.toml: extends 'b\.toml', but .*b\.toml extends another"):
        load(tmp_path / "c.toml")
    (tmp_path / "d.toml").write_text('extends = "d.toml"\n')
    with pytest.raises(UsageError, match="it extends itself"):
        load(tmp_path / "d.toml")
    (tmp_path / "e.toml").write_text('extends = "absent.toml"\n')
    with pytest.raises(UsageError, match=r"absent\.toml: no such recipe file"):
        load(tmp_path / "e.toml")


def test_a_whole_recipe_of_the_first_format_is_read(tmp_path: Path) -> None:
    table = as_dict(load())
    table["finetune"]["shift"], table["sample"] = 1.0, dict(OLD_SAMPLE)
    path = tmp_path / "recipe.toml"
    path.write_text(dumps_written(table))
    assert load(path).finetune.shift == 32.0, "1 at 32 x 32 pixels is 32 at 1024 x 1024"
    assert load(path).sample.shift is None and load(path).sample.steps == 16
    path.write_text(dumps_written(table | {"sample": OLD_SAMPLE | {"shift": 17.0}}))
    with pytest.raises(UsageError, match=r"recipe\.toml: of an older release, whose sample\.shift"):
        load(path)
    path.write_text("format = 3\n")
    with pytest.raises(UsageError, match="format = 3; this release reads 1 and 2"):
        load(path)


def test_threads_are_all_of_the_machine_unless_told() -> None:
    assert 1 <= load().threads <= (os.cpu_count() or 1)
    assert load(None, ["threads=3"]).threads == 3


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
