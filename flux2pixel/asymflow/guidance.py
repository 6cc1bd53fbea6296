"""Guidance on clean predictions."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, guidance: float, *, orthogonal: bool) -> Tensor:
    """Classifier-free guidance on clean predictions (B, N, D).

    With ``orthogonal`` the part of the guidance parallel to the conditional x0_hat is removed, per sample, which keeps
    strong guidance from saturating colours (adaptive projected guidance, Sadat et al., 2410.02416, with eta = 0).
    """
    push = conditional - unconditional
    if orthogonal:
        size = conditional.flatten(1).square().sum(1).clamp(min=1e-12)
        along = (push * conditional).flatten(1).sum(1) / size
        push = push - along.view(-1, *[1] * (push.ndim - 1)) * conditional
    return conditional + (guidance - 1) * push
