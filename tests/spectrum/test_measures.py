"""Every measure equals the dense computation in float64."""

import math
import tracemalloc

import numpy as np
import pytest
import scipy.cluster.hierarchy
import scipy.linalg
import scipy.stats
from numpy.testing import assert_allclose

from loratools.algebra.clusters import clusters, leaves, linkage
from loratools.algebra.measures import concentration, knee, kurtosis, measures
from loratools.algebra.outliers import OUTLIER, robust_z, scores_in_families, theil_sen
from loratools.algebra.subspaces import (
    entry_measures,
    overlap,
    principal_angles,
    random_overlap,
    ties,
)
from loratools.algebra.thin import Thin, inner

SHAPES = [(40, 30, 6), (30, 40, 6), (12, 50, 20)]
SINGLE = 20 * float(np.finfo(np.float32).eps)
"""Of sums of at most 20 terms in float32."""


def factors(shape, seed=0):
    rng = np.random.default_rng(seed)
    out, in_, rank = shape
    b = rng.standard_normal((out, rank)) * 0.7 ** np.arange(rank)
    return b, rng.standard_normal((rank, in_))


def haar(rng, rows, columns):
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    return q * np.sign(np.diag(r))


@pytest.mark.parametrize("use_gram", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_thin_matrix_is_its_dense_product(shape, use_gram):
    b, a = factors(shape)
    thin, dense = Thin(b, a, 1.5, use_gram=use_gram), 1.5 * b @ a
    sigma = np.linalg.svd(dense, compute_uv=False)[: len(thin.singular_values)]
    assert_allclose(thin.singular_values, sigma, atol=1e-6 * sigma[0] if use_gram else 1e-12)
    assert_allclose(thin.squared_norm, np.sum(dense**2))
    assert_allclose(thin.row_energies(), np.sum(dense**2, axis=1), rtol=SINGLE)
    assert_allclose(thin.column_energies(), np.sum(dense**2, axis=0), rtol=SINGLE)
    assert_allclose(np.concatenate([block for _, _, block in thin.blocks()]), dense)
    rows, columns = np.array([3, 0]), np.array([1, 7])
    assert_allclose(thin.entries(rows, columns), dense[rows, columns])
    u, s, vt = thin.svd
    assert_allclose(u * s @ vt, dense, atol=1e-12 * sigma[0])
    other = Thin(*factors(shape, 1), -0.5)
    assert_allclose(inner(thin, other), np.sum(dense * (-0.5 * other.b @ other.a)))


@pytest.mark.parametrize("case", ["skewed", "cancelling", "large", "zero component"])
def test_energies_hold_where_components_differ_in_size(case):
    b, a = factors((700, 40, 6))
    if case == "skewed":  # each component has its size in one factor, in turns
        sizes = 10.0 ** np.array([-30, 30, -20, 20, 0, 0])
        b, a = b * sizes, a / sizes[:, None]
    elif case == "cancelling":
        b = np.concatenate([b, -b], axis=1)
        a = np.concatenate([a, a + 1e-3 * np.random.default_rng(1).standard_normal(a.shape)])
    elif case == "large":
        b, a = b * 1e60, a * 1e40
    else:
        b[:, 2] = 0.0
    dense = b @ a
    thin = Thin(b, a)
    assert_allclose(thin.row_energies(), np.sum(dense**2, axis=1), rtol=SINGLE)
    assert_allclose(thin.column_energies(), np.sum(dense**2, axis=0), rtol=SINGLE)


def test_spectrum_measures_are_their_definitions():
    dense = np.linalg.multi_dot(factors((40, 30, 6)))
    sigma = np.linalg.svd(dense, compute_uv=False)[:6]
    found = measures(sigma, dense.shape)
    assert_allclose(found.frobenius, np.linalg.norm(dense))
    assert_allclose(found.spectral, np.linalg.norm(dense, 2))
    assert_allclose(found.stable_rank, np.linalg.norm(dense) ** 2 / np.linalg.norm(dense, 2) ** 2)
    assert_allclose(found.effective_rank, np.exp(scipy.stats.entropy(sigma)))
    assert_allclose(found.participation_ratio, np.sum(sigma**2) ** 2 / np.sum(sigma**4))
    energies = np.cumsum(sigma**2) / np.sum(sigma**2)
    wanted = tuple(next(k for k in range(1, 7) if energies[k - 1] >= t) for t in (0.9, 0.95, 0.99))
    assert found.energy_ranks == wanted
    beta = 30 / 40
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    assert found.threshold_rank == np.sum(sigma > omega * np.median(sigma))


def test_measures_of_a_zero_matrix_are_zero():
    found = measures(np.zeros(4), (10, 10))
    assert (found.frobenius, found.stable_rank, found.effective_rank) == (0.0, 0.0, 0.0)
    assert (found.energy_ranks, found.knee, found.threshold_rank) == ((0, 0, 0), 0, 0)


@pytest.mark.parametrize("signal", [1, 3, 7])
def test_the_knee_is_where_the_signal_ends(signal):
    sigma = np.concatenate([np.linspace(10, 9, signal), np.linspace(0.5, 0.1, 12)])
    assert knee(sigma) == signal


def test_random_means_of_concentration_and_kurtosis_hold_on_average():
    rng = np.random.default_rng(0)
    sigma, rows, columns = np.array([3.0, 2.0, 0.5]), 20, 24
    spread = np.sum(sigma**2) ** 2 / np.sum(sigma**4)
    ratios, tails = [], []
    for _ in range(600):
        thin = Thin(haar(rng, rows, 3) * sigma, haar(rng, columns, 3).T)
        ratios.append(concentration(thin.row_energies(), spread))
        tails.append(np.divide(*kurtosis(thin, spread)))
    for sample in (ratios, tails):
        assert abs(np.mean(sample) - 1.0) < 4.0 * np.std(sample) / math.sqrt(len(sample))


def test_kurtosis_is_that_of_all_entries():
    thin = Thin(*factors((40, 30, 6)))
    dense = thin.b @ thin.a
    expected = dense.size * np.sum(dense**4) / np.sum(dense**2) ** 2
    assert_allclose(kurtosis(thin, 2.0)[0], expected)


def test_a_family_of_many_experts_takes_memory_in_proportion():
    """256 experts of 58 layers, stored one by one: 110 million pairs."""
    rng, count = np.random.default_rng(0), 256 * 58
    y = 3.0 - 2e-4 * np.arange(count) + 0.1 * rng.standard_normal(count)
    y[::5] += 50.0
    tracemalloc.start()
    slope, intercept = theil_sen(y)
    scores = robust_z(y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * y.nbytes
    assert slope == pytest.approx(-2e-4, rel=0.02)
    assert intercept == pytest.approx(3.0, abs=0.1)
    assert (scores[::5] > OUTLIER).all()
    assert np.median(np.abs(scores)) < 1.0


def test_the_trend_is_the_one_of_scipy():
    y = np.random.default_rng(3).standard_normal(31) + 0.3 * np.arange(31)
    slope, intercept = theil_sen(y)
    found = scipy.stats.theilslopes(y, method="joint")
    assert_allclose([slope, intercept], [found.slope, found.intercept])


def test_an_outlier_in_a_trend_is_found_and_only_it():
    norms = {f"layers.{i}.q": math.exp(0.2 * i + 0.02 * (i % 3)) for i in range(20)}
    norms["layers.11.q"] *= 1.6
    norms |= {f"layers.{i}.v": 1.0 for i in range(4)}
    scores = scores_in_families(norms)
    assert {name for name, score in scores.items() if abs(score) > 3.5} == {"layers.11.q"}
    assert not any(name.endswith("v") for name in scores)
    residuals = np.array([0.02 * (i % 3) for i in range(20)])
    expected = (residuals - np.median(residuals)) / (
        1.4826 * np.median(np.abs(residuals - np.median(residuals)))
    )
    assert_allclose(robust_z(residuals.tolist()), expected, atol=0.2)


@pytest.mark.parametrize("dimensions", [(4, 4), (3, 5), (6, 2)])
def test_angles_are_those_of_scipy(dimensions):
    rng = np.random.default_rng(1)
    one = haar(rng, 20, dimensions[0])
    near = one[:, : dimensions[1]] + 1e-9 * rng.standard_normal(one[:, : dimensions[1]].shape)
    for other in (haar(rng, 20, dimensions[1]), np.linalg.qr(near)[0]):
        expected = np.sort(scipy.linalg.subspace_angles(one, other))
        assert_allclose(principal_angles(one, other), expected, rtol=1e-6, atol=1e-14)
        assert_allclose(
            overlap(one, other) * len(expected), np.sum(np.cos(expected) ** 2), rtol=1e-9
        )


def test_the_random_overlap_holds_on_average():
    rng = np.random.default_rng(2)
    found = [overlap(haar(rng, 30, 4), haar(rng, 30, 7)) for _ in range(500)]
    expected = random_overlap(np.empty((30, 4)), np.empty((30, 7)))
    assert abs(np.mean(found) - expected) < 4.0 * np.std(found) / math.sqrt(len(found))


def test_signs_and_ties_are_the_dense_ones():
    import torch
    from peft.utils.merge_utils import ties as peft_ties

    one, other = Thin(*factors((40, 30, 6))), Thin(*factors((40, 30, 5), 1), 0.5)
    dense = [one.b @ one.a, 0.5 * other.b @ other.a]
    found = entry_measures([[one], [other]], None, 0)
    assert found.exact
    assert found.low == found.conflict == found.high == np.mean(dense[0] * dense[1] < 0)
    merged = peft_ties([torch.from_numpy(d) for d in dense], torch.ones(2), 0.2).numpy()
    assert_allclose(ties([d.reshape(-1) for d in dense]).reshape(40, 30), merged, atol=1e-12)
    assert_allclose(found.ties_errors, [np.sum((merged - d) ** 2) for d in dense])
    assert_allclose(found.ties_energies, [np.sum(d**2) for d in dense])


def test_the_interval_of_a_sample_holds_the_truth_as_often_as_it_says():
    one, other = Thin(*factors((60, 50, 6))), Thin(*factors((60, 50, 6), 1))
    truth = np.mean((one.b @ one.a) * (other.b @ other.a) < 0)
    held = [
        found.low <= truth <= found.high
        for seed in range(300)
        for found in [entry_measures([[one], [other]], 500, seed)]
    ]
    assert 0.90 <= np.mean(held) <= 0.99


def test_a_sample_of_a_stack_draws_from_every_expert():
    zero = Thin(np.zeros((10, 2)), np.zeros((2, 8)))
    one = Thin(*factors((10, 8, 2)))
    found = entry_measures([[zero, one], [zero, one]], 100, 0)
    assert not found.exact
    assert found.conflict == 0.0
    dense = one.b @ one.a
    assert 0.0 < found.ties_energies[0] < 100 * np.max(dense**2)


@pytest.mark.parametrize("count", [2, 3, 9, 40])
def test_clusters_are_those_of_scipy(count):
    points = np.random.default_rng(count).standard_normal((count, 3))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    condensed = distances[np.triu_indices(count, 1)]
    expected = scipy.cluster.hierarchy.linkage(condensed, "average")
    found = linkage(distances)
    assert_allclose(found, expected, atol=1e-12)
    assert sorted(leaves(found)) == list(range(count))
    height = float(np.median(condensed)) / 2
    labels = scipy.cluster.hierarchy.fcluster(expected, height, "distance")
    groups = {tuple(np.flatnonzero(labels == label)) for label in set(labels)}
    assert {tuple(group) for group in clusters(found, height)} == groups
