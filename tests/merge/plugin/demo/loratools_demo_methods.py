"""Third-party merge methods of each class, with nothing but what loratools documents."""

from __future__ import annotations

import numpy as np

from loratools.operations.merge.methods import Method


def alternate(gram, weights, *, flip=False, factor: float = 1.0):
    """Add and subtract in turn; `flip` has no annotation, so its default tells its type."""
    signs = np.where(np.arange(len(weights)) % 2 == (1 if flip else 0), 1.0, -1.0)
    return factor * signs * weights


def first_basis(space, weights):
    """The deltas summed, as factors in the shared space."""
    core = np.tensordot(weights, space.cores, axes=1)
    return space.u @ core, space.v.T


def largest(tasks, weights, *, lambda_: float = 1.0):
    """Each entry from the task where it is largest."""

    def merged(start, stop):
        block = weights[:, None, None] * tasks.block(start, stop).astype(np.float64)
        chosen = np.abs(block).argmax(axis=0)
        return lambda_ * np.take_along_axis(block, chosen[None], axis=0)[0]

    return merged


ALTERNATE = Method("demo_alternate", "span", "Add and subtract.", "nobody 2026", alternate, least=2)
LARGEST = Method("demo_largest", "elementwise", "The largest entries.", "nobody 2026", largest)
FIRST_BASIS = Method("demo_first_basis", "core", "The sum.", "nobody 2026", first_basis)
