"""Tinker's names of modules beside experts, and the parts of projections that it adapts alone.

Reading gives most names without a base (`formats/peft/experts/tinker.py`). What needs one is here:
projections that the model keeps as one and Tinker as several. Source: `tinker_cookbook/weights/` at
9dfcc3a2, whose `_adapter.py` joins them as is done here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from loratools.base.placement import rules
from loratools.base.placement.changes import Span
from loratools.base.placement.fused import FusedPart, mixed_spans
from loratools.base.placement.names import Names
from loratools.base.placement.tied_head import with_one_head
from loratools.operations.in_class_names import in_class_names
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.commands import command_on
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk.errors import UnsupportedError

_PREFIX = re.compile(
    r"(?:model\.language_model|language_model\.model|backbone|model)\.(?P<rest>layers\..+)"
)
_HEAD = re.compile(r"(?:language_model\.|model\.)?lm_head")
_ALONE = (
    "is of the output layer alone, and Tinker's change of it is of the embedding, too, if the "
    "model ties the two; with `base`, that is refused"
)
_OWNER = re.compile(r"(?P<owner>.*\b(?P<block>linear_attn|mixer))\.(?P<leaf>\w+)")


def is_part(name: str) -> bool:
    """Return whether a module is a part of a projection, as Tinker adapts it."""
    match = _OWNER.fullmatch(name)
    fused = {} if match is None else rules.MIXED[match["block"]]
    return match is not None and any(match["leaf"] in parts for parts in fused.values())


def with_whole_projections(
    adapter: Adapter, base: Checkpoint | None
) -> tuple[Adapter, dict[str, ModuleChange]]:
    """Return an adapter without such parts, and the projections that they make.

    Parts stand in blocks: A on top of A, and each B in its own rows. No value changes.

    Raises:
        UnsupportedError: there is no base, whose sizes tell the rows.
    """
    parts = {name: change for name, change in adapter.modules.items() if is_part(name)}
    if not parts:
        return adapter, {}
    if base is None:
        raise UnsupportedError(
            "Tinker adapts this projection in parts, which are one module in the model",
            path=adapter.source,
            tensor=next(iter(parts)),
            hint="Give the base, which tells where they lie in it: "
            + command_on(adapter, "convert", "--to peft --base BASE", output="converted"),
        )
    rest = {name: change for name, change in adapter.modules.items() if name not in parts}
    config = {**adapter.config, "target_modules": []}
    alone = replace(adapter, modules=parts, replacements={}, additions={}, config=config)
    whole = dict(in_class_names([alone], base)[0].modules)
    return replace(adapter, modules=rest), whole


def in_tinker_names(
    adapter: Adapter, modules: Mapping[str, ModuleChange], base: Checkpoint | None
) -> tuple[dict[str, ModuleChange], tuple[Finding, ...]]:
    """Return modules under the names that Tinker has for them, and what to tell.

    Args:
        adapter: for messages.
        modules: single experts, and all others.
        base: the base model.

    Raises:
        UnsupportedError: a projection is adapted where Tinker has no part of it, the base must
            tell where its parts lie, or one of two tied layers changes alone.
    """
    made: dict[str, ModuleChange] = {}
    modules = with_one_head(replace(adapter, modules=modules), base).modules
    told: tuple[Finding, ...] = ()
    for name, change in modules.items():
        if base is None and _HEAD.fullmatch(name) and not change.layer.tied:
            told = (Finding("head-alone", "note", name, f"{name} {_ALONE}"),)
        path = "lm_head" if _HEAD.fullmatch(name) else name
        match = _PREFIX.fullmatch(name)
        if match is not None:
            path = f"model.{match['rest']}"
        for own, part in _parts(adapter, path, change, base):
            if own in made:
                raise UnsupportedError("two modules have one name in Tinker", tensor=own)
            made[own] = part
    return made, told


def _parts(
    adapter: Adapter, path: str, change: ModuleChange, base: Checkpoint | None
) -> Iterator[tuple[str, ModuleChange]]:
    match = _OWNER.fullmatch(path)
    parts = () if match is None else rules.MIXED[match["block"]].get(match["leaf"], ())
    if match is None or not parts:
        yield path, change
        return
    if base is None:
        raise UnsupportedError(
            "Tinker adapts this projection in parts, and where they lie is not known",
            path=adapter.source,
            tensor=path,
            hint="Give the base, which tells: "
            + command_on(adapter, "convert", "--to tinker --base BASE", output="converted"),
        )
    factors = change.require_factors()
    names = Names(base)
    whole = FusedPart(path, match["leaf"], 0)
    spans = mixed_spans(names.section(path), whole, factors.shape[0])
    end = spans[-1][1]
    if factors.b.load()[end:].any():
        raise UnsupportedError(
            "Tinker has no place for the last outputs of this projection",
            path=adapter.source,
            tensor=path,
            got=f"{factors.shape[0]} outputs, of which Tinker adapts {end}",
            hint="Keep the PEFT folder, or leave the module out: "
            + command_on(adapter, "convert", f"--to tinker --drop {path}", output="converted"),
        )
    for leaf, span in zip(parts, spans, strict=True):
        yield f"{match['owner']}.{leaf}", change.with_direction(_cut(factors, span))


def _cut(whole: LowRank, span: Span) -> LowRank:
    """Return the factors of some outputs, without ranks that are zero in all of them."""
    b = whole.b.load()[span[0] : span[1]]
    used = [column for column in range(b.shape[1]) if b[:, column].any()] or [0]
    if len(used) == whole.rank:
        return replace(whole, b=whole.b.rows(list(range(*span))))
    made: TensorRef = in_memory(whole.b.key, b[:, used], whole.b.dtype.code)
    return replace(whole, a=whole.a.rows(used), b=made, alpha=None)
