"""Modules to which no adapter contributes, since all weights are 0 there: they are left out.

Those that a weight pattern silences leave before their values are looked at, so that a module of
NaN, or of a kind that cannot be merged, hinders nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from loratools.operations.merge.align import AlignedModule, MergeInput
from loratools.operations.merge.methods import get_method
from loratools.operations.merge.options import MergeOptions
from loratools.work.regexes import is_found
from loratools_formats.core.adapter import Addition
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import OptionError


def heard(
    modules: list[AlignedModule],
    inputs: Sequence[MergeInput],
    options: MergeOptions,
    *,
    has_others: bool = False,
) -> tuple[list[AlignedModule], tuple[str, ...]]:
    """Return the modules to which an adapter contributes, and the paths of the others.

    Of methods whose result is not zero where every weight is, it is all of them. `has_others` says
    that the adapters have modules besides.

    Raises:
        OptionError: there are no modules of the first sort.
    """
    if not get_method(options.method).scales or options.parameters.get("normalize"):
        return modules, ()
    silent = tuple(
        module.name
        for module in modules
        if not any(
            weight != 0
            for weight, delta in zip(
                weights_of(module.name, inputs, options), module.deltas, strict=True
            )
            if delta is not None
        )
    )
    if len(silent) == len(modules) and not has_others:
        raise nothing_left()
    left = set(silent)
    return [module for module in modules if module.name not in left], silent


def weights_of(name: str, inputs: Sequence[MergeInput], options: MergeOptions) -> Array:
    """Return the (T,) weights of the adapters in a module."""
    for override in options.overrides:
        weights = override.weights
        if weights is not None and is_found(override.match, name):
            return np.array(weights * len(inputs) if len(weights) == 1 else weights)
    return np.array([item.weight for item in inputs])


def without_weight(
    inputs: Sequence[MergeInput], options: MergeOptions
) -> tuple[list[MergeInput], tuple[str, ...]]:
    """Return the adapters without the modules that a pattern gives no weight, and their names.

    Raises:
        OptionError: there are no others.
    """
    silent: set[str] = set()
    left = []
    for item in inputs:
        adapter = item.adapter
        modules = {n: d for n, d in adapter.modules.items() if not _is_silenced(n, options)}
        additions = _with_weight(adapter.additions, options)
        silent |= set(adapter.modules) - set(modules)
        left.append(replace(item, adapter=replace(adapter, modules=modules, additions=additions)))
    if silent and not any(item.adapter.modules or item.adapter.additions for item in left):
        raise nothing_left()
    return left, tuple(sorted(silent))


def _with_weight(additions: Mapping[str, Addition], options: MergeOptions) -> dict[str, Addition]:
    return {key: a for key, a in additions.items() if not _is_silenced(a.target, options)}


def _is_silenced(name: str, options: MergeOptions) -> bool:
    """Return whether the pattern that decides over a module gives every adapter the weight 0."""
    for override in options.overrides:
        if override.weights is not None and is_found(override.match, name):
            return not any(override.weights)
    return False


def nothing_left() -> OptionError:
    """Return the refusal of a merge in which no adapter has a weight."""
    return OptionError("nothing would be left: the weight of every adapter is 0 in all its modules")


def says_nothing(weights: Array) -> bool:
    """Return whether weights are all alike and above 0, so that a method may do without them."""
    return bool(weights[0] > 0.0 and np.allclose(weights, weights[0], atol=0.0))
