"""Writing experts in layouts that PEFT does not write: a stack for each projection, and Tinker's.

The adapter has them stacked or one by one; which layout is written is its `write_as`. Whoever sets
that has seen to it that all experts of a projection are there, with one rank and scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from loratools_formats.contract.commands import command_on
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank
from loratools_formats.core.dtypes import DType, common_dtype, encode
from loratools_formats.core.factors import alpha_of
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import ALL_LINEAR
from loratools_formats.core.peft_patterns import settings_of
from loratools_formats.core.tensors import TensorRef, have_same_bits, joined
from loratools_formats.disk.errors import UnsupportedError
from loratools_formats.formats.peft.experts.layout import A, B, named
from loratools_formats.formats.peft.experts.tinker import GATED, UNGATED

_SINGLE = re.compile(
    r"(?P<owner>(?:.*\.)?experts)\.(?P<index>\d{1,6})\."
    r"(?P<leaf>gate_up_proj|gate_proj|up_proj|down_proj)"
)
_HEAD = re.compile(r"(?P<before>(?:.*\.)?)lm_head")
_ATTENTION = re.compile(r"(?P<before>.*\.layers\.\d+)\.self_attn\.(?P<leaf>[qkvo]_proj)")
TINKER = ("tinker", "tinker-attn")
"""Tinker's layout; the second is of gpt-oss, whose attention it calls `attn`."""
PACKED = ("3d", "shared-outer", *TINKER)


def is_packed(adapter: Adapter, path: str) -> bool:
    """Return whether a module's factors are written by this layout, not as PEFT has them."""
    if adapter.write_as not in PACKED:
        return False
    change = adapter.modules[path]
    return bool(
        change.layer.kind == "experts"
        or _SINGLE.fullmatch(path)
        or (adapter.write_as in TINKER and _HEAD.fullmatch(path))
        or (adapter.write_as == "tinker-attn" and _ATTENTION.fullmatch(path))
    )


def packed_tensors(adapter: Adapter) -> Iterator[TensorRef]:
    """Yield the factors that the layout does not store as PEFT does, under the layout's names.

    Raises:
        UnsupportedError: factors of one projection have different shapes.
    """
    single: dict[tuple[str, str], dict[int, LowRank]] = {}
    for path, change in adapter.modules.items():
        if not is_packed(adapter, path):
            continue
        part = change.require_factors()
        match = _SINGLE.fullmatch(path)
        if match is not None:
            key = match["owner"], match["leaf"]
            single.setdefault(key, {})[int(match["index"])] = part
        elif part.layer.kind == "experts":
            yield from _sides(adapter, part.layer.parameters[0], part.a, part.b)
        else:
            yield part.a.renamed(named(_called(path), A))
            yield part.b.renamed(named(_called(path), B))
    gated = {owner for owner, leaf in single if leaf == "gate_proj"}
    for (owner, leaf), experts in single.items():
        ordered = [experts[index] for index in sorted(experts)]
        path = f"{owner}.{leaf}"
        if adapter.write_as in TINKER:
            names = GATED if owner in gated else UNGATED
            path = f"{owner}.{next(own for own, other in names.items() if other == leaf)}"
        yield from _sides(
            adapter,
            path,
            _stack(path, [part.a for part in ordered]),
            _stack(path, [part.b for part in ordered]),
        )
    if adapter.write_as in TINKER:
        for owner in sorted({owner for owner, _ in single} - gated):
            some = next(iter(adapter.modules.values())).require_factors().a
            for part_name in (A, B):
                empty = TensorRef("w3", some.dtype, (0,), bytes)
                yield empty.renamed(named(f"{owner}.w3", part_name))


def _called(path: str) -> str:
    """Return Tinker's name of a module beside experts."""
    attention = _ATTENTION.fullmatch(path)
    if attention is None:
        return "model.unembed_tokens"
    return f"{attention['before']}.attn.{attention['leaf']}"


def _stack(path: str, parts: list[TensorRef]) -> TensorRef:
    if len({part.shape for part in parts}) > 1:
        raise UnsupportedError(
            "experts of one projection have different ranks, which a stack cannot hold",
            tensor=path,
            got=", ".join(str(list(shape)) for shape in sorted({part.shape for part in parts})),
        )
    dtype = common_dtype([part.dtype for part in parts])
    of_one = [part if part.dtype == dtype else _widened(part, dtype) for part in parts]
    return joined(path, of_one, (len(parts), *parts[0].shape))


def _widened(tensor: TensorRef, dtype: DType) -> TensorRef:
    """Return a factor in a wider type, which holds all of its values."""

    def read() -> bytes:
        return encode(tensor.load(), dtype).tobytes()

    return TensorRef(tensor.key, dtype, tensor.shape, read)


def _sides(adapter: Adapter, path: str, a: TensorRef, b: TensorRef) -> Iterator[TensorRef]:
    outer_is_b = path.rpartition(".")[2] in ("down_proj", "w2")
    if adapter.write_as == "shared-outer" or (
        adapter.write_as in TINKER and _all_share(adapter, path.rpartition(".")[0])
    ):
        a, b = (a, _first(b)) if outer_is_b else (_first(a), b)
    yield a.renamed(named(path, A))
    yield b.renamed(named(path, B))


def _first(stack: TensorRef) -> TensorRef:
    return stack.matrix(0).reshaped((1, *stack.shape[1:]))


def _all_share(adapter: Adapter, owner: str) -> bool:
    """Return whether a layer's experts share A of gate and up, and B of down."""
    sides: dict[str, list[TensorRef]] = {A: [], B: []}
    for path, change in adapter.modules.items():
        match = _SINGLE.fullmatch(path)
        if match is not None and match["owner"] == owner:
            part = change.require_factors()
            down = match["leaf"] == "down_proj"
            sides[B if down else A].append(part.b if down else part.a)
    return all(
        have_same_bits(tensors[0], each) for tensors in sides.values() for each in tensors[1:]
    )


def about_heads(adapter: Adapter) -> list[Finding]:
    """Return findings about output layers that a file under PEFT's names changes alone."""
    heads = [name for name, change in adapter.modules.items() if change.layer.tied]
    if not heads or adapter.format != "peft" or adapter.write_as in TINKER:
        return []
    text = (
        f"{heads[0]} is Tinker's change of the output layer, which is of the embedding, too, if "
        "the model ties the two; under PEFT's names it is of the output layer alone"
    )
    hint = "For a model that ties them, give it first, and both are written: " + command_on(
        adapter, "convert", "--to peft --base BASE", output="converted"
    )
    return [Finding("head-alone", "note", heads[0], text, hint)]


def packed_config(adapter: Adapter, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration for the layout, from PEFT's for the same modules.

    Raises:
        UnsupportedError: Tinker's has no place for ranks and scales that differ, or for embeddings.
    """
    if adapter.write_as not in PACKED:
        return dict(values)
    leaves, others = set(), set()
    for path, change in adapter.modules.items():
        is_stack = change.layer.kind == "experts"
        kept = {name for name in change.layer.parameters if not name.endswith(".weight")}
        if kept and not is_stack:  # of a module that has parameters only, as shared experts have
            others |= kept
            continue
        leaves.add((change.layer.parameters[0] if is_stack else path).rpartition(".")[2])
    made = {key: value for key, value in values.items() if key != "target_parameters"}
    made["target_modules"] = sorted(leaves)
    if others:
        made["target_parameters"] = sorted(others)
    if adapter.write_as in TINKER:
        _refuse_embeddings(adapter)
        if made.get("rank_pattern") or made.get("alpha_pattern"):
            parts = [change.require_factors() for change in adapter.modules.values()]
            if len({(part.rank, part.scale) for part in parts}) > 1:
                raise UnsupportedError("Tinker's configuration has one rank and one alpha for all")
            rank, scale = parts[0].rank, parts[0].scale  # the patterns are of modules left behind
            made |= {"r": rank, "lora_alpha": alpha_of(rank, scale), "use_rslora": False}
            made |= {"rank_pattern": {}, "alpha_pattern": {}}
        made["target_modules"] = ALL_LINEAR
    elif made.get("rank_pattern") or made.get("alpha_pattern"):
        made |= settings_of(_settings_as_written(adapter)) | {"use_rslora": False}
    return made


def _refuse_embeddings(adapter: Adapter) -> None:
    for path, change in adapter.modules.items():
        if change.layer.kind == "embedding":
            raise UnsupportedError(
                "Tinker adapts no embedding, and no reader of its files looks for one",
                path=adapter.source,
                tensor=path,
                hint="Leave it out with `drop`, or write PEFT's own layout",
            )


def _settings_as_written(adapter: Adapter) -> dict[str, tuple[int, float]]:
    """Return rank and alpha by the names of the file, where single experts are one stack."""
    found: dict[str, tuple[int, float]] = {}
    for path, change in adapter.modules.items():
        part = change.require_factors()
        match = _SINGLE.fullmatch(path)
        names = (path,) if match is None else (f"{match['owner']}.{match['leaf']}",)
        for name in change.layer.parameters or names:
            found[name] = part.rank, alpha_of(part.rank, part.scale)
    return found
