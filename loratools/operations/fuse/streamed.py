"""Changes that are no product of thin factors, put into the base by rows.

Full differences, what rotates or scales the base weight, and DoRAs with a magnitude for each input:
`fuse` needs no factors of them. Their rows are computed from their declaration and the base weight
when a tensor's turn comes, so that nothing is approximated and no weight is held whole, unless it
is stored as (in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loratools.base.placement import BiasPlacement, Placement, Placements
from loratools.base.placement.names import Names
from loratools.base.weights import BaseModule, Piece, find_base_module
from loratools.folding.decomposed import rows_of
from loratools.folding.dora import rescaled_rows, rescaling_of
from loratools.folding.module import checked_form
from loratools.folding.with_base import added_bias
from loratools.kinds import get_kind
from loratools.kinds.declaration import Product, Rows
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError, UnsupportedError


@dataclass(frozen=True)
class StreamedPlacement:
    """Outputs of one module's change that go to one stored tensor.

    Attributes:
        key: the tensor.
        module: the adapter's module.
        change: its change.
        place: where all of the module's weight is.
        piece: which outputs of the tensor these are.
        first: the first of them, counted in the module.
        largest: the largest sides of all weights of the adapter, on which some kinds depend.
        order: which of the module's outputs the tensor holds, in its order; None for those from
            `first` on, as they are.
    """

    key: str
    module: str
    change: ModuleChange
    place: BaseModule
    piece: Piece
    first: int
    largest: tuple[int, int]
    order: Sequence[int] | None = None

    @property
    def outputs(self) -> tuple[int, int]:
        """The outputs of the tensor."""
        return self.piece.start, self.piece.stop

    def rows(self) -> Rows:
        """Return the change of the tensor's outputs, as (outputs, in)."""
        weight = self.place.weight()
        direction, magnitude = self.change.direction, self.change.magnitude
        if isinstance(direction, LowRank):
            whole = rows_of(_factors(direction))
        else:
            whole = rows_of(checked_form(self.module, direction, weight, self.largest))
            magnitude = get_kind(direction.kind).magnitude_of(self.change)
        if magnitude is not None:
            whole = rescaled_rows(rescaling_of(magnitude, self.change.axis, weight, whole))
        first, order = self.first, self.order
        shape = self.piece.stop - self.piece.start, whole.shape[1]
        if order is None:
            return Rows(shape, lambda start, stop: whole.rows(first + start, first + stop))
        return Rows(shape, lambda start, stop: picked_rows(whole, order[start:stop]))


def picked_rows(whole: Rows, wanted: Sequence[int]) -> Array:
    """Return some rows in any order; those between the first and the last are computed, too."""
    top = min(wanted)
    found: Array = whole.rows(top, max(wanted) + 1)[np.array(wanted) - top]
    return found


def _factors(delta: LowRank) -> Product:
    a, b = delta.a.load(np.float64), delta.b.load(np.float64)
    return Product(delta.scale * b, a)


def is_streamed(delta: ModuleChange) -> bool:
    """Return whether a change is put into the base by rows."""
    return delta.factors is None or (delta.is_dora and delta.axis == "input")


def streamed_placements(
    adapter: Adapter, base: Checkpoint, divided: Mapping[str, BaseModule]
) -> tuple[list[StreamedPlacement], list[BiasPlacement]]:
    """Return where an adapter's streamed changes go, and what they add to biases.

    Args:
        adapter: the adapter, with the base's names.
        base: the base.
        divided: where the base has modules that it cuts or puts together, which are streamed too.

    Raises:
        AdapterError: a module fits no tensor of the base, or several.
        UnsupportedError: a change of embeddings or of single experts in a stack.
    """
    streamed = {
        name: delta
        for name, delta in adapter.modules.items()
        if name in divided or is_streamed(delta)
    }
    if not streamed:
        return [], []
    names = Names(base)
    places = {
        name: divided.get(name) or _place(names, name, delta) for name, delta in streamed.items()
    }
    largest = (
        max(place.shape[0] for place in places.values()),
        max(place.shape[1] for place in places.values()),
    )
    weights = list(_pieces(streamed, places, largest))
    biases = [
        placed
        for name, delta in streamed.items()
        for placed in _biases(name, delta, places[name], names if name in divided else None)
    ]
    return weights, biases


def _place(names: Names, name: str, delta: ModuleChange) -> BaseModule:
    refuse_unstreamable(name, delta)
    return find_base_module(names, name, delta.direction)


def refuse_unstreamable(name: str, delta: ModuleChange) -> None:
    """Raise `UnsupportedError` for a change of an embedding or a stack, not put in by rows."""
    if delta.layer.kind in ("embedding", "experts"):
        raise UnsupportedError(
            f"a change of this kind is not fused into {delta.layer.kind}",
            tensor=name,
            hint="Make it a plain LoRA first: "
            "loratools to-lora ADAPTER --base MODEL --rank 16 -o plain",
        )


def _pieces(
    streamed: Mapping[str, ModuleChange],
    places: Mapping[str, BaseModule],
    largest: tuple[int, int],
) -> Iterator[StreamedPlacement]:
    for name, delta in streamed.items():
        first = 0
        for piece in places[name].pieces:
            key = piece.stored.key
            yield StreamedPlacement(key, name, delta, places[name], piece, first, largest)
            first += piece.stop - piece.start


def _biases(
    name: str, delta: ModuleChange, place: BaseModule, divided: Names | None
) -> Iterator[BiasPlacement]:
    """Yield what a change adds to biases.

    Args:
        name: of its module.
        delta: the change.
        place: where its weight is.
        divided: the base, if it cuts the module or puts it together with others.
    """
    direction = delta.direction
    if isinstance(direction, LowRank):
        bias, scale = direction.bias, direction.scale
    else:
        bias, scale = added_bias(direction, place.weight(), place), 1.0
    if bias is None:
        return
    if divided is not None:
        first = 0
        for piece in place.pieces:
            key = piece.stored.key.removesuffix("weight") + "bias"
            stop = first + piece.stop - piece.start
            if key not in divided.tensors:
                raise _no_bias(name)
            outputs, rows = ((piece.start, piece.stop),), ((first, stop),)
            yield BiasPlacement(key, name, bias, scale, outputs, rows)
            first = stop
        return
    if place.bias is None:
        raise _no_bias(name)
    yield BiasPlacement(place.bias.key, name, bias, scale)


def _no_bias(name: str) -> AdapterError:
    return AdapterError(
        "the adapter changes a bias that the base does not have",
        tensor=name,
        hint="Nothing of this adapter can be fused without it",
    )


def refuse_clashes(
    base: Checkpoint, placements: Placements, streamed: Sequence[StreamedPlacement]
) -> None:
    """Refuse two modules of one adapter on the same outputs, or a change of an untied weight.

    Raises:
        AdapterError: two modules fit one tensor.
        UnsupportedError: the weight is tied, and the adapter unties it.
    """
    for number, one in enumerate(streamed):
        others: list[Placement | StreamedPlacement] = [*streamed[:number], *placements.deltas]
        for other in others:
            spans = (other.outputs,) if isinstance(other, StreamedPlacement) else other.outputs
            start, stop = one.outputs
            apart = bool(spans) and all(b <= start or stop <= a for a, b in spans)
            if one.key == other.key and one.module != other.module and not apart:
                raise AdapterError(
                    "two modules of the adapter fit the same base tensor",
                    path=base.path,
                    tensor=one.key,
                    got=f"{one.module} and {other.module}",
                )
        if one.key in placements.untied.values():
            raise UnsupportedError(
                "a tied weight is changed in part by a kind that is not of low rank",
                tensor=one.module,
                hint="Make it a plain LoRA first: "
                "loratools to-lora ADAPTER --base MODEL --rank 16 -o plain",
            )
