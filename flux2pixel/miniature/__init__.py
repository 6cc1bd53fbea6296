"""The bundled base klein-tiny and its world. It registers like any other base; nothing outside asks for it by name."""

from pathlib import Path

from flux2pixel.families.registry import Plugin

klein_tiny = Plugin("klein-tiny", Path(__file__).parent / "klein-tiny")
