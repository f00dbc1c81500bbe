"""Changes of an output layer that are of the embedding, too, where the model ties the two.

Tinker's are. Its programs add them to the weight that both layers share, as `build_name_remaps`
of `tinker_cookbook/weights/_merge_utils.py` at 9dfcc3a2 says; PEFT's are of the output layer alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratools.base.placement.class_view import names_in_class
from loratools.base.placement.names import Names
from loratools.base.placement.tied import is_mirrored
from loratools.base.tied import find_tie
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, UnsupportedError


def with_tied_heads(names: Names, adapter: Adapter) -> Adapter:
    """Return an adapter in which such a change is of both layers, or of one, as the base has them.

    The embedding's factors are the output layer's, transposed. No value changes.

    Args:
        names: of the base.
        adapter: whatever it changes.

    Raises:
        AdapterError: the adapter changes the embedding in another way, too.
        UnsupportedError: the base ties the layers and stores both.
    """
    heads = _heads(adapter)
    if not heads:
        return adapter
    tie = find_tie(names, adapter=adapter, guess_head=True)
    modules, config = dict(adapter.modules), adapter.config
    for name in heads:
        part = modules[name].require_factors()
        alone = replace(part, layer=replace(part.layer, tied=False))
        modules[name] = modules[name].with_direction(alone)
        if tie is None or names.spelling(f"{name}.weight") != names.spelling(tie.head):
            continue
        if tie.is_head_stored:
            raise UnsupportedError(
                "Tinker's change of the output layer is of the embedding, too, where the model "
                "ties them; the base's config ties them, yet it stores both",
                path=names.base.path,
                tensor=tie.head,
                hint="Set tie_word_embeddings to false in its config.json, which changes the "
                "output layer alone, or remove the tensor, which changes both",
            )
        _refuse_other_changes(names, adapter, tie.embedding)
        embedding = tie.embedding.removesuffix(".weight")
        modules[embedding] = ModuleChange(_of_embedding(part))
        config = _with_target(config, embedding)
    return replace(adapter, modules=modules, config=config)


def about_tied_heads(given: Adapter, placed: Adapter) -> tuple[Finding, ...]:
    """Return what to tell of changes that are of both layers.

    Args:
        given: an adapter.
        placed: what `with_tied_heads` made of it.
    """
    both = [name for name in _heads(given) if len(placed.modules) > len(given.modules)]
    text = (
        "is of the embedding, too, which the model ties to it, as in Tinker's own merge; to change "
        "the output layer alone, convert the adapter to peft without the base, and fuse that"
    )
    return tuple(Finding("head-of-both", "note", name, f"{name} {text}") for name in both[:1])


def as_class_has_heads(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Return what `with_tied_heads` does in the names of a base's class; without one, nothing."""
    if base is None or not _heads(adapter):
        return adapter
    return with_tied_heads(names_in_class(base), adapter)


def with_one_head(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Return an adapter in Tinker's terms, where one change is of both layers that a model ties.

    Raises:
        UnsupportedError: it changes one of them, or each in its own way.
    """
    if base is None:
        return adapter
    names = names_in_class(base)
    tie = find_tie(names, adapter=adapter, guess_head=True)
    if tie is None:
        return adapter
    ends = [
        [n for n in adapter.modules if names.spelling(f"{n}.weight") == names.spelling(key)]
        for key in (tie.embedding, tie.head)
    ]
    if not any(ends):
        return adapter
    embedding, head = (adapter.modules[end[0]] if end else None for end in ends)
    if embedding is None and head is not None and head.layer.tied:
        return adapter
    if embedding is not None and head is not None and _are_alike(embedding, head):
        rest = {name: c for name, c in adapter.modules.items() if name not in ends[0]}
        return replace(adapter, modules=rest)
    raise UnsupportedError(
        "Tinker has one change for the embedding and the output layer of this model, which ties "
        "them, and the adapter changes one of them alone or each otherwise",
        path=adapter.source,
        tensor=(ends[1] or ends[0])[0],
        hint="Keep the PEFT folder, or leave the module out with `drop`",
    )


def _are_alike(embedding: ModuleChange, head: ModuleChange) -> bool:
    if embedding.is_dora or head.is_dora:
        return False
    return is_mirrored(embedding.require_factors(), head.require_factors())


def _heads(adapter: Adapter) -> list[str]:
    return [n for n, c in adapter.modules.items() if c.factors is not None and c.layer.tied]


def _of_embedding(head: LowRank) -> LowRank:
    """Return the change of an embedding that is an output layer's, seen from the other side."""
    a, b = head.b.transposed((1, 0)), head.a.transposed((1, 0))
    return LowRank(a, b, head.scale, Layer("embedding"), alpha=head.alpha)


def _refuse_other_changes(names: Names, adapter: Adapter, embedding: str) -> None:
    spelling = names.spelling(embedding)
    replaced = [each.target for each in adapter.replacements.values()]
    for target in (*(f"{module}.weight" for module in adapter.modules), *replaced):
        if names.spelling(target) == spelling:
            raise AdapterError(
                "the adapter changes one layer twice: Tinker's change of the output layer is of "
                "the embedding, too, which the model ties to it",
                path=adapter.source,
                tensor=target,
            )


def _with_target(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    made = dict(config)
    targets = made.get("target_modules")
    leaf = module.rpartition(".")[2]
    if isinstance(targets, list) and leaf not in targets:
        made["target_modules"] = sorted([*targets, leaf])
    return made
