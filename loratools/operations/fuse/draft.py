"""What adapters make of one base tensor, gathered: its values, those that replace them, changes.

Two adapters may replace the same values only by equal ones; nothing depends on their order.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from loratools.operations.fuse.blocks import Patch
from loratools.operations.fuse.terms import WeightedChange
from loratools_formats.core.adapter import Adapter, Replacement
from loratools_formats.core.tensors import TensorRef, have_same_bits
from loratools_formats.disk.errors import AdapterError

_MERGE_FIRST = "Merge them first: loratools merge ADAPTER ADAPTER --replacements first -o merged"


@dataclass(frozen=True)
class FuseInput:
    """An adapter to fuse.

    Attributes:
        adapter: read from anywhere.
        weight: factor of its change; negative to take it out again.
        name: for reports.
    """

    adapter: Adapter
    weight: float
    name: str


@dataclass
class Draft:
    """A tensor's plan in the making.

    Attributes:
        source: the values it begins with.
        changes: what is added.
        patches: rows that are replaced first.
        patched_by: whose they are.
        replaced_by: whose tensor it is, None if it is the base's.
    """

    source: TensorRef
    changes: list[WeightedChange] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)
    patched_by: list[FuseInput] = field(default_factory=list)
    replaced_by: FuseInput | None = None


def with_replaced_rows(adapter: Adapter) -> Adapter:
    """Return an adapter whose trained token rows replace rows of the base, instead of changing it.

    A `TRAINABLE_TOKENS` adapter holds the new rows themselves, as `trainable_token_indices` of a
    LoRA does.
    """
    rows = {
        values.key: Replacement(
            "token_rows", f"{name}.weight", values, tuple(delta.kind_delta.settings["rows"])
        )
        for name, delta in adapter.modules.items()
        if delta.kind_delta is not None and delta.kind == "token_rows"
        for values in delta.kind_delta.parts.values()
    }
    targets = {replacement.target for replacement in rows.values()}
    modules = {name: d for name, d in adapter.modules.items() if f"{name}.weight" not in targets}
    return replace(adapter, modules=modules, replacements={**adapter.replacements, **rows})


def replace_values(
    drafts: dict[str, Draft], key: str, replacement: Replacement, item: FuseInput
) -> None:
    """Replace a tensor or rows of it, or add a new one.

    Raises:
        AdapterError: the values do not fit, or another adapter replaces them by others.
    """
    draft = drafts.get(key)
    tensor = replacement.tensor
    if replacement.kind == "token_rows":
        if draft is None or tensor.shape[1:] != draft.source.shape[1:]:
            got = list(tensor.shape)
            raise AdapterError("token rows do not fit the embedding", tensor=tensor.key, got=got)
        if max(replacement.rows, default=0) >= draft.source.shape[0]:
            raise AdapterError(
                "token rows lie beyond the vocabulary",
                tensor=tensor.key,
                got=max(replacement.rows),
                expected=f"below {draft.source.shape[0]}",
            )
        for patch in draft.patches:
            _refuse_other_rows(patch, replacement, item)
        if draft.replaced_by is not None and draft.replaced_by is not item:
            raise _whole_and_rows(key, draft.replaced_by, item)
        draft.patches.append(Patch(replacement.rows, tensor))
        draft.patched_by.append(item)
        return
    if draft is None:
        drafts[key] = Draft(tensor, replaced_by=item)
        return
    for other in draft.patched_by:
        if other is not item:
            raise _whole_and_rows(key, item, other)
    if draft.replaced_by is not None and not have_same_bits(draft.source, tensor):
        raise AdapterError(
            f"{draft.replaced_by.name} and {item.name} replace the same tensor by different ones",
            tensor=key,
            hint=_MERGE_FIRST,
        )
    draft.source, draft.replaced_by = tensor, draft.replaced_by or item


def _whole_and_rows(key: str, whole: FuseInput, rows: FuseInput) -> AdapterError:
    return AdapterError(
        f"{whole.name} replaces a tensor of which {rows.name} replaces rows",
        tensor=key,
        hint="Fuse them one after the other, the one to prevail last",
    )


def _refuse_other_rows(patch: Patch, replacement: Replacement, item: FuseInput) -> None:
    before = {row: number for number, row in enumerate(patch.rows)}
    common = [(number, row) for number, row in enumerate(replacement.rows) if row in before]
    if not common:
        return
    old, new = patch.values.load(), replacement.tensor.load()
    for number, row in common:
        if not (old[before[row]] == new[number]).all():
            raise AdapterError(
                f"{item.name} and an adapter before it replace the same row by different ones",
                tensor=replacement.target,
                got=f"row {row}",
                hint=_MERGE_FIRST,
            )
