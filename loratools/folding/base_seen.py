"""A base model as an adapter divides it: weights that lie otherwise in it, cut or put together.

Single files may split what the base fuses, and fuse what it splits; their modules then are rows of
the base's. Nothing is copied: rows are read where they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loratools.base.dequantised import dequantised
from loratools.base.placement.class_view import made_of_rows
from loratools.base.weights import BaseModule, Piece
from loratools.naming.in_base import BaseRows, rows_in_base
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer
from loratools_formats.core.orientation import OTHER_BASE
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError

_LEAVES = ("weight", "bias")


@dataclass(frozen=True)
class SeenBase:
    """A base, with a tensor for each module that is not one of its own.

    Attributes:
        checkpoint: its tensors, dequantised, and those made of their rows.
        names: what each module of the adapter is called there.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str]


def seen_by(adapter: Adapter, base: Checkpoint) -> SeenBase:
    """Return a base as an adapter's modules divide it."""
    checkpoint = dequantised(base).checkpoint
    made: dict[str, TensorRef] = {}
    names: dict[str, str] = {}
    for name, rows in rows_in_base(adapter, base).items():
        if len(rows) == 1 and rows[0].is_whole:
            names[name] = rows[0].module
            continue
        # A name that no checkpoint has, and that nothing takes for a part of another.
        names[name] = f"the adapter's {name}"
        for leaf in _LEAVES:
            tensor = _made(f"{names[name]}.{leaf}", rows, leaf, checkpoint.tensors)
            if tensor is not None:
                made[tensor.key] = tensor
    return SeenBase(replace(checkpoint, tensors={**checkpoint.tensors, **made}), names)


def divided_in(adapter: Adapter, base: Checkpoint) -> dict[str, BaseModule]:
    """Return where the base has the modules that it cuts or puts together, but for plain LoRAs.

    Plain LoRAs are cut and put together themselves, which is exact, unless another kind changes
    other rows of the same tensor.

    Args:
        adapter: of any format.
        base: a checkpoint of plain tensors.

    Raises:
        AdapterError: a change has not the shape of its rows in the base.
    """
    if all(change.kind == "lora" for change in adapter.modules.values()):
        return {}
    places: dict[str, BaseModule] = {}
    for name, rows in rows_in_base(adapter, base).items():
        parts = _parts(rows, "weight", base.tensors)
        if parts is not None and not (len(rows) == 1 and rows[0].is_whole):
            places[name] = _place(adapter, name, parts)
    kinds = {name: adapter.modules[name].kind for name in places}
    shared = {key for name in places if kinds[name] != "lora" for key in _keys(places[name])}
    return {
        name: place
        for name, place in places.items()
        if kinds[name] != "lora" or not shared.isdisjoint(_keys(place))
    }


def _keys(place: BaseModule) -> set[str]:
    return {piece.stored.key for piece in place.pieces}


def _place(adapter: Adapter, name: str, parts: list[tuple[TensorRef, int, int]]) -> BaseModule:
    change, kernel = adapter.modules[name], parts[0][0].shape[2:]
    pieces = tuple(Piece(stored, False, start, stop) for stored, start, stop in parts)
    place = BaseModule(pieces, Layer("conv", kernel) if kernel else change.layer, None)
    fits = zip(change.shape, place.shape, strict=True)
    if any(own is not None and own != there for own, there in fits):
        raise AdapterError(
            "the delta does not fit the base weight",
            path=adapter.source,
            tensor=name,
            got=f"out {change.shape[0]}, in {change.shape[1]}",
            expected=f"out {place.shape[0]}, in {place.shape[1]}, as {parts[0][0].key} has it",
            hint=OTHER_BASE,
        )
    return place


def _made(
    name: str, rows: Sequence[BaseRows], leaf: str, tensors: Mapping[str, TensorRef]
) -> TensorRef | None:
    """Return a tensor of the base's rows; None if the base has not all, or they are not alike."""
    parts = _parts(rows, leaf, tensors)
    return None if parts is None else made_of_rows(name, parts)


def _parts(
    rows: Sequence[BaseRows], leaf: str, tensors: Mapping[str, TensorRef]
) -> list[tuple[TensorRef, int, int]] | None:
    """Return the rows of each of the base's tensors; None if one is not there, or of another type.

    Rows of tensors that are not of one width are of no module, either.
    """
    parts = []
    for each in rows:
        stored = tensors.get(f"{each.module}.{leaf}")
        if stored is None or stored.shape[0] % each.of:
            return None
        unit = stored.shape[0] // each.of
        parts.append((stored, each.start * unit, each.stop * unit))
    alike = {(stored.dtype, stored.shape[1:]) for stored, _, _ in parts}
    return parts if len(alike) == 1 else None
