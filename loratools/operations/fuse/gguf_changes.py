"""Where an adapter's changes go in a GGUF model.

A product of thin factors is translated as by `convert`: rows of B are put into llama.cpp's
order. DoRAs, rotations and whatever else depends on the weight are computed on the module's weight
as transformers has it, with the rows of llama.cpp's tensors put back in order; then each tensor
takes its rows of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from loratools.base.placement import Placement
from loratools.base.repeated import stored_in, without_repeated
from loratools.base.weights import BaseModule, Piece
from loratools.kinds import get_kind
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.plan import ready
from loratools.operations.fuse.streamed import StreamedPlacement, refuse_unstreamable
from loratools.operations.fuse.terms import WeightedChange
from loratools_formats.containers.gguf.model import decoded
from loratools_formats.containers.gguf.splits import GgufModel
from loratools_formats.contract.format import Context
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer, ModuleChange
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import Buffer, TensorRef, in_file
from loratools_formats.disk.errors import AdapterError, UnsupportedError, naming


def gguf_changes(item: FuseInput, base: GgufModel) -> list[tuple[str, WeightedChange]]:
    """Return the tensors that an adapter changes, with the changes, in GGUF's layout.

    Raises:
        UnsupportedError: the adapter has no true ΔW, or changes something that llama.cpp has no
            tensor for.
        AdapterError: a module does not fit the model, or two fit one tensor.
    """
    placements: list[Placement | StreamedPlacement] = []
    adapter = _in_model_terms(ready(item.adapter, None), base)
    by_rows = {n: d for n, d in adapter.modules.items() if d.factors is None or d.is_dora}
    products = {n: d for n, d in adapter.modules.items() if n not in by_rows}
    in_gguf = get_format("gguf").from_model(
        replace(adapter, modules=products), Context(base=base.path)
    )
    for module, delta in in_gguf.modules.items():
        is_embedding = delta.layer.kind == "embedding"
        placements.append(Placement(f"{module}.weight", module, delta, transposed=is_embedding))
    placements += _streamed(by_rows, base)
    found: dict[str, WeightedChange] = {}
    for change in (WeightedChange(placement, item.weight) for placement in placements):
        key = change.placement.key
        _refuse_scaled(key, base)
        if key in found:
            raise AdapterError(
                "two modules of the adapter fit the same base tensor",
                path=base.path,
                tensor=key,
                got=change.placement.module,
            )
        found[key] = change
    return list(found.items())


def _refuse_scaled(name: str, base: GgufModel) -> None:
    if f"{name.removesuffix('.weight')}.scale" in base.tensors:
        raise UnsupportedError(
            "the model keeps a scale beside this tensor, which is not supported",
            path=base.path,
            tensor=name,
            got=base.tensors[name].kind.name,
            hint="Start from the original model",
        )


def _in_model_terms(adapter: Adapter, base: GgufModel) -> Adapter:
    """Return an adapter with the base model's names; one of GGUF is returned unchanged."""
    target = get_format("gguf")
    if adapter.format == target.name:
        return adapter
    adapter = get_format(adapter.format).to_model(adapter, Context(base=base.path))
    if adapter.replacements:
        adapter = without_repeated(adapter, stored_in(base.path))
    for loss in target.losses(adapter):
        raise UnsupportedError(
            f"{loss.name} {loss.reason}",
            path=adapter.source,
            hint="Fuse it into the transformers checkpoint instead, and convert that",
        )
    return adapter


def _streamed(modules: Mapping[str, ModuleChange], base: GgufModel) -> list[StreamedPlacement]:
    """Return where changes of any kind go.

    Args:
        modules: by the base model's names.
        base: the model.

    Raises:
        AdapterError: a module does not fit the model.
        UnsupportedError: llama.cpp has no such module, or it is an embedding, an expert or a bias.
    """
    if not modules:
        return []
    rows_of = get_format("gguf").rows_in_base(base.path)
    orders: dict[str, Mapping[str, list[int]]] = {}
    places: dict[str, BaseModule] = {}
    for name, delta in modules.items():
        with naming(tensor=name):
            refuse_unstreamable(name, delta)
            orders[name] = rows_of(name)
        weight = _weight(name, orders[name], base)
        places[name] = BaseModule(
            (Piece(weight, False, 0, weight.shape[0]),), Layer("linear"), None
        )
        if _changes_bias(delta, [f"{tensor}.bias" for tensor in orders[name]], base):
            raise UnsupportedError(
                "a change of a bias is not fused into a GGUF model",
                tensor=name,
                hint="Fuse it into the transformers checkpoint instead, and convert that",
            )
    largest = (
        max(place.shape[0] for place in places.values()),
        max(place.shape[1] for place in places.values()),
    )
    return [
        placement
        for name, delta in modules.items()
        for placement in _placements(name, delta, places[name], orders[name], largest)
    ]


def _changes_bias(delta: ModuleChange, biases: list[str], base: GgufModel) -> bool:
    if delta.direction.bias is not None:
        return True
    computed = delta.kind_delta is not None and get_kind(delta.kind).bias is not None
    return computed and any(name in base.tensors for name in biases)


def _placements(
    name: str,
    delta: ModuleChange,
    place: BaseModule,
    orders: Mapping[str, list[int]],
    largest: tuple[int, int],
) -> Iterator[StreamedPlacement]:
    for tensor, order in orders.items():
        piece = Piece(place.pieces[0].stored, False, 0, len(order))
        yield StreamedPlacement(f"{tensor}.weight", name, delta, place, piece, 0, largest, order)


def _weight(name: str, orders: Mapping[str, list[int]], base: GgufModel) -> TensorRef:
    """Return a module's weight with its rows in transformers' order."""
    stored = [decoded(base.tensors[f"{tensor}.weight"]) for tensor in orders]
    source = [row for order in orders.values() for row in order]
    shape = len(source), stored[0].shape[1]
    if len(stored) == 1 and source == list(range(len(source))):
        return stored[0]
    rows = _Reordered(tuple(stored), np.argsort(source))
    return in_file(name, DTYPES["F32"], shape, rows, 0)


@dataclass(frozen=True)
class _Reordered:
    """The float32 bytes of tensors one below another, with their rows in another order.

    Attributes:
        stored: (rows, columns) each.
        order: for each row of the whole, where it is stored.
    """

    stored: tuple[TensorRef, ...]
    order: np.ndarray[tuple[int], np.dtype[np.int64]]

    def read_at(self, offset: int, nbytes: int) -> Buffer:
        """Return exactly `nbytes` bytes from `offset`, both whole elements."""
        width = self.stored[0].shape[1]
        start, stop = offset // 4, (offset + nbytes) // 4
        first, last = start // width, -(-stop // width)
        wanted = self.order[first:last]
        values = np.empty((len(wanted), width), "<f4")
        top = 0
        for tensor in self.stored:
            height = tensor.shape[0]
            inside = (wanted >= top) & (wanted < top + height)
            if inside.any():
                rows = wanted[inside] - top
                low, high = int(rows.min()), int(rows.max()) + 1
                block = tensor.elements(low * width, high * width).reshape(high - low, width)
                values[inside] = block[rows - low]
            top += height
        flat = values.reshape(-1)[start - first * width : stop - first * width]
        return np.ascontiguousarray(flat).view(np.uint8).data
