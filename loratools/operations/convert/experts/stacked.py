"""Experts in stacked parameters, as transformers 5 and PEFT have them."""

from __future__ import annotations

from dataclasses import replace

from loratools.base.placement.changes import Span
from loratools.base.placement.pieces import Piece, put_together
from loratools.operations.convert.experts.groups import Group, Order
from loratools_formats.core.change import Layer, ModuleChange
from loratools_formats.core.peft_facts import nested_paths
from loratools_formats.disk.errors import UnsupportedError


def stacked(group: Group, order: Order | None, experts: int) -> dict[str, ModuleChange]:
    """Return a layer's experts as stacked parameters, by PEFT's paths.

    Where A of gate and up is one, bit for bit, nothing is added; else A is stacked and B has a
    block for each. Experts of smaller rank and missing ones get zeros.

    Args:
        group: the layer.
        order: how the model joins gate and up; None if there is nothing to join.
        experts: how many the model has.

    Raises:
        UnsupportedError: some experts are stacked and others not.
    """
    if group.single and group.stacks:
        raise UnsupportedError(
            "the adapter has these experts both one by one and as a stack", tensor=group.owner
        )
    found = dict(group.stacks)
    if group.single:
        leaves = set(group.single)
        parts: dict[str, list[Piece]] = {}
        for leaf, changes in group.single.items():
            target = leaf
            if leaf in ("gate_proj", "up_proj") and "gate_proj" in leaves:
                target = "gate_up_proj"
            for expert, change in sorted(changes.items()):
                part = change.require_factors()
                outputs = _outputs(leaf, target, part.shape[0], order)
                parts.setdefault(target, []).append(Piece(part, 0, (), expert, outputs))
        for target, pieces in parts.items():
            out, in_ = pieces[0].delta.shape
            joins = target == "gate_up_proj" and "gate_proj" in leaves
            name = f"{group.owner}.{target}"
            layer = Layer("experts", (), (name,), transposed_if_square=None, swapped=False)
            made = put_together(pieces, experts, ((2 if joins else 1) * out, in_), layer)
            found[target] = ModuleChange(made)
    return nested(group.owner, found)


def _outputs(leaf: str, target: str, out: int, order: Order | None) -> tuple[Span, ...]:
    if target != "gate_up_proj":
        return ()
    which = 0 if leaf == "gate_proj" else 1
    if leaf == "gate_up_proj":
        if order != "alternating":
            return ()
        half = out // 2
        return tuple(
            (2 * (i % half) + i // half, 2 * (i % half) + i // half + 1) for i in range(out)
        )
    if order == "alternating":
        return tuple((i, i + 1) for i in range(which, 2 * out, 2))
    return ((which * out, (which + 1) * out),)


def nested(owner: str, stacks: dict[str, ModuleChange]) -> dict[str, ModuleChange]:
    """Return the stacks of a module, given by the names of its parameters, under PEFT's paths."""
    made = {}
    for leaf, path in nested_paths(owner, stacks).items():
        change = stacks[leaf]
        part = change.require_factors()
        layer = replace(part.layer, parameters=(f"{owner}.{leaf}",))
        made[path] = change.with_direction(replace(part, layer=layer))
    return made
