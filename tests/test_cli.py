"""The command line: quick to start, and one line for every mistake."""

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.convert.prepare import Extras
from flux2pixel.recipe import Sample, load
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
        ("convert.run", "convert"),
        ("readout.run", "fit_readout"),
        ("finetune.run", "finetune"),
        ("evaluate.run", "evaluate"),
    ]:
        fake = types.ModuleType(f"flux2pixel.{module}")
        setattr(fake, name, lambda *given, name=name, **named: calls.append((name, given)))
        fake.check = lambda *given: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"flux2pixel.{module}", fake)
    # The stand-in of a fit writes no subspace, so convert would have one made without images.
    fake = types.ModuleType("flux2pixel.subspace.without_images")
    fake.fit_without_images = lambda *given: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flux2pixel.subspace.without_images", fake)

    class Pencil:
        def generate(self, texts: list[str], *, count: int, **settings: Any) -> list[Image.Image]:
            calls.append(("generate", (texts, count, settings)))
            return [Image.new("RGB", (8, 8), (40 * index, 0, 0)) for index in range(len(texts) * count)]

    def open_model(model: str | Path, sample: Sample, **how: Any) -> Pencil:
        calls.append(("open_model", (model, sample, how)))
        return Pencil()

    fake = types.ModuleType("flux2pixel.models.model")
    fake.open_model = open_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flux2pixel.models.model", fake)
    return calls


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, flux2pixel.cli as cli; sys.argv = ['flux2pixel', *sys.argv[1:]]\n"
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
    assert result.output == invoke(command, "-h").output
    assert f"Example: flux2pixel {command}" in result.output


def test_module_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "flux2pixel", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("flux2pixel ")


def test_run_calls_the_stages_in_order(tmp_path: Path, stages: list[Any]) -> None:
    run = tmp_path / "a" / "run"
    result = invoke("run", "--run", run, "--seed", "5", "--steps", "9", "--suite", "geneval")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in stages] == ["fit_subspace", "convert", "fit_readout", "finetune", "evaluate"]
    recipe = load(None, ["seed=5", "finetune.steps=9", 'eval.suite=["geneval"]'])
    assert all(given[:2] == (recipe, run) for _, given in stages)
    seconds = json.loads((run / "seconds.json").read_text())
    assert list(seconds) == ["fit_subspace", "convert", "fit_readout", "finetune"]
    assert sorted(path.name for path in run.iterdir()) == ["seconds.json"]
    nexts = [line for line in result.stderr.splitlines() if line.startswith("next: ")]
    assert nexts == [
        f"next: flux2pixel convert --run {run}",
        f"next: flux2pixel fit-readout --run {run}",
        f"next: flux2pixel finetune --run {run}",
        f"next: flux2pixel eval --run {run}",
        f"next: open {run / 'report.html'} in a browser",
    ]


def test_a_stage_alone_goes_on_with_the_recipe_of_its_run(tmp_path: Path, stages: list[Any]) -> None:
    run, file = tmp_path / "run", tmp_path / "mine.toml"
    file.write_text("seed = 5\n")
    assert invoke("run", file, "--run", run, "--set", "threads=1").exit_code == 0
    assert load(run / "recipe.toml").written == {"seed": 5}
    result = invoke("eval", "--run", run, "--steps", "3")
    assert "recipe.toml of the run" in result.output
    recipe = stages[-1][1][0]
    assert (recipe.seed, recipe.sample.steps) == (5, 3)
    assert invoke("run", "--run", run).exit_code == 0
    assert stages[-1][1][0].seed == 0, "run itself starts afresh"
    other = tmp_path / "other.toml"
    other.write_text("seed = 6\n")
    assert invoke("run", other, "--run", run).exit_code == 0 and stages[-1][1][0].seed == 6
    assert load(run / "recipe.toml").seed == 5, "a run keeps the recipe that it began with"


EVERY = [
    ["run"],
    ["fit-subspace"],
    ["convert", "--overwrite"],
    ["finetune"],
    ["eval"],
    ["generate", "a cat"],
    ["cache"],
]


@pytest.mark.parametrize("words", EVERY, ids=lambda words: words[0])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_no_command_changes_the_recipe_of_its_run(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch, words: list[str], fails: bool
) -> None:
    """B1: a flag of one command was saved into the run and used by all later ones, even of one that failed."""
    monkeypatch.chdir(tmp_path)
    for name in ("open_encoders", "make"):
        monkeypatch.setattr(f"flux2pixel.data.encode.{name}", lambda *given: None)
    run = tmp_path / "run"
    (run / "converted").mkdir(parents=True)
    (run / "recipe.toml").write_text("seed = 1\n")
    if fails:

        def fail(*given: Any, **named: Any) -> None:
            raise Flux2PixelError("broken")

        for module, name in (
            ("subspace.run", "fit_subspace"), ("convert.run", "convert"), ("finetune.run", "finetune"),
            ("evaluate.run", "evaluate"), ("models.model", "open_model"),
        ):  # fmt: skip
            monkeypatch.setattr(sys.modules[f"flux2pixel.{module}"], name, fail)
        monkeypatch.setattr("flux2pixel.data.encode.make", fail)
    before = contents(tmp_path)
    changes = ["--seed", "3", "--set", "sample.steps=4", "--set", "finetune.lora_alpha=7", "--base", "klein-tiny"]
    result = invoke(*words, "--run", run, *changes)
    assert result.exit_code == (1 if fails else 0), result.output
    after = contents(tmp_path)
    writes = {"generate": {"run/generated.png"}, "eval": set(), "cache": set()}
    new = writes.get(words[0], {"run/seconds.json"})
    assert {name: data for name, data in after.items() if name not in new} == before
    assert set(after) - set(before) == (set() if fails else new)
    assert load(run / "recipe.toml").written == {"seed": 1}


@pytest.mark.parametrize("words", EVERY, ids=lambda words: words[0])
def test_a_command_that_fails_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*words, "--recipe", "absent.toml", "--run", "runs/new")
    assert result.exit_code == 2 and not list(tmp_path.iterdir())


def test_a_stage_that_fails_leaves_no_empty_folder(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise Flux2PixelError("broken")

    monkeypatch.setattr(sys.modules["flux2pixel.convert.run"], "convert", fail)
    file = tmp_path / "mine.toml"
    file.write_text("seed = 5\n")
    assert_one_line(invoke("convert", "--recipe", file, "--run", tmp_path / "a" / "b"), 1, "broken")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("words", [["eval"], ["generate", "a cat"], ["finetune"]], ids=lambda words: words[0])
def test_a_run_that_does_not_exist_is_an_error(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert_one_line(invoke(*words, "--run", "runs/frist"), 2, "--run runs/frist: no such run; did you mean runs/first?")
    assert_one_line(invoke(*words, "--run", "elsewhere"), 2, "--run elsewhere: no such run; start one")
    (tmp_path / "runs" / "first" / "finetuned").mkdir()
    wrong = invoke("export", "runs/frist/finetuned", "--out", "a.safetensors")
    assert_one_line(wrong, 2, "no such folder; did you mean runs/first/finetuned?")
    assert not stages


def test_a_run_knows_its_base(tmp_path: Path, stages: list[Any]) -> None:
    """B3: the first screen's commands chain on one run, without its base in every line."""
    run = tmp_path / "run"
    (run / "converted").mkdir(parents=True)
    (run / "converted" / "asymflow.json").write_text(json.dumps({"base": "flux2-klein-4b"}))
    assert invoke("eval", "--run", run).exit_code == 0
    assert stages[-1][1][0].base == "flux2-klein-4b"
    assert invoke("eval", "--run", run, "--base", "flux2-klein-9b").exit_code == 0
    assert stages[-1][1][0].base == "flux2-klein-9b"


def test_the_first_screen_chains_on_one_base_and_one_run(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B3: the README's commands wrote two runs, of two bases."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    monkeypatch.setattr("flux2pixel.models.base.open_base", lambda *given, **named: None)
    monkeypatch.setattr("flux2pixel.subspace.settings.check", lambda *given: None)
    for words in (
        ["fit-subspace", "--images", "photos"],
        ["convert"],
        ["fit-readout", "--images", "photos"],
        ["finetune", "--images", "photos"],
        ["eval", "--suite", "geneval"],
        ["generate", "a cat"],
    ):
        result = invoke(*words, "--base", "flux2-klein-4b")
        assert result.exit_code == 0, result.output
    *fitted, (_, (model, _, how)), _ = stages
    assert {(given[0].base, given[1]) for _, given in fitted} == {("flux2-klein-4b", Path("runs/flux2-klein-4b"))}
    assert model == "flux2-klein-4b" and how["subspace"] is None, "the stand-ins made no model"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["flux2-klein-4b"]


def test_a_dry_run_under_a_launcher_stops_every_process(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A21: rank 0 printed and left, the others trained."""
    for rank in (0, 1):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        for words in (["finetune"], ["eval"], ["fit-subspace"]):
            result = invoke(*words, "--run", tmp_path / "run", "--dry-run")
            assert result.exit_code == 0 and ("takes " in result.stdout) == (rank == 0), result.output
    assert not stages


def test_a_training_that_is_stopped_in_order_keeps_its_recipe(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: Any, **named: Any) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(sys.modules["flux2pixel.finetune.run"], "finetune", stop)
    file, run = tmp_path / "mine.toml", tmp_path / "run"
    (run / "converted").mkdir(parents=True)
    file.write_text("seed = 5\n")
    assert invoke("finetune", "--run", run, "--recipe", file).exit_code == 0
    assert load(run / "recipe.toml").written == {"seed": 5}


def test_the_images_of_run_are_fitted_and_trained_on(tmp_path: Path, stages: list[Any]) -> None:
    """B4: photos went to the subspace only, and a 9B model was trained on scenes of 32 pixels."""
    (tmp_path / "a.png").touch()
    result = invoke("run", "--base", "flux2-klein-9b", "--images", tmp_path, "--run", tmp_path / "run", "--dry-run")
    assert result.exit_code == 0 and result.output.count(f'set     data.source = "{tmp_path}"') == 1
    assert (
        f'set     fit_subspace.source = "{tmp_path}"' in result.output
        and "images " not in result.output.split("set")[0]
    )
    for words in (["run"], ["fit-subspace"], ["finetune", "--model", str(tmp_path)], ["cache"]):
        result = invoke(*words, "--base", "flux2-klein-9b", "--run", tmp_path / "run")
        assert_one_line(result, 2, "source: no ", "give --images")
        result = invoke(*words, "--base", "flux2-klein-9b", "--run", tmp_path / "run", "--images", "scenes")
        assert_one_line(result, 2, "klein-tiny's own world, no use to flux2-klein-9b")
    assert not stages


def test_a_url_of_images_survives(tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A18: as a path, s3://b/a.tar became s3:/b/a.tar."""
    opened: list[str] = []
    monkeypatch.setattr(
        "flux2pixel.data.open_source", lambda source: opened.append(source) or types.SimpleNamespace(name=source)
    )
    assert invoke("fit-subspace", "--images", "s3://b/a.tar", "--run", tmp_path / "run", "--dry-run").exit_code == 0
    assert opened == ["s3://b/a.tar"]


def test_training_goes_on_with_the_images_of_its_cache(tmp_path: Path, stages: list[Any]) -> None:
    run = tmp_path / "run"
    (run / "cache").mkdir(parents=True)
    (run / "cache" / "cache.json").write_text(json.dumps({"request": {"source": "photos", "images": 12}}))
    assert invoke("finetune", "--run", run, "--base", "flux2-klein-4b").exit_code == 0
    recipe = stages[-1][1][0]
    assert (recipe.data.source, recipe.finetune.images) == ("photos", 12)


def test_run_with_gpus_launches_each_stage_that_takes_them(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[list[str]] = []
    monkeypatch.setattr(
        "flux2pixel.runtime.launch.relaunch", lambda *given, **named: launched.append(sys.argv[1:]) or 0
    )
    monkeypatch.setattr("flux2pixel.runtime.launch.check_gpus", lambda *given: None)
    monkeypatch.setattr(sys.modules["flux2pixel.finetune.run"], "prepare", lambda *given: None, raising=False)
    monkeypatch.setattr(sys.modules["flux2pixel.evaluate.run"], "check", lambda *given: None, raising=False)
    run, given = tmp_path / "run", list(sys.argv)
    result = invoke("run", "--run", run, "--gpus", "2", "--seed", "5", "--set", "eval.prompts=2")
    assert result.exit_code == 0, result.output
    assert [words[0] for words in launched] == ["fit-subspace", "fit-readout", "finetune", "eval"] and sys.argv == given
    assert [name for name, _ in stages] == ["convert"]
    for words in launched:
        assert words[-4:] == ["--set", "eval.prompts=2", "--set", "seed=5"] and words[words.index("--gpus") + 1] == "2"
    monkeypatch.setattr("flux2pixel.runtime.launch.relaunch", lambda *given, **named: 3)
    assert invoke("run", "--run", run, "--gpus", "2").exit_code == 3


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
    ]:
        result = invoke(*words, *common)
        assert result.exit_code == 0, result.output
    assert [given[2:] for _, given in stages] == [
        (out, ()),
        (subspace, out, Extras(link=True), torch.device("cpu"), False),
        (tmp_path, None),
        ([str(tmp_path), f"b={tmp_path}"], None, ()),
    ]
    recipes = [given[0] for _, given in stages]
    assert (recipes[0].fit_subspace.source, recipes[0].fit_subspace.rank) == (str(tmp_path), 3)
    assert recipes[2].finetune.steps == recipes[3].sample.steps == 4


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
        assert "seed = 11  # default: 0" in result.output
        assert "takes " in result.output and "writes " in result.output and result.output.count("set     ") == 1
    assert not stages and not run.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--set", "finetune.stesp=3"], "did you mean finetune.steps?"),
        (["run", "--set", "finetune.steps"], "section.key=value"),
        (["run", "absent.toml"], "absent.toml: no such recipe file"),
        (["run", "a.toml", "--recipe", "b.toml"], "two recipes"),
        (["run", "--gpus", "0"], "--gpus 0: must be at least 1"),
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
        (["generate"], "no prompt"),
        (["generate", ""], "an empty prompt"),
        (["generate", "a cat", "--prompts", "absent"], "--prompts absent: no such file"),
        (["generate", "a cat", "--size", "12 by 3"], "write height x width"),
        (["generate", "a cat", "--size", "8x8", "--height", "8"], "leave --height and --width out"),
        (["generate", "a cat", "--dtype", "int3"], "give one of bf16"),
        (["generate", "a cat", "--model", "absent"], "--model absent: no such folder"),
        (["generate", "a cat", "--model", "klein-tiny", "--out", "a.txt"], "is no folder, and not .png"),
        (["generate", "a cat", "--model", "klein-tiny", "--out", "absent/a.png"], "no folder absent"),
        (["export", "absent", "--out", "a.safetensors"], "absent: no such folder"),
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


def test_generate_writes_pictures_that_say_how_they_were_made(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, file = tmp_path / "run", tmp_path / "prompts.txt"
    (run / "converted").mkdir(parents=True)
    (run / "converted" / "asymflow.json").write_text("{}")
    file.write_text("a dog\n\n  a hat \n")
    words = ["generate", "a cat", "--prompts", file, "--num-images", "2", "--size", "16x24", "--seed", "3"]
    words += ["--guidance", "2.5", "--negative", "fog", "--solver", "heun", "--steps", "4", "--run", run]
    assert invoke(*words).exit_code == 0
    (_, (model, sample, _)), (_, (texts, count, settings)) = stages
    assert model == run / "converted"
    assert sample == Sample(steps=4, guidance=2.5, solver="heun", height=16, width=24)
    assert (texts, count, settings["seed"], settings["size"]) == (["a cat", "a dog", "a hat"], 2, 3, (16, 24))
    assert settings["negative"] == "fog"
    made = sorted(path.name for path in run.glob("*.png"))
    assert made == [
        "generated-2.png",
        "generated-3.png",
        "generated-4.png",
        "generated-5.png",
        "generated-6.png",
        "generated.png",
    ]
    about = Image.open(run / "generated-4.png").info
    assert (about["prompt"], about["seed"], about["index"], about["negative"]) == ("a dog", "3", "3", "fog")
    assert about["model"] == str(run / "converted")
    before = contents(run)
    assert invoke("generate", "a cat", "--run", run).exit_code == 0
    after = contents(run)
    assert {name: after[name] for name in before} == before and set(after) - set(before) == {"generated-7.png"}
    assert "negative" not in stages[-1][1][2] and stages[-1][1][2]["size"] is None


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
def test_generate_writes_the_format_of_the_name(tmp_path: Path, stages: list[Any], name: str, kind: str) -> None:
    out = tmp_path / name
    words = ["generate", "a cat", "--model", tmp_path, "--run", tmp_path / "absent", "--out", out]
    assert invoke(*words).exit_code == 0
    assert Image.open(out).format == kind and [path.name for path in tmp_path.iterdir()] == [name]
    assert_one_line(invoke(*words), 2, f"{out}: exists; --overwrite replaces it")
    assert invoke(*words, "--overwrite").exit_code == 0


def test_a_converted_model_is_replaced_only_if_told(tmp_path: Path, stages: list[Any]) -> None:
    """B9: convert replaced the run's model, beside which its finetuned child stayed."""
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "asymflow.json").touch()
    assert_one_line(invoke("convert", "--run", tmp_path), 2, "converted: not empty; --overwrite")
    assert not stages and invoke("convert", "--run", tmp_path, "--overwrite").exit_code == 0 and stages


@pytest.mark.parametrize(
    ("model", "fine"), [("owner/name", True), ("runs/first", False), ("a/b/c", False), ("flux2-dev", True)]
)
def test_a_mistyped_folder_is_not_asked_of_the_hub(
    tmp_path: Path, stages: list[Any], monkeypatch: pytest.MonkeyPatch, model: str, fine: bool
) -> None:
    """A30: --model takes Hub ids as --base does, but a/b where a is a folder here is a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for words in (["eval", "--model", model], ["generate", "a cat", "--model", model, "--dry-run"]):
        result = invoke(*words, "--run", tmp_path / "run")
        assert result.exit_code == (0 if fine else 2), result.output


def test_offline_is_told_to_the_hub_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    script = (
        "import sys; from flux2pixel.cli import main; sys.argv[1:] = ['convert', '--dry-run', '--offline',"
        " '--base', 'nobody/nothing', '--run', 'nowhere']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "import huggingface_hub.constants as told; assert told.HF_HUB_OFFLINE\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
