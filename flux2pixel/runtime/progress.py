"""One progress bar for everything long, on standard error, so that output stays clean.

On a terminal a bar with what is done, the rate, the time so far and the time left. Elsewhere, as in the log of a batch
job, a line at the start and then a line a minute that says the same.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

console = Console(stderr=True, highlight=False)
LINE_SECONDS = 60.0
GB = 1e9


@dataclass
class Work:
    """How much of something is done: ``total`` may be unknown; what was done before the start is in no rate."""

    total: float | None
    unit: str = ""
    done: float = 0
    before: float = 0
    began: float = field(default_factory=lambda: time.monotonic())

    def figures(self) -> str:
        """Such as ``1200/4000 images, 8.3 images/s, 0:05:37 left``; bytes in GB; a slow rate as ``12.5 s each``."""
        size, unit, digits = (GB, " GB", 2) if self.unit == "bytes" else (1, f" {self.unit}".rstrip(), 0)
        of = "" if self.total is None else f"/{self.total / size:.{digits}f}"
        parts = [f"{self.done / size:.{digits}f}{of}{unit}"]
        seconds, made = time.monotonic() - self.began, self.done - self.before
        if made > 0 and seconds > 0:
            rate = made / seconds
            parts.append(f"{1 / rate:.1f} s each" if size == 1 and rate < 1 else f"{rate / size:.2f}{unit}/s")
            if self.total is not None and self.total >= self.done:
                parts.append(f"{clock((self.total - self.done) / rate)} left")
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Bar:
    """A running bar; ``advance`` moves it and may show a short text beside it."""

    def __init__(self, what: str, work: Work, progress: Progress | None, task: TaskID | None, shown: bool):
        self._what, self._work, self._progress, self._task = what, work, progress, task
        self._lock = threading.Lock()
        self._lines, self._last = shown and progress is None, time.monotonic()

    def advance(self, count: float = 1, note: str = "") -> None:
        """Count ``count`` more as done now."""
        with self._lock:  # of several threads
            self._work.done += count
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._work.done, note=note)
        elif self._lines and time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            log(f"{self._what}: {self._work.figures()}{', ' if note else ''}{note}")

    def skip(self, count: float) -> None:
        """Count ``count`` as done before, by a run that this one goes on from: part of the total, of no rate."""
        self._work.before += count
        self._work.done += count
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._work.done)


class _Figures(ProgressColumn):
    def __init__(self, work: Work):
        super().__init__()
        self._work = work

    def render(self, task: Task) -> Text:
        """The figures as they are now, and the time since the start."""
        return Text(f"{self._work.figures()}, {clock(time.monotonic() - self._work.began)} so far")


@contextmanager
def bar(what: str, total: float | None, shown: bool = True, unit: str = "") -> Iterator[Bar]:
    """Show a bar labelled ``what`` over ``total`` units (None: not known) while the block runs.

    ``unit`` is a plural, such as "images"; "bytes" are shown in GB. Lines when not on a terminal; nothing unless
    ``shown``, for all processes of a run but one.
    """
    work = Work(total, unit)
    if not (shown and sys.stderr.isatty()):
        if shown:
            amount = "an unknown number" if total is None else work.figures().partition("/")[2]
            log(f"{what}: {amount}{'' if total is not None or not unit else ' of ' + unit}")
        yield Bar(what, work, None, None, shown)
        return
    columns = TextColumn("{task.description:<14}"), BarColumn(), _Figures(work), TextColumn("{task.fields[note]}")
    with Progress(*columns, console=console) as progress:
        yield Bar(what, work, progress, progress.add_task(what, total=total, note=""), shown)


def quiet_libraries() -> None:
    """Silence the libraries' own loading bars, and warnings about their internals or that we say ourselves."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # Keys of a configuration that its class does not know: families.configs names them, with the file.
    diffusers_logging.get_logger("diffusers.configuration_utils").setLevel(diffusers_logging.ERROR)
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def log(line: str) -> None:
    """Print one line beside any running bar."""
    console.print(line, markup=False, soft_wrap=True)
