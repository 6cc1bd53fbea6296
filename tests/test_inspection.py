"""Inspection: what a good file says about itself, and what is said of a bad one."""

import base64
import functools
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flux2pixel.cli import doctor as module
from flux2pixel.cli.doctor import GIB, Card, doctor
from flux2pixel.cli.inspect import inspect
from flux2pixel.families.known import KNOWN
from flux2pixel.finetune.plan.plan import Plan, plan
from flux2pixel.recipe import load
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


def test_packed_data_is_counted_not_printed(tmp_path: Path) -> None:
    basis = base64.b64encode(bytes(range(256)) * 40).decode()
    (tmp_path / "model_index.json").write_text(json.dumps({"basis": basis, "_class_name": "AsymFlowPipeline"}))
    text = inspect(tmp_path)
    assert basis[:40] not in text and f"basis: ({len(basis):,} characters of data)" in text


def test_doctor_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setattr(module, "REQUIRED", ("typer",))
    monkeypatch.setattr(module, "version", lambda name: None if name == "torch" else "1")
    report, problems = doctor(load(), tmp_path / "run")
    assert "typer" in report and "can run here" in report and not problems
    blocked = tmp_path / "file"
    blocked.touch()
    _, problems = doctor(load(None, [f"fit_subspace.source={tmp_path / 'absent'}"]), blocked)
    assert len(problems) == 2


RECIPES = Path(__file__).parent.parent / "recipes"


@functools.cache
def planned(name: str) -> Plan:
    """The plan of a shipped recipe, made once: it does not depend on the machine."""
    return plan(load(RECIPES / f"{name}.toml"), Path("nowhere"))


H100 = Card("cuda:0", "H100", 80 * 10**9, (9, 0))


@pytest.mark.parametrize(
    ("name", "cards", "host", "said"),
    [
        ("klein-9b-24gb", [], 64, "no GPU: the training takes"),
        ("klein-9b-24gb", [Card("cuda:0", "RTX 4090", 24 * 10**9, (8, 9))], 64, ""),
        ("klein-9b-24gb", [Card("cuda:0", "RTX 4080", 16 * 10**9, (8, 9))], 64, "cuda:0 has 14.9"),
        ("klein-9b-24gb", [Card("cuda:0", "RTX 4090", 24 * 10**9, (8, 9))], 8, "loading takes"),
        ("klein-9b-24gb", [Card("cuda:0", "Titan RTX", 24 * 10**9, (7, 5))], 64, "has no bf16"),
        ("klein-9b-8x80gb", [H100] * 2, 640, "the recipe is for 8 processes, one a GPU, and this machine has 2"),
        ("klein-tiny", [], 8, ""),
    ],
)
def test_doctor_holds_the_recipe_against_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cards: list[Card], host: int, said: str
) -> None:
    """B5: "can run here" on two CPUs for a recipe of a 24 GB GPU."""
    monkeypatch.setattr(module, "_devices", lambda: cards)
    monkeypatch.setattr(module, "available_memory", lambda: host * GIB)
    monkeypatch.setattr(module, "_hub", lambda known, offline: [])
    monkeypatch.setattr(module, "version", lambda name: "1")
    monkeypatch.setattr("flux2pixel.finetune.plan.plan.plan", lambda recipe, run, gpus: planned(name))
    (tmp_path / "photos").mkdir()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**13))
    photos = [] if name == "klein-tiny" else [f"{s}.source={tmp_path / 'photos'}" for s in ("data", "fit_subspace")]
    report, problems = doctor(load(RECIPES / f"{name}.toml", photos), tmp_path / "run")
    assert (len(problems) == 1 and said in problems[0]) if said else not problems, problems
    assert "free disk" in report and "GiB may be taken" in report


def test_doctor_wants_the_packages_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version", lambda name: None if name in ("torchao", "lpips", "torch") else "1")
    monkeypatch.setattr(module, "_hub", lambda known, offline: [])
    _, problems = doctor(load(RECIPES / "klein-9b-24gb.toml"), tmp_path)
    for words in ("torchao is not installed (for finetune.frozen_int8)", "lpips is not installed (for finetune.perc"):
        assert any(words in problem for problem in problems)
    assert module.optional_packages(load(None, ["data.source=hf:a/b", "finetune.trackers=['wandb']"])).keys() == {
        "datasets",
        "wandb",
    }


def test_doctor_knows_of_a_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "is gated and there is no Hub token" in module._hub(KNOWN["flux2-klein-9b"], offline=False)[0]
    assert "--offline" in module._hub(KNOWN["flux2-klein-4b"], offline=True)[0]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given: "config.json")
    assert not module._hub(KNOWN["flux2-klein-9b"], offline=True)
