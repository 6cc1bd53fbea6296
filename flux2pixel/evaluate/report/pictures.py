"""Small pictures for reports, as data URIs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from flux2pixel.runtime.page import data_uri
from flux2pixel.weights.subspace import read_subspace


def basis_vectors(path: Path, count: int) -> list[str]:
    """The first basis vectors of a subspace file as p x p pictures, each scaled to its own range around mid grey."""
    basis = read_subspace(path)[0].basis.numpy()
    side = round((basis.shape[0] / 3) ** 0.5)
    found = []
    for column in basis.T[:count]:
        # Shown as Oklab channels read as L, a, b offsets would hardly be visible: plain per-channel contrast instead.
        patch = column.reshape(3, side, side).transpose(1, 2, 0)
        found.append(data_uri(Image.fromarray((127.5 + 127.5 * patch / np.abs(patch).max()).astype(np.uint8))))
    return found
