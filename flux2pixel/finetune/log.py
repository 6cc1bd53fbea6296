"""Where a training is watched: ``finetune.jsonl`` always, TensorBoard, wandb or trackio if asked for."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError

Track = Callable[[int, Mapping[str, float]], None]


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
        self._track = [_open_tracker(name, run, step, settings) for name in trackers if name != "jsonl"]

    def write(self, step: int, **values: Any) -> None:
        """Append one record; nested mappings and lists of numbers go to the trackers as ``outer/inner``."""
        record = {"step": step} | values
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for track in self._track:
            track(step, dict(_scalars(values)))

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


def memory() -> float:
    """Peak memory of this process in GiB: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from _scalars({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def _open_tracker(name: str, run: Path, step: int, settings: Mapping[str, Any]) -> Track:
    check_trackers((name,))
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run writes over what came after its checkpoint.
        writer = SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else None, flush_secs=10)

        def track(step: int, values: Mapping[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return track
    import importlib

    tracker = importlib.import_module(name)
    session = tracker.init(project="flux2pixel", name=run.name, config=dict(settings))
    return lambda step, values: session.log(dict(values), step=step)
