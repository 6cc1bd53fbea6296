"""How a function becomes a command: the shared flags are added to its own, and an error is one line."""

import functools
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from flux2pixel.cli.options import CONTROL, Flags
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import FailedElsewhere, Flux2PixelError, ProcessFailed, exit_code, sentence

Debug = Annotated[bool, typer.Option("--debug", rich_help_panel=CONTROL, help="Show the full traceback of an error.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give ``function`` ``--debug``, and if it takes ``flags``, all of :class:`Flags`; print its errors as one line.

    Typer reads a command's flags off its signature, so the one that is returned has the function's own and the shared.
    """
    own = inspect.signature(function, eval_str=True).parameters
    takes_flags = "flags" in own
    hints = get_type_hints(Flags, include_extras=True) if takes_flags else {"debug": Debug}
    defaults = {item.name: item.default for item in fields(Flags)}
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [one.replace(kind=kind) for name, one in own.items() if name != "flags"]
    parameters += [
        inspect.Parameter(name, kind, default=defaults[name], annotation=hint) for name, hint in hints.items()
    ]

    @functools.wraps(function)
    def run(**given: Any) -> None:
        shared = {name: given.pop(name) for name in hints}
        with one_line_errors(shared["debug"], silent=launch.rank() > 0):
            if shared.get("offline"):
                os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
            function(**given, **({"flags": Flags(**shared)} if takes_flags else {}))

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


@contextmanager
def one_line_errors(debug: bool, silent: bool = False) -> Iterator[None]:
    """Print an error as one line and exit 2 (usage) or 1 (failure); with ``--debug`` print its traceback first.

    With ``silent`` an error that every process of a run has is left for the first of them to print.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug and not isinstance(error, FailedElsewhere):
            traceback.print_exc()
        common = silent and isinstance(error, Flux2PixelError | OSError) and not isinstance(error, ProcessFailed)
        if not (common or isinstance(error, FailedElsewhere)):
            typer.echo(f"error: {sentence(error)}", err=True)
        raise typer.Exit(exit_code(error)) from error
