"""Intruder dimensions equal the paper's definition, on planted cases and trained adapters."""

import dense
import numpy as np
import pytest
from numpy.testing import assert_allclose

from loratools.algebra.intruders import (
    amplification,
    base_svd,
    certified,
    in_base,
    largest_atom,
    leading_triplets,
)
from loratools.algebra.thin import Thin

SHAPES = [(120, 80), (80, 120), (100, 100)]


def planted(shape, seed=0):
    """Return W and a ΔW with two strong random directions and two along W's own."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) / np.sqrt(shape[1])
    u, _, vt = np.linalg.svd(weight, full_matrices=False)
    b = np.concatenate([rng.standard_normal((shape[0], 2)), 3.0 * u[:, :2]], axis=1)
    a = np.concatenate([rng.standard_normal((2, shape[1])), 0.2 * vt[:2]])
    a[:2] *= 3.0 / np.linalg.norm(a[:2], axis=1)[:, None]
    b[:, :2] /= np.linalg.norm(b[:, :2], axis=0)
    return weight, Thin(b, a, 1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_cosines_are_exact_in_the_singular_basis(shape):
    weight, delta = planted(shape)
    cosines, found, (u, s, vt) = dense.intruders(weight, delta.b @ delta.a, 10, 0.5)
    result = in_base(base_svd(weight), delta, 10, 0.5)
    assert_allclose(result.cosines, cosines, atol=1e-9)
    assert result.intruders == list(found) == [0, 1]
    assert_allclose(result.s, s[:10], rtol=1e-12)
    own = (result.u * result.s) @ result.vt
    assert_allclose(own, (u[:, :10] * s[:10]) @ vt[:10], atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_bounds_never_contradict_the_definition(shape, seed):
    weight, delta = planted(shape, seed)
    cosines, found, _ = dense.intruders(weight, delta.b @ delta.a, 10, 0.5)
    result = certified(weight, delta, 10, 0.5)
    for j, verdict in enumerate(result.verdicts):
        assert verdict == "undetermined" or (verdict == "intruder") == (j in found), cosines[j]
    assert 0 in result.intruders or 1 in result.intruders
    assert result.verdicts.count("undetermined") <= 1


def test_the_bound_on_an_atom_is_one():
    rng = np.random.default_rng(5)
    values = np.sort(rng.uniform(0.1, 2.0, 200))
    for atom in (0.1, 0.3, 0.6):
        start = rng.standard_normal(200)
        start /= np.linalg.norm(start)
        start *= np.sqrt(1.0 - atom)
        start[70] = np.sqrt(atom)
        start /= np.linalg.norm(start)
        bound = largest_atom(lambda x: values * x, start, 0.0)
        assert np.max(start**2) <= bound * (1.0 + 1e-9)
        assert bound <= atom + 0.15


def test_leading_triplets_are_those_of_numpy_where_singular_values_cluster():
    rng = np.random.default_rng(6)
    u, _ = np.linalg.qr(rng.standard_normal((90, 60)))
    v, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    sizes = np.concatenate([np.full(5, 2.0), np.linspace(1.99, 1.0, 55)])
    matrix = (u * sizes) @ v.T
    found_u, found_s, found_vt = leading_triplets(
        lambda x: matrix @ x, lambda y: matrix.T @ y, matrix.shape, 8
    )
    assert_allclose(found_s, sizes[:8], rtol=1e-10)
    assert_allclose(matrix @ found_vt.T, found_u * found_s, atol=1e-9)
    zero = leading_triplets(lambda x: 0.0 * (matrix @ x), lambda y: matrix.T @ y * 0.0, (90, 60), 3)
    assert_allclose(zero[1], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_trained_adapters_have_the_intruders_of_the_definition(name):
    from loratools.operations.spectrum.operation import spectrum
    from loratools_formats import read_adapter
    from loratools_formats.checkpoints.checkpoint import read_checkpoint

    weights, changes = dense.base_weights(), dense.peft_changes(dense.TINY / name)
    result = spectrum(read_adapter(dense.TINY / name), base=read_checkpoint(dense.TINY / "model"))
    assert len(result.matrices) == len(changes)
    for matrix in result.matrices:
        weight, change = weights[matrix.name], changes[matrix.name]
        cosines, found, _ = dense.intruders(weight, change, 10, 0.5)
        assert_allclose(matrix.base.cosines, cosines, atol=1e-7)
        assert (matrix.base.intruders, matrix.base.undetermined) == (len(found), 0)
        assert matrix.base.exact
        relative = np.linalg.norm(change) / np.linalg.norm(weight)
        assert_allclose(matrix.base.relative_change, relative, rtol=1e-6)
        spectral = np.linalg.norm(change, 2) / np.linalg.norm(weight, 2)
        assert_allclose(matrix.base.relative_spectral, spectral, rtol=1e-6)
        after = weight + change
        norms = np.linalg.norm(weight, axis=1), np.linalg.norm(after, axis=1)
        assert_allclose(matrix.base.magnitude_change, np.mean(np.abs(norms[1] - norms[0])))
        cosine = np.sum(weight * after, axis=1) / norms[0] / norms[1]
        assert_allclose(matrix.base.direction_change, np.mean(1.0 - cosine), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_bounds_on_trained_adapters_never_contradict_the_definition(name, monkeypatch):
    """As for weights that are too large to decompose: what bounds leave open is counted apart."""
    import loratools as lt

    exact = lt.spectrum(dense.TINY / name, base=dense.TINY / "model")
    monkeypatch.setattr("loratools.base.decompositions._EXACT_SIDE", 0)
    bounded = lt.spectrum(dense.TINY / name, base=dense.TINY / "model")
    settled = 0
    for one, other in zip(exact.matrices, bounded.matrices, strict=True):
        assert not other.base.exact
        assert other.base.leading == one.base.leading
        least = other.base.intruders
        assert least <= one.base.intruders <= least + other.base.undetermined
        settled += other.base.undetermined == 0
        for truth, known in zip(one.base.cosines, other.base.cosines, strict=True):
            assert known <= truth + 1e-6
    assert settled > len(exact.matrices) // 2


def test_amplification_is_the_ratio_of_norms_in_the_changes_own_spaces():
    weight, delta = planted((120, 80))
    change = delta.b @ delta.a
    u, _, vt = np.linalg.svd(change)
    inside = np.linalg.norm(u[:, :4].T @ weight @ vt[:4].T)
    assert_allclose(amplification(weight, delta), np.linalg.norm(change) / inside)
