"""``finetune.profile = N``: N steps of every process as a trace of torch.profiler, after the first two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from flux2pixel.runtime.processes import Team
from flux2pixel.runtime.progress import log

WARM = 2  # steps that set up what later ones have


class Profiler(Protocol):
    """What is told that a step is over."""

    def step(self) -> None: ...


class _Off:
    def step(self) -> None:
        pass


@contextmanager
def profiled(steps: int, run: Path, team: Team) -> Iterator[Profiler]:
    """Profile ``steps`` steps into ``<run>/profile/rank-R.json`` (chrome://tracing, Perfetto); nothing if 0."""
    if not steps:
        yield _Off()
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    folder = run / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{team.rank}.json"

    def write(finished: profile) -> None:
        finished.export_chrome_trace(str(path))
        if team.leads:
            log(f"finetune: {steps} steps profiled into {folder}")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if team.device.type == "cuda" else [])]
    phases = schedule(wait=WARM - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=phases, on_trace_ready=write, profile_memory=True) as profiler:
        yield profiler
