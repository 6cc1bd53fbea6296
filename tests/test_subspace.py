"""Sums, solvers and their figures on data whose answer is known."""

import pytest
import torch

from flux2pixel.subspace import diagnostics, solvers
from flux2pixel.subspace.moments import Moments
from flux2pixel.subspace.strata import Strata, read_strata, write_strata


@pytest.fixture
def known():
    """Token pairs x = s A z exactly, z anisotropic."""
    basis = solvers.polar(torch.randn(48, 8, dtype=torch.float64))
    z = torch.randn(40, 25, 8, dtype=torch.float64) * torch.linspace(0.5, 2, 8, dtype=torch.float64)
    return basis, 1.9, z, 1.9 * z @ basis.mT


def gather(x, z, size):
    moments = Moments.zeros(x.shape[-1], z.shape[-1])
    for part_x, part_z in zip(x.split(size), z.split(size), strict=True):
        moments.add(part_x, part_z)
    return moments


def natural_tokens(images=6, tokens=300, width=192, rank=16):
    """Float32 tokens whose energy falls off as in photographs, most of it in the patch mean; whitened latents."""
    spread = torch.arange(1, width + 1).float() ** -1.0
    axes = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, width - 1)], 1))[0]
    sources = torch.randn(images, tokens, width)
    latents = sources[..., :rank] + 0.3 * torch.randn(images, tokens, rank)
    return 20 * (sources * spread) @ axes.mT, latents @ torch.linalg.qr(torch.randn(rank, rank))[0]


def test_procrustes_recovers_a_known_basis_and_scale(known):
    basis, scale, z, x = known
    found, s = solvers.procrustes(gather(x, z, 8))
    assert (found - basis).abs().max() < 1e-12
    assert float(s) == pytest.approx(scale, rel=1e-12)


def test_procrustes_recovers_it_from_float32_blocks(known):
    basis, scale, _, _ = known
    z = torch.randn(4, 1000, 8)
    found, s = solvers.procrustes(gather(scale * z @ basis.float().mT, z, 2))
    assert (found - basis).abs().max() < 1e-6
    assert float(s) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("tokens", [16, 300])
def test_sums_do_not_depend_on_batches_order_or_process_and_add(tokens):
    x, z = natural_tokens(images=12, tokens=tokens)
    whole = gather(x, z, 12)
    order = torch.randperm(12)
    shuffled, parts = gather(x[order], z[order], 5), gather(x[:7], z[:7], 3) + gather(x[7:], z[7:], 1)
    for other in (shuffled, parts):
        assert (other.tokens, other.images) == (12 * tokens, 12)
        for name in ("xx", "xz", "zz", "x", "z"):
            want, got = getattr(whole, name), getattr(other, name)
            assert (want - got).norm() < 1e-12 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_to_float64_is_within_the_bound(dtype):
    x, z = (tokens.to(dtype) for tokens in natural_tokens(images=8, tokens=4500))
    exact, fast = gather(x.double(), z.double(), 8), gather(x, z, 8)
    for name in ("xx", "xz"):
        want, got = getattr(exact, name), getattr(fast, name)
        assert (want - got).norm() < 4096**0.5 * 2**-24 * want.norm()
        assert not torch.equal(want, got), "the float32 path was not taken"
    assert diagnostics.principal_angles(*(solvers.procrustes(m)[0] for m in (exact, fast))).deg2rad().max() < 1e-6


def test_sums_are_the_plain_products(known):
    _, _, z, x = known
    moments = gather(x, z, 7)
    flat_x, flat_z = x.flatten(0, 1), z.flatten(0, 1)
    assert (moments.xx - flat_x.mT @ flat_x).abs().max() < 1e-10
    assert (moments.xz - flat_x.mT @ flat_z).abs().max() < 1e-10
    assert (moments.zz - flat_z.mT @ flat_z).abs().max() < 1e-10
    assert (moments.x - flat_x.sum(0)).abs().max() < 1e-10
    assert (moments.z - flat_z.sum(0)).abs().max() < 1e-10


def test_bad_tokens_add_nothing():
    moments = Moments.zeros(48, 8)
    x, z = torch.randn(2, 5, 48), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"are not \(B, N, 48\)"):
        moments.add(x, z[:, :4])
    z[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        moments.add(x, z)
    assert moments.tokens == 0 and moments.upper.count_nonzero() == 0
    with pytest.raises(ValueError, match="do not add"):
        moments + Moments.zeros(48, 7)


def test_strata_add_up_whoever_saw_which_image(tmp_path):
    x, z = torch.randn(64, 9, 48), torch.randn(64, 9, 8)
    names = [f"digest {index}" for index in range(64)]
    whole, first, second = (Strata(48, 8) for _ in range(3))
    whole.add(names, x, z)
    first.add(names[40:], x[40:], z[40:])
    second.add(names[:40], x[:40], z[:40])
    write_strata(tmp_path / "first", first, {"base": "b"})
    restored, metadata, _ = read_strata(tmp_path / "first")
    assert metadata["base"] == "b"
    joined = restored + second
    for level in range(6):
        assert joined.subset(level).images == whole.subset(level).images
        assert torch.allclose(joined.subset(level).xz, whole.subset(level).xz, rtol=1e-12)
    assert whole.half(0).images + whole.half(1).images == whole.subset(0).images == 64
    assert 20 < whole.half(0).images < 44 and 20 < whole.subset(1).images < 44 and whole.subset(2).images < 28


def test_pca_captures_the_most_energy():
    x = torch.randn(40, 25, 48, dtype=torch.float64) * torch.linspace(1, 3, 48).double()
    moments = gather(x + 1, torch.randn(40, 25, 8, dtype=torch.float64), 8)
    found = {
        "pca": solvers.pca(moments, 8)[0],
        "centred": solvers.pca(moments, 8, center=True)[0],
        "procrustes": solvers.procrustes(moments)[0],
        "random": solvers.haar(48, 8, torch.Generator().manual_seed(0)),
    }
    energy = {name: diagnostics.energy(basis, moments) for name, basis in found.items()}
    assert energy["pca"] > max(energy["centred"], energy["procrustes"], energy["random"])
    spectrum = diagnostics.spectrum(moments)
    assert energy["pca"] == pytest.approx(sum(spectrum[:8]) / sum(spectrum))


def test_residual_is_the_direct_computation(known):
    _, _, z, x = known
    x = x + 0.3 * torch.randn_like(x)
    moments = gather(x, z, 8)
    basis, scale = solvers.procrustes(moments)
    direct = (x - scale * z @ basis.mT).square().sum() / x.square().sum()
    found = diagnostics.describe(basis, scale, moments)
    assert found["alignment_residual"] == pytest.approx(float(direct), rel=1e-9)
    assert found["residual_over_procrustes"] == pytest.approx(1)
    linear = torch.linalg.lstsq(z.flatten(0, 1), x.flatten(0, 1))
    best = (x.flatten(0, 1) - z.flatten(0, 1) @ linear.solution).square().sum() / x.square().sum()
    assert found["linear_residual"] == pytest.approx(float(best), rel=1e-9)


def test_recovery_obeys_the_residual_norm_identity(known):
    basis, scale, _, _ = known
    assert diagnostics.recovery_error(basis, torch.tensor(scale)) < 1e-12
    assert diagnostics.recovery_error(basis * 1.01 / 1.01 + 1e-4, torch.tensor(scale)) > 1e-9, "A is not orthonormal"


def test_stability_tells_few_images_from_many():
    def fitted(images):
        x, z = torch.randn(images, 20, 48), torch.randn(images, 20, 8)
        strata = Strata(48, 8)
        strata.add([str(index) for index in range(images)], x + z @ torch.randn(8, 48), z)
        return diagnostics.stability(strata, solvers.procrustes)

    torch.manual_seed(1)
    few, many = fitted(12), fitted(600)
    assert few["half_split_angle_deg"] > 3 * many["half_split_angle_deg"]
    assert few["held_out_residual"] > 1.05 * few["halves_residual"]
    assert many["held_out_residual"] < 1.01 * many["halves_residual"]
    counts = [row["images"] for row in many["by_images"]]
    assert counts == sorted(counts) and counts[-1] == 600
    assert many["by_images"][0]["angle_deg"] > many["by_images"][-2]["angle_deg"] > many["by_images"][-1]["angle_deg"]


def test_principal_angles_are_accurate_when_small():
    basis = torch.eye(6, 2, dtype=torch.float64)
    tilted = basis.clone()
    tilted[:, 1] = torch.tensor([0, 1, 1e-9, 0, 0, 0]).double()
    assert float(diagnostics.principal_angles(basis, tilted).deg2rad().max()) == pytest.approx(1e-9, rel=1e-6)


def test_panels_of_a_gpu_are_the_update_of_the_cpu():
    block = torch.randn(300, 768 + 3 + 32)
    by_blas, by_panels = Moments.zeros(768, 32), Moments.zeros(768, 32)
    by_blas._update(block)
    by_panels._update_panels(block)
    assert not by_blas.upper.tril(-1).any()
    assert torch.allclose(by_blas.upper, by_panels.upper.triu(), rtol=0, atol=1e-3)
    assert (by_blas.upper - (block.double().mT @ block.double()).triu()).abs().max() < 1e-3
