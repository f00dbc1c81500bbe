"""Experts that an adapter has one by one, in the stacks that llama.cpp keeps them in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.dtypes import DType, common_dtype, dtype_of_multiples, encode
from loratools_formats.core.expert_names import LISTED, OF_MIXTRAL, SINGLE
from loratools_formats.core.flat_experts import FLAT, singles_of
from loratools_formats.core.peft_facts import NESTED
from loratools_formats.core.tensors import TensorRef, joined
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.gguf.architectures import Architecture, Module
from loratools_formats.formats.gguf.gate_up import GATE, UP
from loratools_formats.formats.gguf.layouts import halves, whole

_OLD = re.compile(r"(?P<block>.*\bblock_sparse_moe)\.(?P<leaf>input|output)_linear")


def today(modules: Mapping[str, ModuleChange]) -> dict[str, ModuleChange]:
    """Return modules with Granite's stacks under the names that transformers 5 gives them."""
    made = {}
    for path, change in modules.items():
        match = _OLD.fullmatch(path)
        if match is None or change.layer.kind != "experts":
            made[path] = change
            continue
        owner, is_inner = f"{match['block']}.experts", match["leaf"] == "input"
        part = change.require_factors()
        leaf = "gate_up_proj" if is_inner else "down_proj"
        layer = replace(part.layer, parameters=(f"{owner}.{leaf}",))
        made[owner + NESTED * is_inner] = change.with_direction(replace(part, layer=layer))
    return made


def flat_apart(modules: Mapping[str, ModuleChange], experts: int) -> dict[str, ModuleChange]:
    """Return modules with the matrices of DBRX's experts as linear layers of single ones.

    Args:
        modules: as PEFT has them.
        experts: how many the model has.

    Raises:
        AdapterError: the rows of a matrix are not those of so many experts.
    """
    made: dict[str, ModuleChange] = {}
    for path, change in modules.items():
        (parameter,) = change.layer.parameters if len(change.layer.parameters) == 1 else ("",)
        if FLAT.fullmatch(parameter) is None or change.layer.kind != "linear":
            made[path] = change
            continue
        part = change.require_factors()
        rows = part.shape[0]
        if experts < 1 or rows % experts:
            raise AdapterError(
                "module does not fit the base model",
                tensor=parameter,
                got=f"{rows} rows",
                expected=f"rows of {experts} experts",
            )
        for name, single in singles_of(parameter, part, experts):
            made[name] = ModuleChange(single)
    return made


def stacks_apart(modules: Mapping[str, ModuleChange]) -> dict[str, ModuleChange]:
    """Return modules with stacks of DBRX's experts as linear layers of single ones."""
    made: dict[str, ModuleChange] = {}
    for path, change in modules.items():
        match = FLAT.fullmatch(path)
        if match is None or change.layer.kind != "experts":
            made[path] = change
            continue
        part = change.require_factors()
        for expert in range(part.experts):
            a, b = part.a.matrix(expert), part.b.matrix(expert)
            single = replace(part, a=a, b=b, layer=Layer("linear"))
            made[f"{match['owner']}.{expert}.{match['leaf']}"] = ModuleChange(single)
    return made


def in_stack(path: str, architecture: Architecture) -> tuple[Module, int] | None:
    """Return what becomes of one expert's projection where the model's files have only stacks.

    Gate and up of `experts.N.gate_up_proj` come one behind the other whatever the model, and those
    of `experts.gate_up_projs.N` as in the stack; so their writers have them.

    Args:
        path: of the module.
        architecture: whose table has the stacked parameters.
    """
    match = SINGLE.fullmatch(path) or LISTED.fullmatch(path)
    if match is None:
        return None
    owner, expert = match["owner"], int(match["index"])
    leaf = OF_MIXTRAL.get(match["leaf"], match["leaf"])
    if match.re is LISTED:
        leaf += "_proj"
    own = architecture.module(f"{owner}.{leaf}")
    if own is not None and own[0].stacked:
        module = own[0]
        if leaf == "gate_up_proj":
            rows = module.rows if match.re is LISTED and len(module.tensors) == 2 else halves
            module = Module(_gate_and_up(module), rows)
        return module._replace(stacked=False), expert
    both = architecture.module(f"{owner}.gate_up_proj")
    if both is None or not both[0].stacked or leaf not in ("gate_proj", "up_proj"):
        return None
    return Module((_gate_and_up(both[0])[leaf == "up_proj"],), whole), expert


def _gate_and_up(module: Module) -> tuple[str, ...]:
    """Return the names of gate's and up's tensors, which the model may keep as one."""
    if len(module.tensors) == 2:
        return module.tensors
    owner = module.tensors[0].rpartition(".")[0]
    return f"{owner}.{GATE}", f"{owner}.{UP}"


def stacked(name: str, found: Mapping[int, LowRank], experts: int) -> LowRank:
    """Stack the factors of single experts; those that are not adapted get zeros.

    Smaller ranks get zeros too. Another scale is folded into B, exactly if the ratio is a power of
    two, else with one rounding.

    Args:
        name: of the tensor, for messages.
        found: by number of the expert.
        experts: how many the model has.

    Raises:
        UnsupportedError: experts of different shapes.
        AdapterError: the model has fewer.
    """
    first = next(iter(found.values()))
    for part in found.values():
        if part.shape != first.shape:
            raise UnsupportedError(
                "experts of one layer differ in shape",
                tensor=name,
                got=list(part.shape),
                expected=list(first.shape),
            )
    if max(found) >= experts:
        raise AdapterError(
            "the base model has fewer experts", tensor=name, got=max(found), expected=experts
        )
    rank = max(part.rank for part in found.values())
    dtype = common_dtype([t.dtype for part in found.values() for t in (part.a, part.b)])
    dtype = dtype_of_multiples(dtype, (part.scale / first.scale for part in found.values()))
    out, in_ = first.shape
    a = [_padded(_of(found, e, "a"), (rank, in_), dtype, 1.0) for e in range(experts)]
    b = [
        _padded(
            _of(found, e, "b"),
            (out, rank),
            dtype,
            found[e].scale / first.scale if e in found else 1.0,
        )
        for e in range(experts)
    ]
    return replace(
        first,
        a=joined(first.a.key, a, (experts, rank, in_)),
        b=joined(first.b.key, b, (experts, out, rank)),
        layer=Layer("experts"),
        alpha=None,
    )


def _of(found: Mapping[int, LowRank], expert: int, side: str) -> TensorRef | None:
    part = found.get(expert)
    return None if part is None else part.a if side == "a" else part.b


def _padded(
    tensor: TensorRef | None, shape: tuple[int, int], dtype: DType, factor: float
) -> TensorRef:
    """Return a factor with zeros up to a shape; all zeros if there is none."""
    if tensor is not None and tensor.shape == shape and tensor.dtype == dtype and factor == 1.0:
        return tensor

    def read() -> bytes:
        import numpy as np

        made = np.zeros(shape, dtype.numpy_dtype())
        if tensor is not None:
            values = tensor.load() if factor == 1.0 else factor * tensor.load(np.float64)
            made[tuple(map(slice, values.shape))] = encode(values, dtype)
        return made.tobytes()

    return TensorRef("zeros" if tensor is None else tensor.key, dtype, shape, read)
