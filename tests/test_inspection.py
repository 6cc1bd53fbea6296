"""Inspection: what a good file says about itself, and what is said of a bad one."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from flux2pixel.cli.inspection import doctor, inspect
from flux2pixel.recipe import Recipe, load
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.weights.header import read_header


def safetensors(header: dict[str, Any], data: bytes = b"") -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


SUBSPACE = {
    "__metadata__": {"format": "flux2pixel.subspace", "method": "pca", "base": "klein-tiny"},
    "basis": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
    "scale": {"dtype": "F32", "shape": [], "data_offsets": [32, 36]},
}
GOOD = safetensors(SUBSPACE, bytes(36))


def test_a_subspace_file_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "subspace.safetensors"
    path.write_bytes(GOOD)
    assert read_header(path).parameters == 9
    text = inspect(path)
    for word in ("flux2pixel.subspace", "method: pca", "basis  F32  (4, 2)", "scale  F32  ()", "9 parameters"):
        assert word in text


@pytest.mark.parametrize("kept", range(len(GOOD)))
def test_every_truncation_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(GOOD[:kept])
    with pytest.raises(Flux2PixelError, match=r"truncated|not a safetensors file") as error:
        inspect(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"just a text file, quite long enough to hold a length",
        struct.pack("<Q", 4) + b"nope" + bytes(10),
        struct.pack("<Q", 50) + b"nope" + bytes(10),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}),
        safetensors({"a": {"shape": [2]}}),
        safetensors({"a": 3}),
        safetensors({"__metadata__": 3}),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(Flux2PixelError, match="not a safetensors file"):
        inspect(path)


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(GOOD + b"x")
    with pytest.raises(Flux2PixelError, match="1 bytes after the last tensor"):
        inspect(path)


def test_a_converted_folder_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "asymflow.json").write_text(json.dumps({"patch_size": 8, "color_space": "oklab"}))
    (tmp_path / "conversion.json").write_text(json.dumps({"max_abs_error": 1e-12}))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.safetensors").write_bytes(GOOD)
    text = inspect(tmp_path)
    for word in ("pixel model", "patch_size: 8", "max_abs_error: 1e-12", "transformer/model.safetensors"):
        assert word in text


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        inspect(tmp_path / "absent")
    with pytest.raises(Flux2PixelError, match="not a model"):
        inspect(tmp_path)
    (tmp_path / "asymflow.json").write_text("{")
    with pytest.raises(Flux2PixelError, match="not valid JSON"):
        inspect(tmp_path)


def test_doctor_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setattr("flux2pixel.cli.inspection._PACKAGES", ("typer",))
    report, problems = doctor(Recipe(), tmp_path / "run")
    assert "typer" in report and "can run here" in report and not problems
    blocked = tmp_path / "file"
    blocked.touch()
    _, problems = doctor(load(None, [f"fit_subspace.source={tmp_path / 'absent'}"]), blocked)
    assert len(problems) == 2
