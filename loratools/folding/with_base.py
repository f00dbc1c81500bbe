"""Opening modules of any kind: finding their weights in the base, and taking changes apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Decomposed, Matrix
from loratools.algebra.ranks import RankRule, Spectrum
from loratools.base.shape_only import ShapeOnly
from loratools.base.tied import find_tie, shared_embeddings
from loratools.base.weights import (
    BaseModule,
    find_base_module,
    is_fused,
    is_in_stack,
    names_under,
)
from loratools.folding.base_seen import seen_by
from loratools.folding.decomposed import Streaming, decomposed, exact_factors, rows_of
from loratools.folding.dora import Rescaling, finite_vector, rescaled_rows, rescaling_of
from loratools.folding.module import checked_form, known_shape
from loratools.folding.without_base import needs_base
from loratools.kinds import get_kind
from loratools.kinds.declaration import DeltaForm, Kronecker, Product, Weight
from loratools.lowrank.matrices import loaded, matrices
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions, rounded, spectrum_of
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import KindDelta, LowRank, ModuleChange
from loratools_formats.core.dtypes import DTYPES, Array
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk.errors import UnsupportedError

_OVERSAMPLE = 16
_MOST_TRIPLETS = 256
_ALL_TRIPLETS = 1 << 40  # more than any weight has


@dataclass(frozen=True)
class Opened:
    """One module's change, ready to be asked.

    Attributes:
        exact: factors that lose nothing but rounding, if there are any.
        matrices: its matrices, taken apart.
        planned: the factors to be made, or those there are if they only change their rank.
        rescaling: of a DoRA.
        kind: what it was.
    """

    exact: Product | None
    matrices: list[Decomposed]
    planned: PlannedFactors
    rescaling: Rescaling | None
    kind: str


class Opener:
    """Opens the modules of one adapter.

    Args:
        adapter: of any kind.
        rule: how ranks will be chosen.
        options: how to compute and store.
        base: the base model, for kinds that need it.

    Attributes:
        fused: modules to fold whose weights are in one tensor with others in the base.

    Raises:
        UnsupportedError: a module needs the base, and there is none.
        AdapterError: a module's weight is not in the base.
    """

    def __init__(
        self,
        adapter: Adapter,
        rule: RankRule,
        options: ComputeOptions,
        base: Checkpoint | None,
    ) -> None:
        self.adapter = adapter
        self.rule = rule
        self.options = options
        self.device = Device(options.device)
        self.fused: list[str] = []
        self.places = self._find_base_modules(base)
        shapes = [place.shape for place in self.places.values()]
        self.largest = (
            max((shape[0] for shape in shapes), default=0),
            max((shape[1] for shape in shapes), default=0),
        )

    def _find_base_modules(self, base: Checkpoint | None) -> dict[str, BaseModule]:
        needing = [name for name, delta in self.adapter.modules.items() if needs_base(delta)]
        if base is None:
            if needing:
                delta = self.adapter.modules[needing[0]]
                only_shapes = not delta.is_dora and get_kind(delta.kind).needs == "shape"
                what = "shapes of the base model's layers" if only_shapes else "base model"
                raise UnsupportedError(
                    f"a weight change of kind {delta.kind} depends on the {what}",
                    path=self.adapter.source,
                    tensor=needing[0],
                    hint="Pass the base model's folder or safetensors file as `base`"
                    + ("; only headers are read" if only_shapes else ""),
                )
            return {}
        places = {}
        seen = seen_by(self.adapter, base)
        names, in_base = names_under(self.adapter, seen.checkpoint, needing), seen.names
        for name, delta in self.adapter.modules.items():
            if delta.kind == "lora":
                continue
            if is_fused(names, in_base[name]):
                self.fused.append(name)
            if needs_base(delta) or not is_in_stack(names, in_base[name]):
                places[name] = find_base_module(
                    names, in_base[name], delta.direction, only_read=True
                )
        return places

    def refuse_tied(self, base: Checkpoint) -> None:
        """Refuse changes that no plain LoRA makes where the embedding is tied to the output layer.

        Raises:
            UnsupportedError: a module is such a change of a tied tensor.
        """
        needing = [name for name, delta in self.adapter.modules.items() if needs_base(delta)]
        seen = seen_by(self.adapter, base)
        names, in_base = names_under(self.adapter, seen.checkpoint, needing), seen.names
        tie = find_tie(names, adapter=self.adapter, guess_head=True)
        shared = {f"{name}.weight" for name in shared_embeddings(names)}
        tied = shared if tie is None else {*shared, *map(names.spelling, (tie.embedding, tie.head))}
        for name, delta in self.adapter.modules.items():
            reason = get_kind(delta.kind).if_tied if delta.factors is None else ""
            if reason and names.spelling(f"{in_base[name]}.weight") in tied:
                raise UnsupportedError(
                    f"kind {delta.kind} cannot be expressed as a plain LoRA on this base: {reason}",
                    path=self.adapter.source,
                    tensor=name,
                    hint="Fuse it into the base: loratools fuse MODEL ADAPTER -o fused",
                )

    def open(self, name: str) -> Opened:
        """Return a module ready to be asked for spectra and factors."""
        whole = self.adapter.modules[name]
        place = self.places.get(name)
        delta = whole.direction
        if isinstance(delta, LowRank):
            if whole.magnitude is None:
                like = PlannedFactors.like(delta)
                return Opened(None, list(matrices(delta, self.device)), like, None, "lora")
            assert place is not None
            ((b, a),) = loaded(delta)
            product = Product(delta.scale * b.astype(np.float64), a.astype(np.float64))
            bias = _scaled_bias(delta)
            return self._through_dora(name, place, product, whole.magnitude, whole, bias)
        if delta.layer.kind == "experts":
            return self._stack(name, delta)
        weight: Weight
        kind = get_kind(delta.kind)
        if place is None:
            weight = ShapeOnly(known_shape(delta))
        elif kind.needs == "weight" or whole.is_dora:
            weight = place.weight()
        else:
            weight = ShapeOnly(place.shape)
        change = checked_form(name, delta, weight, self.largest)
        layer = delta.layer if place is None else place.layer
        bias = added_bias(delta, weight, place)
        magnitude = kind.magnitude_of(whole)
        if magnitude is not None and place is not None:
            return self._through_dora(name, place, change, magnitude, whole, bias)
        exact = exact_factors(change, of_any_rank=kind.low_rank and not self.rule.is_given)
        matrix: Decomposed
        if exact is not None and not isinstance(change, Kronecker):
            matrix = Matrix(exact.b, exact.a, 1.0, self.device, use_gram=True)
        else:
            matrix = decomposed(change, self.device, self._streaming(name), name)
        planned = PlannedFactors.new(name, layer, rows_of(change).shape, bias=bias)
        return Opened(exact, [matrix], planned, None, delta.kind)

    def _stack(self, name: str, delta: KindDelta) -> Opened:
        """Return the changes of stacked experts, which no kind folds exactly."""
        changes = [
            checked_form(name, plane, ShapeOnly(known_shape(plane))) for plane in delta.planes()
        ]
        streaming = self._streaming(name)
        parts = [
            decomposed(change, self.device, streaming, f"{name}#{index}")
            for index, change in enumerate(changes)
        ]
        shape = rows_of(changes[0]).shape
        planned = PlannedFactors.new(
            name, delta.layer, shape, experts=delta.experts, bias=delta.bias
        )
        return Opened(None, parts, planned, None, delta.kind)

    def _through_dora(
        self,
        name: str,
        place: BaseModule,
        change: DeltaForm,
        magnitude: TensorRef,
        whole: ModuleChange,
        bias: TensorRef | None,
    ) -> Opened:
        weight = place.weight()
        rescaling = rescaling_of(magnitude, whole.axis, weight, rows_of(change))
        matrix = decomposed(rescaled_rows(rescaling), self.device, self._streaming(name), name)
        planned = PlannedFactors.new(name, place.layer, weight.shape, bias=bias)
        return Opened(None, [matrix], planned, rescaling, whole.kind)

    def _streaming(self, name: str) -> Streaming:
        rule = self.rule
        highest = rule.override(name) or rule.rank or rule.max_rank
        if rule.needs_every_value and rule.override(name) is None:
            highest = _ALL_TRIPLETS
        elif highest is None:
            highest = max(_MOST_TRIPLETS, rule.min_rank or 0)
        return Streaming(highest + _OVERSAMPLE, self.options.seed)

    def spectrum(self, name: str, opened: Opened) -> Spectrum:
        """Return a module's singular values, as far as they are known."""
        spectrum = spectrum_of(name, opened.planned, opened.matrices, self.options)
        known = spectrum.singular_values
        if opened.exact is None and known.shape[1] < min(spectrum.shape):
            # Triplets beyond those asked for are there to make the others accurate.
            known = known[:, : self._streaming(name).width - _OVERSAMPLE]
        norms = np.array([part.squared_norm for part in opened.matrices])
        tail = np.maximum(norms - (known**2).sum(axis=1), 0.0)
        rank = len(opened.exact.a) if opened.exact is not None else known.shape[1]
        return replace(
            spectrum,
            singular_values=known,
            rank=min(rank, known.shape[1]),
            tail=tail if opened.exact is None and known.shape[1] < min(spectrum.shape) else None,
        )


def added_bias(delta: KindDelta, weight: Weight, place: BaseModule | None) -> TensorRef | None:
    """Return what a change adds to its layer's bias, None if nothing."""
    function = get_kind(delta.kind).bias
    if function is None or place is None or place.bias is None:
        return delta.bias
    added = function(delta, weight, finite_vector(place.bias, "bias"))
    return _in_float32(place.bias.key, added)


def _scaled_bias(delta: LowRank) -> TensorRef | None:
    """Return what factors add to their layer's bias, None if nothing."""
    if delta.bias is None:
        return None
    added = delta.scale * finite_vector(delta.bias, "bias")
    return _in_float32(delta.bias.key, added)


def _in_float32(key: str, values: Array) -> TensorRef:
    """Round values once.

    Raises:
        AdapterError: float32 does not hold them.
    """
    with np.errstate(over="ignore"):
        stored, _ = rounded(values, DTYPES["F32"], key)
    return in_memory(key, stored)
