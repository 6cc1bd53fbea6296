"""Identities of the parameterisation, in float64."""

import pytest
import torch

from flux2pixel import AsymFlow
from flux2pixel.asymflow import color, schedule, tokens
from flux2pixel.asymflow.denoiser import Denoiser, denoise
from flux2pixel.asymflow.guidance import guide
from flux2pixel.asymflow.solvers import SOLVERS, sample
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

    def predict(x, sigma, final):
        return (1 - sigma) * a2 / ((1 - sigma) ** 2 * a2 + sigma**2) * x

    x1 = torch.randn(1, 4, 8, dtype=torch.float64)
    exact = x1 * a2**0.5
    errors = []
    for steps in (20, 80):
        sigmas = schedule.grid(steps, dtype=torch.float64)
        errors.append((sample(predict, x1, sigmas, SOLVERS[solver]) - exact).abs().max().item())
    assert errors[1] < errors[0] / 4 ** (order - 0.5)


def test_orthogonal_guidance_has_no_parallel_part():
    conditional, unconditional = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    push = guide(conditional, unconditional, 4.0, orthogonal=True) - conditional
    assert (push * conditional).sum((1, 2)).abs().max() < 1e-11
    plain = guide(conditional, unconditional, 4.0, orthogonal=False)
    assert torch.allclose(plain, unconditional + 4 * (conditional - unconditional))


@pytest.mark.parametrize("factor", [17.0, 34.0, 40.0])
@pytest.mark.parametrize("steps", [32, 38])
def test_unipc_draws_at_the_published_shifts(factor, steps):
    """At large shifts the first integer timesteps repeat; looked up by value UniPC began at the wrong one and died."""
    a2, x1 = 0.25, torch.randn(1, 4, 8, dtype=torch.float64)
    sigmas = schedule.grid(steps, factor, dtype=torch.float64)

    def predict(x, sigma, final):
        return (1 - sigma) * a2 / ((1 - sigma) ** 2 * a2 + sigma**2) * x

    missed = {name: (sample(predict, x1, sigmas, SOLVERS[name]) - x1 * a2**0.5).abs().max() for name in SOLVERS}
    assert missed["unipc"] < 1.05 * missed["euler"], "coarse near 0, but no worse than first order"


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
def test_the_last_evaluation_is_told_so(solver):
    told = []
    sample(lambda x, sigma, final: told.append(final) or x * 0, torch.randn(1, 2, 3), schedule.grid(5), SOLVERS[solver])
    assert told[-1] and sum(told) == 1


def test_a_shift_is_stated_at_1024_and_grows_with_the_side():
    """17 at 1024 x 1024 is 8.5 at 512 and 34 at 2048, to the bit; the matched latent grid is that over s."""
    for height, width, factor in ((512, 512, 8.5), (1024, 1024, 17.0), (2048, 2048, 34.0), (512, 2048, 17.0)):
        levels = schedule.noise_levels(50, 17.0, height, width, torch.float64)
        assert torch.equal(levels, schedule.grid(50, factor, torch.float64))
        for scale in (1.0, 2.3):
            flow = AsymFlow(torch.eye(12, dtype=torch.float64)[:, :4], scale)
            matched = schedule.noise_levels(50, 17.0 / scale, height, width, torch.float64)
            assert (flow.sigma_of(matched) - levels).abs().max() < 1e-15


def test_the_denoiser_is_the_core_with_guidance_and_latent_models_need_no_recovery():
    flow = AsymFlow(torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64))[0], 1.7)
    weight = torch.randn(2, 12, 12, dtype=torch.float64)
    x, sigma = torch.randn(2, 3, 12, dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)

    def networks(inputs, time):
        return inputs @ weight[0] * time.view(-1, 1, 1), inputs @ weight[1]

    one, other = (denoise(flow, lambda i, t, branch=branch: networks(i, t)[branch], x, sigma) for branch in (0, 1))
    assert torch.allclose(Denoiser(networks, flow, guidance=3.0)(x, sigma), other + 3 * (one - other), atol=1e-12)
    clamped = Denoiser(networks, flow, 3.0, orthogonal=True, clamp=lambda x0: x0 + 1)(x, sigma)
    assert torch.allclose(clamped, guide(one, other, 3.0, orthogonal=True) + 1)
    latent = Denoiser(lambda z, t: (networks(z, t)[0], None))(x, sigma)
    assert torch.allclose(latent, x - sigma.view(-1, 1, 1) * networks(x, sigma)[0])


def test_colour_is_exact_in_anybodys_autocast():
    """A round trip of 8-bit colours inside bf16 autocast, of half-precision inputs and with TF32 products allowed."""
    rgb = (torch.randint(0, 256, (2, 3, 8, 8)).float() / 255).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert (color.decode(color.encode(rgb)) - rgb).abs().max() < 1e-4
    assert color.encode(rgb.bfloat16()).dtype == torch.float32 and color.decode(rgb.half()).dtype == torch.float32
