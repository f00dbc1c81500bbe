"""Whether a tensor is stored as (in, out), where the base's architecture may have to tell."""

from __future__ import annotations

from dataclasses import replace

from loratools.base.placement import rules
from loratools.base.placement.names import Names
from loratools_formats.checkpoints.facts import CONV1D_TYPES
from loratools_formats.core.change import KindDelta, LowRank
from loratools_formats.core.orientation import OTHER_BASE, is_transposed, named_conv1d
from loratools_formats.disk.errors import AdapterError, UnsupportedError


def whole_is_transposed(
    names: Names, module: str, delta: LowRank | KindDelta, shape: tuple[int, ...]
) -> bool:
    """Return whether a tensor that is all of a module's weight is stored as (in, out).

    Raises:
        AdapterError: the delta does not fit, or only in the layout that the architecture has not.
        UnsupportedError: it is square, and the architecture does not tell either.
    """
    layer = delta.layer
    if layer.kind == "experts":
        told = _experts_if_square(names, module)
        if layer.swapped is not None:
            lies = stack_is_transposed(names, module)
            layer = replace(layer, transposed_if_square=None)
            delta = replace(delta, layer=layer)
            told = None if lies is None else layer.swapped != lies
    else:
        told = _linear_if_square(names, module)
    if layer.transposed_if_square is None:
        delta = replace(delta, layer=replace(layer, transposed_if_square=told))
    transposed = is_transposed(module, delta, shape)
    is_whole = layer.kind == "linear" and not layer.parameters
    if is_whole and shape[0] != shape[1] and told not in (None, transposed):
        raise AdapterError(
            "the delta fits the base weight only the other way round",
            path=names.base.path,
            tensor=module,
            got=f"out {delta.shape[0]}, in {delta.shape[1]}",
            expected=f"a weight {'(in, out)' if told else '(out, in)'} of shape {list(shape)}",
        )
    return transposed


def cut_is_transposed(
    names: Names,
    module: str,
    delta: LowRank | KindDelta,
    shape: tuple[int, ...],
    *,
    stacked: bool = False,
) -> bool:
    """Return whether a matrix that shares only its inputs with a delta is stored as (in, out).

    Args:
        names: the checkpoint.
        module: the module the matrix is the weight of; of stacked experts, their key.
        delta: whose inputs it has.
        shape: of the stored matrix.
        stacked: it is one of stacked experts.

    Raises:
        AdapterError: the delta has another number of inputs.
        UnsupportedError: it is square, and the architecture does not tell.
    """
    width = delta.shape[1]
    if len(shape) != 2 or width not in shape:
        raise AdapterError(
            "the delta does not fit the base weight",
            tensor=module,
            got=f"in {width}",
            expected=f"a weight of shape {list(shape)}",
            hint=OTHER_BASE,
        )
    if shape[0] != shape[1]:
        return shape[0] == width
    if stacked:
        told = stack_is_transposed(names, module)
    else:
        told = _linear_if_square(names, module)
        told = delta.layer.transposed_if_square if told is None else told
    if told is None:
        raise UnsupportedError(
            "the weight is square and could be stored either way round",
            tensor=module,
            got=list(shape),
            hint="The base model's type does not tell either",
        )
    return told


def stack_is_transposed(names: Names, parameter: str) -> bool | None:
    """Return whether stacked experts are stored as (E, in, out); None if nothing tells.

    The shapes of a module's two parameters do: both have the model's width on one side, and
    `gate_up_proj` has twice the other side of `down_proj`. Else the model's type does.
    """
    shapes = [
        names.shape(key)
        for leaf in ("gate_up_proj", "down_proj")
        if (key := names.find(f"{parameter.rpartition('.')[0]}.{leaf}")) is not None
    ]
    if len(shapes) == 2 and all(len(shape) == 3 for shape in shapes):
        (_, rows, columns), (_, other_rows, other_columns) = shapes
        straight = (rows, columns) == (2 * other_columns, other_rows)
        turned = (columns, rows) == (2 * other_rows, other_columns)
        if straight != turned:
            return turned
    owner = parameter.removesuffix(".weight").rpartition(".")[0]
    if any(names.find(f"{owner}.gate_proj{end}") is not None for end in ("", ".weight")):
        return False  # gate and up apart, as MLX stacks them, for every architecture
    if names.find(parameter) is None:  # experts one by one, which transformers stacks as they lie
        return False
    types = set(names.types_of(parameter))
    if types & (rules.TRANSPOSED_EXPERTS | rules.UNMARKED_TRANSPOSED):
        return True
    return False if types & rules.STRAIGHT_EXPERTS else None


def stack_is_swapped(names: Names, parameter: str, delta: LowRank) -> bool | None:
    """Return whether factors of a stack have A on the outputs; None if nothing tells.

    Args:
        names: the checkpoint.
        parameter: the stack's name there.
        delta: its factors.

    Raises:
        AdapterError: they fit the stack neither way.
    """
    key = names.find(parameter)
    lies = None if key is None else stack_is_transposed(names, parameter)
    if key is None or lies is None:
        return None
    return whole_is_transposed(names, parameter, delta, names.shape(key)) != lies


def _linear_if_square(names: Names, module: str) -> bool | None:
    odd = names.odd_kind(module)
    if odd is not None:
        return odd == "conv1d"
    types = set(names.types_of(module))
    if types & CONV1D_TYPES:
        return named_conv1d(module)
    return False if names.has_class or types & rules.LINEAR_TYPES else None


def _experts_if_square(names: Names, module: str) -> bool | None:
    types = set(names.types_of(module))
    if types & rules.TRANSPOSED_EXPERTS:
        return True
    return False if types & rules.STRAIGHT_EXPERTS else None
