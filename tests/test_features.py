"""FID, KID, precision and recall against torch-fidelity on the same features, and what they must see."""

import numpy as np
import pytest
import torch
from test_fidelity import blurred, textured

from flux2pixel.evaluate.fidelity import distances as features
from flux2pixel.evaluate.fidelity import measures


def gaussian(n: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, 8))


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    return gaussian(400, 0), gaussian(300, 1, shift=0.3, scale=1.2)


def test_fid_agrees_with_torch_fidelity(sets: tuple[np.ndarray, np.ndarray]) -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    moments = [fid.fid_features_to_statistics(torch.from_numpy(one)) for one in sets]
    theirs = fid.fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert features.fid(*sets) == pytest.approx(theirs, rel=1e-6)


def test_precision_and_recall_agree_with_torch_fidelity(sets: tuple[np.ndarray, np.ndarray]) -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    ours, theirs = sets
    found = features.precision_recall(ours, theirs)
    # torch-fidelity's first argument is the generated set.
    peer = prc.prc_features_to_metric(torch.from_numpy(ours), torch.from_numpy(theirs), verbose=False)
    assert found["precision"] == pytest.approx(float(peer["precision"]), abs=1e-6)
    assert found["recall"] == pytest.approx(float(peer["recall"]), abs=1e-6)


def test_kid_agrees_with_torch_fidelity(sets: tuple[np.ndarray, np.ndarray]) -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    small = [one[:100] for one in sets]
    peer = kid.kid_features_to_metric(*map(torch.from_numpy, small), kid_subset_size=100, kid_subsets=1, verbose=False)
    theirs = peer["kernel_inception_distance_mean"]
    assert features.kid(*small) == pytest.approx(float(theirs), rel=1e-6), "whole sets: every subset is the set"


def test_equal_sets_and_other_sets() -> None:
    one, same, other = gaussian(300, 0), gaussian(300, 1), gaussian(300, 2, shift=2.0)
    assert features.fid(one, one) == pytest.approx(0, abs=1e-9)
    assert abs(features.kid(one, same)) < 0.05 < features.kid(one, other)
    assert features.precision_recall(one, one) == {"precision": 1.0, "recall": 1.0}
    assert features.precision_recall(other, one)["precision"] < 0.3 < features.precision_recall(same, one)["precision"]
    assert np.isnan(features.precision_recall(one[:3], same)["recall"])


def test_patch_features_see_blur() -> None:
    reference, same, soft = textured(60, 0), textured(60, 1), blurred(textured(60, 1))
    basis = measures.leading(measures.summarise(reference, 8).patches, 8, features.COMPONENTS)
    truth, sharp, blur = (features.patch_features(one, basis, 8) for one in (reference, same, soft))
    assert truth.shape == (60, 64)
    assert features.fid(blur, truth) > 2 * features.fid(sharp, truth)


def test_psnr_of_a_known_error() -> None:
    one = np.full((4, 4, 3), 100, np.uint8)
    assert features.psnr(one, one) == 100
    assert features.psnr(one + 1, one) == pytest.approx(20 * np.log10(255))
