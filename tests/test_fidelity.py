import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from flux2pixel.evaluate.fidelity import measures as fidelity


def textured(n: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = uniform_filter(rng.normal(size=(n, 32, 32, 3)), size=(1, 9, 9, 1), mode="wrap") * 4
    pixels: np.ndarray = (0.5 + 0.12 * smooth + 0.05 * rng.normal(size=smooth.shape)).clip(0, 1) * 255
    return pixels.astype(np.uint8)


def blurred(images: np.ndarray) -> np.ndarray:
    pixels: np.ndarray = uniform_filter(images.astype(float), size=(1, 3, 3, 1), mode="nearest")
    return pixels.astype(np.uint8)


def test_a_set_is_at_distance_zero_from_itself() -> None:
    images = textured()
    values = fidelity.measure(images, images)
    for key in values.keys() - {"blockiness", "grain"}:
        assert abs(values[key]) < 1e-7, key


def test_blur_lowers_the_high_band_and_raises_the_texture_distance() -> None:
    images, other = textured(seed=0), textured(seed=1)
    same, blur = fidelity.measure(other, images), fidelity.measure(blurred(other), images)
    assert blur["spectrum_high"] < -0.5 < same["spectrum_high"]
    assert blur["texture_frechet"] > 10 * same["texture_frechet"]
    assert blur["grain"] < 0.6 * same["grain"]


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 0.0])
    got = fidelity.frechet_distance(np.zeros(3), np.diag(a), np.array([1.0, 0.0, 2.0]), np.diag(b))
    assert got == pytest.approx(5.0 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_frechet_does_not_depend_on_the_order_or_the_axes() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    first = fidelity.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    x, y = x @ turn, y @ turn
    assert fidelity.frechet_distance(y.mean(0), np.cov(y.T), x.mean(0), np.cov(x.T)) == pytest.approx(first, rel=1e-9)


def test_white_noise_has_a_flat_spectrum_at_its_variance() -> None:
    noise = np.random.default_rng(0).normal(0.5, 0.1, size=(400, 32, 32, 1)).repeat(3, axis=-1)
    power = fidelity.radial_power_spectrum((noise * 255).round().clip(0, 255).astype(np.uint8))
    assert power.shape == (17,)
    np.testing.assert_allclose(power[2:], 0.01, rtol=0.1)


def test_blocks_show_as_blockiness_above_one() -> None:
    images = textured()
    assert fidelity.blockiness(images) == pytest.approx(1.0, abs=0.03)
    offsets = np.random.default_rng(2).integers(-20, 20, size=(len(images), 4, 4, 1))
    blocks = offsets.repeat(8, axis=1).repeat(8, axis=2)
    assert fidelity.blockiness((images.astype(int) + blocks).clip(0, 255).astype(np.uint8)) > 1.3
    assert np.isnan(fidelity.blockiness(np.zeros((1, 32, 32, 3), np.uint8)))


def test_a_wrong_array_is_refused_by_shape_and_dtype() -> None:
    with pytest.raises(ValueError, match="uint8"):
        fidelity.grain(np.zeros((2, 32, 32, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="8x8 patch"):
        fidelity.patch_frechet(np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8))
