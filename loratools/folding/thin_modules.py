"""The modules of an adapter of any kind as thin matrices, opened one at a time.

Factors are taken as they are, kinds that fold are folded, and any other change is given by its
leading singular triplets with the energy of the rest. A DoRA changes the weight by
m/‖W + ΔW‖ ⊙ (W + ΔW) − W, which only the base tells: without it, a DoRA module gives its direction
ΔW and says that it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from loratools.algebra.once import once
from loratools.algebra.one_matrix import Decomposed
from loratools.algebra.ranks import RankRule, Spectrum
from loratools.algebra.thin import Thin
from loratools.folding.decomposed import dense
from loratools.folding.regenerate import regenerated
from loratools.folding.with_base import Opener
from loratools.folding.without_base import with_settings
from loratools.lowrank.matrices import loaded
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.core.factors import NOT_FINITE
from loratools_formats.disk.errors import AdapterError, naming

_SAFE_SCALE = 1e60
"""Up to which squares of products of float32 numbers stay below float64's largest."""


@dataclass(frozen=True)
class ThinModule:
    """One module's change.

    Attributes:
        name: module path.
        kind: `lora`, `dora`, or another kind's name.
        layer: what is adapted.
        shape: (out, in) of one matrix.
        matrices: one, or one for each stacked expert.
        rank: of the factors in the file; None of a kind that has none.
        alpha: as the file states it, None if it does not.
        scale: that multiplies the factors' product; None of a kind that has none.
        directional: whether the matrices are a DoRA's direction rather than its change.
        like: the factors whose rank would be replaced in a file.
        bytes_per_rank: that one more rank costs in a file.
        known: the spectrum, if it was needed to open the module; else it is computed when asked
            for.
    """

    name: str
    kind: str
    layer: Layer
    shape: tuple[int, int]
    matrices: tuple[Thin, ...]
    rank: int | None
    alpha: float | None
    scale: float | None
    directional: bool
    like: PlannedFactors
    bytes_per_rank: int = 0
    known: Spectrum | None = None

    @once
    def spectrum(self) -> Spectrum:
        """Singular values and what a rank costs in a file, as `squeeze` and `to-lora` have them."""
        if self.known is not None:
            return self.known
        rows = np.zeros((len(self.matrices), self.like.rank))
        for row, matrix in zip(rows, self.matrices, strict=True):
            values = matrix.singular_values
            row[: len(values)] = values
        return Spectrum(self.name, self.shape, rows, self.like.rank, self.bytes_per_rank)

    def without_matrices(self) -> ThinModule:
        """Return the module without what takes memory; its spectrum stays known."""
        return replace(self, known=self.spectrum, matrices=())


class ThinModules:
    """Opens the modules of one adapter as thin matrices.

    Args:
        adapter: of any kind.
        base: the base model, for DoRA and kinds that need it.
        operation: what it is for, for messages.
        given: settings that neither the file nor the base's configuration holds, by name.

    Attributes:
        adapter: the adapter, with settings that the base tells filled in.
        modules: its changes by path, DoRAs as their directions where there is no base.
        directional: whether there are such DoRAs.

    Raises:
        UnsupportedError: a module needs the base, and there is none, or the factors do not tell
            the true change.
        AdapterError: no modules, or a module's weight is not in the base.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: Checkpoint | None,
        operation: str,
        given: Mapping[str, str] | None = None,
    ) -> None:
        complete = regenerated(adapter, base, given or {})
        adapter = with_settings(complete.adapter, complete.unused, base)
        adapter.require_true_delta(operation)
        if not adapter.modules:
            raise AdapterError("the adapter has no modules", path=adapter.source)
        self.adapter = adapter
        self.modules = {
            name: ModuleChange(change.direction) if base is None and change.factors else change
            for name, change in adapter.modules.items()
        }
        self.directional = base is None and any(
            change.is_dora for change in adapter.modules.values()
        )
        self._options = ComputeOptions()
        self._opener = Opener(
            replace(adapter, modules=self.modules),
            RankRule(),
            self._options,
            base,
        )

    def open(self, name: str) -> ThinModule:
        """Return a module's change as thin matrices.

        Raises:
            AdapterError: NaN or infinite values, or tensors that do not fit.
        """
        whole, change = self.adapter.modules[name], self.modules[name]
        with naming(self.adapter.source, name):
            if change.factors is not None and not change.is_dora:
                return self._of_factors(name, whole, change.factors)
            return self._of_other(name, change)

    def _of_factors(self, name: str, whole: ModuleChange, delta: LowRank) -> ThinModule:
        wide = "F64" in (delta.a.dtype.code, delta.b.dtype.code)
        thin = []
        for b, a in loaded(delta, narrow=True):
            thin.append(Thin(b, a, delta.scale, use_gram=not wide))
            if not (_is_finite(b, a) if wide else _has_finite_sizes(thin[-1])):
                raise NonFiniteError(NOT_FINITE, tensor=name)
            overflows = wide or abs(delta.scale) > _SAFE_SCALE
            if overflows and not np.isfinite(thin[-1].squared_norm):
                raise AdapterError("squares of the factors overflow float64", tensor=name)
        out, in_ = delta.shape
        bits = in_ * delta.a.dtype.bits + out * delta.b.dtype.bits
        return ThinModule(
            name,
            whole.kind,
            delta.layer,
            delta.shape,
            tuple(thin),
            delta.rank,
            delta.alpha,
            delta.scale,
            whole.is_dora,
            PlannedFactors.like(delta),
            bytes_per_rank=delta.experts * bits // 8,
        )

    def _of_other(self, name: str, change: ModuleChange) -> ThinModule:
        opened = self._opener.open(name)
        spectrum = self._opener.spectrum(name, opened)
        if opened.exact is not None and len(opened.exact.a) <= min(opened.planned.shape):
            matrices: tuple[Thin, ...] = (Thin(opened.exact.b, opened.exact.a),)
        else:
            matrices = tuple(_leading(part, spectrum.rank) for part in opened.matrices)
        direction = change.factors
        return ThinModule(
            name,
            opened.kind,
            opened.planned.layer,
            opened.planned.shape,
            matrices,
            None if direction is None else direction.rank,
            None if direction is None else direction.alpha,
            None if direction is None else direction.scale,
            False,
            opened.planned,
            known=spectrum,
        )


class NonFiniteError(AdapterError):
    """A factor holds NaN or infinite values."""


def _is_finite(b: Array, a: Array) -> bool:
    return bool(np.isfinite(b).all() and np.isfinite(a).all())


def _has_finite_sizes(thin: Thin) -> bool:
    """Return whether float32 factors are finite, by the squares of their columns and rows.

    Those hold in float64 whatever is finite in float32, and are needed anyway.
    """
    with np.errstate(invalid="ignore"):
        grams = thin.grams
    return bool(np.isfinite(np.diag(grams.b)).all() and np.isfinite(np.diag(grams.a)).all())


def _leading(part: Decomposed, rank: int) -> Thin:
    """Return the leading triplets of a matrix, and the energy of the others."""
    b, a = part.factors(rank)
    kept = float(np.sum(part.singular_values[:rank] ** 2))
    rest = max(part.squared_norm - kept, 0.0)
    negligible = part.squared_norm * 1e-14
    tail = rest if rest > negligible else 0.0
    return Thin(b, a, use_gram=False, tail=tail, whole=lambda: dense(part))
