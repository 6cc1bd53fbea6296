"""The measures without a network: what they must see, their closed forms, and the figures they have always given."""

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from flux2pixel.evaluate.fidelity import distances, measures
from flux2pixel.evaluate.fidelity.measures import summarise

# Of blurred(textured(100, 1)) against textured(120, 2), as 7ec274f computed them from whole stacks.
RECORDED = {
    "patch_frechet": 0.02984572072384073,
    "texture_frechet": 0.08920016341813278,
    "spectrum_all": 0.9474187224936463,
    "spectrum_high": -1.5759592058691156,
    "blockiness": 1.0083284740301925,
    "grain": 0.006947962479954169,
    "colour_mean_error": 0.005058785232840701,
    "colour_std_error": 0.022005467057611278,
    "fid": 0.012209340727048157,
    "kid": 0.0015161223405273994,
    "precision": 0.61,
    "recall": 0.7666666666666667,
}
PSNR = 26.123370328138826  # of blurred(textured(100, 1)) against textured(100, 1)


def textured(n: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = uniform_filter(rng.normal(size=(n, 32, 32, 3)), size=(1, 9, 9, 1), mode="wrap") * 4
    pixels: np.ndarray = (0.5 + 0.12 * smooth + 0.05 * rng.normal(size=smooth.shape)).clip(0, 1) * 255
    return pixels.astype(np.uint8)


def blurred(images: np.ndarray) -> np.ndarray:
    pixels: np.ndarray = uniform_filter(images.astype(float), size=(1, 3, 3, 1), mode="nearest")
    return pixels.astype(np.uint8)


def measure(images: np.ndarray, reference: np.ndarray, patch: int = 8) -> dict[str, float]:
    return measures.measure(summarise(images, patch), summarise(reference, patch))


def test_the_figures_are_what_they_were() -> None:
    ours, theirs = blurred(textured(100, 1)), textured(120, 2)
    found = measure(ours, theirs)
    basis = measures.leading(summarise(theirs, 8).patches, 8, distances.COMPONENTS)
    found |= distances.distances(*(distances.patch_features(images, basis, 8) for images in (ours, theirs)))
    assert {key: found[key] for key in RECORDED} == pytest.approx(RECORDED, rel=1e-9)
    pairs = zip(ours, textured(100, 1), strict=True)
    assert np.mean([distances.psnr(*pair) for pair in pairs]) == pytest.approx(PSNR, rel=1e-12)


def test_a_set_is_at_distance_zero_from_itself() -> None:
    images = textured()
    values = measure(images, images)
    for key in values.keys() - measures.absolute(summarise(images, 8)).keys():
        assert abs(values[key]) < 1e-7, key


def test_blur_lowers_the_high_band_and_raises_the_texture_distance() -> None:
    images, other = textured(seed=0), textured(seed=1)
    same, blur = measure(other, images), measure(blurred(other), images)
    assert blur["spectrum_high"] < -0.5 < same["spectrum_high"]
    assert blur["high_band_share"] < 0.2 * same["high_band_share"] < 0.2
    assert blur["texture_frechet"] > 10 * same["texture_frechet"]
    assert blur["grain"] < 0.6 * same["grain"]


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 0.0])
    got = measures.frechet_distance(np.zeros(3), np.diag(a), np.array([1.0, 0.0, 2.0]), np.diag(b))
    assert got == pytest.approx(5.0 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_frechet_does_not_depend_on_the_order_or_the_axes() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    first = measures.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    x, y = x @ turn, y @ turn
    assert measures.frechet_distance(y.mean(0), np.cov(y.T), x.mean(0), np.cov(x.T)) == pytest.approx(first, rel=1e-9)


def test_white_noise_has_a_flat_spectrum_at_its_variance() -> None:
    noise = np.random.default_rng(0).normal(0.5, 0.1, size=(400, 32, 32, 1)).repeat(3, axis=-1)
    one = summarise((noise * 255).round().clip(0, 255).astype(np.uint8), 8)
    assert one.spectrum.shape == (17,)
    np.testing.assert_allclose(one.spectrum[2:], 0.01, rtol=0.1)
    counts = measures._rings(32, 32)[2][1:]
    assert measures.absolute(one)["high_band_share"] == pytest.approx(counts[8:].sum() / counts.sum(), rel=0.02)


def test_blocks_show_as_blockiness_above_one() -> None:
    images = textured()
    plain = measures.absolute(summarise(images, 8))
    assert plain["blockiness"] == pytest.approx(1.0, abs=0.03) == plain["blockiness_second"]
    offsets = np.random.default_rng(2).integers(-20, 20, size=(len(images), 4, 4, 1))
    blocks = offsets.repeat(8, axis=1).repeat(8, axis=2)
    blocky = measures.absolute(summarise((images.astype(int) + blocks).clip(0, 255).astype(np.uint8), 8))
    assert blocky["blockiness"] > 1.3 and blocky["blockiness_second"] > 1.15
    black = measures.absolute(summarise(np.zeros((1, 32, 32, 3), np.uint8), 8))
    assert np.isnan(black["blockiness"]) and np.isnan(black["blockiness_second"]) and np.isnan(black["high_band_share"])


def test_second_differences_see_a_crease_that_first_differences_miss() -> None:
    """A ramp that turns at every border has steps of one height everywhere and bends at the borders alone."""
    zigzag = np.abs((np.arange(33) + 8) % 16 - 8.0)[:32]
    luma = 0.01 * (zigzag[:, None] + zigzag[None, :])
    assert measures.border_steps(luma, 8, 1) == pytest.approx((0.01, 0.01))
    across, elsewhere = measures.border_steps(luma, 8, 2)
    assert across > 0.005 and elsewhere == pytest.approx(0, abs=1e-12)


def test_a_wrong_array_is_refused_by_shape_and_dtype() -> None:
    with pytest.raises(ValueError, match="uint8"):
        summarise(np.zeros((2, 32, 32, 3)), 8)
    with pytest.raises(ValueError, match="8x8 patch"):
        summarise(np.zeros((1, 4, 4, 3), np.uint8), 8)
    with pytest.raises(ValueError, match="no images"):
        summarise([], 8)
