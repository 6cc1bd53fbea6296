"""Sums, estimators and their figures on data whose answer is known."""

import pytest
import torch

from flux2pixel.subspace import diagnostics, estimators
from flux2pixel.subspace.moments import Moments


@pytest.fixture
def known():
    """Token pairs x = s A z exactly, z anisotropic."""
    basis = estimators.polar(torch.randn(48, 8, dtype=torch.float64))
    z = torch.randn(40, 25, 8, dtype=torch.float64) * torch.linspace(0.5, 2, 8, dtype=torch.float64)
    return basis, 1.9, z, 1.9 * z @ basis.mT


def gather(x, z, size):
    moments = Moments.zeros(x.shape[-1], z.shape[-1])
    for part_x, part_z in zip(x.split(size), z.split(size), strict=True):
        moments.add(part_x, part_z)
    return moments


def test_procrustes_recovers_a_known_basis_and_scale(known):
    basis, scale, z, x = known
    found, s = estimators.procrustes(gather(x, z, 8))
    assert (found - basis).abs().max() < 1e-6
    assert float(s) == pytest.approx(scale, rel=1e-6)


def test_sums_do_not_depend_on_the_batch_and_add(known):
    _, _, z, x = known
    whole = gather(x, z, 40)
    parts = gather(x[:15], z[:15], 4) + gather(x[15:], z[15:], 7)
    assert parts.tokens == whole.tokens == 1000 and parts.images == whole.images == 40
    assert (parts.xx - whole.xx).norm() / whole.xx.norm() < 1e-6


def test_pca_captures_the_most_energy():
    z = torch.randn(40, 25, 8, dtype=torch.float64)
    moments = gather(torch.randn(40, 25, 48, dtype=torch.float64) * torch.linspace(1, 3, 48).double(), z, 8)
    energy = {}
    for name, basis in {
        "pca": estimators.pca(moments, 8)[0],
        "procrustes": estimators.procrustes(moments)[0],
        "random": estimators.haar(moments, 8, torch.Generator().manual_seed(0))[0],
    }.items():
        energy[name] = diagnostics.describe(basis, torch.tensor(1.0).double(), moments)["captured_energy"]
    assert energy["pca"] > energy["procrustes"]
    assert energy["pca"] == pytest.approx(sum(diagnostics.spectrum(moments)[:8]) / sum(diagnostics.spectrum(moments)))


def test_residual_is_the_direct_computation(known):
    _, _, z, x = known
    x = x + 0.3 * torch.randn_like(x)
    moments = gather(x, z, 8)
    basis, scale = estimators.procrustes(moments)
    direct = (x - scale * z @ basis.mT).square().sum() / x.square().sum()
    assert diagnostics.describe(basis, scale, moments)["alignment_residual"] == pytest.approx(float(direct), rel=1e-4)


def test_decoder_jacobian_of_a_linear_decoder(known):
    basis, scale, _, _ = known
    jacobian = estimators.decoder_jacobian(
        lambda z: scale * z @ basis.mT, lambda: torch.randn(64, 16, 8, dtype=torch.float64), rounds=200
    )
    angles = diagnostics.principal_angles(estimators.polar(jacobian), basis)
    assert angles.max() < 1e-4
    assert (estimators.polar(jacobian) - basis).abs().max() < 0.02


def test_principal_angles_are_accurate_when_small():
    basis = torch.eye(6, 2, dtype=torch.float64)
    tilted = basis.clone()
    tilted[:, 1] = torch.tensor([0, 1, 1e-9, 0, 0, 0]).double()
    assert float(diagnostics.principal_angles(basis, tilted).deg2rad().max()) == pytest.approx(1e-9, rel=1e-6)
