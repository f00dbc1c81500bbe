"""Adapters on their way into a shared set: plain, under PEFT's names, and known to fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loratools.algebra.joint import Triplets
from loratools.algebra.thin import Thin
from loratools.folding.without_base import folded_exactly
from loratools.lowrank.matrices import loaded
from loratools.lowrank.resize import rounded
from loratools.operations.convert.operation import prepare
from loratools.work.scratch import Scratch
from loratools_formats.contract.commands import command_on
from loratools_formats.contract.shared_set import Member, is_shared_set, possible_name
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank
from loratools_formats.core.factors import NOT_FINITE
from loratools_formats.core.file_names import without_ending
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError


@dataclass(frozen=True)
class Entrant:
    """An adapter that is to be shared.

    Attributes:
        name: that it will go by.
        adapter: in PEFT's terms, every module a plain pair of factors.
        source: the adapter as it was read.
    """

    name: str
    adapter: Adapter
    source: Adapter


def entrant(name: str, adapter: Adapter, scratch_folder: Path | None) -> Entrant:
    """Return an adapter as it can be shared.

    Raises:
        UnsupportedError: a DoRA, a kind that does not fold exactly, or a set itself.
        AdapterError: it has no modules, or no place in a PEFT file.
        OptionError: no file can have its name.
    """
    if is_shared_set(adapter):
        raise UnsupportedError(
            "is a shared set itself",
            path=adapter.source,
            hint="Take its adapters out first: "
            + command_on(adapter, "fleet unshare", "--all", output="adapters"),
        )
    adapter.require_true_delta("share")
    if not adapter.modules:
        raise AdapterError("the adapter has no modules to share", path=adapter.source)
    plain = folded_exactly(adapter, "share", scratch_folder)
    for module, change in plain.modules.items():
        if change.is_dora:
            raise UnsupportedError(
                "the change of a DoRA depends on the base's weights, so it has no core in a "
                "shared basis",
                path=adapter.source,
                tensor=module,
                hint="Make it a plain LoRA first: "
                + command_on(adapter, "to-lora", "--base MODEL --rank RANK"),
            )
    if plain.format != "peft":
        plain = prepare(plain, "peft").adapter
    try:
        possible_name(name)
    except ValueError as error:
        raise OptionError(f"the adapter has {error}", hint="Rename its file or folder") from error
    return Entrant(name, plain, adapter)


def short_names(names: Sequence[str]) -> list[str]:
    """Return names that files can have: without suffixes and folders, as far as they stay distinct.

    >>> short_names(["a/one.safetensors", "b/two"]), short_names(["a/x", "b/x"])
    (['one', 'two'], ['a-x', 'b-x'])
    """
    plain = [without_ending(name) for name in names]
    parts = [[part for part in name.replace("\\", "/").split("/") if part] for name in plain]
    for depth in range(1, 1 + max(map(len, parts), default=0)):
        short = ["-".join(each[-depth:]) for each in parts]
        if len({one.casefold() for one in short}) == len(short):
            return short
    return [f"{'-'.join(each)}-{place}" for place, each in enumerate(parts)]


def left_beside(entrants: Sequence[Entrant]) -> tuple[Finding, ...]:
    """Return a finding on files beside adapters, for which a set has no place."""
    names = sorted({name for one in entrants for name in one.source.attachments})
    if not names:
        return ()
    message = f"a shared set has no place for the files beside adapters: {', '.join(names)}"
    return (Finding("attachments-left-out", "note", None, message),)


def triplets_of(name: str, factors: LowRank, source: Path | None) -> list[Triplets]:
    """Return the singular triplets of each matrix of a module, exact to rounding.

    Raises:
        AdapterError: NaN or infinite values, or squares beyond float64.
    """
    wide = "F64" in (factors.a.dtype.code, factors.b.dtype.code)
    found = []
    for b, a in loaded(factors, narrow=True):
        if not (np.isfinite(b).all() and np.isfinite(a).all()):
            raise AdapterError(NOT_FINITE, path=source, tensor=name)
        thin = Thin(b, a, factors.scale, use_gram=not wide)
        if not np.isfinite(thin.squared_norm):
            raise AdapterError("squares of the factors overflow float64", path=source, tensor=name)
        found.append(Triplets.of(thin))
    return found


def member_of(one: Entrant, group: int, relative_error: float, scratch: Scratch) -> Member:
    """Return what a set holds of an adapter besides its cores."""
    biases: dict[str, TensorRef] = {}
    for name, change in one.adapter.modules.items():
        factors = change.require_factors()
        if factors.bias is not None:
            biases[name] = _scaled(factors.bias, factors.scale, scratch)
    config: Mapping[str, object] = one.adapter.config
    return Member(
        one.name,
        group,
        config,
        relative_error,
        biases,
        one.adapter.replacements,
        one.adapter.carried,
    )


def _scaled(bias: TensorRef, scale: float, scratch: Scratch) -> TensorRef:
    """Return scale · bias in the bias' own type."""
    if scale == 1.0:
        return bias
    stored, _ = rounded(bias.load(np.float64) * scale, bias.dtype, bias.key)
    return scratch.store(bias.key, stored, bias.dtype)
