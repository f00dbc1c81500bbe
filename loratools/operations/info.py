"""What an adapter is, from its headers and configuration alone; no tensor is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loratools.operations.training_facts import components, training_facts
from loratools.work.json_object import named
from loratools_formats.core.adapter import Adapter, Dialect
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.findings import Finding


@dataclass(frozen=True)
class ModuleInfo:
    """One adapted module.

    Attributes:
        name: module path.
        kind: `lora`, `dora`, or another kind's name.
        layer: `linear`, `conv`, `embedding` or `experts`.
        shape: (out, in) of one matrix, the true one where factors of experts are the other way
            round; None for what the file does not tell.
        experts: number of stacked matrices, 1 if ordinary.
        rank: of the factors; None for another kind.
        alpha: as the file states it, None if it does not.
        scale: that multiplies b @ a; None for another kind.
        dtypes: stored types of its tensors.
    """

    name: str
    kind: str
    layer: str
    shape: tuple[int | None, int | None]
    experts: int
    rank: int | None
    alpha: float | None
    scale: float | None
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class AdditionInfo:
    """A tensor that is added to a bias or a norm's weight."""

    key: str
    target: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ReplacementInfo:
    """A tensor that takes the place of a base tensor, or of some of its rows."""

    key: str
    kind: str
    target: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """Everything `loratools info` shows.

    Attributes:
        path: where it was read from.
        format: name of its format.
        dialects: of a single file, how its keys are spelled, and by what that is recognised.
        base_model: as recorded, None if it is not.
        modules: adapted modules, in path order.
        additions: tensors that are added to biases and norms.
        replacements: tensors that replace base tensors.
        carried: keys of tensors that are neither.
        parameters: number of elements in all tensors.
        nbytes: size of the weight file.
        dtypes: number of tensors by stored type.
        findings: what a user should know; those of severity `error` make operations on ΔW refuse
            it.
        provenance: what the file says about how it was made, as metadata keys and values.
        training: what its metadata says of its training, by a word for each.
        components: of a file of a pipeline, how many modules each component has.
        expert_layout: how the file stores factors of experts, and what tells that; empty if it has
            none.
    """

    path: str
    format: str
    dialects: tuple[Dialect, ...]
    base_model: str | None
    modules: tuple[ModuleInfo, ...]
    additions: tuple[AdditionInfo, ...]
    replacements: tuple[ReplacementInfo, ...]
    carried: tuple[str, ...]
    parameters: int
    nbytes: int = named("bytes")
    dtypes: dict[str, int]
    findings: tuple[Finding, ...]
    provenance: dict[str, str]
    training: dict[str, str]
    components: dict[str, int]
    expert_layout: str


def describe(adapter: Adapter) -> AdapterInfo:
    """Return what an adapter is; reads no tensor."""
    return AdapterInfo(
        path=str(adapter.source),
        format=adapter.format,
        dialects=adapter.dialects,
        base_model=adapter.base_model,
        modules=tuple(_module(name, delta) for name, delta in adapter.modules.items()),
        additions=tuple(
            AdditionInfo(key, a.target, a.tensor.shape, a.tensor.dtype.code)
            for key, a in adapter.additions.items()
        ),
        replacements=tuple(
            ReplacementInfo(key, r.kind, r.target, r.tensor.shape, r.tensor.dtype.code)
            for key, r in adapter.replacements.items()
        ),
        carried=tuple(adapter.carried),
        parameters=sum(tensor.numel for tensor in adapter.tensors()),
        nbytes=adapter.weights_nbytes,
        dtypes=dict(sorted(Counter(t.dtype.code for t in adapter.tensors()).items())),
        findings=adapter.findings,
        provenance={k: v for k, v in adapter.metadata.items() if k.startswith("loratools.")},
        training=training_facts(adapter.metadata),
        components=components(adapter.modules) if adapter.dialects else {},
        expert_layout="" if adapter.expert_layout is None else adapter.expert_layout.described,
    )


def _module(name: str, delta: ModuleChange) -> ModuleInfo:
    dtypes = tuple(sorted({tensor.dtype.code for tensor in delta.tensors()}))
    part = delta.factors
    return ModuleInfo(
        name=name,
        kind=delta.kind,
        layer=delta.layer.kind,
        shape=delta.shape[::-1] if delta.layer.swapped else delta.shape,
        experts=1 if part is None else part.experts,
        rank=delta.rank,
        alpha=None if part is None else part.alpha,
        scale=None if part is None else part.scale,
        dtypes=dtypes,
    )


def counted(values: Iterable[Any]) -> str:
    """Return the distinct values with how often each occurs, most frequent first.

    >>> counted([16, 16, 8])
    '16 (2×), 8 (1×)'
    >>> counted([16, 16])
    '16'
    """
    counts = Counter(values).most_common()
    if len(counts) == 1:
        return str(counts[0][0])
    return ", ".join(f"{value} ({count}×)" for value, count in counts)
