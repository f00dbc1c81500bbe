"""Compare one module of two adapters in detail."""

from __future__ import annotations

import math

import numpy as np

from loratools.algebra.median import median
from loratools.algebra.subspaces import entry_measures, overlap, principal_angles, random_overlap
from loratools.algebra.thin import Thin, cosine
from loratools.folding.thin_modules import ThinModule
from loratools.operations.compare.result import PairModule
from loratools.operations.compare.starts import Starts
from loratools_formats.core.dtypes import Array

Angles = tuple[float, float, float]


def pair_module(
    name: str,
    one: ThinModule,
    other: ThinModule,
    changes: Array,
    starts: Starts,
    sample: int | None,
    seed: int,
) -> PairModule:
    """Compare a module of two adapters.

    Args:
        name: module path.
        one: of the first adapter.
        other: of the second.
        changes: (2, 2) inner products of the changes.
        starts: how the stored A factors relate.
        sample: entries to draw; None for all.
        seed: of the sample.
    """
    first, second, product = changes[0, 0], changes[1, 1], changes[0, 1]
    angle_cosine = cosine(float(product), float(first), float(second))
    norms = math.sqrt(first), math.sqrt(second)
    moved = max(first + second - 2.0 * product, 0.0)
    direction = None if angle_cosine is None else 2.0 * norms[0] * norms[1] * (1.0 - angle_cosine)
    a_norm = float(starts.ours[0, 1])
    a_moved = max(a_norm + float(starts.theirs[0, 1] - 2.0 * starts.inner[0, 1]), 0.0)
    entries = entry_measures([one.matrices, other.matrices], sample, seed)
    pairs = list(zip(one.matrices, other.matrices, strict=True))
    outputs = _spaces(pairs, 0)
    inputs = _spaces(pairs, 1)
    return PairModule(
        name=name,
        cosine=angle_cosine,
        norms=norms,
        norm_ratio=norms[1] / norms[0] if norms[0] else None,
        moved=math.sqrt(moved) / norms[0] if norms[0] else None,
        moved_direction=min(direction / moved, 1.0) if moved and direction is not None else None,
        a_change=math.sqrt(a_moved / a_norm) if a_norm > 0.0 else None,
        output_overlap=outputs[0],
        output_overlap_random=outputs[1],
        input_overlap=inputs[0],
        input_overlap_random=inputs[1],
        output_angles=outputs[2],
        input_angles=inputs[2],
        sign_conflict=entries.conflict,
        sign_conflict_interval=(entries.low, entries.high),
        sign_conflict_expected=None if angle_cosine is None else math.acos(angle_cosine) / math.pi,
        linear_losses=(
            math.sqrt(moved) / (2.0 * norms[0]) if norms[0] else None,
            math.sqrt(moved) / (2.0 * norms[1]) if norms[1] else None,
        ),
        ties_losses=(
            _loss(entries.ties_errors[0], entries.ties_energies[0]),
            _loss(entries.ties_errors[1], entries.ties_energies[1]),
        ),
    )


def _loss(error: float, energy: float) -> float | None:
    return math.sqrt(error / energy) if energy > 0.0 else None


def _spaces(pairs: list[tuple[Thin, Thin]], side: int) -> tuple[float, float, Angles]:
    """Return overlap, its random mean, and angles in degrees: means over experts."""
    found = []
    for one, other in pairs:
        q1, q2 = one.spaces()[side], other.spaces()[side]
        degrees = np.degrees(principal_angles(q1, q2)) if q1.size and q2.size else np.full(1, 90.0)
        angles = float(degrees[0]), median(degrees), float(degrees[-1])
        found.append((overlap(q1, q2), random_overlap(q1, q2), *angles))
    mean = np.mean(found, axis=0)
    return float(mean[0]), float(mean[1]), (float(mean[2]), float(mean[3]), float(mean[4]))
