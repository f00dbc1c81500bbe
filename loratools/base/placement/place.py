"""Putting every change of an adapter in its place, or listing what fits nowhere."""

from __future__ import annotations

import re
import shlex
from itertools import combinations, pairwise

from loratools.base.placement.changes import (
    BiasPlacement,
    Placement,
    Placements,
    Span,
)
from loratools.base.placement.experts import expert_placements
from loratools.base.placement.flat_experts import flat_placements
from loratools.base.placement.fused import joined_spans, part_spans
from loratools.base.placement.names import Names
from loratools.base.placement.orient import cut_is_transposed, whole_is_transposed
from loratools.base.placement.replacing import place_replacements
from loratools.base.placement.sites import Site, sites
from loratools.base.placement.tied import tied_changes
from loratools.base.placement.tied_head import about_tied_heads, with_tied_heads
from loratools.base.tied import find_tie, shared_embeddings
from loratools.work.module_patterns import pattern_of
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import DEFAULT_HEAD, head_of
from loratools_formats.contract.commands import command_on
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.orientation import OTHER_BASE
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, LoratoolsError, printable

_LISTED = 4
_LLAMA_CPP = re.compile(r"blk\.\d+\.|(?:token_embd|output|output_norm)(?:\.|$)")


class UnmatchedError(AdapterError):
    """Modules or tensors of an adapter fit nothing in a base."""


def place(adapter: Adapter, base: Checkpoint) -> Placements:
    """Return where everything in an adapter goes.

    Args:
        adapter: read from a file.
        base: with tensors of the shapes they have in the model; of quantised weights, too.

    Raises:
        AdapterError: a module or tensor fits no base tensor, or several; the message lists all of
            them and the nearest names.
        UnsupportedError: a layout is ambiguous.
    """
    names = Names(base)
    given, adapter = adapter, with_tied_heads(names, adapter)
    tied = tied_changes(names, adapter)
    missing: list[str] = []
    replaced = place_replacements(names, adapter, tied, missing)
    deltas: list[Placement] = list(tied.deltas)
    biases: list[BiasPlacement] = []
    for module, delta in adapter.modules.items():
        if module not in tied.modules:
            placed = module_placements(names, module, delta)
            if not placed:
                missing.append(module)
                continue
            deltas += placed
        part = delta.require_factors()
        if part.bias is not None:
            biases += _bias_placements(names, module, part, part.bias)
    biases += _additions(names, adapter, missing)
    if missing:
        raise unmatched(names, missing, adapter)
    _refuse_clashes(names, deltas)
    return Placements(
        tuple(deltas),
        tuple(biases),
        (*tied.replacements, *replaced.placed),
        tied.untied,
        (*tied.findings, *about_tied_heads(given, adapter), *replaced.findings),
    )


def module_placements(names: Names, module: str, delta: ModuleChange) -> list[Placement]:
    """Return where a module's change goes; empty if the base has nothing that it fits.

    Raises:
        AdapterError: it fits several tensors, or has another shape.
        UnsupportedError: a layout is ambiguous, or the change has no factors.
    """
    part = delta.require_factors()
    if part.layer.parameters:
        placed = expert_placements(names, module, delta)
        if placed or part.layer.kind == "experts":
            return placed
    found = sites(names, module, "weight")
    if not found:
        return flat_placements(names, module, delta)
    shares = _share_spans(names, module, found, part)
    return [
        _placement(names, module, delta, site, share)
        for site, share in zip(found, shares, strict=True)
    ]


def has_place(names: Names, module: str, change: ModuleChange) -> bool:
    """Return whether the base has a module, of whatever shape."""
    try:
        if change.layer.parameters and change.factors is not None:
            return bool(expert_placements(names, module, change))
        found = bool(sites(names, module, "weight"))
    except LoratoolsError:  # several fit, or none of that shape
        return True
    tie = None if found else find_tie(names, guess_head=True)
    return found or (tie is not None and f"{module}.weight" in (tie.embedding, tie.head))


def _placement(
    names: Names, module: str, delta: ModuleChange, site: Site, share: tuple[Span, ...]
) -> Placement:
    part = delta.require_factors()
    out, in_ = part.shape
    shape = names.shape(site.key)
    if site.plane is not None:
        _check_plane(names, module, site, shape)
        shape = shape[1:]
    if site.part is None and site.share is None and site.plane is None:
        return Placement(site.key, module, delta, whole_is_transposed(names, module, part, shape))
    oriented_by = module if site.part is None else site.part.module
    oriented_by = oriented_by if site.plane is None else site.key
    transposed = cut_is_transposed(names, oriented_by, part, shape, stacked=site.plane is not None)
    total = shape[1] if transposed else shape[0]
    outputs = () if site.part is None else part_spans(names, site.part, total)
    if site.alternates:
        share = tuple((i, i + 1) for first in range(out // 2) for i in (first, out // 2 + first))
    here = sum(stop - start for start, stop in outputs) or total
    wanted = sum(stop - start for start, stop in share) or out
    if here != wanted:
        raise _does_not_fit(module, out, in_, f"{here} outputs in {site.key}")
    return Placement(
        site.key, module, delta, transposed, plane=site.plane, outputs=outputs, rows=share
    )


def _check_plane(names: Names, module: str, site: Site, shape: tuple[int, ...]) -> None:
    if site.plane is not None and site.plane >= shape[0]:
        raise AdapterError(
            "the base has fewer experts",
            path=names.base.path,
            tensor=module,
            got=f"{site.key} of shape {list(shape)}",
        )


def _share_spans(
    names: Names, module: str, found: list[Site], part: LowRank
) -> list[tuple[Span, ...]]:
    """Return which outputs of a delta go to each site, where it fuses several weights."""
    if not found or found[0].share is None:
        return [() for _ in found]
    out, in_ = part.shape
    sizes = []
    for site in found:
        stored = names.shape(site.key)
        sizes.append(stored[1 if cut_is_transposed(names, module, part, stored) else 0])
    if sum(sizes) != out:
        raise _does_not_fit(module, out, in_, f"{sum(sizes)} outputs in all of its parts")
    return [(span,) for span in joined_spans(sizes)]


def _bias_placements(
    names: Names, module: str, part: LowRank, bias: TensorRef
) -> list[BiasPlacement]:
    out, in_ = part.shape
    found = sites(names, module, "bias")
    if not found:
        raise AdapterError(
            "the adapter changes a bias that the base does not have",
            path=names.base.path,
            tensor=module,
            hint="Nothing of this adapter can be fused without it",
        )
    placed, here = _vectors(names, found, module, bias, part.scale)
    if here != out:
        raise _does_not_fit(module, out, in_, f"a bias of {here}")
    return placed


def _vectors(
    names: Names, found: list[Site], module: str, vector: TensorRef, scale: float = 1.0
) -> tuple[list[BiasPlacement], int]:
    """Return where the elements of a vector go, and how many of the base's those are."""
    sizes = [names.shape(site.key)[0] for site in found]
    shared = found[0].share is not None
    placed = []
    for site, size, span in zip(found, sizes, joined_spans(sizes), strict=True):
        outputs = () if site.part is None else part_spans(names, site.part, size)
        rows = (span,) if shared else ()
        placed.append(BiasPlacement(site.key, module, vector, scale, outputs, rows))
    here = sum(
        sum(stop - start for start, stop in p.outputs) or size
        for p, size in zip(placed, sizes, strict=True)
    )
    return placed, here


def _additions(names: Names, adapter: Adapter, missing: list[str]) -> list[BiasPlacement]:
    """Return what is added to biases and norms."""
    placed = []
    for addition in adapter.additions.values():
        stored = names.base.tensors.get(addition.target)
        if stored is None:
            module, _, leaf = addition.target.rpartition(".")
            found = sites(names, module, leaf) if leaf == "bias" else []
            if not found:
                missing.append(addition.target)
                continue
            vectors, here = _vectors(names, found, module, addition.tensor)
            if addition.tensor.shape != (here,):
                size = addition.tensor.numel
                raise _does_not_fit(module, size, 1, f"a bias of {here}")
            placed += vectors
            continue
        if stored.shape != addition.tensor.shape:
            raise AdapterError(
                "what is added does not fit the base tensor",
                tensor=addition.tensor.key,
                got=list(addition.tensor.shape),
                expected=f"{list(stored.shape)} of {addition.target}",
            )
        placed.append(BiasPlacement(addition.target, addition.target, addition.tensor))
    return placed


def _does_not_fit(module: str, out: int, in_: int, expected: str) -> AdapterError:
    return AdapterError(
        "the delta does not fit the base weight",
        tensor=module,
        got=f"out {out}, in {in_}",
        expected=expected,
        hint=OTHER_BASE,
    )


def unmatched(names: Names, missing: list[str], adapter: Adapter) -> UnmatchedError:
    """Return the error that modules or tensors fit nothing in the base."""
    if all(map(_LLAMA_CPP.match, missing)):
        source = "ADAPTER" if adapter.source is None else shlex.quote(str(adapter.source))
        base = shlex.quote(str(names.base.path))
        return UnmatchedError(
            f"is in llama.cpp's names, which the base {base} does not have",
            path=adapter.source,
            got=missing[0],
            hint=f"Rename it: loratools convert --to peft -o renamed --base {base} {source}",
        )
    head = head_of(sorted(names.types))
    if shared_embeddings(names) and all(
        names.spelling(name).removesuffix(".weight") in (head, DEFAULT_HEAD) for name in missing
    ):
        return UnmatchedError(
            "the output layer is tied to an embedding that an encoder and a decoder share, and the "
            "base has none of its own",
            path=names.base.path,
            tensor=missing[0],
            hint=f"To go without it, leave it out with `drop`: '^{re.escape(head)}$'",
        )
    listed = []
    for name in missing[:_LISTED]:
        nearest = names.nearest(name)
        listed.append(f"{printable(name)} (nearest: {', '.join(nearest) or 'none'})")
    more = f"; and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
    return UnmatchedError(
        f"no base tensor fits {len(missing)} of the adapter's modules or tensors: "
        f"{'; '.join(listed)}{more}",
        path=names.base.path,
        hint=_without(missing, adapter),
    )


def _without(missing: list[str], adapter: Adapter) -> str:
    """Return the hint where a base lacks modules: another base, or a command that drops them."""
    gone = [name if name in adapter.modules else name.rpartition(".")[0] for name in missing]
    kept = adapter.modules.keys() - set(gone)
    form = get_format(adapter.format)
    if not kept or not form.is_writable or form.naming is not None:
        return OTHER_BASE
    pattern = shlex.quote(pattern_of(gone, kept))
    command = command_on(adapter, "convert", f"--to {form.name} --drop {pattern}", output="without")
    return f"{OTHER_BASE} Without them: {command}"


def _refuse_clashes(names: Names, deltas: list[Placement]) -> None:
    """Refuse two modules on the same outputs of one matrix: one of them must be misplaced."""
    planes: dict[str, dict[int | None, list[Placement]]] = {}
    for placement in deltas:
        planes.setdefault(placement.key, {}).setdefault(placement.plane, []).append(placement)
    for by_plane in planes.values():
        everywhere = by_plane.get(None, [])
        for plane, here in by_plane.items():
            near = here if plane is None else here + everywhere
            for one, other in combinations(near, 2):
                if one.module != other.module and _overlap(one.outputs, other.outputs):
                    raise AdapterError(
                        "two modules of the adapter fit the same base tensor",
                        path=names.base.path,
                        tensor=one.key,
                        got=f"{one.module} and {other.module}",
                    )


def _overlap(one: tuple[Span, ...], other: tuple[Span, ...]) -> bool:
    return not one or not other or any(a[1] > b[0] for a, b in pairwise(sorted((*one, *other))))
