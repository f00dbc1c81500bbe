"""Factor-space algebra against dense float64 NumPy, on NumPy arrays and on torch tensors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.algebra import linalg, residuals


def factors(seed, out, in_, rank, decay=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    b = rng.standard_normal((out, rank)) * decay ** np.arange(rank)
    return b.astype(dtype), rng.standard_normal((rank, in_)).astype(dtype)


def dense(b, a, scale=1.0):
    return scale * (b.astype(np.float64) @ a.astype(np.float64))


def truncated(delta, rank):
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


shapes = st.tuples(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 24))


@given(shapes, st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_both_routes_find_the_dense_singular_values(shape, scale):
    b, a = factors(*shape)
    want = np.linalg.svd(dense(b, a, scale), compute_uv=False)
    by_qr = linalg.singular_values(b, a, scale)
    by_gram = linalg.gram_core(linalg.grams(b, a), scale).singular_values
    count = len(by_qr)
    np.testing.assert_allclose(by_qr, want[:count], atol=1e-12 * want[0])
    shared = min(len(by_gram), len(want))
    np.testing.assert_allclose(by_gram[:shared], want[:shared], atol=3e-7 * want[0])


@given(shapes, st.integers(1, 24))
@settings(max_examples=60, deadline=None)
def test_both_routes_give_the_optimal_factors(shape, rank):
    b, a = factors(*shape, decay=0.8)
    want, s = truncated(dense(b, a, 3.0), rank)
    by_qr = linalg.qr_factors(b, a, 3.0, rank)
    by_gram = linalg.gram_factors(b, a, linalg.gram_core(linalg.grams(b, a), 3.0), rank)
    for found in (by_qr, by_gram):
        assert np.linalg.norm(dense(found.b, found.a) - want) <= 1e-6 * s[0]


def test_factors_are_canonical():
    b, a = factors(1, 30, 20, 8, decay=0.7)
    for found in (
        linalg.qr_factors(b, a, 2.0, 5),
        linalg.gram_factors(b, a, linalg.gram_core(linalg.grams(b, a), 2.0), 5),
        linalg.rsvd_factors(b, a, 2.0, 5, oversample=3, power_iterations=2, seed=0),
    ):
        s = found.singular_values
        assert (np.diff(s) < 0).all()
        np.testing.assert_allclose(found.b.T @ found.b, np.diag(s), atol=1e-6 * s[0])
        np.testing.assert_allclose(found.a @ found.a.T, np.diag(s), atol=1e-6 * s[0])
        assert (np.abs(found.b).max(axis=0) == found.b.max(axis=0)).all()


def test_gauge_does_not_change_the_factors():
    b, a = factors(2, 25, 35, 6, decay=0.5)
    gauge = np.random.default_rng(3).standard_normal((6, 6))
    one = linalg.qr_factors(b, a, 1.0, 4)
    two = linalg.qr_factors(b @ gauge, np.linalg.inv(gauge) @ a, 1.0, 4)
    assert relative(two.b, one.b) < 1e-5
    assert relative(two.a, one.a) < 1e-5


def test_numerically_zero_directions_come_out_as_zeros():
    b, a = factors(4, 30, 30, 8)
    b[:, 5:] = b[:, :3]
    a[5:] = 2 * a[:3]
    core = linalg.gram_core(linalg.grams(b, a), 1.0)
    assert np.count_nonzero(core.singular_values) == 5
    found = linalg.gram_factors(b, a, core, 8)
    assert not found.b[:, 5:].any()
    assert relative(dense(found.b, found.a), dense(b, a)) < 1e-7


def test_all_zero_factors():
    b, a = np.zeros((10, 4), np.float32), np.ones((4, 6), np.float32)
    core = linalg.gram_core(linalg.grams(b, a), 2.0)
    found = linalg.gram_factors(b, a, core, 2)
    assert not core.singular_values.any()
    assert not found.b.any()
    assert not found.a.any()


@pytest.mark.slow
def test_rsvd_with_enough_directions_is_the_exact_svd():
    b, a = factors(5, 60, 50, 12, decay=0.9)
    want, _ = truncated(dense(b, a, 0.5), 6)
    found = linalg.rsvd_factors(b, a, 0.5, 6, oversample=6, power_iterations=1, seed=7)
    assert relative(dense(found.b, found.a), want) < 1e-10


@pytest.mark.slow
def test_rsvd_is_near_the_optimum_and_better_with_power_iterations():
    b, a = factors(6, 300, 200, 64, decay=0.98)
    delta = dense(b, a)
    optimum = np.linalg.norm(delta - truncated(delta, 8)[0])

    def error(iterations):
        found = linalg.rsvd_factors(b, a, 1.0, 8, oversample=4, power_iterations=iterations, seed=0)
        return np.linalg.norm(delta - dense(found.b, found.a)) / optimum

    assert 1.0 <= error(2) < error(0)
    assert error(2) < 1.02


def test_rsvd_repeats_with_its_seed_only():
    b, a = factors(8, 80, 70, 40)

    def run(seed):
        return linalg.rsvd_factors(b, a, 1.0, 4, oversample=2, power_iterations=0, seed=seed).b

    assert np.array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))


@given(shapes, shapes)
@settings(max_examples=40, deadline=None)
def test_concatenation_is_the_sum(first, second):
    b1, a1 = factors(*first)
    b2, a2 = factors(second[0], first[1], first[2], second[3])
    b, a = linalg.concatenate([(2.0, b1, a1), (-0.5, b2, a2)])
    assert b.shape[1] == first[3] + second[3]
    want = dense(b1, a1, 2.0) + dense(b2, a2, -0.5)
    np.testing.assert_allclose(b @ a, want, atol=1e-10)


def test_inner_product_and_norm():
    b1, a1 = factors(9, 20000, 30, 5)
    b2, a2 = factors(10, 20000, 30, 7)
    want = np.sum(dense(b1, a1) * dense(b2, a2))
    assert linalg.inner(b1, a1, b2, a2) == pytest.approx(want, rel=1e-10)
    squared = linalg.grams(b1, a1).squared_norm
    assert squared == pytest.approx(np.linalg.norm(dense(b1, a1)) ** 2, rel=1e-12)


@pytest.mark.parametrize("size", [0.3, 1e-3, 1e-6, 1e-9])
def test_residual_norm_of_any_size(size):
    b, a = factors(11, 40, 50, 6)
    new_b, new_a = b.astype(np.float64), a.astype(np.float64)
    new_b = new_b + size * np.random.default_rng(0).standard_normal(b.shape)
    error, norm = residuals.residual_norm(b, a, 1.0, linalg.grams(b, a), new_b, new_a)
    want = np.linalg.norm(dense(b, a) - new_b @ new_a)
    assert error == pytest.approx(want, rel=1e-6)
    assert norm == pytest.approx(np.linalg.norm(dense(b, a)), rel=1e-12)


def test_torch_tensors_take_the_same_path():
    import torch

    b, a = factors(12, 50, 40, 8, decay=0.8)
    tb, ta = torch.from_numpy(b), torch.from_numpy(a)
    pairs = [
        (
            linalg.gram_factors(b, a, linalg.gram_core(linalg.grams(b, a), 1.5), 3),
            linalg.gram_factors(tb, ta, linalg.gram_core(linalg.grams(tb, ta), 1.5), 3),
        ),
        (linalg.qr_factors(b, a, 1.5, 3), linalg.qr_factors(tb, ta, 1.5, 3)),
        (
            linalg.rsvd_factors(b, a, 1.5, 3, oversample=2, power_iterations=1, seed=5),
            linalg.rsvd_factors(tb, ta, 1.5, 3, oversample=2, power_iterations=1, seed=5),
        ),
    ]
    for ours, theirs in pairs:
        assert isinstance(theirs.b, torch.Tensor)
        np.testing.assert_allclose(theirs.b.numpy(), ours.b, atol=1e-9)
        np.testing.assert_allclose(theirs.a.numpy(), ours.a, atol=1e-9)
    new = linalg.qr_factors(tb, ta, 1.5, 3)
    error, _ = residuals.residual_norm(tb, ta, 1.5, linalg.grams(tb, ta), new.b, new.a)
    s = np.linalg.svd(dense(b, a, 1.5), compute_uv=False)
    assert error == pytest.approx(np.sqrt(np.sum(s[3:] ** 2)), rel=1e-9)


def test_narrow_factors_are_widened_without_loss():
    rng = np.random.default_rng(11)
    b = rng.standard_normal((5000, 40)).astype(np.float32)
    a = rng.standard_normal((40, 3000)).astype(np.float32)
    narrow, wide = linalg.grams(b, a), linalg.grams(b.astype(np.float64), a.astype(np.float64))
    assert np.array_equal(narrow.b, wide.b)
    assert np.array_equal(narrow.a, wide.a)
    core = linalg.gram_core(wide, 0.5)
    found = linalg.gram_factors(b, a, core, 40)
    rest = 0.5 * (b.astype(np.float64) @ a) - found.b @ found.a
    assert np.linalg.norm(rest) <= 1e-9 * core.singular_values[0]


@pytest.mark.parametrize("zeros", [0, 1, 3])
def test_gram_route_of_factors_without_full_rank(zeros):
    rng = np.random.default_rng(12)
    b, a = rng.standard_normal((300, 8)), rng.standard_normal((8, 200))
    b[:, 4:] = b[:, :4] @ rng.standard_normal((4, 4))
    b[:, :zeros] = 0.0
    dense = b @ a
    core = linalg.gram_core(linalg.grams(b, a), 1.0)
    true = np.linalg.svd(dense, compute_uv=False)[:8]
    assert np.allclose(core.singular_values, true, rtol=0.0, atol=1e-6 * true[0])
    found = linalg.gram_factors(b, a, core, 8)
    assert np.linalg.norm(dense - found.b @ found.a) <= 1e-6 * true[0]


@pytest.mark.parametrize("spread", [3, 6, 9])
@pytest.mark.parametrize("shape", [(5, 8, 13), (15, 32, 21), (40, 30, 12), (1, 26, 20)], ids=str)
def test_columns_and_rows_of_opposite_sizes_do_not_drown_the_others(shape, spread):
    out, in_, rank = shape
    rng = np.random.default_rng(spread)
    sizes = 10.0 ** rng.uniform(-spread, spread, rank)
    sizes[:2] = 10.0**-spread, 10.0**spread
    b = (rng.standard_normal((out, rank)) * sizes).astype(np.float32)
    a = (rng.standard_normal((rank, in_)) / sizes[:, None]).astype(np.float32)
    b[:, 2] = 0.0
    dense = 1.5 * (b.astype(np.float64) @ a.astype(np.float64))
    s = np.linalg.svd(dense, compute_uv=False)
    core = linalg.gram_core(linalg.grams(b, a), 1.5)
    count = min(shape)
    assert np.abs(core.singular_values[:count] - s[:count]).max() <= 1e-7 * s[0]
    for k in (rank, 2):
        found = linalg.gram_factors(b, a, core, k)
        error = np.linalg.norm(found.b @ found.a - dense)
        assert error <= np.linalg.norm(s[k:]) + 1e-6 * np.linalg.norm(s)


def test_a_large_row_beside_a_column_of_zeros_adds_nothing():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes = 10.0 ** rng.uniform(-6, 6, 12)
        b, a = rng.standard_normal((40, 12)) * sizes, rng.standard_normal((12, 30)) / sizes[:, None]
        b[:, 2], a[5] = 0.0, 0.0
        core = linalg.gram_core(linalg.grams(b, a), 1.0)
        s = np.linalg.svd(b @ a, compute_uv=False)[:12]
        assert np.abs(core.singular_values - s).max() <= 1e-7 * s[0]
        found = linalg.gram_factors(b, a, core, 12)
        assert np.linalg.norm(found.b @ found.a - b @ a) <= 1e-6 * s[0]
