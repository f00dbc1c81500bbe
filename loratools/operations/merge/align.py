"""Bringing several adapters together: which modules they share, and whether those are the same.

Adapters may differ in rank, scale, type and in which modules they adapt. What must agree is what a
module is: its shape, layer kind and, for square weights, which way round it is stored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from loratools.base.named_base import distinct_bases
from loratools_formats.contract.commands import command_on
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.orientation import exchanged
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError


@dataclass(frozen=True)
class MergeInput:
    """An adapter to merge, its weight, and the name it goes by in reports."""

    adapter: Adapter
    weight: float
    name: str


@dataclass(frozen=True)
class AlignedModule:
    """One module of all adapters.

    Attributes:
        name: module path.
        deltas: one per adapter, None where it does not adapt the module.
        absent: names of the adapters that do not.
    """

    name: str
    deltas: tuple[ModuleChange | None, ...]
    absent: tuple[str, ...]

    @property
    def first(self) -> LowRank:
        """Factors of the first adapter that has the module."""
        return next(delta.require_factors() for delta in self.deltas if delta is not None)

    @property
    def needs_base(self) -> bool:
        """Whether a delta depends on the base weight."""
        return any(delta is not None and delta.is_dora for delta in self.deltas)


def align(
    inputs: Sequence[MergeInput],
    *,
    force_base: bool = False,
    allow_missing: bool = False,
    leave: Collection[str] = (),
) -> list[AlignedModule]:
    """Return every module that any adapter has, in path order.

    Args:
        inputs: the adapters.
        leave: modules to leave out, which are merged otherwise.
        force_base: take adapters that name different base models.
        allow_missing: take adapters that share few modules with the others, or none.

    Raises:
        AdapterError: a module differs in shape or kind, or an adapter shares fewer than half of its
            modules, and of the others', with them.
        OptionError: the adapters name different base models and `force_base` is false.
        UnsupportedError: an adapter replaces the weight of a DoRA.
    """
    if not force_base:
        _check_bases(inputs)
    owners = Counter(name for item in inputs for name in item.adapter.modules)
    names = sorted(owners)
    if not names:
        raise AdapterError("the adapters have no modules to merge", path=inputs[0].adapter.source)
    for item in inputs if len(inputs) > 1 and not allow_missing else ():
        _check_names_meet(item, owners)
    modules = [_aligned(name, inputs) for name in names if name not in leave]
    _check_weights({module.name for module in modules if module.needs_base}, inputs)
    return modules


def _check_names_meet(item: MergeInput, owners: Mapping[str, int]) -> None:
    """Refuse an adapter whose names hardly meet the others': they may be other spellings.

    One that adapts part of what the others do is ordinary.

    Args:
        item: the adapter.
        owners: how many of all adapters have a module.
    """
    own = set(item.adapter.modules)
    shared = {name for name in own if owners[name] > 1}
    count = len(owners) - len(own) + len(shared)  # of modules that the others have
    if own and 2 * len(shared) >= min(len(own), count):
        return
    others = owners.keys() - (own - shared)
    few = f"only {len(shared)} of its {len(own)} modules" if shared else "no module"
    raise AdapterError(
        f"an adapter shares {few} with the others",
        path=item.adapter.source,
        got=min(own - others, default="no modules"),
        expected=f"such as {min(others - own, default='a module')}",
        hint="Are they adapters of the same model, in the same naming? If so, and they adapt "
        "different modules, pass `allow_missing=True`",
    )


def _check_weights(needing: set[str], inputs: Sequence[MergeInput]) -> None:
    """Refuse a DoRA of a weight that one of the adapters replaces: each has a weight of its own."""
    for item in inputs:
        for replacement in item.adapter.replacements.values():
            module, _, leaf = replacement.target.rpartition(".")
            if leaf == "weight" and module in needing:
                raise UnsupportedError(
                    "an adapter replaces the weight that a DoRA's change depends on",
                    path=item.adapter.source,
                    tensor=replacement.tensor.key,
                    hint="Make the DoRA plain first: "
                    + command_on(None, "to-lora", "--base MODEL --rank RANK"),
                )


def _check_bases(inputs: Sequence[MergeInput]) -> None:
    bases = distinct_bases(item.adapter.base_model for item in inputs)
    if len(bases) > 1:
        raise OptionError(
            "the adapters name different base models",
            got=", ".join(bases),
            hint="Pass `force_base=True` if the weights they adapt are the same",
        )


def _aligned(name: str, inputs: Sequence[MergeInput]) -> AlignedModule:
    found = [item.adapter.modules.get(name) for item in inputs]
    first = next(delta.require_factors() for delta in found if delta is not None)
    deltas = tuple(
        None if delta is None else _matched(name, delta, first, item)
        for delta, item in zip(found, inputs, strict=True)
    )
    absent = tuple(item.name for delta, item in zip(deltas, inputs, strict=True) if delta is None)
    return AlignedModule(name, deltas, absent)


def _matched(name: str, whole: ModuleChange, first: LowRank, item: MergeInput) -> ModuleChange:
    """Return the delta in the orientation of the first one."""
    delta = whole.require_factors()
    if delta.layer.tied != first.layer.tied:
        raise AdapterError(
            "the change of the output layer is of the embedding, too, if the model ties them, as "
            "Tinker has it; another adapter's is of the output layer alone",
            path=item.adapter.source,
            tensor=name,
            hint="Give Tinker's the base, which tells whether it ties them: "
            + command_on(
                item.adapter if delta.layer.tied else None,
                "convert",
                "--to peft --base BASE",
                output="converted",
            ),
        )
    if _identity(delta) == _identity(first):
        return whole
    if _is_pointwise(delta) and _is_pointwise(first) and delta.shape == first.shape:
        return whole.with_direction(replace(delta, layer=first.layer))
    both = delta.layer.kind == first.layer.kind == "experts"
    if not whole.is_dora and both:
        turned = exchanged(delta)
        if _identity(turned) == _identity(first):
            return whole.with_direction(turned)
    raise AdapterError(
        "a module differs between the adapters",
        path=item.adapter.source,
        tensor=name,
        got=_described(delta),
        expected=_described(first),
        hint=_SIDES if None in (delta.layer.swapped, first.layer.swapped) and both else None,
    )


_SIDES = "Pass `base`, whose class tells on which side of the experts A is"


def _is_pointwise(delta: LowRank) -> bool:
    """Return whether it is a linear layer, or a convolution that is one at each place.

    Models of one architecture store the same projections either way.
    """
    return delta.layer.kind in ("linear", "conv") and math.prod(delta.layer.kernel) == 1


def _identity(delta: LowRank) -> tuple[object, ...]:
    # Only for experts does the file's (out, in) depend on how the weight is stored.
    turned = delta.layer.kind == "experts" and delta.shape[0] == delta.shape[1]
    turn = _turn(delta) if turned else None
    return delta.layer.kind, delta.layer.kernel, delta.shape, delta.experts, turn


def _turn(delta: LowRank) -> object:
    """Return which way round a square stack lies, as far as its file tells."""
    layer = delta.layer
    return ("swapped", layer.swapped) if layer.swapped is not None else layer.transposed_if_square


def _described(delta: LowRank) -> str:
    experts = f", {delta.experts} experts" if delta.experts > 1 else ""
    turn = delta.layer.transposed_if_square if delta.layer.swapped is None else delta.layer.swapped
    stored = ", stored as (in, out)" if turn else ", stored either way" if turn is None else ""
    square = stored if experts and delta.shape[0] == delta.shape[1] else ""
    return f"{delta.layer.kind}, out {delta.shape[0]}, in {delta.shape[1]}{experts}{square}"
