"""Pictures of features: closed forms, invariances."""

import numpy as np
import pytest

from pipeline.report import geometry


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_similarity_is_that_of_the_nearest_prototypes():
    x = unit(np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=np.float32))
    found = geometry.similarity(x, np.array([0, 0, 1, 2]))
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[1, half, 0], [half, 1, half], [0, half, 1]], atol=1e-7)


def test_plane_keeps_the_distances_of_what_is_flat():
    angles = np.linspace(0, 2, 7)
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    places, share = geometry.plane(x @ x.T)
    assert share == pytest.approx(1)
    between = np.linalg.norm(places[:, None] - places, axis=2)
    np.testing.assert_allclose(between, np.linalg.norm(x[:, None] - x, axis=2), atol=1e-7)
    assert (places.max(axis=0) >= -places.min(axis=0)).all()  # of either sign it is one picture


def test_plane_is_pca_of_one_prototype_each():
    x = unit(np.random.default_rng(0).normal(size=(30, 6)))
    places, share = geometry.plane(geometry.similarity(x, np.arange(30)))
    moved = x - x.mean(axis=0)
    _, values, axes = np.linalg.svd(moved)
    np.testing.assert_allclose(np.abs(places), np.abs(moved @ axes[:2].T), atol=1e-7)
    assert share == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())


@pytest.mark.parametrize("k", [1, 2])
def test_plane_of_hardly_anything(k):
    places, share = geometry.plane(np.eye(k))
    assert places.shape == (k, 2) and np.isfinite(places).all() and share == pytest.approx(1)


def test_heat_rows_are_sorted_even_and_of_the_largest(monkeypatch):
    monkeypatch.setattr(geometry, "HEAT_ROWS", 12)
    monkeypatch.setattr(geometry, "HEAT_CLUSTERS", 3)
    cluster = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [50, 40, 30, 5]))
    rows = geometry.heat_rows(cluster)
    assert len(set(rows)) == 12
    shown = cluster[rows]
    assert shown.tolist() == sorted(shown)
    np.testing.assert_allclose(np.bincount(shown), [5, 4, 3], atol=1)


def test_heat_and_contrast_of_two_orthogonal_groups():
    x = np.repeat(np.eye(2, 5), 3, axis=0).astype(np.float32)
    x[0] *= -1  # the sign does not matter
    cluster = np.repeat([0, 1], 3)
    percent = geometry.heat(x)
    np.testing.assert_array_equal(percent, 100 * (cluster[:, None] == cluster))
    assert geometry.contrast(percent, cluster) == (1, 0)
    assert geometry.contrast(percent[:3, :3], cluster[:3]) == (1, 0)  # no other cluster


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_singular_values_are_those_of_the_matrix(shape):
    x = np.random.default_rng(1).normal(size=shape)
    values = np.linalg.svd(x, compute_uv=False)
    found = geometry.singular_values(x)
    np.testing.assert_allclose(found[: len(values)], values / values[0], atol=1e-7)
    assert (found[len(values) :] < 1e-6).all()


def test_spectra_of_all_and_of_the_largest_clusters(monkeypatch):
    monkeypatch.setattr(geometry, "OWN_LINES", 2)
    x = np.eye(3)[[0, 0, 0, 1, 1, 2]].astype(np.float32)
    found = geometry.spectra(x, np.array([4, 4, 4, 0, 0, 1]))
    assert list(found) == ["", "4", "0"]
    np.testing.assert_allclose(found[""], [1, np.sqrt(2 / 3), np.sqrt(1 / 3)], atol=1e-7)
    np.testing.assert_allclose(found["4"], [1, 0, 0], atol=1e-7)


def test_nearest_goes_by_prototype():
    vectors = np.eye(3, dtype=np.float32)
    z = unit(np.array([[9, 1, 0], [0, 1, 9], [0, 9, 1]], dtype=np.float32))
    assert geometry.nearest(z, vectors, np.array([0, 0, 1])).tolist() == [0, 1, 0]
