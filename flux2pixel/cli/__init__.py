"""The command line: one module per command, a thin layer over the verbs. Importing it imports no torch."""

from flux2pixel.cli.app import app, main

__all__ = ["app", "main"]
