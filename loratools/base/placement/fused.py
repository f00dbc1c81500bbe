"""Which outputs of a fused projection belong to which of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from loratools.base.placement import rules
from loratools.base.placement.changes import Span
from loratools.base.placement.names import Names
from loratools_formats.checkpoints import expert_classes
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")

STACKED_GLU = "experts.gate_up_proj"
HALVES = "experts, halved"
"""Stacked experts that a class makes of single ones: all outputs of the first, then the second."""

_EQUAL = {HALVES: 2, STACKED_GLU: 2, "in_proj_weight": 3}
"""Into how many equal parts fused weights of some names fall in every model."""


class FusedPart(NamedTuple):
    """One of the projections in a fused one.

    Attributes:
        module: path of the fused module or parameter.
        leaf: its name.
        place: which part, in the order of the fused one.
        equal: how many equal parts there are, if the base's class tells; 0 if the model's type
            does.
    """

    module: str
    leaf: str
    place: int
    equal: int = 0


def fusions(module: str) -> list[FusedPart]:
    """Return the fused modules that a module could be a part of."""
    parent, dot, leaf = module.rpartition(".")
    mixed = rules.MIXED.get(parent.rpartition(".")[2], {})
    return [
        FusedPart(f"{parent}{dot}{fused}", fused, parts.index(leaf))
        for fused, parts in mixed.items()
        if leaf in parts
    ] + [
        FusedPart(f"{parent}{dot}{fused}", fused, parts.index(leaf))
        for tables, choices in ((rules.QKV, rules.QKV_PARTS), (rules.GLU, rules.GLU_PARTS))
        for parts in choices
        if leaf in parts
        for fused in tables
    ]


def part_spans(names: Names, part: FusedPart, total: int) -> tuple[Span, ...]:
    """Return the outputs of a fused projection that are one part's.

    Args:
        names: the checkpoint.
        part: which.
        total: number of outputs of the fused projection.

    Raises:
        UnsupportedError: the order of outputs is not known for this model.
        AdapterError: the configuration does not fit the weight.
    """
    if part.leaf == STACKED_GLU and is_alternating(names, part.module):
        return tuple((index, index + 1) for index in range(part.place, total, 2))
    if part.leaf in rules.MIXED.get(part.module.rpartition(".")[0].rpartition(".")[2], {}):
        return (mixed_spans(names.section(part.module), part, total)[part.place],)
    equal = part.equal or _EQUAL.get(part.leaf)
    if equal:
        return _joined((1,) * equal, total, part)
    if part.leaf in rules.GLU:
        if not rules.GLU[part.leaf].intersection(names.types_of(part.module)):
            raise _unknown_layout(names, part.module)
        return _joined((1, 1), total, part)
    layouts = rules.QKV[part.leaf]
    layout = next((layouts[t] for t in names.types_of(part.module) if t in layouts), None)
    if layout is None:
        raise _unknown_layout(names, part.module)
    if layout == "thirds":
        return _joined((1, 1, 1), total, part)
    section = names.section(part.module)
    heads = _head_count(names, part, section)
    key_values = heads if layout == "headwise" else _key_value_count(names, part, section, heads)
    if layout == "joined":
        return _joined((heads, key_values, key_values), total, part)
    per_group = heads // key_values
    size, rest = divmod(total, key_values * (per_group + 2))
    if rest or heads % key_values:
        raise _does_not_fit(part, total, f"{heads} heads and {key_values} key-value heads")
    start, stop = ((0, per_group), (per_group, per_group + 1), (per_group + 1, per_group + 2))[
        part.place
    ]
    step = per_group + 2
    return tuple(
        ((group * step + start) * size, (group * step + stop) * size) for group in range(key_values)
    )


def mixed_spans(section: Mapping[str, Any], part: FusedPart, total: int) -> list[Span]:
    """Return the outputs of each part of a projection of linear attention or Mamba.

    Mamba's has more outputs behind them, which are no part's.

    Args:
        section: of the configuration, for the layers.
        part: any of them.
        total: number of outputs of the fused projection.

    Raises:
        UnsupportedError: the configuration lacks a size.
        AdapterError: the sizes do not fit the weight.
    """

    def product(*keys: str) -> int:
        for key in keys:
            if not _is_count(section.get(key)):
                raise UnsupportedError(
                    "the sizes of this projection's parts are not in the base model's config",
                    tensor=part.module,
                    expected=key,
                )
        return int(section[keys[0]]) * int(section[keys[1]])

    if part.leaf == "in_proj_qkv":
        key = product("linear_num_key_heads", "linear_key_head_dim")
        sizes = [key, key, product("linear_num_value_heads", "linear_value_head_dim")]
        fits = sum(sizes) == total
    else:
        sizes = [product("mamba_num_heads", "mamba_head_dim")] * 2
        fits = sum(sizes) < total
    if not fits:
        raise _does_not_fit(part, total, f"parts of {sizes}")
    return joined_spans(sizes)


def is_alternating(names: Names, stack: str) -> bool:
    """Return whether a stacked `gate_up_proj` alternates the outputs of gate and up.

    Raises:
        UnsupportedError: the order is not known for this model.
    """
    types = set(names.types_of(stack))
    if types & expert_classes.ALTERNATING:
        return True
    if not types & rules.HALVED_EXPERTS:
        raise _unknown_layout(names, stack)
    return False


def joined_spans(sizes: list[int]) -> list[Span]:
    """Return the spans of parts that lie one after the other."""
    return list(pairwise(accumulate(sizes, initial=0)))


def _joined(weights: tuple[int, ...], total: int, part: FusedPart) -> tuple[Span, ...]:
    unit, rest = divmod(total, sum(weights))
    if rest:
        raise _does_not_fit(part, total, f"parts in proportion {list(weights)}")
    return (joined_spans([weight * unit for weight in weights])[part.place],)


def _head_count(names: Names, part: FusedPart, section: Mapping[str, Any]) -> int:
    for key in _HEADS:
        if _is_count(section.get(key)):
            return int(section[key])
    raise UnsupportedError(
        "the number of attention heads is not in the base model's config",
        path=names.base.path,
        tensor=part.module,
        expected=" or ".join(_HEADS),
    )


def _key_value_count(names: Names, part: FusedPart, section: Mapping[str, Any], heads: int) -> int:
    types = rules.MULTI_QUERY_TYPES.intersection(names.types_of(part.module))
    if types and not section.get("new_decoder_architecture"):
        if not isinstance(section.get("multi_query"), bool):
            raise UnsupportedError(
                "the base model's config does not say whether heads share a key",
                path=names.base.path,
                tensor=part.module,
                expected="multi_query",
            )
        return 1 if section["multi_query"] else heads
    return next((section[key] for key in _KEY_VALUE_HEADS if _is_count(section.get(key))), heads)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 20


def _unknown_layout(names: Names, module: str) -> UnsupportedError:
    return UnsupportedError(
        "the order of outputs in this fused projection is not known for the base model",
        path=names.base.path,
        tensor=module,
        got=f"model type {', '.join(names.types_of(module)) or 'unknown'}",
        hint="Adapt the fused module itself, or a base that keeps its parts separate",
    )


def _does_not_fit(part: FusedPart, total: int, expected: str) -> AdapterError:
    return AdapterError(
        "the fused projection does not fit the sizes in the base model's config",
        tensor=part.module,
        got=f"{total} outputs",
        expected=expected,
    )
