"""Joint bases of several matrices, against dense definitions written here, in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.algebra.joint import Bases, Joint, Triplets
from loratools.algebra.thin import Thin

EPS = float(np.finfo(np.float64).eps)


def made(seed, count=5, shape=(22, 17), rank=3, common=6, noise=0.3):
    rng = np.random.default_rng(seed)
    out, in_ = shape
    left, right = rng.standard_normal((out, common)), rng.standard_normal((common, in_))
    return [
        (
            left @ rng.standard_normal((common, rank)) + noise * rng.standard_normal((out, rank)),
            rng.standard_normal((rank, common)) @ right + noise * rng.standard_normal((rank, in_)),
        )
        for _ in range(count)
    ]


def joint(pairs, weights=None):
    triplets = [Triplets.of(Thin(b, a, use_gram=False)) for b, a in pairs]
    weights = weights or [1.0 / one.squared_norm for one in triplets]
    return Joint(triplets, weights), triplets, weights


def lost(found, pairs, weights, *, diagonal=False):
    """Return Σ w‖ΔW − UΣVᵀ‖² of the best cores, from dense matrices and by least squares."""
    u, v = found
    total = 0.0
    for (b, a), weight in zip(pairs, weights, strict=True):
        whole = b @ a
        if diagonal:
            columns = np.stack([np.outer(x, y).ravel() for x, y in zip(u.T, v.T, strict=True)], 1)
            d = np.linalg.lstsq(columns, whole.ravel(), rcond=None)[0]
            fit = (u * d) @ v.T
        else:
            fit = u @ (np.linalg.pinv(u) @ whole @ np.linalg.pinv(v.T)) @ v.T
        total += weight * float(np.sum((whole - fit) ** 2))
    return total


def dense_alternation(pairs, weights, rank, steps=300):
    """Maximise Σ w‖UᵀΔWV‖² by alternating eigenvectors of dense matrices (arXiv 2407.00066)."""
    wholes = [np.sqrt(w) * (b @ a) for (b, a), w in zip(pairs, weights, strict=True)]
    _, vectors = np.linalg.eigh(sum(one.T @ one for one in wholes))
    v = vectors[:, ::-1][:, :rank]
    for _ in range(steps):
        _, vectors = np.linalg.eigh(sum(one @ v @ v.T @ one.T for one in wholes))
        u = vectors[:, ::-1][:, :rank]
        _, vectors = np.linalg.eigh(sum(one.T @ u @ u.T @ one for one in wholes))
        v = vectors[:, ::-1][:, :rank]
    return u, v


def dense_least_squares(pairs, weights, start, steps=60):
    """Fit U, V and diagonal cores by alternating least squares on dense unfoldings."""
    u, v = start
    wholes = [np.sqrt(w) * (b @ a) for (b, a), w in zip(pairs, weights, strict=True)]
    for _ in range(steps):
        columns = np.stack([np.outer(x, y).ravel() for x, y in zip(u.T, v.T, strict=True)], 1)
        d = [np.linalg.lstsq(columns, one.ravel(), rcond=None)[0] for one in wholes]
        seen = np.concatenate([(v * row).T for row in d], axis=1)
        u = np.linalg.lstsq(seen.T, np.concatenate(wholes, axis=1).T, rcond=None)[0].T
        seen = np.concatenate([u * row for row in d])
        v = np.linalg.lstsq(seen, np.concatenate(wholes), rcond=None)[0].T
    return u, v


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_full_cores_lose_what_the_papers_iteration_on_dense_matrices_loses(rank):
    pairs = made(rank)
    cores, _, weights = joint(pairs)
    ours = lost(cores.full(rank, steps=2000, tolerance=1e-12), pairs, weights)
    dense = lost(dense_alternation(pairs, weights, rank), pairs, weights)
    assert ours == pytest.approx(dense, rel=1e-6)


def test_large_cores_improve_by_iteration_as_well(monkeypatch):
    pairs = made(1, count=8)
    cores, _, weights = joint(pairs)
    exact = lost(cores.full(6, steps=2000, tolerance=1e-12), pairs, weights)
    monkeypatch.setattr("loratools.algebra.joint._EIGEN_SIZE", 0)
    iterated = lost(cores.full(6, steps=5000, tolerance=1e-12), pairs, weights)
    assert iterated == pytest.approx(exact, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_diagonal_cores_cannot_be_improved_by_least_squares_on_dense_matrices(seed):
    pairs = made(seed)
    cores, _, weights = joint(pairs)
    found = cores.diagonal(4, steps=5_000, tolerance=1e-8)
    ours = lost(found, pairs, weights, diagonal=True)
    further = lost(dense_least_squares(pairs, weights, found), pairs, weights, diagonal=True)
    assert ours == pytest.approx(further, rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rank", [2, 5, 8])
def test_methods_lose_in_their_order(seed, rank):
    """Full cores hold every diagonal one of their rank, and iterations start from `principal`."""
    pairs = made(seed)
    cores, _, weights = joint(pairs)
    full = lost(cores.full(rank), pairs, weights)
    assert full <= lost(cores.principal(rank), pairs, weights) * (1.0 + 1e-9)
    assert full <= lost(cores.diagonal(rank), pairs, weights, diagonal=True)


@pytest.mark.parametrize("rank", [1, 3, 6, 12])
def test_energies_are_what_principal_bases_keep(rank):
    pairs = made(7)
    cores, _, weights = joint(pairs)
    energies = cores.energies()
    assert energies.sum() == pytest.approx(cores.total, rel=1e-12)
    assert len(energies) == cores.rank
    kept = cores.total - lost(cores.principal(rank), pairs, weights)
    assert energies[:rank].sum() == pytest.approx(kept, rel=1e-9)


def test_one_matrix_is_its_own_singular_triplets():
    (pair,) = made(0, count=1)
    cores, (one,), _ = joint([pair], [1.0])
    for found, diagonal in ((cores.full(3), False), (cores.diagonal(3), True)):
        bases = Bases.of(*found, diagonal=diagonal)
        core = bases.core(one)
        whole = core if diagonal else core.diagonal()
        expected = np.linalg.svd(pair[0] @ pair[1], compute_uv=False)[:3]
        np.testing.assert_allclose(np.abs(whole), expected, rtol=1e-12)
        assert bases.squared_error(one, core) <= (1e3 * EPS) ** 2 * one.squared_norm


@pytest.mark.parametrize("shape", [(22, 17), (9, 30), (30, 6)])
def test_bases_that_hold_everything_lose_rounding_only(shape):
    pairs = made(3, shape=shape)
    cores, triplets, weights = joint(pairs)
    bases = Bases.of(*cores.full(cores.rank), diagonal=False)
    for one in triplets:
        error = bases.squared_error(one, bases.core(one))
        assert error <= (1e3 * EPS) ** 2 * one.squared_norm
    assert lost((bases.u, bases.v), pairs, weights) <= (1e3 * EPS) ** 2 * cores.total


def test_the_error_of_cores_is_that_of_dense_matrices():
    pairs = made(4)
    cores, triplets, _ = joint(pairs)
    rng = np.random.default_rng(0)
    u, v = (basis + 1e-3 * rng.standard_normal(basis.shape) for basis in cores.full(5))
    for diagonal in (False, True):
        bases = Bases.of(u, v, diagonal=diagonal)
        for one, (b, a) in zip(triplets, pairs, strict=True):
            core = bases.core(one)
            whole = np.diag(core) if diagonal else core
            dense = float(np.sum((b @ a - u @ whole @ v.T) ** 2))
            assert bases.squared_error(one, core) == pytest.approx(dense, rel=1e-9)


def test_spaces_that_all_share_take_no_further_dimensions():
    """As of adapters whose A was frozen: the rows of all lie in three dimensions."""
    pairs = made(5, count=6)
    pairs = [(b, pairs[0][1]) for b, _ in pairs]
    cores, _, _ = joint(pairs)
    assert cores.sizes == (18, 3)
    twice, _, _ = joint([pairs[0], pairs[0]])
    assert twice.sizes == (3, 3)


def test_a_zero_matrix_takes_no_part():
    pairs = made(6)
    cores, _, weights = joint(pairs)
    zero = (np.zeros((22, 2)), np.zeros((2, 17)))
    with_zero, _, _ = joint([*pairs, zero], [*weights, 1.0])
    np.testing.assert_allclose(with_zero.energies(), cores.energies(), rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.0, 3.0))
def test_the_split_into_factors_does_not_matter(seed, spread):
    """(B G, G⁻¹ A) is the same ΔW, whatever G: bases span the same spaces and lose the same."""
    rng = np.random.default_rng(seed)
    pairs = made(int(rng.integers(1000)))
    turned = []
    for b, a in pairs:
        left, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        right, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        sizes = 10.0 ** rng.uniform(-spread, spread, 3)
        turned.append((b @ (left * sizes) @ right, right.T @ (left / sizes).T @ a))
    cores, _, weights = joint(pairs)
    others, _, _ = joint(turned, weights)
    assert others.sizes == cores.sizes
    # The factors were rounded after they were turned, and G is as far from orthogonal as 10^2s.
    off = 1e3 * EPS * 10.0 ** (2.0 * spread)
    np.testing.assert_allclose(others.energies(), cores.energies(), atol=off * cores.total)
    for found, turned_found in (
        (cores.full(5, steps=3), others.full(5, steps=3)),
        (cores.principal(5), others.principal(5)),
    ):
        assert lost(found, pairs, weights) == pytest.approx(
            lost(turned_found, pairs, weights), abs=1e3 * off * cores.total
        )
