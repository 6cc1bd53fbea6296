"""Encoded bytes to upright 8-bit sRGB. What a file can hold besides plain RGB is converted on purpose:

EXIF orientation   applied
alpha, palette or tRNS transparency   laid over white
grayscale, bilevel, YCbCr, LAB   converted; 16-bit grayscale scaled (v / 257), 16-bit RGB cut to its high byte by Pillow
embedded ICC profile   converted to sRGB by littleCMS; CMYK without one by Pillow's formula
animation   first frame
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})

# A 16384 x 16384 picture; Pillow's own limit (half of it with a warning) is below a stitched panorama.
MAX_PIXELS = 2**28

_SRGB = ImageCms.createProfile("sRGB")


class Unreadable(Exception):
    """A picture that cannot be used; its one line says why."""


def read_bytes(content: Path | bytes | np.ndarray) -> tuple[bytes | np.ndarray, str]:
    """Return the content itself, a path read from disk, and its SHA-256: of the encoded bytes, or of an array's own.

    Raises Unreadable if the file cannot be read or is empty.
    """
    if isinstance(content, np.ndarray):
        return content, hashlib.sha256(
            repr(content.shape).encode() + np.ascontiguousarray(content).tobytes()
        ).hexdigest()
    if isinstance(content, Path):
        try:
            content = content.read_bytes()
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error
    if not content:
        raise Unreadable("the file is empty")
    return content, hashlib.sha256(content).hexdigest()


def decode(content: bytes | np.ndarray) -> Image.Image:
    """Encoded bytes, or an (H, W, 3) uint8 array, to an upright RGB picture. Raises Unreadable with the reason."""
    if isinstance(content, np.ndarray):
        if content.ndim != 3 or content.shape[2] != 3 or content.dtype != np.uint8:
            raise Unreadable(f"an array of shape {content.shape} and {content.dtype} is not (H, W, 3) uint8")
        return Image.fromarray(content)
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Unreadable(f"{opened.width} x {opened.height} is more than {MAX_PIXELS} pixels")
            opened.load()
            return to_srgb(ImageOps.exif_transpose(opened))
    except Image.UnidentifiedImageError as error:
        raise Unreadable("not a picture that Pillow knows") from error
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly every type on damaged data
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error


def to_srgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB in sRGB, transparency over white."""
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    elif image.mode == "F":
        raise Unreadable("32-bit float pixels have no defined range; save it as 8- or 16-bit")
    if image.mode in ("PA", "La", "RGBa", "LA") or (image.mode in ("P", "L", "RGB", "1") and _has_transparency(image)):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        alpha = image.getchannel("A")
        flat = _profiled(image.convert("RGB"), image.info.get("icc_profile"))
        white = Image.new("RGB", image.size, "white")
        white.paste(flat, mask=alpha)
        return white
    if image.mode in ("1", "P", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return _profiled(image, image.info.get("icc_profile"))


def _has_transparency(image: Image.Image) -> bool:
    return "transparency" in image.info


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Pillow's own conversion clips 16-bit values at 255, which turns a picture white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Unreadable("32-bit integer pixels have no defined range; save it as 8- or 16-bit")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _profiled(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert from the embedded profile to sRGB. A damaged or mismatched profile is ignored, as viewers do."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
                if converted is not None:
                    return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")
