"""Tensors of an adapter that take the place of base tensors, or of some of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from loratools.base.placement import rules
from loratools.base.placement.changes import Span
from loratools.base.placement.fused import joined_spans, part_spans
from loratools.base.placement.names import Names
from loratools.base.placement.sites import Site, sites
from loratools.base.placement.tied import TiedChanges
from loratools.base.task_class import ENDING_OF_TASK
from loratools_formats.checkpoints.facts import HEAD_BIASES, HEADS, INPUT_EMBEDDINGS
from loratools_formats.core.adapter import Adapter, Replacement
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_POOLER = "pooler"
_RESIZABLE = INPUT_EMBEDDINGS | rules.TASK_HEADS | frozenset(HEADS.values())


@dataclass
class Replaced:
    """Where replacements go.

    Attributes:
        placed: by base key, rows after whole tensors.
        findings: what a user should know.
    """

    placed: list[tuple[str, Replacement]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def place_replacements(
    names: Names, adapter: Adapter, tied: TiedChanges, missing: list[str]
) -> Replaced:
    """Return where an adapter's replacements go, and tell `names` of tensors they resize.

    Args:
        names: the checkpoint.
        adapter: the adapter.
        tied: what is dealt with already, and the new tensors there are.
        missing: is extended by the targets that the base does not have.

    Raises:
        AdapterError: a shape does not fit.
        UnsupportedError: it would go into columns of a fused weight.
    """
    result = Replaced()
    for name, replacement in adapter.replacements.items():
        if name in tied.replaced:
            continue
        if replacement.target in tied.untied:
            result.placed.append((replacement.target, replacement))
            continue
        module, _, leaf = replacement.target.rpartition(".")
        found = sites(names, module, leaf) or _tied_bias(names, replacement)
        if found:
            result.placed += _at(names, replacement, found)
        elif _belongs_to_task(names, adapter, replacement):
            result.placed.append((replacement.target, replacement))
            message = f"{replacement.target}: not in the base, added"
            result.findings.append(Finding("tensor-added", "note", replacement.target, message))
        elif replacement.kind == "parameter":
            message = f"{replacement.target}: not in the base, left out, as PEFT does"
            result.findings.append(Finding("tensor-dropped", "note", replacement.target, message))
        else:
            missing.append(replacement.target)
    return result


def _tied_bias(names: Names, replacement: Replacement) -> list[Site]:
    key = names.find(HEAD_BIASES.get(replacement.target, replacement.target))
    return [] if key is None else [Site(key)]


def _belongs_to_task(names: Names, adapter: Adapter, replacement: Replacement) -> bool:
    """Return whether it is a head, or the pooler that a classifier has in front of its own."""
    parts = names.spelling(replacement.target).split(".")
    is_pooler = _POOLER in parts and adapter.config.get("task_type") in ENDING_OF_TASK
    return replacement.kind == "module" and (parts[0] in rules.TASK_HEADS or is_pooler)


def _at(
    names: Names, replacement: Replacement, found: list[Site]
) -> Iterator[tuple[str, Replacement]]:
    site = found[0]
    if site.plane is not None:
        raise UnsupportedError(
            "replacing one expert of a stack is not supported",
            path=names.base.path,
            tensor=replacement.target,
        )
    if site.share is not None:
        yield from _shared_out(names, replacement, found)
    elif site.part is not None:
        shape = names.shape(site.key)
        outputs = part_spans(names, site.part, shape[0])
        yield site.key, _as_rows(replacement, shape, outputs)
    else:
        if replacement.kind == "token_rows":
            _check_rows(replacement, names.shape(site.key), replacement.rows)
        else:
            _check_whole(names, replacement, site.key)
        yield site.key, replacement


def _as_rows(
    replacement: Replacement, shape: tuple[int, ...], outputs: tuple[Span, ...]
) -> Replacement:
    rows = tuple(row for start, stop in outputs for row in range(start, stop))
    _check_rows(replacement, shape, rows)
    return replace(replacement, kind="token_rows", rows=rows)


def _check_rows(replacement: Replacement, shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    expected = (len(rows), *shape[1:])
    if replacement.tensor.shape != expected or (rows and max(rows) >= shape[0]):
        raise AdapterError(
            "the rows do not fit the base tensor",
            tensor=replacement.target,
            got=f"{list(replacement.tensor.shape)}, last row {max(rows, default=0)}",
            expected=f"{list(expected)}, rows below {shape[0]}",
        )


def _check_whole(names: Names, replacement: Replacement, key: str) -> None:
    stored, new = names.tensors[key].shape, replacement.tensor.shape
    if stored == new:
        return
    path = names.spelling(key).rpartition(".")[0]
    resizable = path in _RESIZABLE or path.partition(".")[0] in rules.TASK_HEADS
    if not resizable or stored[1:] != new[1:]:
        raise AdapterError(
            "the replacement does not fit the base tensor",
            tensor=replacement.target,
            got=list(new),
            expected=list(stored),
        )
    names.resized[key] = new


def _shared_out(
    names: Names, replacement: Replacement, found: list[Site]
) -> Iterator[tuple[str, Replacement]]:
    shapes = [names.tensors[site.key].shape for site in found]
    tensor = replacement.tensor
    spans = joined_spans([shape[0] for shape in shapes])
    if tensor.shape[0] != spans[-1][1] or {shape[1:] for shape in shapes} != {tensor.shape[1:]}:
        raise AdapterError(
            "the replacement does not fit the base tensors it fuses",
            tensor=replacement.target,
            got=list(tensor.shape),
            expected=[list(shape) for shape in shapes],
        )
    for site, span in zip(found, spans, strict=True):
        yield site.key, replace(replacement, target=site.key, tensor=_rows_of(tensor, span))


def _rows_of(tensor: TensorRef, span: Span) -> TensorRef:
    start, stop = span
    row = tensor.nbytes // tensor.shape[0]
    return TensorRef(
        tensor.key,
        tensor.dtype,
        (stop - start, *tensor.shape[1:]),
        lambda: memoryview(tensor.raw())[start * row : stop * row],
    )
