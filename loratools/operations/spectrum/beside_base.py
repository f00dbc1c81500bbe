"""One matrix beside its base weight: size, amplification, intruder dimensions, parts of change."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loratools.algebra.intruders import (
    BaseSvd,
    Leading,
    amplification,
    base_svd,
    certified,
    in_base,
    leading_triplets,
)
from loratools.algebra.thin import Thin
from loratools.factors.matrices import loaded
from loratools.operations.spectrum.result import BaseMeasures
from loratools_formats.core.adapter import Delta, Dora
from loratools_formats.disk.errors import OptionError, OutputError

Array = np.ndarray[Any, Any]

_EXACT_SIDE = 1024
_NORM_TOLERANCE = 1e-6  # of a residual; the error of σ₁ is its square


@dataclass(frozen=True)
class IntruderOptions:
    """How intruder dimensions are looked for.

    Attributes:
        count: leading singular vectors of W + ΔW to examine, k of arXiv 2410.21228; 0 for none.
        epsilon: a vector intrudes if its |cos| with every one of W's is below this.
        exact: decompose base weights of any size; by default those of at most 1024 on a side, and
            larger ones are judged by bounds.
        cache: folder that keeps decompositions of base weights, by a digest of their values.

    Raises:
        OptionError: a number out of range.
    """

    count: int = 10
    epsilon: float = 0.5
    exact: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise OptionError("the number of singular vectors is negative", got=self.count)
        if not 0.0 < self.epsilon <= 1.0:
            raise OptionError("epsilon is a cosine", got=self.epsilon, expected="above 0, at most 1")


def leading(weight: Array, delta: Thin, options: IntruderOptions) -> tuple[Leading, bool]:
    """Return the leading triplets of W + ΔW, judged, and whether their cosines are exact."""
    kept = _Cache(options.cache, weight)
    found = kept.load()
    if found is None and (options.exact or min(weight.shape) <= _EXACT_SIDE):
        found = base_svd(weight)
        kept.store(found)
    if found is not None:
        return in_base(found, delta, options.count, options.epsilon), True
    return certified(weight, delta, options.count, options.epsilon), False


def beside_base(
    weight: Array, delta: Thin, whole: Delta, options: IntruderOptions
) -> BaseMeasures:
    """Return what a matrix is beside its base weight.

    Args:
        weight: W (out, in) float64.
        delta: ΔW, whose tail counts in its norm only.
        whole: the module's change as it was read.
        options: how to look for intruder dimensions; where ΔW has a tail, there are none to tell.
    """
    squared = float(np.vdot(weight, weight))
    top = _spectral_norm(weight) if squared else 0.0
    examined = squared > 0.0 and options.count > 0 and delta.tail == 0.0
    found, exact = leading(weight, delta, options) if examined else (None, False)
    magnitude, direction = _parted(weight, merged_weight(weight, delta, whole))
    return BaseMeasures(
        relative_change=float(np.sqrt(delta.squared_norm / squared)) if squared else None,
        relative_spectral=float(delta.singular_values[0]) / top if top else None,
        amplification=amplification(weight, delta) if squared and delta.squared_norm else None,
        leading=0 if found is None else len(found.s),
        intruders=0 if found is None else len(found.intruders),
        undetermined=0 if found is None else found.verdicts.count("undetermined"),
        cosines=() if found is None else tuple(float(c) for c in found.cosines),
        exact=exact,
        magnitude_change=magnitude,
        direction_change=direction,
    )


def _spectral_norm(weight: Array) -> float:
    _, s, _ = leading_triplets(
        lambda x: weight @ x, lambda y: weight.T @ y, weight.shape, 1, _NORM_TOLERANCE
    )
    return float(s[0])


def merged_weight(weight: Array, delta: Thin, whole: Delta) -> Array | None:
    """Return W + ΔW, None where ΔW is not known in whole.

    A DoRA's is m/‖W + BA‖ ⊙ (W + BA), from its direction and magnitudes.
    """
    if isinstance(whole, Dora) and whole.axis == "output":
        ((b, a),) = loaded(whole.direction)
        merged: Array = weight + whole.direction.scale * (b.astype(np.float64) @ a)
        norms = np.linalg.norm(merged, axis=1)
        gains = whole.magnitude.load(np.float64).reshape(-1) / np.where(norms > 0.0, norms, 1.0)
        return merged * gains[:, None]
    if delta.tail:
        return None
    return weight + delta.scale * (delta.b.astype(np.float64) @ delta.a)


def _parted(weight: Array, merged: Array | None) -> tuple[float | None, float | None]:
    """Return ΔM and ΔD over outputs (arXiv 2402.09353, §3.2)."""
    if merged is None:
        return None, None
    before, after = np.linalg.norm(weight, axis=1), np.linalg.norm(merged, axis=1)
    products = before * after
    dots = np.einsum("ij,ij->i", weight, merged)
    cosines = np.divide(dots, products, out=np.ones_like(dots), where=products > 0.0)
    return float(np.abs(after - before).mean()), float((1.0 - cosines).mean())


class _Cache:
    """Decompositions of base weights in a folder, by the SHA-256 of their shape and values."""

    def __init__(self, folder: Path | None, weight: Array) -> None:
        self._shape = weight.shape
        self._file: Path | None = None
        if folder is not None:
            digest = hashlib.sha256(repr(weight.shape).encode())
            digest.update(np.ascontiguousarray(weight, np.float64).view(np.uint8).data)
            self._file = folder / f"{digest.hexdigest()}.svd.npz"

    def load(self) -> BaseSvd | None:
        """Return what is kept for the weight, None if nothing whole."""
        if self._file is None or not self._file.is_file():
            return None
        try:
            with np.load(self._file, allow_pickle=False) as arrays:
                found = BaseSvd(arrays["u"], arrays["s"], arrays["vt"])
        except (OSError, ValueError, KeyError, EOFError):
            return None  # cut short or foreign: it is computed again and replaced
        rows, columns = self._shape
        size = min(self._shape)
        shapes = (found.u.shape, found.s.shape, found.vt.shape)
        return found if shapes == ((rows, size), (size,), (size, columns)) else None

    def store(self, found: BaseSvd) -> None:
        """Keep a decomposition; it appears whole or not at all.

        Raises:
            OutputError: the folder cannot be written to.
        """
        if self._file is None:
            return
        buffer = io.BytesIO()
        np.savez(buffer, u=found.u, s=found.s, vt=found.vt)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._file.parent, delete=False) as file:
                file.write(buffer.getbuffer())
            os.replace(file.name, self._file)
        except OSError as error:
            raise OutputError(
                f"the cache cannot be written: {error.strerror}", path=self._file.parent
            ) from error
