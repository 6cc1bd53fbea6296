"""Where a training is watched: ``finetune.jsonl`` always, TensorBoard, wandb or trackio if asked for."""

from __future__ import annotations

import json
import resource
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError


class Tracker(Protocol):
    """One of the places beside ``finetune.jsonl``."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Note values of a step."""

    def picture(self, step: int, path: Path) -> None:
        """Show a picture of a step."""


class Log:
    """The leading process's records; those of steps after ``step`` are from before a kill and are taken out.

    Raises UsageError if a tracker's package is absent.
    """

    def __init__(self, run: Path, trackers: tuple[str, ...], step: int, settings: Mapping[str, Any]):
        self.path = run / "finetune.jsonl"
        kept = self.path.read_text().splitlines() if step and self.path.is_file() else []
        self.records: list[dict[str, Any]] = [r for r in map(json.loads, kept) if r["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        files.write(self.path, lambda temporary: temporary.write_text(text))
        self._trackers = [_open_tracker(name, run, step, settings) for name in trackers if name != "jsonl"]

    def write(self, step: int, **values: Any) -> None:
        """Append one record; nested mappings and lists of numbers go to the trackers as ``outer/inner``."""
        record = {"step": step} | values
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if numbers := dict(_scalars(values)):
            for tracker in self._trackers:
                tracker.numbers(step, numbers)

    def pictures(self, step: int, path: Path) -> None:
        """Show the samples of a step to the trackers; the file itself is the record."""
        for tracker in self._trackers:
            tracker.picture(step, path)

    def curve(self, *names: str) -> list[list[float]]:
        """Rows [step, names ...] of the records that have all of them."""
        return [[r["step"], *(r[n] for n in names)] for r in self.records if all(n in r for n in names)]

    def rows(self, name: str) -> list[tuple[int, Any]]:
        """Every (step, value) of ``name``."""
        return [(r["step"], r[name]) for r in self.records if name in r]

    def last(self, name: str) -> Any:
        """The latest value of ``name``, None if there is none."""
        return next((r[name] for r in reversed(self.records) if name in r), None)

    def first(self, name: str) -> Any:
        """The earliest value of ``name``, None if there is none."""
        return next((r[name] for r in self.records if name in r), None)


def check_trackers(trackers: tuple[str, ...]) -> None:
    """Raise UsageError naming a tracker whose package is absent."""
    import importlib.util

    for name in trackers:
        if name != "jsonl" and importlib.util.find_spec(name) is None:
            extra = "'flux2pixel[train]'" if name == "tensorboard" else name
            raise UsageError(f"finetune.trackers: {name} is not installed; pip install {extra}, or take it out")


def memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU if it trains on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from _scalars({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def _open_tracker(name: str, run: Path, step: int, settings: Mapping[str, Any]) -> Tracker:
    check_trackers((name,))
    return TensorBoard(run, step) if name == "tensorboard" else Session(name, run, step, settings)


class TensorBoard:
    """Event files in ``<run>/tensorboard``; a resumed run writes over what came after its checkpoint."""

    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else None, flush_secs=10)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def picture(self, step: int, path: Path) -> None:
        from PIL import Image

        self._writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self._writer.flush()


class Session:
    """A run of wandb or trackio. Its identity is kept in ``<run>/trackers.json``, so that a resumed training goes on in
    the same one; a training that starts again from step 0 is a new one."""

    def __init__(self, name: str, run: Path, step: int, settings: Mapping[str, Any]):
        import importlib

        self._package = importlib.import_module(name)
        path = run / "trackers.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if not step or name not in known:
            known[name] = f"{run.name}-{uuid.uuid4().hex[:8]}"
            files.write_json(path, known)
        # trackio goes by the run's name, wandb by its id.
        named = {"id": known[name], "name": run.name} if name == "wandb" else {"name": known[name]}
        self._session = self._package.init(project="flux2pixel", config=dict(settings), resume="allow", **named)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._session.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        self._session.log({"samples": self._package.Image(str(path))}, step=step)
