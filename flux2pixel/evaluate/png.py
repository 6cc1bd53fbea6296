"""Image files that say what made them: 8-bit RGB png with the digest of their settings in a text chunk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from flux2pixel.evaluate.suite import Size
from flux2pixel.runtime import files

KEY = "flux2pixel"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk of a png, with its length and checksum
EFFORT = 1  # zlib level: level 6 takes four times as long for a tenth fewer bytes


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings as canonical JSON."""
    return sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(path: Path, image: np.ndarray, digest: str) -> None:
    """Write an (H, W, 3) uint8 image as png, atomically, carrying ``digest``."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(KEY, digest)

    def save(temporary: Path) -> None:
        Image.fromarray(image).save(temporary, format="png", compress_level=EFFORT, pnginfo=info)

    files.write(path, save)


def read_digest(path: Path) -> str | None:
    """Return the digest that :func:`write` left in a file; None for an absent, damaged or foreign one."""
    from PIL import Image

    if fault(path) is not None:
        return None
    with Image.open(path) as image:
        found = image.info.get(KEY)
    return found if isinstance(found, str) else None


def fault(path: Path) -> str | None:
    """Say in words why a file is not a whole png, or return None. Reads its ends alone; does not decode."""
    try:
        with path.open("rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                return "is not a png"
            file.seek(-len(END), os.SEEK_END)
            return None if file.read() == END else "is cut off"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def size(path: Path) -> Size:
    """(height, width) of an image file, from its header."""
    from PIL import Image

    with Image.open(path) as image:
        return image.height, image.width
