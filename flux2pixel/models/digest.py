"""Which model a file was made with: digests of a base's parts."""

from __future__ import annotations

import hashlib

from flux2pixel.models.base import Base
from flux2pixel.runtime import files


def vae_digest(base: Base) -> str:
    """SHA-256 over the VAE's weight files, which a subspace names so that it is not used with another VAE."""
    weights = sorted((base.folder / "vae").glob("*.safetensors"))
    if len(weights) == 1:
        return files.digest(weights[0])
    return hashlib.sha256("".join(files.digest(file) for file in weights).encode()).hexdigest()
