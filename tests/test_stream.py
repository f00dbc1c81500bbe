"""The best factors of a streamed matrix: near the optimum whatever the spectrum, and seeded."""

import numpy as np
import pytest

from loratools.algebra.row_blocks import RowSource, RowStore
from loratools.algebra.streamed_svd import StreamedMatrix, streamed_svd
from loratools_formats.disk.errors import AdapterError

SHAPES = [(640, 540), (540, 640)]


def matrix(shape, decay, rng):
    """Return a matrix whose singular values fall as k^-decay."""
    u, _ = np.linalg.qr(rng.standard_normal((shape[0], min(shape))))
    v, _ = np.linalg.qr(rng.standard_normal((shape[1], min(shape))))
    return (u * np.arange(1, min(shape) + 1) ** -decay) @ v.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.2, 1.0, 3.0])
def test_the_error_is_within_one_percent_of_the_optimum(shape, decay):
    x = matrix(shape, decay, np.random.default_rng(0))
    source = RowSource(shape, lambda start, stop: x[start:stop])
    found = StreamedMatrix(source, lambda: streamed_svd(source, 48, power_iterations=None, seed=0))
    sigma = np.linalg.svd(x, compute_uv=False)
    for rank in (1, 8, 32):
        error = np.sqrt(found.squared_error(*found.factors(rank)))
        assert error <= 1.01 * np.sqrt(np.sum(sigma[rank:] ** 2)) + 1e-12
        assert error == pytest.approx(np.linalg.norm(x - np.matmul(*found.factors(rank))))


def test_a_random_matrix_is_no_worse():
    x = np.random.default_rng(1).standard_normal((560, 640))
    source = RowSource(x.shape, lambda start, stop: x[start:stop])
    svd = streamed_svd(source, 80, power_iterations=None, seed=0)
    sigma = np.linalg.svd(x, compute_uv=False)
    left = np.sqrt(source.squared_norm - np.sum(svd.singular_values[:64] ** 2))
    assert left <= 1.01 * np.sqrt(np.sum(sigma[64:] ** 2))


def test_equal_seeds_give_equal_bits():
    x = np.random.default_rng(2).standard_normal((530, 550))
    source = RowSource(x.shape, lambda start, stop: x[start:stop])
    one, two = (streamed_svd(source, 20, power_iterations=None, seed=7) for _ in range(2))
    assert one.u.tobytes() == two.u.tobytes()
    other = streamed_svd(source, 20, power_iterations=None, seed=8)
    assert one.u.tobytes() != other.u.tobytes()


@pytest.mark.parametrize("shape", [(30, 700), (700, 30), (40, 40)])
def test_small_matrices_are_decomposed_exactly(shape):
    x = np.random.default_rng(3).standard_normal(shape)
    source = RowSource(shape, lambda start, stop: x[start:stop])
    svd = streamed_svd(source, 5, power_iterations=None, seed=0)
    np.testing.assert_allclose(svd.singular_values, np.linalg.svd(x, compute_uv=False), rtol=1e-10)
    np.testing.assert_allclose((svd.u * svd.singular_values) @ svd.vt, x, atol=1e-10)


def test_stored_rows_and_rows_made_anew_are_the_same():
    x = np.random.default_rng(4).standard_normal((530, 550)).astype(np.float32)
    store = RowStore(x.shape, None)
    for part in (x[:250], x[250:]):
        store.append(part, float((part.astype(np.float64) ** 2).sum()))
    source = RowSource(x.shape, lambda start, stop: x[start:stop].astype(np.float64))
    assert store.squared_norm == pytest.approx(source.squared_norm)
    one, two = (streamed_svd(s, 9, power_iterations=3, seed=0) for s in (store, source))
    np.testing.assert_allclose(one.singular_values, two.singular_values, rtol=1e-10)


def test_rows_that_overflow_are_refused():
    with pytest.raises(AdapterError, match="overflows"):
        RowSource((2, 2), lambda start, stop: np.full((stop - start, 2), 1e200))


def test_the_error_is_within_a_thousandth_of_the_optimum_above_noise():
    rng = np.random.default_rng(5)
    shape, rank = (700, 620), 16
    low = (rng.standard_normal((shape[0], 24)) * np.exp(-np.arange(24) / 8)) @ (
        rng.standard_normal((24, shape[1]))
    )
    x = low + 2.0 * rng.standard_normal(shape)
    source = RowSource(shape, lambda start, stop: x[start:stop])
    found = StreamedMatrix(
        source, lambda: streamed_svd(source, rank + 10, power_iterations=None, seed=0)
    )
    error = np.sqrt(found.squared_error(*found.factors(rank)))
    optimum = np.sqrt(np.sum(np.linalg.svd(x, compute_uv=False)[rank:] ** 2))
    assert error <= 1.001 * optimum


@pytest.mark.parametrize("power_iterations", [None, 1, 2])
def test_small_singular_values_are_found_behind_large_ones(power_iterations):
    # What is looked for is a millionth of σ₁, which XᵀX has as 1e-12: beyond float32.
    x = matrix((640, 540), 0.0, np.random.default_rng(6))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = np.concatenate([np.logspace(0, -6, 24), np.full(len(s) - 24, 1e-9)])
    x = (u * s) @ vt
    source = RowSource(x.shape, lambda start, stop: x[start:stop])
    svd = streamed_svd(source, 34, power_iterations=power_iterations, seed=0)
    np.testing.assert_allclose(svd.singular_values[:24], s[:24], rtol=1e-6)


def test_vectors_that_leave_no_room_for_as_many_again_are_those_of_power_iterations():
    x = matrix((640, 540), 0.5, np.random.default_rng(7))
    source = RowSource(x.shape, lambda start, stop: x[start:stop])
    found = StreamedMatrix(source, lambda: streamed_svd(source, 304, power_iterations=2, seed=0))
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((540, 304)))
    for _ in range(2):
        basis, _ = np.linalg.qr(x.T @ (x @ basis))
    values = np.linalg.svd(x @ basis, compute_uv=False)
    for rank in (100, 290):
        least = np.sqrt(np.linalg.norm(x) ** 2 - np.sum(values[:rank] ** 2))
        assert np.sqrt(found.squared_error(*found.factors(rank))) <= 1.0001 * least


@pytest.mark.parametrize("power", [-300, -120, -40, 40, 120, 300])
def test_sizes_that_float32_does_not_hold_lose_nothing(power):
    x = matrix((640, 540), 0.5, np.random.default_rng(8))
    errors = []
    for scaled in (x, np.ldexp(x, power)):
        source = RowSource(x.shape, lambda start, stop, rows=scaled: rows[start:stop])
        svd = streamed_svd(source, 48, power_iterations=None, seed=0)
        errors.append(1.0 - np.sum((svd.singular_values[:32] / np.linalg.norm(scaled)) ** 2))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_matrix_of_lower_rank_than_asked_for_is_found_whole(rank):
    rng = np.random.default_rng(9)
    x = rng.standard_normal((640, rank)) @ rng.standard_normal((rank, 540))
    source = RowSource(x.shape, lambda start, stop: x[start:stop])
    found = StreamedMatrix(source, lambda: streamed_svd(source, 48, power_iterations=None, seed=0))
    assert found.squared_error(*found.factors(32)) <= 1e-24 * np.linalg.norm(x) ** 2
