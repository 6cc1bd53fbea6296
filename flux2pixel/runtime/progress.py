"""One progress bar for everything long: rate, share done, remaining time. On standard error, so output stays clean."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


class Bar:
    """A running bar; ``advance`` moves it, ``note`` shows a short text beside it."""

    def __init__(self, progress: Progress, task):
        self._progress, self._task = progress, task

    def advance(self, count: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=count, note=note)


@contextmanager
def bar(what: str, total: int | None, shown: bool = True) -> Iterator[Bar]:
    """Show a bar labelled ``what`` over ``total`` units (None: not known) while the block runs.

    Plain lines when not on a terminal; nothing unless ``shown``, for all processes of a run but one.
    """
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not (shown and sys.stderr.isatty())) as progress:
        if shown and progress.disable:
            log(f"{what}: {'unknown number' if total is None else total}")
        yield Bar(progress, progress.add_task(what, total=total, note=""))


def quiet_libraries() -> None:
    """Silence the libraries' own loading bars and two warnings that are about their internals."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def log(line: str) -> None:
    """Print one line beside any running bar."""
    console.print(line, markup=False, soft_wrap=True)
