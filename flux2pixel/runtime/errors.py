"""The one exception family: every message is one line that says what, where, and what to do."""


class Flux2PixelError(Exception):
    """A failure the user can act on; the command line prints its one line and exits 1."""


class UsageError(Flux2PixelError):
    """A wrong option, recipe or path, found before any work; the command line exits 2."""


def one_line(error: BaseException) -> str:
    """Return the message of ``error`` on one line, with the file it names if it is an ``OSError``."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
