"""The estimators do what scikit-learn's own checks ask of one, and what its PCA gives."""

import numpy as np
import pytest
from sklearn.decomposition import PCA as SkPCA
from sklearn.utils.estimator_checks import check_estimator

from flux2pixel.subspace.estimators import PCA, Procrustes, RandomBasis


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", [PCA(), PCA(center=True), PCA(n_components=1), Procrustes(), RandomBasis()])
def test_scikit_learns_checks_pass(estimator):
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    assert [r["check_name"] for r in results if r["status"] == "failed"] == []
    # The array API is off in scikit-learn unless SCIPY_ARRAY_API is set before scipy is imported.
    assert {r["check_name"] for r in results if r["status"] == "skipped"} <= {"check_array_api_input"}


def test_centred_pca_is_scikit_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12)) + 3
    ours, theirs = PCA(4, center=True).fit(x), SkPCA(4).fit(x)
    signs = np.sign((ours.components_ * theirs.components_).sum(1))[:, None]
    np.testing.assert_allclose(ours.components_ * signs, theirs.components_, atol=1e-10)
    np.testing.assert_allclose(ours.explained_variance_ratio_, theirs.explained_variance_ratio_, rtol=1e-10)
    np.testing.assert_allclose(ours.explained_variance_ * 500 / 499, theirs.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(ours.inverse_transform(ours.transform(x)), theirs.inverse_transform(theirs.transform(x)))


def test_partial_fit_in_parts_is_fit():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 6))
    x = z @ np.linalg.qr(rng.normal(size=(24, 6)))[0].T * 2.5
    whole = Procrustes().fit(x, z)
    parts = Procrustes().partial_fit(x[:100], z[:100]).partial_fit(x[100:], z[100:])
    np.testing.assert_allclose(parts.basis_, whole.basis_, atol=1e-12)
    assert whole.scale_ == pytest.approx(2.5)
    np.testing.assert_allclose(whole.transform(x), z, atol=1e-12)
    np.testing.assert_allclose(whole.inverse_transform(z), x, atol=1e-12)


def test_rank_out_of_range_is_refused():
    with pytest.raises(ValueError, match="n_components: 30"):
        PCA(30).fit(np.ones((40, 24)))
