"""The one exception family: every message is one line that says what, where, and what to do."""

from __future__ import annotations


class Flux2PixelError(Exception):
    """A failure the user can act on; the command line prints its one line and exits 1."""


class UsageError(Flux2PixelError):
    """A wrong option, recipe or path, found before any work; the command line exits 2."""


class ProcessFailed(Flux2PixelError):
    """What stopped a run of several processes, raised in the one that failed first; that process prints it."""

    def __init__(self, rank: int, world: int, error: BaseException):
        super().__init__(f"process {rank} of {world}: {sentence(error)}")
        self.code = exit_code(error)


class FailedElsewhere(Flux2PixelError):
    """Another process of the run failed first and prints why, so this one prints nothing; ``code`` is the other's."""

    def __init__(self, code: int = 2):
        super().__init__("another process of this run failed; its message says why")
        self.code = code


def exit_code(error: BaseException) -> int:
    """What a command exits with for ``error``: 2 for a usage error, else 1; that of the process that failed first."""
    if isinstance(error, ProcessFailed | FailedElsewhere):
        return error.code
    return 2 if isinstance(error, UsageError) else 1


def one_line(error: BaseException) -> str:
    """Return the message of ``error`` on one line, never empty, with the file it names if it is an ``OSError``."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        said = "" if isinstance(error, MemoryError) else f" ({'. '.join(line.split('. ')[:2])})"
        return f"out of memory{said}; take a smaller batch, resolution or dtype"
    return line


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the name of its type if it has none: to be put into one of ours."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def sentence(error: BaseException) -> str:
    """What a user reads of ``error``: its line; the name of its type too where it is none that we foresaw."""
    foreseen = isinstance(error, Flux2PixelError | OSError | ImportError | MemoryError)
    if foreseen or type(error).__name__ == "OutOfMemoryError":
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
