"""The decoder's Jacobian against automatic differentiation in reverse, and on decoders whose answer is known."""

import pytest
import torch
from families import write_base
from torch import nn

from flux2pixel.models.base import open_base
from flux2pixel.subspace import diagnostics, jacobian, solvers
from flux2pixel.subspace.prior import decode_pixels, prior_latents, prior_pairs, prior_side

GRID = (3, 2)


def linear(basis, scale):
    return lambda z: scale * z @ basis.mT


def reverse(decode, z):
    """Mean self-block Jacobian by torch.autograd."""
    blocks = torch.autograd.functional.jacobian(decode, z)
    own = [blocks[b, i, :, b, i, :] for b in range(z.shape[0]) for i in range(z.shape[1])]
    return torch.stack(own).mean(0)


@pytest.fixture(scope="module", params=["flux2-klein", "flux1-dev"])
def decoder(request, tmp_path_factory):
    """A stock VAE with attention and random weights, in float64, as a map of tokens, and where to take it."""
    base = open_base(write_base(tmp_path_factory.mktemp("base"), request.param))
    base.vae.double()
    z = torch.randn(2, 6, base.latent_width, dtype=torch.float64)
    height, width = (side * base.patch_size for side in GRID)
    return lambda latent: decode_pixels(base, latent, height, width), z


def test_exact_is_reverse_mode(decoder):
    decode, z = decoder
    z = z[:1]
    want = reverse(decode, z)
    assert (jacobian.exact(decode, z, GRID) - want).norm() < 1e-10 * want.norm()
    assert (jacobian.exact(decode, z, GRID, chunk=5) - want).norm() < 1e-10 * want.norm()


def test_stochastic_is_unbiased_within_its_standard_error(decoder):
    decode, z = decoder
    want = jacobian.exact(decode, z, GRID, chunk=96)
    found = jacobian.stochastic(decode, z, 64, torch.Generator().manual_seed(0))
    deviation = (found.mean - want) / found.standard_error
    assert 0.8 < deviation.square().mean().sqrt() < 1.25
    fewer = jacobian.stochastic(decode, z, 16, torch.Generator().manual_seed(0))
    assert 1.2 < fewer.relative_error / found.relative_error < 3.5


def test_colours_are_exact_beyond_the_decoders_reach():
    torch.manual_seed(0)
    reach_one = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 12, 1)).double()

    def decode(z):
        return reach_one(z.mT.unflatten(2, (6, 7))).flatten(2).mT

    z = torch.randn(2, 42, 4, dtype=torch.float64)
    want = jacobian.exact(decode, z, (6, 7))
    assert (jacobian.exact(decode, z, (6, 7), stride=2) - want).norm() < 1e-12 * want.norm()
    assert (jacobian.exact(decode, z, (6, 7), stride=1) - want).norm() > 1e-3 * want.norm()


def test_colours_part_the_grid():
    for stride in (0, 1, 2, 3, 9):
        masks = torch.stack(list(jacobian.colours((4, 5), stride)))
        assert torch.equal(masks.sum(0), torch.ones(20, dtype=masks.sum(0).dtype))
        assert len(masks) == (20 if stride in (0, 9) else stride**2)


def test_a_linear_vae_is_recovered():
    basis = solvers.polar(torch.randn(48, 8, dtype=torch.float64))
    z = torch.randn(3, 6, 8, dtype=torch.float64)
    mean = jacobian.exact(linear(basis, 1.9), z, GRID)
    assert (solvers.polar(mean) - basis).abs().max() < 1e-12
    assert float(mean.norm()) / 8**0.5 == pytest.approx(1.9, rel=1e-12)
    estimated = jacobian.stochastic(linear(basis, 1.9), z, 400, torch.Generator().manual_seed(0))
    assert diagnostics.principal_angles(solvers.polar(estimated.mean), basis).max() < 1e-6
    assert (solvers.polar(estimated.mean) - basis).abs().max() < 0.02


def test_the_prior_is_smooth_white_in_scale_and_repeatable(tmp_path):
    base = open_base(write_base(tmp_path, "flux2-klein"))
    side = 8 * base.patch_size
    z = prior_latents(base, 64, side, torch.Generator().manual_seed(0))
    assert z.shape == (64, 64, base.latent_width)
    assert float(z.std()) == pytest.approx(1, abs=1e-3)
    grid = z.unflatten(1, (8, 8))
    neighbours, far = (grid[:, 1:] * grid[:, :-1]).mean(), (grid[:, :1] * grid[:, -1:]).mean()
    assert neighbours > 0.7 > 0.3 > far
    small = prior_side(base)
    pairs = list(prior_pairs(base, 3, 2, torch.Generator().manual_seed(0), "cpu"))
    assert [len(x) for x, _ in pairs] == [2, 1]
    assert pairs[0][0].shape[1:] == ((small // base.patch_size) ** 2, base.token_width)
    again = next(prior_pairs(base, 3, 2, torch.Generator().manual_seed(0), "cpu"))
    assert torch.equal(again[1], pairs[0][1])
