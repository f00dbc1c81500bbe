"""Factors whose terms nearly cancel, against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loratools.algebra.cancelling import core_of
from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Matrix
from loratools.algebra.thin import Thin

OUT, IN = 6, 7
SIZES = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a type and return float64."""
    import ml_dtypes

    return values.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float64)


def exact(b: np.ndarray, a: np.ndarray, scale: float = 1.0) -> list[list[Fraction]]:
    """Return scale · b @ a as fractions."""
    factor = Fraction(scale)
    left = [[Fraction(float(x)) * factor for x in row] for row in b]
    right = [[Fraction(float(x)) for x in row] for row in a.T]
    return [[sum(x * y for x, y in zip(u, v, strict=True)) for v in right] for u in left]


def norm(matrix: list[list[Fraction]]) -> float:
    """‖·‖_F, rounded once or twice."""
    squared = sum(x * x for row in matrix for x in row)
    return math.sqrt(squared)


def difference(x: list[list[Fraction]], y: list[list[Fraction]]) -> list[list[Fraction]]:
    return [[u - v for u, v in zip(p, q, strict=True)] for p, q in zip(x, y, strict=True)]


def cancelling(
    dtype: str, smallness: float, pairs: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return b and a, each column of b twice with opposite signs, and nearly equal rows of a."""
    rng = np.random.default_rng(seed)
    c, d, e = rng.standard_normal((OUT, pairs)), *rng.standard_normal((2, pairs, IN))
    b = rounded(np.hstack([c, -c]) * 2.0 ** rng.integers(-3, 3), dtype)
    return b, rounded(np.vstack([d + smallness * e, d]), dtype)


@pytest.mark.slow
@example("float16", 0.01, 2, 1.0, 2)  # just beyond what Gram matrices can tell
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SIZES)),
    st.floats(-14.0, -1.0).map(lambda power: 10.0**power),
    st.integers(1, 3),
    st.sampled_from([1.0, 0.5, 1.7, -3.0]),
    st.integers(0, 2**32),
)
def test_norms_factors_and_errors_are_those_of_exact_arithmetic(dtype, small, pairs, scale, seed):
    b, a = cancelling(dtype, small, pairs, seed)
    truth = exact(b, a, scale)
    size = norm(truth)
    matrix = Matrix(b, a, scale, Device("cpu"), use_gram=dtype != "float64")
    assert math.sqrt(matrix.squared_norm) == pytest.approx(size, rel=1e-9)
    values = matrix.singular_values
    assert np.linalg.norm(values) == pytest.approx(size, rel=1e-6)
    for rank in range(1, 2 * pairs + 1):
        new_b, new_a = matrix.factors(rank)
        error = norm(difference(truth, exact(new_b, new_a)))
        left_out = float(np.linalg.norm(values[rank:]))
        assert abs(error - left_out) <= 1e-6 * size
        reported = math.sqrt(matrix.squared_error(new_b, new_a))
        if reported > 1e-4 * size or error > 1e-4 * size:
            assert reported == pytest.approx(error, rel=1e-3)
    thin = Thin(b, a, scale, use_gram=dtype != "float64")
    assert math.sqrt(thin.squared_norm) == pytest.approx(size, rel=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("smallness", [1.0, 1e-3, 1e-6, 1e-9, 0.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_of_a_higher_rank_than_their_product(dtype, smallness, transposed):
    b, a = cancelling(dtype, smallness, 9, 4)  # 18 columns on 6 × 7
    if transposed:
        b, a = a.T.copy(), b.T.copy()
    truth = exact(b, a, 0.5)
    size = norm(truth)
    matrix = Matrix(b, a, 0.5, Device("cpu"), use_gram=dtype != "float64")
    assert math.sqrt(matrix.squared_norm) == pytest.approx(size, rel=1e-9)
    values = matrix.singular_values
    assert values.shape == (18,)
    assert not values[6:].any()
    assert np.linalg.norm(values) == pytest.approx(size, rel=1e-6)
    for rank in (1, 3, 6, 8, 18):
        new_b, new_a = matrix.factors(rank)
        assert new_b.shape[1] == new_a.shape[0] == rank
        error = norm(difference(truth, exact(new_b, new_a)))
        assert abs(error - float(np.linalg.norm(values[rank:]))) <= 1e-6 * size
        reported = math.sqrt(matrix.squared_error(new_b, new_a))
        assert reported >= error * (1.0 - 1e-9) - 1e-12 * size
        assert reported <= error + 1e-6 * size


@pytest.mark.parametrize("smallness", [1e-2, 1e-3, 1e-4])
def test_qr_is_enough_for_what_cancels_a_little(smallness, monkeypatch):
    def never(*_):
        raise AssertionError("taken apart in more bits than it needs")

    b, a = cancelling("float32", smallness, 3, 1)
    truth = exact(b, a)
    size = norm(truth)
    monkeypatch.setattr("loratools.algebra.cancelling.core_of", never)
    matrix = Matrix(b, a, 1.0, Device("cpu"), use_gram=True)
    assert math.sqrt(matrix.squared_norm) == pytest.approx(size, rel=1e-9)
    thin = Thin(b, a, 1.0)
    assert math.sqrt(thin.squared_norm) == pytest.approx(size, rel=1e-9)
    for rank in (1, 2, 3, 6):
        new_b, new_a = (part.astype("f4").astype("f8") for part in matrix.factors(rank))
        error = norm(difference(truth, exact(new_b, new_a)))
        reported = math.sqrt(matrix.squared_error(new_b, new_a))
        assert error <= reported <= error + 1e-9 * size


def test_an_error_is_never_below_the_true_one():
    for seed in range(20):
        b, a = cancelling("float64", 1e-9, 2, seed)
        matrix = Matrix(b, a, 1.0, Device("cpu"), use_gram=False)
        new_b, new_a = matrix.factors(2)
        error = norm(difference(exact(b, a), exact(new_b, new_a)))
        assert math.sqrt(matrix.squared_error(new_b, new_a)) >= error * (1.0 - 1e-9)


def test_a_change_that_cancels_whole_is_zero_and_loses_nothing():
    rng = np.random.default_rng(0)
    c, d = rng.standard_normal((OUT, 2)), rng.standard_normal((2, IN))
    matrix = Matrix(np.hstack([c, -c]), np.vstack([d, d]), 1.0, Device("cpu"), use_gram=True)
    assert matrix.squared_norm == 0.0
    assert not matrix.singular_values.any()
    new_b, new_a = matrix.factors(1)
    assert not new_b.any()
    assert not new_a.any()
    assert matrix.squared_error(new_b, new_a) == 0.0


def weighted(b: np.ndarray, a: np.ndarray, weights: np.ndarray) -> list[list[Fraction]]:
    """Return b @ diag(weights) @ a as fractions."""
    left = [
        [Fraction(float(x)) * Fraction(float(w)) for x, w in zip(row, weights, strict=True)]
        for row in b
    ]
    right = [[Fraction(float(x)) for x in row] for row in a.T]
    return [[sum(x * y for x, y in zip(u, v, strict=True)) for v in right] for u in left]


@pytest.mark.parametrize("seed", range(60))
def test_a_core_is_off_by_no_more_than_its_floor(seed):
    rng = np.random.default_rng(seed)
    out, width, pairs = (int(n) for n in rng.integers(1, 9, 3))
    c = rng.standard_normal((out, pairs)) * 2.0 ** rng.integers(-90, 90, pairs)
    d = rng.standard_normal((pairs, width)) * 2.0 ** rng.integers(-90, 90, (pairs, 1))
    small = 10.0 ** rng.uniform(-40, -1)
    b, weights = np.hstack([c, c]), np.repeat([1.7, -1.7], pairs)
    a = np.vstack([d * (1.0 + small * rng.standard_normal(d.shape)), d])
    if seed % 3 == 0:  # the same matrix, turned, so that no column is like another
        turned = np.linalg.qr(rng.standard_normal((pairs, pairs)))[0]
        b, a = np.hstack([c, c @ turned]), np.vstack([d, turned.T @ d])
    if seed % 5 == 0:
        b, a, weights = np.hstack([b, 0 * b]), np.vstack([a, a]), np.tile(weights, 2)
    core = core_of(b, a, weights)
    whole = weighted(core.q_b @ core.core, core.q_a.T, np.ones(core.core.shape[1]))
    truth = weighted(b, a, weights)
    own_rounding = 1e-14 * norm(truth)
    assert abs(float(np.linalg.norm(core.core)) - norm(truth)) <= core.floor + own_rounding
    assert norm(difference(truth, whole)) <= core.floor + own_rounding
    terms = np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1) * np.abs(weights)
    assert core.floor <= 1e-27 * terms.sum()
    for q in (core.q_b, core.q_a):
        np.testing.assert_allclose(q.T @ q, np.eye(q.shape[1]), atol=1e-13)


def test_rows_that_are_summed_in_blocks():
    rng = np.random.default_rng(3)
    c, d = rng.standard_normal((2500, 1)), rng.standard_normal((1, 2))
    core = core_of(
        np.hstack([c, c]),
        np.vstack(
            [
                d,
                d * (1 + 1e-20),
            ]
        ),
        np.array([1.0, -1.0]),
    )
    assert core.norm == 0.0
    b, a = np.hstack([c, c * (1.0 - 2.0**-52)]), np.vstack([d, d])
    truth = norm(weighted(b, a, np.array([1.0, -1.0])))
    assert core_of(b, a, np.array([1.0, -1.0])).norm == pytest.approx(truth, rel=1e-9)
