"""A checkpoint under the names that its class has in memory, where PEFT looks for modules.

What the class keeps in one parameter is put together, and what it keeps apart is cut, as it is
read: experts of a stack, the parts of a fused projection, gate and up that alternate. Other
conversions, such as the order of rows for rotary embeddings, are not undone; tensors that need one
keep their stored names.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from loratools.base.dequantised import dequantised
from loratools.base.placement.model_class import Named, Rule, class_of, names_in
from loratools.base.placement.names import Names
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import text_values
from loratools_formats.core.tensors import Buffer, TensorRef, in_file


@dataclass(frozen=True)
class ClassView:
    """A checkpoint as its class has it.

    Attributes:
        checkpoint: with tensors under the class's names, and by default unchanged.
        stored: for each tensor of the view, the names of the tensors it is made of.
        kept: stored names of tensors that the class has in a form not undone here.
        known: whether the configuration names a class that is known.
    """

    checkpoint: Checkpoint
    stored: Mapping[str, tuple[str, ...]]
    kept: tuple[str, ...] = ()
    known: bool = True


def names_in_class(base: Checkpoint) -> Names:
    """Return a base's names as its class has them, its quantised weights under plain ones."""
    return Names(class_view(dequantised(base).checkpoint).checkpoint)


def class_view(base: Checkpoint, config: Mapping[str, Any] | None = None) -> ClassView:
    """Return a checkpoint as the class that its configuration names has it.

    Args:
        base: the checkpoint.
        config: a configuration that names the class, where the checkpoint's own names none.
    """
    model = class_of(base.config) or class_of(config or {})
    if model is None:
        return ClassView(base, {key: (key,) for key in base.tensors}, known=False)
    groups: dict[str, list[tuple[str, Named]]] = {}
    for key, named in names_in(model, sorted(base.tensors, key=_natural)).items():
        groups.setdefault(named.name, []).append((key, named))
    tensors: dict[str, TensorRef] = {}
    stored: dict[str, tuple[str, ...]] = {}
    kept: list[str] = []
    for name, members in groups.items():
        rule = members[0][1].rule
        keys = tuple(key for key, _ in members)
        if rule is None and len(keys) == 1:
            made = {name: base.tensors[keys[0]]}
        elif rule is not None and all(named.rule is rule for _, named in members):
            made = _converted(base, rule, name, [(key, named.source) for key, named in members])
        else:
            made = {}
        for made_name, tensor in made.items():
            tensors[made_name] = tensor.renamed(made_name)
            stored[made_name] = keys
        if not made:
            kept += keys
            tensors.update({key: base.tensors[key] for key in keys})
            stored.update({key: (key,) for key in keys})
    return ClassView(replace(base, tensors=tensors), stored, tuple(kept))


def _natural(key: str) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in key.split(".")]


def _converted(
    base: Checkpoint, rule: Rule, name: str, members: Sequence[tuple[str, int]]
) -> dict[str, TensorRef]:
    """Return what a rule makes of tensors; empty if that is not undone here."""
    types = {base.tensors[key].dtype for key, _ in members}
    if [operation for operation, _ in rule.operations] == ["Transpose"] and len(members) == 1:
        return _exchanged(base, base.tensors[members[0][0]], name, rule.operations[0][1])
    if rule.alternates and len(members) == 1:
        return _in_halves(base.tensors[members[0][0]], name)
    if len(types) != 1 or next(iter(types)).bits < 8:
        return {}
    by_source = [
        [_whole(base.tensors[key]) for key, which in members if which == source]
        for source in range(len(rule.sources))
    ]
    if not all(by_source):
        return {}
    pieces: list[list[_Pieces]] | None = by_source
    for operation, arguments in rule.operations:
        if pieces is not None:
            pieces = _operated(operation, arguments.get("dim", 0), pieces, len(rule.targets))
    if pieces is None or len(pieces) != len(rule.targets) or any(len(p) > 1 for p in pieces):
        return {}
    names = [rule.made(name, index) for index in range(len(pieces))]
    return {n: parts[0].tensor(n) for n, parts in zip(names, pieces, strict=True)}


_WIDTH_AXIS = {"gate_up_proj": 2, "down_proj": 1}
"""Which axis of a stack in memory has the model's width."""


def _exchanged(
    base: Checkpoint, tensor: TensorRef, name: str, arguments: Mapping[str, Any]
) -> dict[str, TensorRef]:
    """Return a tensor with two axes exchanged, where transformers exchanges them; empty if unclear.

    Some rules exchange axes only of a tensor whose shape is not the parameter's.
    """
    one, other = arguments.get("dim0", 0), arguments.get("dim1", 1)
    if max(one, other) >= len(tensor.shape) or tensor.dtype.bits < 8:
        return {}
    if arguments.get("check_dims"):
        axis = _WIDTH_AXIS.get(name.rpartition(".")[2])
        width = text_values(base.config).get("hidden_size")
        if axis is None or axis not in (one, other) or width not in tensor.shape:
            return {}
        if tensor.shape[axis] == width:
            return {name: tensor}
    order = list(range(len(tensor.shape)))
    order[one], order[other] = order[other], order[one]
    return {name: tensor.transposed(tuple(order))}


def _in_halves(tensor: TensorRef, name: str) -> dict[str, TensorRef]:
    """Return a stack with outputs in halves that alternate in the file; empty if it is none."""
    if len(tensor.shape) != 3 or tensor.shape[1] % 2 or tensor.dtype.bits < 8:
        return {}
    experts, out, in_ = tensor.shape
    halves = tensor.reshaped((experts, out // 2, 2, in_)).transposed((0, 2, 1, 3))
    return {name: halves.reshaped(tensor.shape)}


def _operated(
    operation: str, dim: int, pieces: list[list[_Pieces]], targets: int
) -> list[list[_Pieces]] | None:
    """Return what an operation makes of the tensors of each source; None if it is not known."""
    if operation == "MergeModulelist":
        alike = all(len({part.shape for part in parts}) == 1 for parts in pieces)
        return [[_stacked(parts)] for parts in pieces] if alike and dim == 0 else None
    if any(len(parts) > 1 for parts in pieces):
        return None
    only = [parts[0] for parts in pieces]
    if operation == "Concatenate":
        sides = {(*piece.shape[:dim], *piece.shape[dim + 1 :]) for piece in only}
        fits = len(sides) == 1 and (dim == 0 or len(only[0].shape) > 2)
        return [[_concatenated(only, dim)]] if fits else None
    if operation == "Chunk" and len(only) == 1 and dim == 0 and not only[0].shape[0] % targets:
        rows = only[0].shape[0] // targets
        return [[only[0].rows(i * rows, (i + 1) * rows)] for i in range(targets)]
    return None


@dataclass(frozen=True)
class _Run:
    """Elements [start, stop) of a stored tensor."""

    tensor: TensorRef
    start: int
    stop: int


@dataclass(frozen=True)
class _Pieces:
    """A tensor made of runs of others, row-major."""

    shape: tuple[int, ...]
    runs: tuple[_Run, ...]

    def elements(self, start: int, stop: int) -> tuple[_Run, ...]:
        """Return the runs of elements [start, stop)."""
        found, at = [], 0
        for run in self.runs:
            size = run.stop - run.start
            low, high = max(start - at, 0), min(stop - at, size)
            if low < high:
                found.append(_Run(run.tensor, run.start + low, run.start + high))
            at += size
        return tuple(found)

    def rows(self, start: int, stop: int) -> _Pieces:
        """Return rows [start, stop) along the first axis."""
        row = math.prod(self.shape[1:])
        return _Pieces((stop - start, *self.shape[1:]), self.elements(start * row, stop * row))

    def tensor(self, name: str) -> TensorRef:
        """Return it as a tensor, read piece by piece."""
        first = self.runs[0]
        if len(self.runs) == 1 and first.stop - first.start == first.tensor.numel:
            return first.tensor.reshaped(self.shape)
        return in_file(name, first.tensor.dtype, self.shape, _Source(self), 0)


class _Source:
    """Runs one behind the other, as a place to read bytes from."""

    def __init__(self, pieces: _Pieces) -> None:
        self._runs = pieces.runs
        self._width = pieces.runs[0].tensor.dtype.bits // 8
        sizes = [(run.stop - run.start) * self._width for run in self._runs]
        self._starts = list(accumulate(sizes, initial=0))

    def read_at(self, offset: int, nbytes: int) -> Buffer:
        """Return bytes, whichever tensors hold them."""
        read = bytearray()
        index = bisect_right(self._starts, offset) - 1
        while len(read) < nbytes:
            run, at = self._runs[index], offset + len(read) - self._starts[index]
            count = min(nbytes - len(read), self._starts[index + 1] - self._starts[index] - at)
            start = run.start * self._width + at
            read += run.tensor.raw_range(start, start + count)
            index += 1
        return memoryview(read)


def _whole(tensor: TensorRef) -> _Pieces:
    return _Pieces(tensor.shape, (_Run(tensor, 0, tensor.numel),))


def made_of_rows(name: str, parts: Sequence[tuple[TensorRef, int, int]]) -> TensorRef:
    """Return a tensor of rows of others, one after another, read piece by piece.

    Args:
        name: of the new tensor.
        parts: each a tensor, its first row and the one after its last; of one type and one width.
    """
    pieces = [_whole(tensor).rows(start, stop) for tensor, start, stop in parts]
    return _concatenated(pieces, 0).tensor(name)


def _stacked(parts: Sequence[_Pieces]) -> _Pieces:
    return _Pieces((len(parts), *parts[0].shape), tuple(r for part in parts for r in part.runs))


def _concatenated(parts: Sequence[_Pieces], dim: int) -> _Pieces:
    first = parts[0].shape
    shape = (*first[:dim], sum(part.shape[dim] for part in parts), *first[dim + 1 :])
    if dim == 0:
        return _Pieces(shape, tuple(run for part in parts for run in part.runs))
    runs: list[_Run] = []
    for outer in range(math.prod(first[:dim])):
        for part in parts:
            size = math.prod(part.shape[dim:])
            runs += part.elements(outer * size, (outer + 1) * size)
    return _Pieces(shape, tuple(runs))
