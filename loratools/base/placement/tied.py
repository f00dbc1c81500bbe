"""Token embeddings that share their weight with the output layer.

A checkpoint stores such a weight once. PEFT changes the layers it adapts, not the weight they
share: a change of only one of the two, or two different changes, untie them, and the checkpoint
must then hold both. Replaced weights are copied into the shared one, except `modules_to_save`,
whose copies belong to their own layer; a resized vocabulary takes its partner along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loratools.base.placement.changes import Placement
from loratools.base.placement.names import Names
from loratools.base.placement.orient import whole_is_transposed
from loratools.base.tied import Tie, find_tie, shared_embeddings
from loratools_formats.checkpoints.facts import HEAD_BIASES
from loratools_formats.core.adapter import Adapter, Replacement
from loratools_formats.core.change import LowRank
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import have_same_bits
from loratools_formats.disk.errors import AdapterError, UnsupportedError


@dataclass(frozen=True)
class TiedChanges:
    """What an adapter does to a tied weight.

    Attributes:
        deltas: changes of the weight, or of the two it becomes.
        replacements: what replaces it, or them.
        untied: maps the new output-layer tensor to the embedding it is copied from, if they must
            differ.
        findings: what a user should know.
        modules: modules of the adapter that are dealt with.
        replaced: replacements of the adapter, by key, that are dealt with.
    """

    deltas: tuple[Placement, ...] = ()
    replacements: tuple[tuple[str, Replacement], ...] = ()
    untied: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    modules: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()


@dataclass
class _End:
    """What the adapter does to one of the two layers."""

    modules: list[str]
    whole: list[str]
    rows: list[str]


def tied_changes(names: Names, adapter: Adapter) -> TiedChanges:
    """Return what an adapter does to a checkpoint's tied weight.

    Raises:
        AdapterError: its parts contradict each other.
        UnsupportedError: more than two layers share the weight, or the checkpoint holds both.
    """
    _refuse_shared_encoder(names, adapter)
    tie = find_tie(names, adapter=adapter)
    if tie is None:
        return TiedChanges()
    embedding = _end(names, adapter, tie.embedding)
    head = _end(names, adapter, tie.head)
    if not (_modules(embedding, head) or _replaced(embedding, head)):
        return TiedChanges()
    _refuse_doubles(adapter, embedding, head)
    same = (
        _same_deltas(adapter, embedding, head)
        and _same_wholes(names, adapter, tie, embedding, head)
        and _same_rows(adapter, embedding, head)
    )
    return (_together if same else _apart)(names, adapter, tie, embedding, head)


def _end(names: Names, adapter: Adapter, key: str) -> _End:
    spelling = names.spelling(key)

    def hits(name: str) -> bool:
        return names.spelling(name) == spelling

    replaced = {k: r for k, r in adapter.replacements.items() if hits(r.target)}
    return _End(
        [module for module in adapter.modules if hits(f"{module}.weight")],
        [k for k, r in replaced.items() if r.kind != "token_rows"],
        [k for k, r in replaced.items() if r.kind == "token_rows"],
    )


def _refuse_doubles(adapter: Adapter, *ends: _End) -> None:
    for end in ends:
        for found in (end.modules, end.whole, end.rows):
            if len(found) > 1:
                raise AdapterError(
                    "the adapter changes one layer twice",
                    path=adapter.source,
                    got=", ".join(found),
                )


def _refuse_shared_encoder(names: Names, adapter: Adapter) -> None:
    """Refuse changes of an embedding that an encoder and a decoder share, which is three layers."""
    shared = {f"{name}.weight" for name in shared_embeddings(names)}
    targets = [f"{module}.weight" for module in adapter.modules]
    targets += [replacement.target for replacement in adapter.replacements.values()]
    for target in targets:
        if names.spelling(target) in shared:
            raise UnsupportedError(
                "an encoder and a decoder share this embedding; changing it for one of them is not "
                "supported",
                path=names.base.path,
                tensor=target,
            )


def _same_deltas(adapter: Adapter, embedding: _End, head: _End) -> bool:
    """Return whether both layers change alike.

    Config ensure_weight_tying does not tell: for some models PEFT 0.21 ties nothing in spite of
    it. Where it does, the file holds both changes.
    """
    if not embedding.modules or not head.modules:
        return not (embedding.modules or head.modules)
    one, other = adapter.modules[embedding.modules[0]], adapter.modules[head.modules[0]]
    if "dora" in (one.kind, other.kind) or one.factors is None or other.factors is None:
        return False
    return is_mirrored(one.factors, other.factors)


def is_mirrored(embedding: LowRank, head: LowRank) -> bool:
    """Return whether an output layer's change is the transposed one of an embedding, exactly."""
    import numpy as np

    if (
        embedding.scale != head.scale
        or head.bias is not None
        or embedding.shape != head.shape[::-1]
        or embedding.rank != head.rank
        or embedding.layer.kind != "embedding"
    ):
        return False
    pairs = ((head.a, embedding.b), (head.b, embedding.a))
    return all(np.array_equal(one.load(), other.load().T) for one, other in pairs)


def _same_wholes(names: Names, adapter: Adapter, tie: Tie, embedding: _End, head: _End) -> bool:
    found = [adapter.replacements[key] for key in (*embedding.whole, *head.whole)]
    if len(found) == 2:
        return have_same_bits(found[0].tensor, found[1].tensor)
    if not found:
        return True
    resized = found[0].tensor.shape != names.tensors[tie.embedding].shape
    return resized or found[0].kind != "module"


def _same_rows(adapter: Adapter, embedding: _End, head: _End) -> bool:
    """PEFT ties trained rows of an embedding, not those of an output layer."""
    if not head.rows:
        return True
    if not embedding.rows:
        return False
    one, other = adapter.replacements[embedding.rows[0]], adapter.replacements[head.rows[0]]
    return one.rows == other.rows and have_same_bits(one.tensor, other.tensor)


def _together(names: Names, adapter: Adapter, tie: Tie, embedding: _End, head: _End) -> TiedChanges:
    keys = (tie.embedding, tie.head) if tie.is_head_stored else (tie.embedding,)
    modules = (embedding.modules + head.modules)[:1]
    wholes = (embedding.whole + head.whole)[:1]
    rows = (embedding.rows + head.rows)[:1]
    findings: tuple[Finding, ...] = ()
    if modules:
        message = f"{tie.embedding}: embedding and output layer stay tied, both changed alike"
        findings = (Finding("stays-tied", "note", tie.embedding, message),)
    return TiedChanges(
        tuple(
            _placement(names, adapter, tie, key, module, wholes)
            for key in keys
            for module in modules
        ),
        tuple((key, adapter.replacements[name]) for key in keys for name in wholes + rows),
        {},
        findings,
        _modules(embedding, head),
        _replaced(embedding, head),
    )


def _apart(names: Names, adapter: Adapter, tie: Tie, embedding: _End, head: _End) -> TiedChanges:
    if tie.is_head_stored:
        raise UnsupportedError(
            "the base's config ties the embedding and the output layer, yet it stores both, and "
            "the adapter changes them differently",
            path=names.base.path,
            tensor=tie.head,
            hint="Set tie_word_embeddings to false in its config.json, or remove the tensor",
        )
    wholes = embedding.whole + head.whole
    # A single tensor that is not `modules_to_save` was copied into the weight both share.
    shared = [name for name in wholes if adapter.replacements[name].kind != "module"]
    follows = shared if len(wholes) == 1 else []
    deltas: list[Placement] = []
    replacements: list[tuple[str, Replacement]] = []
    for key, end in ((tie.embedding, embedding), (tie.head, head)):
        whole = end.whole or follows
        rows = end.rows or embedding.rows
        deltas += [_placement(names, adapter, tie, key, module, whole) for module in end.modules]
        replacements += [(key, adapter.replacements[name]) for name in whole + rows]
    note = (
        f"{tie.embedding} and {tie.head} were tied; the adapter changes them differently, so both "
        "are written and tie_word_embeddings becomes false"
    )
    return TiedChanges(
        tuple(deltas),
        tuple(replacements),
        {tie.head: tie.embedding, **_untied_bias(names, tie)},
        (Finding("untied", "note", tie.head, note),),
        _modules(embedding, head),
        _replaced(embedding, head),
    )


def _untied_bias(names: Names, tie: Tie) -> dict[str, str]:
    bias = tie.head.removesuffix("weight") + "bias"
    stored = names.find(HEAD_BIASES.get(bias, bias))
    return {} if stored is None or stored == bias else {bias: stored}


def _modules(*ends: _End) -> frozenset[str]:
    return frozenset(module for end in ends for module in end.modules)


def _replaced(*ends: _End) -> frozenset[str]:
    return frozenset(name for end in ends for name in (*end.whole, *end.rows))


def _placement(
    names: Names, adapter: Adapter, tie: Tie, key: str, module: str, wholes: list[str]
) -> Placement:
    delta = adapter.modules[module]
    shape = names.tensors[tie.embedding].shape
    if wholes:
        shape = adapter.replacements[wholes[0]].tensor.shape
    transposed = whole_is_transposed(names, module, delta.require_factors(), shape)
    return Placement(key, module, delta, transposed)
