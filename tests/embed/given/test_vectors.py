"""Given vectors to unit rows; what is none has a reason."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.embed.given.vectors import unit_rows

KINDS = [
    pa.list_(pa.float16()), pa.list_(pa.float32()), pa.large_list(pa.float64()),
    pa.list_(pa.float16(), 3), pa.list_(pa.float32(), 3), pa.list_(pa.float64(), 3),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_have_unit_length_in_float16(kind):
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float16).astype(float)
    found, why = unit_rows(pa.array([row.tolist() for row in x], kind), "v", 3)
    assert found.dtype == np.float16 and found.shape == (50, 3) and not why
    wanted = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert np.abs(found - wanted).max() < 1e-3


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[4]], ids=str)
def test_bad_rows_have_reasons(kind):
    nan, inf = float("nan"), float("inf")
    bad = [None, [nan, 0, 1], [1, None, 0], [1, inf, 0], [0, 0, 0]]
    found, why = unit_rows(pa.array([[1, 0, 0], *bad, [0, 2, 0]], kind), "v", 3)
    assert found[[0, 6]].tolist() == [[1, 0, 0], [0, 1, 0]] and not found[1:6].any()
    assert why == {
        1: "missing_embedding: v is null",
        2: "embedding_not_finite: v",
        3: "embedding_not_finite: v",
        4: "embedding_not_finite: v",
        5: "zero_vector: v",
    }


def test_ragged_rows_have_reasons_and_a_slice_is_a_slice():
    column = pa.array([[9.0], [3, 4], [1], [], [0, 1]], pa.list_(pa.float32())).slice(1)
    found, why = unit_rows(column, "v", 2)
    assert np.allclose(found, [[0.6, 0.8], [0, 0], [0, 0], [0, 1]], atol=1e-3)
    assert why == {1: "wrong_dimension: v has 1, not 2", 2: "wrong_dimension: v has 0, not 2"}


def test_huge_and_tiny_numbers_keep_their_direction():
    column = pa.array([[1e300, 1e300], [1e-320, 0], [3e38, -4e38]], pa.list_(pa.float64()))
    found, why = unit_rows(column, "v", 2)
    assert not why and np.allclose(found, [[0.7071, 0.7071], [1, 0], [0.6, -0.8]], atol=1e-3)
