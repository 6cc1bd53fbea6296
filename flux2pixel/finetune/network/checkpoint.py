"""Checkpoints: sharded by torch.distributed.checkpoint, whole or not there, found and pruned by their manifest.

``step-00000240/`` holds DCP's files and ``manifest.json``, which is written last and names every file with its size. A
folder is written under another name and renamed, so a killed save leaves nothing that could be taken for a checkpoint.
DCP reshards: a checkpoint of any number of processes is read by any other.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from flux2pixel.finetune.step.ema import PowerEma
from flux2pixel.recipe import Recipe, as_dict
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError
from flux2pixel.runtime.processes import Team

MANIFEST = "manifest.json"
FORMAT = 1

# A run that goes on under another value of these would not be the run it was.
FIXED = ("base", "seed", "finetune.trainable", "finetune.lora_rank", "finetune.lora_targets", "finetune.images")
FIXED_SECTIONS = ("data",)


@dataclass
class State:
    """All that a training is, besides its recipe and data: draws are functions of the step, so no RNG is among it."""

    network: nn.Module
    optimizer: Optimizer
    ema: PowerEma
    step: int = 0

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
        manifest = {"format": FORMAT, "step": state.step, "ema_updates": state.ema.updates, "processes": team.world}
        manifest |= {"recipe": as_dict(recipe), "files": written} | record
        files.write_json(temporary / MANIFEST, manifest)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        prune(folder, recipe.finetune.keep)
    team.barrier()
    return time.perf_counter() - began


def load(state: State, path: Path, team: Team) -> None:
    """Read a checkpoint into ``state``, resharding as needed. Raises Flux2PixelError naming a damaged one."""
    manifest = read_manifest(path)
    tensors = state.tensors()
    try:
        with _quiet():
            dcp.load(tensors, checkpoint_id=path, no_dist=team.mesh is None)
    except Exception as error:  # DCP raises CheckpointException, KeyError, RuntimeError or what its reader raised
        raise Flux2PixelError(f"{path}: cannot be read ({error}); delete it to go on from the one before") from error
    state.load(tensors)
    state.step, state.ema.updates = manifest["step"], manifest["ema_updates"]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises Flux2PixelError naming a file that is missing or cut."""
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    for name, size in manifest["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise Flux2PixelError(f"{path / name}: missing or cut; delete {path} to go on from the one before")
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


def fixed(key: str) -> bool:
    """Whether a run cannot go on under another value of ``key``."""
    return key in FIXED or key.split(".")[0] in FIXED_SECTIONS
