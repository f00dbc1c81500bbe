"""From the base model's modules to GGUF tensors: names, row orders, splits and stacks.

Everything is a selection of rows of B, or a stacking of factors, so no value changes. The base
model is needed to know the architecture, and the numbers of heads and experts. What llama.cpp
would ignore, refuse or crash on is refused, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from loratools_formats.containers.gguf.container import KeyValue, is_gguf
from loratools_formats.containers.gguf.cursor import ARRAY
from loratools_formats.containers.gguf.splits import GgufModel, read_model
from loratools_formats.contract.commands import command_on
from loratools_formats.contract.format import Context, Loss
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.alora import invocation_tokens
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.orientation import exchanged, is_transposed
from loratools_formats.core.peft_facts import owner
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError, naming
from loratools_formats.disk.files import RegularFile
from loratools_formats.formats.gguf.architectures import Module, is_joined, numbered
from loratools_formats.formats.gguf.base import Base, read_base
from loratools_formats.formats.gguf.experts import flat_apart, in_stack, stacked, today
from loratools_formats.formats.gguf.gate_up import as_in_base
from loratools_formats.formats.gguf.read import EMBEDDING, INVOCATION_KEY, base_model_keys
from loratools_formats.formats.gguf.write import dtype_fallbacks

_OUTPUT = "output"
DEFAULT_DTYPE = "f32"
"""ggml rounds activations to the type of 16-bit factors; with 32 bits nothing is lost."""

_OWN_KEYS = ("general.", "adapter.", "tokenizer.", "split.", "format")
_PREFIXES = (
    "", "model.language_model.", "language_model.model.", "language_model.", "model.text_model.",
    "backbone.",
)  # fmt: skip


def from_model(adapter: Adapter, context: Context) -> Adapter:
    """Return an adapter in the names and layout of GGUF; one that has them is checked only.

    Raises:
        UnsupportedError: no base model is given, its architecture is not known, or a module has no
            counterpart that llama.cpp would apply.
        AdapterError: a module does not fit the base model.
    """
    if adapter.format == "gguf":
        return _of_gguf(adapter, context)
    if context.base is None:
        raise UnsupportedError(
            "a GGUF adapter depends on the architecture of its base model",
            path=adapter.source,
            hint="Pass the model's folder (config.json is enough) or its GGUF file as `base`",
        )
    base = read_base(context.base)
    stacks: dict[str, dict[int, LowRank]] = {}
    modules: dict[str, ModuleChange] = {}
    for path, delta in flat_apart(today(adapter.modules), base.sizes.experts).items():
        with naming(tensor=path):
            for name, expert, part in _placed(path, plain_factors(delta, adapter), base):
                known = name in modules if expert is None else expert in stacks.get(name, {})
                if known:
                    raise AdapterError("two modules become the same GGUF tensor", got=name)
                if expert is None:
                    modules[name] = ModuleChange(part)
                else:
                    stacks.setdefault(name, {})[expert] = part
    for name, found in stacks.items():
        if name in modules:
            raise AdapterError(
                "the adapter has these experts both one by one and as a stack", tensor=name
            )
        modules[name] = ModuleChange(stacked(name, found, base.sizes.experts))
    modules = as_in_base(modules, base.has)
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
        findings=(*adapter.findings, *dtype_fallbacks(modules, context.dtype)),
        inputs=adapter.inputs,
        other_inputs=with_base(adapter, base),
    )


def _of_gguf(adapter: Adapter, context: Context) -> Adapter:
    if context.base is not None and is_gguf(context.base):
        model = read_model(context.base)
        _check_architecture(adapter, model.get("general.architecture", "string"))
        made = as_in_base(adapter.modules, lambda name: f"{name}.weight" in model.tensors)
        adapter = replace(adapter, modules=made)
        _check_fit(adapter, model)
    elif context.base is not None:
        _check_architecture(adapter, read_base(context.base).architecture.name)
    return replace(
        adapter,
        config={**adapter.config, "storage": context.dtype},
        findings=(*adapter.findings, *dtype_fallbacks(adapter.modules, context.dtype)),
    )


def with_base(adapter: Adapter, base: Base | None) -> dict[str, tuple[RegularFile, ...]]:
    """Return the files that took part in making an adapter, the base's among them."""
    others = dict(adapter.other_inputs)
    return {**others, "base": base.files} if base is not None and base.files else others


def _invocation(adapter: Adapter) -> dict[str, KeyValue]:
    tokens = invocation_tokens(adapter)
    return {} if tokens is None else {INVOCATION_KEY: KeyValue(ARRAY, tokens, "u32", len(tokens))}


def plain_factors(delta: ModuleChange, adapter: Adapter) -> LowRank:
    """Return a delta of an adapter if llama.cpp has its kind.

    Raises:
        UnsupportedError: it is a DoRA, or has a bias.
    """
    if delta.is_dora:
        raise UnsupportedError(
            "llama.cpp has no DoRA",
            hint="Make it a plain LoRA first: "
            + command_on(adapter, "to-lora", "--base MODEL --rank RANK"),
        )
    part = delta.require_factors()
    if part.bias is not None:
        raise UnsupportedError(
            "llama.cpp adapters have no biases (lora_bias)",
            hint="Fuse this adapter into the transformers checkpoint instead, and convert that",
        )
    return part


def _placed(path: str, delta: LowRank, base: Base) -> list[tuple[str, int | None, LowRank]]:
    """Return (GGUF name, expert, factors) of every tensor that a module becomes."""
    if delta.layer.kind == "experts":
        module, delta = _expert_parameter(path, delta, base)
        expert = None
    else:
        module, expert = _found(path, base)
    names = list(module.tensors)
    _check_embedding(names[0], delta, base)
    if delta.layer.kind == "conv":
        raise UnsupportedError("llama.cpp applies no adapter to convolutions")
    orders = module.rows(delta.shape[0], base.sizes)
    kind = delta.layer.kind
    if module.columns is not None:
        (order,) = module.columns(delta.shape[1], base.sizes)
        delta = replace(delta, a=in_order(delta.a.transposed((1, 0)), order).transposed((1, 0)))
    parts = [
        replace(delta, b=in_order(delta.b, order), layer=Layer(kind), alpha=None)
        for order in orders
    ]
    return [(name, expert, part) for name, part in zip(names, parts, strict=True)]


def rows_in_gguf(base: Base, path: str) -> dict[str, list[int]]:
    """Return which of a linear module's outputs each GGUF tensor holds, in its order, by name.

    Args:
        base: of a GGUF model, whose shapes are known.
        path: the module.

    Raises:
        UnsupportedError: llama.cpp has no such module, or keeps it in a stack of experts.
        AdapterError: the model lacks one of the tensors.
    """
    module, expert = _found(path, base)
    if module.columns is not None:
        raise UnsupportedError(
            "llama.cpp keeps the inputs of this module in another order", tensor=path
        )
    if expert is not None or module.stacked:
        raise UnsupportedError(
            "changes of single experts in a stack are not supported here", tensor=path
        )
    names = list(module.tensors)
    shapes = {name: (base.shapes or {}).get(f"{name}.weight") for name in names}
    rows = 0
    for name, shape in shapes.items():
        if shape is None or len(shape) != 2:
            raise AdapterError(
                "module does not fit the base model",
                tensor=path,
                got=None if shape is None else list(shape),
                expected=f"a matrix {name}",
            )
        rows += shape[0]
    return dict(zip(names, module.rows(rows, base.sizes), strict=True))


def _found(path: str, base: Base) -> tuple[Module, int | None]:
    found = _look_up(path, base)
    if found is None:
        raise UnsupportedError(
            f"llama.cpp applies no adapter to this module of {base.architecture.name}"
            + (f": {reason}" if (reason := _reason(path, base)) else ""),
            hint="Remove it from the adapter if it was trained by mistake",
        )
    return found


def without_place(adapter: Adapter, base: Base) -> list[Loss]:
    """Return the modules that llama.cpp applies no adapter to, and why."""
    lost = []
    for path, change in flat_apart(today(adapter.modules), base.sizes.experts).items():
        names = [path]
        if change.layer.kind == "experts":
            names = [f"{owner(path)}.{leaf}" for leaf in ("gate_up_proj", "up_proj", "down_proj")]
        if any(_look_up(name, base) is not None for name in names):
            continue
        why = _reason(path, base) or f"llama.cpp's {base.architecture.name} has no such module"
        lost.append(
            Loss(path, f"would be ignored by llama.cpp: {why}", "Take such modules out with `drop`")
        )
    return lost


_OTHER_PARTS = re.compile(
    r"(?:^|[._])(?:vision|visual|image|audio|speech|video|multi_modal_projector|aligner|connector)"
)


def _reason(path: str, base: Base) -> str | None:
    if _OTHER_PARTS.search(path):
        return "its adapters are for the language model only"
    reasons, modules = base.architecture.reasons, base.architecture.modules
    for template in _templates(path, base):
        if template in reasons:
            return reasons[template]
        if template in modules and is_joined(template, modules[template]):
            return "several modules are one tensor there"
    return None


def _templates(path: str, base: Base) -> Iterator[str]:
    for tried in _spellings(path, base):
        yield numbered(tried)[0]


def in_order(b: TensorRef, order: list[int]) -> TensorRef:
    """Return a factor with its rows in another order; itself if it is the same order."""
    return b if order == list(range(b.shape[-2])) else b.rows(order)


def _look_up(path: str, base: Base) -> tuple[Module, int | None] | None:
    for tried in _spellings(path, base):
        found = base.architecture.module(tried) or in_stack(tried, base.architecture)
        if found is not None:
            return found
    return None


def _spellings(path: str, base: Base) -> Iterator[str]:
    for prefix in sorted({base.prefix, *_PREFIXES}, key=len, reverse=True):
        if path.startswith(prefix):
            rest = path[len(prefix) :]
            yield rest
            yield f"model.{rest}"


def _refuse_tied(name: str) -> None:
    """Raise `UnsupportedError` if a GGUF tensor is one that tied models share or lack."""
    if name == _OUTPUT:
        raise UnsupportedError(
            "the base model's output layer is its embedding, and llama.cpp has no tensor for it",
            hint="Fuse this adapter into the transformers checkpoint instead, and convert that",
        )
    if name == EMBEDDING:
        raise UnsupportedError(
            "llama.cpp aborts on an adapter of an embedding that is the output layer too",
            hint="Fuse this adapter into the transformers checkpoint instead, and convert that",
        )


def _check_embedding(name: str, delta: LowRank, base: Base) -> None:
    if base.tied:
        _refuse_tied(name)
    if base.tied is None and name in (_OUTPUT, EMBEDDING):
        raise UnsupportedError(
            "the base model's config does not tell whether its output layer is its embedding",
            expected="tie_word_embeddings",
            hint="Pass the folder that holds the weights, too, or the GGUF model, as `base`",
        )
    if (name == EMBEDDING) != (delta.layer.kind == "embedding"):
        raise AdapterError("module is of another kind than in the base model", got=delta.layer.kind)


def _expert_parameter(path: str, delta: LowRank, base: Base) -> tuple[Module, LowRank]:
    """Find by its shape which parameter a stack of experts adapts, and put it the base's way."""
    module = owner(path)
    sizes = base.sizes
    shapes = {
        "gate_up_proj": (2 * sizes.expert_width, sizes.hidden),
        "up_proj": (sizes.expert_width, sizes.hidden),
        "down_proj": (sizes.hidden, sizes.expert_width),
    }
    shapes = {name: shape for name, shape in shapes.items() if _look_up(f"{module}.{name}", base)}
    named = {name.rpartition(".")[2] for name in delta.layer.parameters} or set(shapes)
    swapped = delta.layer.swapped
    held = delta.shape[::-1] if swapped else delta.shape
    alike = [
        name for name, shape in shapes.items() if name in named and sorted(shape) == sorted(held)
    ]
    fitting = alike if swapped is None else [name for name in alike if shapes[name] == held]
    found = _look_up(f"{module}.{fitting[0]}", base) if len(fitting) == 1 else None
    if found is None or not found[0].stacked:
        raise UnsupportedError(
            f"no stack of experts of {base.architecture.name} has this shape",
            got=f"{list(delta.shape)} of {', '.join(sorted(named))}",
            expected=", ".join(f"{list(shape)} of {name}" for name, shape in shapes.items()),
        )
    stored = (sizes.experts, *shapes[fitting[0]])
    if swapped if swapped is not None else is_transposed(path, delta, stored):
        delta = exchanged(delta)
    return found[0], delta


def _check_shapes(modules: Mapping[str, ModuleChange], base: Base) -> None:
    if base.shapes is None:
        return
    for name, delta in modules.items():
        _check_shape(name, delta.require_factors(), base.shapes.get(f"{name}.weight"))


def _check_architecture(adapter: Adapter, wanted: object) -> None:
    if adapter.config.get("architecture") != wanted:
        raise AdapterError(
            "the adapter is for another architecture than the model",
            path=adapter.source,
            got=adapter.config.get("architecture"),
            expected=wanted,
        )


def _check_fit(adapter: Adapter, model: GgufModel) -> None:
    """Refuse an adapter read from GGUF that is not one of a model."""
    for name, delta in adapter.modules.items():
        if f"{_OUTPUT}.weight" not in model.tensors:
            _refuse_tied(name)
        tensor = model.tensors.get(f"{name}.weight")
        _check_shape(name, delta.require_factors(), None if tensor is None else tensor.shape)


def _check_shape(name: str, delta: LowRank, wanted: tuple[int, ...] | None) -> None:
    shape = delta.shape if delta.layer.kind != "embedding" else delta.shape[::-1]
    stack = (delta.experts,) if delta.layer.kind == "experts" else ()
    if wanted != (*stack, *shape):
        raise AdapterError(
            "module does not fit the base model",
            tensor=name,
            got=[*stack, *shape],
            expected="no such tensor" if wanted is None else list(wanted),
        )
