"""Changes of stacked expert parameters, on stacks and on checkpoints with a tensor per expert.

PEFT's file does not say which of a module's parameters a change belongs to; the base's shapes do.
"""

from __future__ import annotations

import re

from loratools.base.placement.changes import Placement
from loratools.base.placement.fused import joined_spans
from loratools.base.placement.names import Names
from loratools.base.placement.orient import whole_is_transposed
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.orientation import exchanged
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_PIECES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""The projections that a parameter joins, under each of the names that checkpoints give them."""

_STACK = re.compile(r"(?P<stack>.*\bexperts)\.(?P<leaf>[a-z0-9_]+)")


def expert_placements(names: Names, module: str, delta: ModuleChange) -> list[Placement]:
    """Return where the change of a parameter goes; empty if the base has none of its candidates.

    Args:
        names: the checkpoint.
        module: the adapter's module.
        delta: a delta whose layer lists parameters.

    Raises:
        AdapterError: no candidate has a fitting shape.
        UnsupportedError: several have.
    """
    part = delta.require_factors()
    fitting: dict[str, list[Placement]] = {}
    misfit: AdapterError | None = None
    for parameter in part.layer.parameters:
        try:
            placed = _stacked(names, module, parameter, delta) or _per_expert(
                names, module, parameter, delta
            )
        except AdapterError as error:
            misfit = error
            continue
        if placed:
            fitting[parameter] = placed
    if len(fitting) > 1:
        raise UnsupportedError(
            "the change fits several parameters, and the file does not say which is meant",
            path=names.base.path,
            tensor=module,
            got=", ".join(fitting),
        )
    if fitting:
        return next(iter(fitting.values()))
    if misfit is not None:
        raise misfit
    return []


def _stacked(names: Names, module: str, parameter: str, delta: ModuleChange) -> list[Placement]:
    key = names.find(parameter)
    part = delta.require_factors()
    if key is None:
        key = names.alternated(parameter)
        return [] if key is None else [_alternated(names, module, parameter, key, delta)]
    shape = names.shape(key)
    transposed = whole_is_transposed(names, parameter, part, shape)
    only = 0 if part.layer.kind != "experts" and len(shape) == 3 else None
    return [Placement(key, module, delta, transposed, plane=only)]


def _alternated(
    names: Names, module: str, parameter: str, key: str, delta: ModuleChange
) -> Placement:
    """Return where the change of a stack goes whose outputs alternate in the file, (E, out, in)."""
    part, shape = delta.require_factors(), names.shape(key)
    if whole_is_transposed(names, parameter, part, shape):
        delta = delta.with_direction(exchanged(part))
    half = shape[-2] // 2
    rows = (2 * (row % half) + row // half for row in range(shape[-2]))
    outputs = tuple((row, row + 1) for row in rows)
    only = 0 if part.layer.kind != "experts" else None
    return Placement(key, module, delta, False, outputs=outputs, plane=only)


def _per_expert(names: Names, module: str, parameter: str, delta: ModuleChange) -> list[Placement]:
    match = _STACK.fullmatch(names.spelling(parameter))
    if match is None:
        return []
    stack, leaf = match["stack"], match["leaf"]
    part = delta.require_factors()
    rows: list[list[str]] = []
    leaves: tuple[str, ...] = ()
    for leaves in _PIECES.get(leaf, ((leaf,),)):
        rows = []
        for expert in range(part.experts):
            keys = [names.find(f"{stack}.{expert}.{piece}.weight") for piece in leaves]
            rows.append([key for key in keys if key is not None])
        if any(rows):
            break
    if not any(rows):
        return _of_class(names, module, parameter, delta)
    _check_complete(names, parameter, stack, leaves, rows)
    return [
        placement
        for expert, keys in enumerate(rows)
        for placement in _one_expert(names, module, parameter, delta, expert, keys)
    ]


def _of_class(names: Names, module: str, parameter: str, delta: ModuleChange) -> list[Placement]:
    """Return where a change goes, in tensors that the class does not name as it names stacks."""
    rows = names.merged_into(parameter)
    if not rows:
        return []
    experts, parts = delta.require_factors().experts, len(rows[0])
    if len(rows) != experts or any(len(keys) != parts for keys in rows):
        raise AdapterError(
            "the adapter and the base have different numbers of experts",
            path=names.base.path,
            tensor=parameter,
            got=f"{experts} experts",
            expected=f"{len(rows)}",
        )
    return [
        placement
        for expert, keys in enumerate(rows)
        for placement in _one_expert(names, module, parameter, delta, expert, keys)
    ]


def _check_complete(
    names: Names, parameter: str, stack: str, leaves: tuple[str, ...], rows: list[list[str]]
) -> None:
    beyond = names.find(f"{stack}.{len(rows)}.{leaves[0]}.weight")
    if beyond is not None or any(len(keys) != len(leaves) for keys in rows):
        raise AdapterError(
            "the adapter and the base have different numbers of experts",
            path=names.base.path,
            tensor=parameter,
            got=f"{len(rows)} experts",
            expected="a tensor for each expert, and no more",
        )


def _one_expert(
    names: Names, module: str, parameter: str, delta: ModuleChange, expert: int, keys: list[str]
) -> list[Placement]:
    part = delta.require_factors()
    shapes = [names.shape(key) for key in keys]
    if len({shape[1:] for shape in shapes}) != 1 or len(shapes[0]) != 2:
        raise AdapterError(
            "an expert's weights do not fit together", tensor=keys[0], got=list(shapes[0])
        )
    sizes = [shape[0] for shape in shapes]
    if _is_transposed(names, parameter, part, (sum(sizes), shapes[0][1])):
        delta = delta.with_direction(exchanged(part))
    spans = joined_spans(sizes)
    which = expert if part.layer.kind == "experts" else None
    return [
        Placement(
            key, module, delta, False, expert=which, rows=(spans[i],) if len(keys) > 1 else ()
        )
        for i, key in enumerate(keys)
    ]


def _is_transposed(names: Names, parameter: str, part: LowRank, matrix: tuple[int, int]) -> bool:
    """Compare with the stack that transformers would make of the experts' weights, (E, out, in)."""
    shape = (part.experts, *matrix) if part.layer.kind == "experts" else matrix
    return whole_is_transposed(names, parameter, part, shape)
