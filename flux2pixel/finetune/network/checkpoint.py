"""Checkpoints: sharded by torch.distributed.checkpoint, whole or not there, found and pruned by their manifest.

``step-00000240/`` holds DCP's files and ``manifest.json``, which is written last and names every file with its size. A
folder is written under another name and renamed, so a killed save leaves nothing that could be taken for a checkpoint.
DCP reshards: a checkpoint of any number of processes is read by any other.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from flux2pixel.finetune.network.trainable import Group
from flux2pixel.finetune.step.ema import PowerEma
from flux2pixel.recipe import Recipe, as_dict
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError, one_line
from flux2pixel.runtime.processes import Team

MANIFEST = "manifest.json"
FORMAT = 1
DAMAGED = re.compile(r"PytorchStreamReader|invalid header|corrupt|unexpected EOF|pickle data was truncated")

# A run that goes on under another value of these would not be the run it was.
FIXED = (
    "base",
    "seed",
    *(f"finetune.{name}" for name in ("trainable", "lora_rank", "lora_alpha", "lora_targets", "optimizer", "loss")),
)
FIXED_DATA = ("data.", "finetune.images")  # unless other images are accepted
FREE_DATA = ("data.exclude", "data.batch", "data.text_tokens", "data.max_broken")


@dataclass
class State:
    """All that a training is, besides its recipe and data: draws are functions of the step, so no RNG is among it."""

    network: nn.Module
    optimizer: Optimizer
    ema: PowerEma
    groups: Sequence[Group] = ()
    step: int = 0
    skipped: int = 0  # steps in a row, up to the present one, that were left out

    def tensors(self) -> dict[str, Any]:
        """The trained parameters, the optimizer's state by parameter name, the averages; sharded as they are."""
        trained = {n: p.detach() for n, p in self.network.named_parameters() if p.requires_grad}
        options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
        optimizer = get_optimizer_state_dict(self.network, self.optimizer, options=options)
        return {"network": trained, "optimizer": optimizer, "ema": self.ema.values}

    def load(self, tensors: dict[str, Any]) -> None:
        """Take the optimizer's state; parameters and averages were read in place."""
        options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
        set_optimizer_state_dict(self.network, self.optimizer, tensors["optimizer"], options=options)


@contextmanager
def _quiet():
    """DCP warns that it works without a process group, which is what one process means."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        yield


def save(state: State, folder: Path, recipe: Recipe, team: Team, record: dict[str, Any]) -> float:
    """Write the checkpoint of the present step below ``folder``; returns the seconds that training stood still."""
    began = time.perf_counter()
    path = folder / f"step-{state.step:08d}"
    temporary = path.with_name(path.name + ".tmp")
    if team.leads:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    team.barrier()
    with _quiet():
        dcp.save(state.tensors(), checkpoint_id=temporary, no_dist=team.mesh is None)
    team.barrier()
    if team.leads:
        written = {item.name: item.stat().st_size for item in sorted(temporary.iterdir())}
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "step": state.step,
            "ema_updates": state.ema.updates,
            "processes": team.world,
        }
        manifest |= {"skipped": state.skipped, "groups": {g.name: list(g.parameters) for g in state.groups}}
        manifest |= {"recipe": as_dict(recipe), "files": written} | record
        files.write_json(temporary / MANIFEST, manifest)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        prune(folder, recipe.finetune.keep)
    team.barrier()
    return time.perf_counter() - began


def load(state: State, path: Path, team: Team) -> dict[str, Any]:
    """Read a checkpoint into ``state``, resharding as needed; returns its manifest.

    Raises UsageError if it is of other parameters, Flux2PixelError with the reason if it is damaged or cannot be
    loaded now; only a damaged one is to be put aside.
    """
    manifest = read_manifest(path)
    groups = {g.name: list(g.parameters) for g in state.groups}
    if manifest.get("groups", groups) != groups:
        names = ", ".join(sorted(name for name in {*groups, *manifest["groups"]} if _other(name, groups, manifest)))
        raise UsageError(
            f"{path}: its trained parameters are not those of the recipe (group {names}); restore "
            f"finetune.lora_targets or use another --run"
        )
    tensors = state.tensors()
    try:
        with _quiet():
            dcp.load(tensors, checkpoint_id=path, no_dist=team.mesh is None)
        state.load(tensors)
    except Exception as error:  # DCP raises CheckpointException, KeyError, RuntimeError or what its reader raised
        cause = _cause(error)
        reason = f"{type(cause).__name__}: {one_line(cause)}"
        if isinstance(cause, pickle.UnpicklingError | EOFError | zipfile.BadZipFile) or DAMAGED.search(str(cause)):
            raise Flux2PixelError(
                f"{path}: is damaged ({reason}); move it away to go on from the one before"
            ) from error
        raise Flux2PixelError(
            f"{path}: is whole, but cannot be loaded now ({reason}); nothing was changed, run again once that is mended"
        ) from error
    state.step, state.ema.updates = manifest["step"], manifest["ema_updates"]
    state.skipped = manifest.get("skipped", 0)
    return manifest


def _other(name: str, groups: dict[str, Any], manifest: dict[str, Any]) -> bool:
    return groups.get(name) != manifest["groups"].get(name)


def _cause(error: BaseException) -> BaseException:
    """What DCP's own exception is about: the first process's failure."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises Flux2PixelError naming a file that is missing or cut."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise UsageError(f"{path}: is a checkpoint of format {manifest['format']}, this reads {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise Flux2PixelError(
            f"{path / MANIFEST}: is damaged ({type(error).__name__}); move {path} away to go on from the one before"
        ) from error
    for name, size in manifest["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise Flux2PixelError(f"{path / name}: missing or cut; move {path} away to go on from the one before")
    return manifest


def newest(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps, if any."""
    found = [path for path in folder.glob("step-*") if (path / MANIFEST).is_file() and path.suffix != ".tmp"]
    return max(found, key=lambda path: path.name, default=None)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what killed saves left."""
    found = sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")
    for path in [*found[:-keep], *folder.glob("step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def differences(stored: dict[str, Any], present: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, as (key, stored, present); one that is missing on a side is None there."""
    found = []
    for name in dict.fromkeys([*stored, *present]):
        mine, theirs = stored.get(name), present.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += differences(mine, theirs, f"{prefix}{name}.")
        elif mine != theirs:
            found.append((f"{prefix}{name}", mine, theirs))
    return found


def fixed(key: str, new_data: bool = False) -> bool:
    """Whether a run cannot go on under another value of ``key``; of the data's, where other images are accepted."""
    return key in FIXED or (not new_data and key.startswith(FIXED_DATA) and key not in FREE_DATA)


def known(table: dict[str, Any], key: str) -> bool:
    """Whether nested ``table`` has ``key``, such as ``finetune.steps``."""
    for name in key.split("."):
        if not isinstance(table, dict) or name not in table:
            return False
        table = table[name]
    return True
