"""From GGUF tensors back to the base model's modules: parts put together, rows put back.

The base model is needed where the order of rows depends on its numbers of heads, and to know how
its class begins the paths of its modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratools_formats.contract.format import Context
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.alora import INVOCATION_TOKENS
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.peft_facts import NESTED
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.gguf.architectures import ARCHITECTURES, Architecture, Module
from loratools_formats.formats.gguf.base import read_base
from loratools_formats.formats.gguf.experts import stacks_apart
from loratools_formats.formats.gguf.from_model import in_order, plain_factors, with_base
from loratools_formats.formats.gguf.gate_up import cut, side_by_side
from loratools_formats.formats.gguf.layouts import Sizes
from loratools_formats.formats.gguf.read import INVOCATION_KEY


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
    if base is not None and base.architecture.name != architecture.name:
        raise AdapterError(
            "the adapter is for another architecture than the base model",
            path=adapter.source,
            got=name,
            expected=base.architecture.name,
        )
    architecture = architecture if base is None else base.architecture
    parts: dict[str, dict[int, LowRank]] = {}
    origins: dict[str, _Origin] = {}
    for tensor, delta in cut(adapter.modules, architecture.has).items():
        found = architecture.origin(tensor)
        if found is None:
            raise UnsupportedError(
                f"no module of {name} is known for this tensor", path=adapter.source, tensor=tensor
            )
        origin = _Origin(*found)
        origins[origin.path] = origin
        parts.setdefault(origin.path, {})[origin.part] = plain_factors(delta, adapter)
    prefix = "model." if base is None else base.prefix
    modules: dict[str, ModuleChange] = {}
    for path, found_parts in parts.items():
        whole = _whole(origins[path], found_parts, None if base is None else base.sizes)
        called = prefix + path.removeprefix("model.") if path.startswith("model.") else path
        modules[called] = ModuleChange(_with_layer(path, called, whole, architecture))
    tokens = adapter.config["keys"].get(INVOCATION_KEY)
    activation = {} if tokens is None else {INVOCATION_TOKENS: tokens.value}
    return replace(
        adapter,
        modules=_parameters_wrapped(stacks_apart(modules)),
        config={**adapter.config, **activation},
        other_inputs=with_base(adapter, base),
    )


def _whole(origin: _Origin, parts: Mapping[int, LowRank], sizes: Sizes | None) -> LowRank:
    """Put the parts of a module together, and their rows back in the model's order."""
    module = origin.module
    missing = [t for i, t in enumerate(module.tensors) if i not in parts]
    if missing and module.stacked:  # of gate and up, which have the same outputs
        other = _unchanged(next(iter(parts.values())))
        parts = {index: parts.get(index, other) for index in range(len(module.tensors))}
    elif missing:
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
            hint="Pass the model's folder (config.json is enough) or its GGUF file as `base`",
        )
    ordered = [parts[i] for i in range(len(module.tensors))]
    if len(ordered) > 1:
        first = side_by_side(origin.path, ordered)
    known = sizes or Sizes(1, 1, 1, 1)
    orders = module.rows(first.shape[0], known)
    first = replace(first, b=in_order(first.b, _inverse([r for order in orders for r in order])))
    if module.columns is None:
        return first
    (columns,) = module.columns(first.shape[1], known)
    turned = in_order(first.a.transposed((1, 0)), _inverse(columns))
    return replace(first, a=turned.transposed((1, 0)))


def _unchanged(other: LowRank) -> LowRank:
    """Return factors of the same shapes, with the same A, that change nothing."""
    nbytes = other.b.nbytes
    return replace(
        other, b=TensorRef(other.b.key, other.b.dtype, other.b.shape, lambda: bytes(nbytes))
    )


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _with_layer(path: str, called: str, delta: LowRank, architecture: Architecture) -> LowRank:
    if delta.layer.kind == "experts":
        layer = Layer("experts", (), (called,), transposed_if_square=None, swapped=False)
        return replace(delta, layer=layer)
    if architecture.conv1d and delta.layer.kind == "linear" and path not in architecture.outputs:
        return replace(delta, layer=Layer("linear", transposed_if_square=True))
    return delta


def _parameters_wrapped(modules: Mapping[str, ModuleChange]) -> dict[str, ModuleChange]:
    """Name adapted parameters as PEFT does: by their module, each further one a wrapper deeper."""
    owners: dict[str, list[str]] = {}
    result: dict[str, ModuleChange] = {}
    for path, delta in modules.items():
        if delta.layer.parameters:
            owners.setdefault(path.rpartition(".")[0], []).append(path)
        else:
            result[path] = delta
    for owner, paths in owners.items():
        for depth, path in enumerate(sorted(paths)):
            result[f"{owner}{NESTED * depth}"] = modules[path]
    return dict(sorted(result.items()))
