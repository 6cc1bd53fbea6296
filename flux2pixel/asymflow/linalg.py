"""The one decomposition that the method needs."""

from __future__ import annotations

import torch
from torch import Tensor


def polar(matrix: Tensor) -> Tensor:
    """The orthonormal polar factor U V^T of a tall (D, r) matrix: the matrix with A^T A = I that is nearest to it."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh
