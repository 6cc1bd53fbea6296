"""The command line: quick to start, and one line for every mistake."""

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.convert.prepare import Extras
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import Flux2PixelError

COMMANDS = ["run", "fit-subspace", "convert", "finetune", "eval", "generate", "export", "inspect", "doctor", "bases"]
COMMANDS += ["compare", "export-subspace", "cache", "verify"]


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def assert_one_line(result: Any, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """Stand-ins for the stages, which note how they are called."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for module, name in [
        ("subspace.run", "fit_subspace"),
        ("subspace.without_images", "fit_without_images"),
        ("convert.run", "convert"),
        ("finetune.run", "finetune"),
        ("evaluate.run", "evaluate"),
        ("models.model", "generate"),
    ]:
        fake = types.ModuleType(f"flux2pixel.{module}")
        setattr(fake, name, lambda *given, name=name, **named: calls.append((name, given)))
        monkeypatch.setitem(sys.modules, f"flux2pixel.{module}", fake)
    return calls


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, flux2pixel.cli.app as cli; sys.argv = ['flux2pixel', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0 and "--debug" in result.output


def test_module_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "flux2pixel", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("flux2pixel ")


def test_run_calls_the_stages_in_order(tmp_path: Path, stages: list[Any]) -> None:
    run = tmp_path / "a" / "run"
    result = invoke("run", "--run", run, "--seed", "5", "--steps", "9", "--suite", "geneval")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in stages] == ["fit_subspace", "convert", "finetune", "evaluate"]
    recipe = load(run / "recipe.toml")
    assert all(given[:2] == (recipe, run) for _, given in stages)
    assert (recipe.seed, recipe.finetune.steps, recipe.eval.suite) == (5, 9, ("geneval",))
    seconds = json.loads((run / "seconds.json").read_text())
    assert list(seconds) == ["fit_subspace", "convert", "finetune"]
    assert sorted(path.name for path in run.iterdir()) == ["recipe.toml", "seconds.json"]


def test_a_stage_alone_goes_on_with_the_recipe_of_its_run(tmp_path: Path, stages: list[Any]) -> None:
    run = tmp_path / "run"
    assert invoke("run", "--run", run, "--seed", "5").exit_code == 0
    result = invoke("eval", "--run", run, "--steps", "3")
    assert "recipe.toml of the run" in result.output
    recipe = stages[-1][1][0]
    assert (recipe.seed, recipe.sample.steps) == (5, 3)
    assert invoke("run", "--run", run).exit_code == 0
    assert stages[-1][1][0].seed == 0, "run itself starts afresh"


def test_stages_get_their_paths(tmp_path: Path, stages: list[Any]) -> None:
    subspace = tmp_path / "s.safetensors"
    subspace.touch()
    (tmp_path / "a.png").touch()
    out = tmp_path / "out"
    common = ["--run", tmp_path / "run"]
    for words in [
        ["fit-subspace", "--images", tmp_path, "--method", "pca", "--rank", "3", "--out", out],
        ["convert", "--subspace", subspace, "--out", out, "--link"],
        ["finetune", "--model", tmp_path, "--steps", "4"],
        ["eval", "--model", tmp_path, "--model", f"b={tmp_path}", "--steps", "4"],
        ["generate", "a photo of a red circle", "--model", tmp_path, "--steps", "4", "--height", "64"],
    ]:
        result = invoke(*words, *common)
        assert result.exit_code == 0, result.output
    assert [given[2:] for _, given in stages] == [
        (out, ()),
        (subspace, out, Extras(link=True)),
        (tmp_path, None),
        ([str(tmp_path), f"b={tmp_path}"], None, ()),
        ("a photo of a red circle", tmp_path, None, (64, None)),
    ]
    recipes = [given[0] for _, given in stages]
    assert (recipes[0].fit_subspace.source, recipes[0].fit_subspace.rank) == (str(tmp_path), 3)
    assert recipes[2].finetune.steps == recipes[3].sample.steps == recipes[4].sample.steps == 4


def test_default_run_directory_is_named_after_the_base(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    invoke("convert")
    invoke("convert", "--base", tmp_path / "my base")
    runs = [given[1] for name, given in stages if name == "convert"]
    assert runs == [Path("runs/klein-tiny"), Path("runs/my base")]


def test_dry_run_prints_and_writes_nothing(tmp_path: Path, stages: list[Any]) -> None:
    run = tmp_path / "run"
    for words in [["run"], ["fit-subspace"], ["convert"], ["finetune"], ["eval"], ["generate", "a cat"]]:
        result = invoke(*words, "--run", run, "--dry-run", "--set", "seed=11")
        assert result.exit_code == 0, result.output
        assert "seed = 11" in result.output and "takes " in result.output and "writes " in result.output
    assert not stages and not run.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--set", "finetune.stesp=3"], "did you mean finetune.steps?"),
        (["run", "--set", "finetune.steps"], "section.key=value"),
        (["run", "absent.toml"], "absent.toml: no such recipe file"),
        (["run", "a.toml", "--recipe", "b.toml"], "two recipes"),
        (["run", "--gpus", "2"], "--gpus 2: only 1"),
        (["run", "--images", "absent"], "--images absent: no such image source"),
        (["fit-subspace", "--images", "absent"], "--images absent: no such image source"),
        (["fit-subspace", "--method", "pac"], "did you mean pca?"),
        (["convert", "--subspace", "absent"], "--subspace absent: no such file"),
        (["finetune", "--model", "absent"], "--model absent: no such folder"),
        (["eval", "--model", "absent"], "--model absent: no such folder"),
        (["eval", "--images", "a=absent"], "--images a=absent: no such folder"),
        (["eval", "--gpus", "0"], "--gpus 0: must be at least 1"),
        (["eval", "--suite", "genevl"], "did you mean geneval?"),
        (["generate", "a cat", "--steps", "0"], "sample.steps"),
        (["inspect", "absent"], "absent: no such file"),
    ],
)
def test_usage_errors(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line(invoke(*words), 2, said)
    assert not stages and not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_unwritable_run_directory(tmp_path: Path, stages: list[Any], below: str) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    assert_one_line(invoke("run", "--run", blocked / below), 1, str(blocked / below), "cannot write here")
    assert not stages


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (Flux2PixelError("a.safetensors: bad\nlines"), "a.safetensors: bad lines"),
        (OSError(28, "No space left on device", "x.bin"), "x.bin: No space left on device"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero (--debug"),
    ],
)
def test_failures_are_one_line_unless_debug(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise raised

    monkeypatch.setattr(sys.modules["flux2pixel.convert.run"], "convert", fail)
    assert_one_line(invoke("convert", "--run", tmp_path), 1, said)
    result = invoke("convert", "--run", tmp_path, "--debug")
    assert result.exit_code == 1 and "Traceback" in result.stderr


def test_inspect_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((500).to_bytes(8, "little") + b'{"basis":')
    assert_one_line(invoke("inspect", path), 1, str(path), "truncated")
