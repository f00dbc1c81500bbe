"""Weights of a base model as matrices (out, in), read a block of rows at a time.

A module's weight may be one tensor, some rows of a fused one, or several tensors one below another.
Rows that lie in a file the same way are read where they are; a tensor that is stored the other way
round is held whole.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loratools.base.dequantised import dequantised
from loratools.base.placement.fused import part_spans
from loratools.base.placement.names import Names
from loratools.base.placement.orient import cut_is_transposed, whole_is_transposed
from loratools.base.placement.sites import Site, sites
from loratools.base.tied import find_tie
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import KindDelta, Layer, LowRank
from loratools_formats.core.dtypes import Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError


@dataclass(frozen=True)
class Piece:
    """Outputs of one stored tensor.

    Attributes:
        stored: the tensor: (out, in), (in, out), or (out, in, *kernel).
        transposed: whether it is stored as (in, out).
        start: first output.
        stop: after the last one.
    """

    stored: TensorRef
    transposed: bool
    start: int
    stop: int


@dataclass(frozen=True)
class BaseModule:
    """Where in the base a module's weight is.

    Attributes:
        pieces: its outputs, in order.
        layer: what the module is, as the tensor's shape shows.
        bias: the layer's bias, None if it has none or it is not a tensor of its own.
    """

    pieces: tuple[Piece, ...]
    layer: Layer
    bias: TensorRef | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        first = self.pieces[0]
        side = first.stored.shape[0] if first.transposed else math.prod(first.stored.shape[1:])
        return sum(piece.stop - piece.start for piece in self.pieces), side

    def weight(self) -> BaseWeight:
        """Return its weight."""
        return BaseWeight(self.pieces, self.shape, self.bias)


def names_under(adapter: Adapter, base: Checkpoint, modules: Collection[str]) -> Names:
    """Return the base's tensors with the adapter's replacement tensors substituted.

    A file may hold the whole weight or bias of a layer beside its change, such as a saved embedding
    or a trained bias. The change then applies to that tensor instead of the base's.

    Args:
        adapter: whose replacements count.
        base: the base model.
        modules: those whose weights will be read.

    Raises:
        UnsupportedError: only rows of a weight are replaced, or the base has it inside another.
    """
    checkpoint = dequantised(base).checkpoint
    names = Names(checkpoint)
    tensors = dict(checkpoint.tensors)
    for replacement in adapter.replacements.values():
        module, _, leaf = replacement.target.rpartition(".")
        if module not in modules:
            continue
        key = names.find(replacement.target)
        if replacement.kind == "token_rows" or (key is None and sites(names, module, leaf)):
            raise UnsupportedError(
                "the adapter replaces a part of the weight that its change depends on",
                path=adapter.source,
                tensor=replacement.tensor.key,
            )
        if key is None and leaf == "weight" and _tied(names, module):
            key = replacement.target  # the output layer's own, which parts it from the embedding
        if key is not None:
            tensors[key] = replacement.tensor
    return Names(replace(checkpoint, tensors=tensors))


def find_base_module(
    names: Names, name: str, delta: LowRank | KindDelta, *, only_read: bool = False
) -> BaseModule:
    """Return where the weight of a module is.

    Args:
        names: of the base.
        name: of the module.
        delta: its change.
        only_read: whether nothing will be written where it is; it may be in a stack then.

    Raises:
        AdapterError: no tensor of the base fits, or several do.
        UnsupportedError: it is one of stacked matrices, or it is not known which way round it lies.
    """
    found = sites(names, name, "weight") or _tied(names, name)
    if not found:
        near = ", ".join(names.nearest(f"{name}.weight")) or "none"
        raise AdapterError(
            "no base tensor fits the module",
            path=names.base.path,
            tensor=name,
            hint=f"Nearest names: {near}",
        )
    if not only_read and any(site.plane is not None for site in found):
        raise UnsupportedError(
            "weights of single experts in a stack are not supported here",
            tensor=name,
            got=found[0].key,
        )
    pieces = tuple(piece for site in found for piece in _pieces(names, name, delta, site))
    stored, layer = pieces[0].stored, delta.layer
    if len(stored.shape) > 2 and layer.kind != "experts" and not layer.parameters:
        layer = Layer("conv", kernel=stored.shape[2:])
    biases = sites(names, name, "bias")
    alone = len(found) == len(biases) == 1 and found[0].part is None and biases[0].part is None
    return BaseModule(pieces, layer, names.tensors[biases[0].key] if alone else None)


def _tied(names: Names, name: str) -> list[Site]:
    """Return the embedding that an output layer is tied to; empty if the module is none so tied."""
    tie = find_tie(names, guess_head=True)
    is_head = tie is not None and names.spelling(tie.head) == names.spelling(f"{name}.weight")
    return [Site(tie.embedding)] if tie is not None and is_head else []


def is_in_stack(names: Names, name: str) -> bool:
    """Return whether the weight of a module is one of several in a tensor, as of experts."""
    return any(site.plane is not None for site in sites(names, name, "weight"))


def is_fused(names: Names, name: str) -> bool:
    """Return whether the weight of a module is in one tensor with those of others."""
    found = sites(names, name, "weight")
    return any(site.plane is not None or site.part is not None for site in found)


def _pieces(names: Names, name: str, delta: LowRank | KindDelta, site: Site) -> Sequence[Piece]:
    stored = names.tensors[site.key]
    if site.plane is not None:
        stored = stored.matrix(site.plane)
        transposed = cut_is_transposed(names, site.key, delta, stored.shape, stacked=True)
    elif site.part is None and site.share is None:
        transposed = whole_is_transposed(names, name, delta, stored.shape)
    else:
        by = name if site.part is None else site.part.module
        transposed = cut_is_transposed(names, by, delta, stored.shape)
    total = math.prod(stored.shape[1:]) if transposed else stored.shape[0]
    spans = ((0, total),) if site.part is None else part_spans(names, site.part, total)
    if site.alternates:
        spans = tuple((i, i + 1) for first in range(2) for i in range(first, total, 2))
    return [Piece(stored, transposed, start, stop) for start, stop in spans]


class BaseWeight:
    """One weight of the base.

    Args:
        pieces: its outputs, in order.
        shape: (out, in).
        bias: of the layer, None if it has none of its own.
    """

    def __init__(
        self, pieces: Sequence[Piece], shape: tuple[int, int], bias: TensorRef | None = None
    ) -> None:
        self.shape = shape
        self._bias = bias
        self._pieces = pieces
        self._turned = {
            piece.stored.key: self._whole(piece.stored) for piece in pieces if piece.transposed
        }

    def _whole(self, stored: TensorRef) -> Array:
        wide = np.float64 if stored.dtype.code == "F64" else np.float32
        whole: Array = stored.load(wide).reshape(stored.shape[0], -1).T
        return whole

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) in float64.

        Raises:
            AdapterError: NaN or infinite values.
        """
        blocks, top = [], 0
        for piece in self._pieces:
            height = piece.stop - piece.start
            first, last = max(start, top) - top, min(stop, top + height) - top
            if first < last:
                blocks.append(self._read(piece, piece.start + first, piece.start + last))
            top += height
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def bias(self) -> Array | None:
        """Return the layer's bias in float64, None if it has none of its own.

        Raises:
            AdapterError: NaN or infinite values.
        """
        if self._bias is None:
            return None
        values: Array = self._bias.load(np.float64)
        if not np.isfinite(values).all():
            raise AdapterError("base bias holds NaN or infinite values", tensor=self._bias.key)
        return values

    def _read(self, piece: Piece, start: int, stop: int) -> Array:
        stored, width = piece.stored, self.shape[1]
        if piece.transposed:
            rows = self._turned[stored.key][start:stop].astype(np.float64)
        else:
            flat = stored.elements(start * width, stop * width)
            rows = flat.astype(np.float64).reshape(stop - start, width)
        if not np.isfinite(rows).all():
            raise AdapterError("base weight holds NaN or infinite values", tensor=stored.key)
        return rows
