"""Between the base model's modules and GGUF tensors: names, row orders, splits and stacks.

Everything is a selection of rows of B, or a stacking of factors, so no value changes. The base
model is needed to know the architecture, and the numbers of heads and experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratools_formats.adapter import Adapter, Delta, Dora, Layer, LowRank, low_rank_part
from loratools_formats.errors import AdapterError, LoratoolsError, UnsupportedError
from loratools_formats.files import RegularFile
from loratools_formats.gguf.architectures import ARCHITECTURES, Architecture, Module, Sizes
from loratools_formats.gguf.base import Base, read_base
from loratools_formats.gguf.container import ARRAY, KeyValue
from loratools_formats.gguf.read import ALORA, EMBEDDING, INVOCATION_TOKENS, base_model_keys
from loratools_formats.orientation import is_transposed
from loratools_formats.registry import Context
from loratools_formats.tensors import TensorRef, in_memory, joined

OUTPUT = "output"
DEFAULT_DTYPE = "f32"
"""ggml rounds activations to the type of 16-bit factors; with 32 bits nothing is lost."""

_WRAPPER = ".base_layer"
_OWN_KEYS = ("general.", "adapter.", "tokenizer.", "split.", "format")
_PREFIXES = (
    "", "model.language_model.", "language_model.model.", "language_model.", "model.text_model.",
)  # fmt: skip


def from_model(adapter: Adapter, context: Context) -> Adapter:
    """Return an adapter in the names and layout of GGUF.

    Raises:
        UnsupportedError: no base model is given, its architecture is not known, or a module has no
            counterpart that llama.cpp would apply.
        AdapterError: a module does not fit the base model.
    """
    if adapter.format == "gguf":
        return replace(adapter, config={**adapter.config, "storage": context.dtype})
    if context.base is None:
        raise UnsupportedError(
            "a GGUF adapter depends on the architecture of its base model",
            path=adapter.source,
            hint="Pass --base with the model's folder (config.json is enough) or its GGUF file",
        )
    base = read_base(context.base)
    stacks: dict[str, dict[int, LowRank]] = {}
    modules: dict[str, Delta] = {}
    for path, delta in adapter.modules.items():
        try:
            for name, expert, part in _placed(path, _plain(delta), base):
                known = name in modules if expert is None else expert in stacks.get(name, {})
                if known:
                    raise AdapterError("two modules become the same GGUF tensor", got=name)
                if expert is None:
                    modules[name] = part
                else:
                    stacks.setdefault(name, {})[expert] = part
        except LoratoolsError as error:
            error.tensor = error.tensor or path
            raise
    for name, found in stacks.items():
        if name in modules:
            raise AdapterError("experts are adapted one by one and as a stack", tensor=name)
        modules[name] = _stacked(name, found, base.sizes.experts)
    _check_shapes(modules, base)
    keys = dict(base_model_keys(adapter.base_model or ""))
    count = {"general.base_model.count": KeyValue("u32", 1)} if keys else {}
    return Adapter(
        format="gguf",
        source=adapter.source,
        modules=dict(sorted(modules.items())),
        config={
            "architecture": base.architecture.name,
            "keys": {**count, **_invocation(adapter)},
            "storage": context.dtype or DEFAULT_DTYPE,
        },
        metadata={
            **keys,
            **{k: v for k, v in adapter.metadata.items() if k and not k.startswith(_OWN_KEYS)},
        },
        base_model=adapter.base_model,
        notes=adapter.notes,
        inputs=adapter.inputs,
        other_inputs=_with_base(adapter, base),
    )


def _with_base(adapter: Adapter, base: Base | None) -> dict[str, tuple[RegularFile, ...]]:
    others = dict(adapter.other_inputs)
    return {**others, "base": base.files} if base is not None and base.files else others


def _invocation(adapter: Adapter) -> dict[str, KeyValue]:
    tokens = adapter.config.get(ALORA)
    if not tokens:
        return {}
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < 1 << 32 for token in tokens
    ):
        raise AdapterError(f"config value {ALORA} is wrong", path=adapter.source, got=tokens)
    return {INVOCATION_TOKENS: KeyValue(ARRAY, tokens, "u32", len(tokens))}


def _plain(delta: Delta) -> LowRank:
    if isinstance(delta, Dora):
        raise UnsupportedError(
            "llama.cpp has no DoRA", hint="Make a LoRA of it with `loratools to-lora` first"
        )
    part = low_rank_part(delta)
    if part.bias is not None:
        raise UnsupportedError("llama.cpp adapters have no biases (lora_bias)")
    return part


def _placed(path: str, delta: LowRank, base: Base) -> list[tuple[str, int | None, LowRank]]:
    """Return (GGUF name, expert, factors) of every tensor that a module becomes."""
    if delta.layer.kind == "experts":
        module, block, delta = _expert_parameter(path, delta, base)
        expert = None
    else:
        found = _look_up(path, base)
        if found is None:
            raise UnsupportedError(
                f"llama.cpp applies no adapter to this module of {base.architecture.name}",
                hint="Remove it from the adapter if it was trained by mistake",
            )
        module, block, expert = found
    names = [f"{block}{tensor}" for tensor in module.tensors]
    _check_embedding(names[0], delta, base)
    if delta.layer.kind == "conv":
        raise UnsupportedError("llama.cpp applies no adapter to convolutions")
    orders = module.rows(delta.shape[0], base.sizes)
    kind = delta.layer.kind
    parts = [
        replace(delta, b=_in_order(delta.b, order), layer=Layer(kind), alpha=None)
        for order in orders
    ]
    return [(name, expert, part) for name, part in zip(names, parts, strict=True)]


def _in_order(b: TensorRef, order: list[int]) -> TensorRef:
    return b if order == list(range(b.shape[-2])) else b.rows(order)


def _look_up(path: str, base: Base) -> tuple[Module, str, int | None] | None:
    for prefix in sorted({base.prefix, *_PREFIXES}, key=len, reverse=True):
        if path.startswith(prefix):
            rest = path[len(prefix) :]
            for tried in (rest, f"model.{rest}"):
                found = base.architecture.module(tried)
                if found is not None:
                    return found
    return None


def _check_embedding(name: str, delta: LowRank, base: Base) -> None:
    if name == OUTPUT and base.tied:
        raise UnsupportedError(
            "the base model's output layer is its embedding, and llama.cpp has no tensor for it",
            hint="Fuse this adapter into the transformers checkpoint instead, and convert that",
        )
    if name == EMBEDDING and base.tied:
        raise UnsupportedError(
            "llama.cpp aborts on an adapter of an embedding that is the output layer too",
            hint="Fuse this adapter into the transformers checkpoint instead, and convert that",
        )
    if (name == EMBEDDING) != (delta.layer.kind == "embedding"):
        raise AdapterError("module is of another kind than in the base model", got=delta.layer.kind)


def _expert_parameter(path: str, delta: LowRank, base: Base) -> tuple[Module, str, LowRank]:
    """Find by its shape which parameter a stack of experts adapts, and put it the base's way."""
    owner = path
    while owner.endswith(_WRAPPER):
        owner = owner.removesuffix(_WRAPPER)
    sizes = base.sizes
    shapes = {
        "gate_up_proj": (2 * sizes.expert_width, sizes.hidden),
        "down_proj": (sizes.hidden, sizes.expert_width),
    }
    named = {name.rpartition(".")[2] for name in delta.layer.parameters} or set(shapes)
    fitting = [
        name
        for name, shape in shapes.items()
        if name in named and sorted(shape) == sorted(delta.shape)
    ]
    found = _look_up(f"{owner}.{fitting[0]}", base) if len(fitting) == 1 else None
    if found is None or not found[0].stacked:
        raise UnsupportedError(
            f"no stack of experts of {base.architecture.name} has this shape",
            got=f"{list(delta.shape)} of {', '.join(sorted(named))}",
            expected=", ".join(f"{list(shape)} of {name}" for name, shape in shapes.items()),
        )
    stored = (sizes.experts, *shapes[fitting[0]])
    if is_transposed(path, delta, stored):
        delta = replace(delta, a=delta.b.transposed((0, 2, 1)), b=delta.a.transposed((0, 2, 1)))
    return found[0], found[1], delta


def _stacked(name: str, found: Mapping[int, LowRank], experts: int) -> LowRank:
    """Stack the factors of single experts; those that are not adapted get zeros."""
    first = next(iter(found.values()))
    for delta in found.values():
        if (delta.rank, delta.shape, delta.scale) != (first.rank, first.shape, first.scale):
            raise UnsupportedError(
                "experts of one layer differ in rank, shape or scale",
                tensor=name,
                hint="Give them one rank and scale with `loratools squeeze --uniform`",
            )
    if max(found) >= experts:
        raise AdapterError(
            "the base model has fewer experts", tensor=name, got=max(found), expected=experts
        )
    a = [found[e].a if e in found else _zeros(first.a) for e in range(experts)]
    b = [found[e].b if e in found else _zeros(first.b) for e in range(experts)]
    return replace(
        first,
        a=joined(first.a.key, a, (experts, *first.a.shape)),
        b=joined(first.b.key, b, (experts, *first.b.shape)),
        layer=Layer("experts"),
    )


def _zeros(like: TensorRef) -> TensorRef:
    return TensorRef(like.key, like.dtype, like.shape, lambda: bytes(like.nbytes))


def _check_shapes(modules: Mapping[str, Delta], base: Base) -> None:
    for name, delta in modules.items():
        if not isinstance(delta, LowRank):
            continue
        if delta.layer.kind == "experts" and delta.experts != base.sizes.experts:
            raise AdapterError(
                "the base model has another number of experts",
                tensor=name,
                got=delta.experts,
                expected=base.sizes.experts,
            )
        if base.shapes is None:
            continue
        shape = delta.shape if delta.layer.kind != "embedding" else delta.shape[::-1]
        stack = (delta.experts,) if delta.layer.kind == "experts" else ()
        wanted = base.shapes.get(f"{name}.weight")
        if wanted != (*stack, *shape):
            raise AdapterError(
                "module does not fit the base model",
                tensor=name,
                got=[*stack, *shape],
                expected="no such tensor" if wanted is None else list(wanted),
            )


@dataclass(frozen=True)
class _Origin:
    """Where a GGUF tensor comes from: the module's path, its row, and which of its tensors."""

    path: str
    module: Module
    part: int


def to_model(adapter: Adapter, context: Context) -> Adapter:
    """Return an adapter read from GGUF in the names and layout of its base model.

    Raises:
        UnsupportedError: the architecture is not known, or the base model is needed and not given.
        AdapterError: the base model is another one.
    """
    name = str(adapter.config.get("architecture"))
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise UnsupportedError(
            "GGUF adapters of this architecture cannot be translated: its layout is not known",
            path=adapter.source,
            got=name,
            expected=", ".join(sorted(ARCHITECTURES)),
        )
    base = None if context.base is None else read_base(context.base)
    if base is not None and base.architecture is not architecture:
        raise AdapterError(
            "the adapter is for another architecture than the base model",
            path=adapter.source,
            got=name,
            expected=base.architecture.name,
        )
    parts: dict[str, dict[int, LowRank]] = {}
    origins: dict[str, _Origin] = {}
    for tensor, delta in adapter.modules.items():
        found = architecture.origin(tensor)
        if found is None:
            raise UnsupportedError(
                f"no module of {name} is known for this tensor", path=adapter.source, tensor=tensor
            )
        origin = _Origin(*found)
        origins[origin.path] = origin
        parts.setdefault(origin.path, {})[origin.part] = _plain(delta)
    prefix = "model." if base is None else base.prefix
    modules: dict[str, Delta] = {}
    for path, found_parts in parts.items():
        whole = _whole(origins[path], found_parts, None if base is None else base.sizes)
        called = prefix + path.removeprefix("model.") if path.startswith("model.") else path
        modules[called] = _with_layer(path, called, whole, architecture)
    wrapped = _parameters_wrapped(modules)
    return replace(adapter, modules=wrapped, other_inputs=_with_base(adapter, base))


def _whole(origin: _Origin, parts: Mapping[int, LowRank], sizes: Sizes | None) -> LowRank:
    """Put the parts of a module together, and their rows back in the model's order."""
    module = origin.module
    missing = [t for i, t in enumerate(module.tensors) if i not in parts]
    if missing:
        raise UnsupportedError(
            "a fused module is adapted in part only",
            tensor=origin.path,
            expected=", ".join(module.tensors),
            hint="Such an adapter can be used with llama.cpp, but not be converted",
        )
    first = parts[0]
    if module.keeps_order:
        return first
    if sizes is None and not module.stacked:
        raise UnsupportedError(
            "the order of this module's rows depends on the base model's heads",
            tensor=origin.path,
            hint="Pass --base with the model's folder (config.json is enough) or its GGUF file",
        )
    ordered = [parts[i] for i in range(len(module.tensors))]
    if len(ordered) > 1:
        first = _side_by_side(origin.path, ordered)
    orders = module.rows(first.shape[0], sizes or Sizes(1, 1, 1))
    source = [row for order in orders for row in order]
    inverse = sorted(range(len(source)), key=source.__getitem__)
    return replace(first, b=_in_order(first.b, inverse))


def _side_by_side(path: str, parts: list[LowRank]) -> LowRank:
    """Return one pair of factors for parts stacked on top of each other.

    If all have the same A, it is kept; else ranks add up: [B₁ 0; 0 B₂] [A₁; A₂].
    """
    first = parts[0]
    same = all(
        part.scale == first.scale
        and part.a.shape == first.a.shape
        and part.a.dtype == first.a.dtype
        and bytes(part.a.raw()) == bytes(first.a.raw())
        for part in parts
    )
    if not same:
        return _block_diagonal(path, parts)
    rows = sum(part.shape[0] for part in parts)
    if first.experts == 1:
        return replace(first, b=joined(first.b.key, [p.b for p in parts], (rows, first.rank)))
    stack = first.experts
    flat = joined(first.b.key, [part.b for part in parts], (stack * rows, first.rank))
    order: list[int] = []
    for expert in range(stack):
        starts = 0
        for part in parts:
            height = part.shape[0]
            order += range(starts + expert * height, starts + (expert + 1) * height)
            starts += stack * height
    return replace(first, b=flat.rows(order).reshaped((stack, rows, first.rank)))


def _block_diagonal(path: str, parts: list[LowRank]) -> LowRank:
    import numpy as np

    stack = (parts[0].experts,) if parts[0].layer.kind == "experts" else ()
    rank = sum(part.rank for part in parts)
    rows = sum(part.shape[0] for part in parts)
    a = np.concatenate([part.a.load(np.float64) for part in parts], axis=-2)
    b = np.zeros((*stack, rows, rank))
    row = column = 0
    for part in parts:
        height, width = part.shape[0], part.rank
        block = part.scale * part.b.load(np.float64)
        b[..., row : row + height, column : column + width] = block
        row, column = row + height, column + width
    return replace(parts[0], a=in_memory(path, a), b=in_memory(path, b), scale=1.0, alpha=None)


def _with_layer(path: str, called: str, delta: LowRank, architecture: Architecture) -> LowRank:
    if delta.layer.kind == "experts":
        return replace(delta, layer=Layer("experts", parameters=(called,)))
    if architecture.conv1d and delta.layer.kind == "linear" and path not in architecture.outputs:
        return replace(delta, layer=Layer("linear", transposed_if_square=True))
    return delta


def _parameters_wrapped(modules: Mapping[str, Delta]) -> dict[str, Delta]:
    """Name adapted parameters as PEFT does: by their module, each further one a wrapper deeper."""
    owners: dict[str, list[str]] = {}
    result: dict[str, Delta] = {}
    for path, delta in modules.items():
        if isinstance(delta, LowRank) and delta.layer.parameters:
            owners.setdefault(path.rpartition(".")[0], []).append(path)
        else:
            result[path] = delta
    for owner, paths in owners.items():
        names = tuple(sorted(paths))
        for depth, path in enumerate(names):
            delta = modules[path]
            if isinstance(delta, LowRank):
                layer = replace(delta.layer, parameters=names)
                result[f"{owner}{_WRAPPER * depth}"] = replace(delta, layer=layer)
    return dict(sorted(result.items()))
