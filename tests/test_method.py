"""Identities of the parameterisation, in float64."""

import pytest
import torch

from flux2pixel import AsymFlow
from flux2pixel.asymflow import color, schedule, tokens
from flux2pixel.asymflow import solvers as sampler
from flux2pixel.subspace.estimators import polar


@pytest.fixture(params=[0.4, 1.0, 2.7])
def flow(request):
    return AsymFlow(polar(torch.randn(48, 8, dtype=torch.float64)), request.param)


def draws(flow, count=5):
    x0, eps = torch.randn(2, count, 7, 48, dtype=torch.float64)
    return x0, eps, torch.linspace(0.02, 0.98, count, dtype=torch.float64)


def test_recovery_is_exact_for_a_perfect_network(flow):
    x0, eps, sigma = draws(flow)
    level = sigma.view(-1, 1, 1)
    x_t = (1 - level) * x0 + level * eps
    projector = flow.basis @ flow.basis.mT
    # In calibrated coordinates the clean data is x0 / s: v = P eps - x0 / s.
    v = eps @ projector - x0 / flow.scale
    assert (flow.predict_x0(v, x_t, sigma) - x0).abs().max() < 1e-12
    assert (flow.velocity(v, x_t, sigma) - (eps - x0)).abs().max() < 1e-10


def test_recovery_equals_the_two_branch_form(flow):
    v, x_t, sigma = draws(flow)
    k, _ = flow.calibrate(sigma)
    k, level, s = k.view(-1, 1, 1), sigma.view(-1, 1, 1), flow.scale
    projector = flow.basis @ flow.basis.mT
    inside = (s * k * v + (1 - s) * k * x_t) @ projector
    rest = x_t + s * v
    expected = inside + (rest - rest @ projector) / level
    assert (flow.velocity(v, x_t, sigma) - expected).abs().max() < 1e-11


def test_residual_norm_identity(flow):
    """An output error e moves x0_hat by s^2 (tau^2 |P e|^2 + |(I - P) e|^2), squared."""
    v, x_t, sigma = draws(flow)
    e = torch.randn_like(v)
    moved = flow.predict_x0(v + e, x_t, sigma) - flow.predict_x0(v, x_t, sigma)
    inside = e @ flow.basis @ flow.basis.mT
    _, tau = flow.calibrate(sigma)
    low, rest = inside.square().sum((1, 2)), (e - inside).square().sum((1, 2))
    expected = flow.scale**2 * (tau**2 * low + rest)
    assert torch.allclose(moved.square().sum((1, 2)), expected, rtol=1e-12)


def test_time_map_and_lift_invert(flow):
    sigma = torch.linspace(0, 1, 9, dtype=torch.float64)
    assert (flow.sigma_of(flow.calibrate(sigma)[1]) - sigma).abs().max() < 1e-14
    z = torch.randn(2, 3, 8, dtype=torch.float64)
    assert (flow.project(flow.lift(z)) - z).abs().max() < 1e-13


def test_recovery_is_float32_under_autocast_and_differentiable():
    flow = AsymFlow(polar(torch.randn(48, 8)), 1.3)
    v = torch.randn(2, 7, 48, dtype=torch.bfloat16, requires_grad=True)
    x_t, sigma = torch.randn(2, 7, 48), torch.rand(2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = flow.predict_x0(v, x_t, sigma)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, flow.predict_x0(v, x_t, sigma))
    inside.sum().backward()
    assert v.grad is not None


@pytest.mark.parametrize(
    ("basis", "scale", "message"),
    [(torch.ones(4, 2), 1.0, "orthonormal"), (torch.eye(2, 4), 1.0, "D >= r"), (torch.eye(4, 2), -1.0, "positive")],
)
def test_bad_subspaces_are_refused(basis, scale, message):
    with pytest.raises(ValueError, match=message):
        AsymFlow(basis, scale)


def test_patch_tokens_are_channel_first_and_invert():
    image = torch.randn(2, 3, 16, 24)
    cut = tokens.patchify(image, 8)
    assert cut.shape == (2, 6, 192)
    assert torch.equal(cut[1, 4].reshape(3, 8, 8), image[1, :, 8:16, 8:16])
    assert torch.equal(tokens.unpatchify(cut, 8, 16, 24), image)


def test_oklab_known_colours_and_round_trip():
    white = color.encode(torch.ones(3, 1, 1, dtype=torch.float64)).flatten() * 0.16
    assert torch.allclose(white, torch.tensor([0.44, 0.0, -0.01], dtype=torch.float64), atol=1e-6)
    red = color.encode(torch.tensor([1.0, 0, 0], dtype=torch.float64).view(3, 1, 1)).flatten() * 0.16
    # Ottosson's published Oklab of sRGB red: (0.628, 0.225, 0.126).
    assert torch.allclose(
        red + torch.tensor([0.56, 0, 0.01]), torch.tensor([0.628, 0.2249, 0.1258]).double(), atol=1e-3
    )
    rgb = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    assert (color.decode(color.encode(rgb)) - rgb).abs().max() < 1e-9
    assert color.decode(10 * torch.randn(1, 3, 8, 8)).isfinite().all()


def test_shift_is_not_log_shift():
    assert schedule.shift(torch.tensor(0.5), 17.0) == pytest.approx(17 / 18)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("unipc", 2)])
def test_solvers_converge_at_their_order(solver, order):
    """Gaussian data N(0, a^2): x0_hat is linear and the flow's end point is known in closed form."""
    a2 = 0.25

    def predict(x, sigma):
        return (1 - sigma) * a2 / ((1 - sigma) ** 2 * a2 + sigma**2) * x

    x1 = torch.randn(1, 4, 8, dtype=torch.float64)
    exact = x1 * a2**0.5
    errors = []
    for steps in (20, 80):
        sigmas = schedule.grid(steps, dtype=torch.float64)
        errors.append((sampler.sample(predict, x1, sigmas, solver=solver) - exact).abs().max().item())
    assert errors[1] < errors[0] / 4 ** (order - 0.5)


def test_orthogonal_guidance_has_no_parallel_part():
    conditional, unconditional = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    push = sampler.guide(conditional, unconditional, 4.0, orthogonal=True) - conditional
    assert (push * conditional).sum((1, 2)).abs().max() < 1e-11
    plain = sampler.guide(conditional, unconditional, 4.0, orthogonal=False)
    assert torch.allclose(plain, unconditional + 4 * (conditional - unconditional))
