"""A disk that fills up: one line, exit 1, and nothing half-written. The limit on file size stands in for the disk."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flux2pixel.cli import app

SMALL = ["--set", "fit_subspace.images=20", "--set", "convert.verify_steps=2", "--set", "threads=1"]
SMALL += ["--set", "finetune.steps=1", "--set", "finetune.batch=2", "--set", "finetune.images=8"]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes; the kernel refuses the write as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def invoke(run: Path, *words: str) -> Any:
    return CliRunner().invoke(app, [*words, "--run", str(run), *SMALL])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a subspace and a converted model."""
    folder = tmp_path_factory.mktemp("disk") / "run"
    for stage in ("fit-subspace", "convert"):
        result = invoke(folder, stage)
        assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    ("words", "room", "written"),
    [
        (["fit-subspace"], 8_000, "fitted.safetensors"),
        (["convert"], 1_000_000, "model"),
        (["finetune"], 1_000_000, "trained"),
        (
            ["generate", "a photo of a red circle", "--steps", "1", "--height", "128", "--width", "128"],
            9_000,
            "image.png",
        ),
    ],
    ids=["fit-subspace", "convert", "finetune", "generate"],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(run: Path, words: list[str], room: int, written: str) -> None:
    out = run / written
    with room_for(room):
        result = invoke(run, *words, "--out", str(out))
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {out.with_suffix('')}"), result.stderr
    assert "cannot be written (File too large)" in last
    assert not out.exists() and not list(run.rglob("*.tmp"))
    result = invoke(run, *words, "--out", str(out))
    assert result.exit_code == 0 and out.exists(), result.output
