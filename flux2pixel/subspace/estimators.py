"""The bases as scikit-learn estimators: rows are pixel tokens X (n, D), targets are latent tokens Z (n, r).

``transform`` gives the latent coordinates (x - mean) A / s, ``inverse_transform`` the pixels s z A^T + mean. Whole
images, saved sums and many processes go through :class:`~flux2pixel.subspace.moments.Moments` and ``fit_moments``.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Generator, Tensor

from flux2pixel.subspace import solvers
from flux2pixel.subspace.moments import Moments
from flux2pixel.subspace.solvers import polar

__all__ = ["PCA", "Procrustes", "RandomBasis", "TokenBasis", "polar"]

_FLOATS = (np.float64, np.float32)


class TokenBasis(TransformerMixin, BaseEstimator):
    """What the estimators share: sums, transform and its inverse. Subclasses say what the sums are solved for.

    Attributes:
        basis_: A, (D, r) float64, orthonormal columns.
        scale_: s, float.
        mean_: what ``transform`` subtracts, (D,) float64.
        moments_: the sums so far; save and add them with :mod:`flux2pixel.subspace.moments`.
    """

    _supervised = True  # fitted on pairs (X, Z)

    def _solve(self, moments: Moments) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit on pixel tokens X (n, D) and, except for PCA, their latent tokens y (n, r)."""
        if hasattr(self, "moments_"):
            del self.moments_
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Add tokens to those seen so far and fit on all of them."""
        fresh = not hasattr(self, "moments_")
        if self._supervised:
            X, y = validate_data(self, X, y, reset=fresh, dtype=_FLOATS, multi_output=True, y_numeric=True)
            z = np.asarray(y, dtype=X.dtype).reshape(len(X), -1)
        else:
            X = validate_data(self, X, reset=fresh, dtype=_FLOATS)
            z = np.empty((len(X), 0), dtype=X.dtype)
        moments = Moments.zeros(X.shape[1], z.shape[1]) if fresh else self.moments_
        moments.add(torch.tensor(X)[None], torch.tensor(z)[None])
        return self.fit_moments(moments)

    def fit_moments(self, moments: Moments) -> Self:
        """Fit on sums gathered elsewhere."""
        basis, scale = self._solve(moments)
        self.moments_ = moments
        self.n_features_in_ = moments.width
        self.basis_, self.scale_ = basis.numpy(), float(scale)
        self.mean_ = np.zeros(moments.width)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Pixel tokens (n, D) to latent coordinates (n, r), in the dtype of X."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=_FLOATS)
        return (X - self.mean_.astype(X.dtype)) @ (self.basis_ / self.scale_).astype(X.dtype)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Latent coordinates (n, r) to the pixel tokens of the subspace (n, D)."""
        check_is_fitted(self)
        X = np.asarray(X)
        return X @ (self.scale_ * self.basis_.T).astype(X.dtype) + self.mean_.astype(X.dtype)

    @property
    def _n_features_out(self) -> int:
        return self.basis_.shape[1]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self._supervised
        tags.target_tags.multi_output = self._supervised
        tags.target_tags.two_d_labels = self._supervised
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class PCA(TokenBasis):
    """Principal subspace of the pixel tokens.

    Args:
        n_components: rank of the basis; None is all D.
        center: take the second moment about the mean, as scikit-learn's PCA does. The reference does not.

    Attributes:
        explained_variance_: eigenvalues of the second moment over n, (n_components,).
        explained_variance_ratio_: their share of the trace.
        components_: basis_ transposed, scikit-learn's name and shape.
    """

    _supervised = False

    def __init__(self, n_components: int | None = None, *, center: bool = False):
        self.n_components = n_components
        self.center = center

    def _solve(self, moments: Moments) -> tuple[Tensor, Tensor]:
        rank = moments.width if self.n_components is None else self.n_components
        if not 1 <= rank <= moments.width:
            raise ValueError(f"n_components: {rank} is not between 1 and the token width {moments.width}")
        return solvers.pca(moments, rank, center=self.center)

    def fit_moments(self, moments: Moments) -> Self:
        super().fit_moments(moments)
        second = solvers.second_moment(moments, center=self.center).numpy()
        if self.center:
            self.mean_ = (moments.x / moments.tokens).numpy()
        energy = np.einsum("dr,dr->r", self.basis_, second @ self.basis_).clip(0)
        self.explained_variance_ = energy / moments.tokens
        self.explained_variance_ratio_ = energy / max(float(np.trace(second)), np.finfo(float).tiny)
        self.components_ = self.basis_.T
        return self


class Procrustes(TokenBasis):
    """The orthonormal basis nearest to the latents: A = polar(E[x z^T]) minimises ||X - A Z||."""

    def _solve(self, moments: Moments) -> tuple[Tensor, Tensor]:
        return solvers.procrustes(moments)


class RandomBasis(TokenBasis):
    """A Haar-random basis with as many columns as the latent token: the control.

    Args:
        random_state: seed.
    """

    def __init__(self, random_state: int = 0):
        self.random_state = random_state

    def _solve(self, moments: Moments) -> tuple[Tensor, Tensor]:
        basis = solvers.haar(moments.width, moments.rank, Generator().manual_seed(self.random_state))
        return basis, solvers.scale_of(basis, moments)
