"""Giving every tensor of an adapter a key in a naming: kohya's, diffusers' or ComfyUI's.

Only leaves and the form of scales change here. Module names must already be of the naming; making
them so may need a list of names or a table, which is the business of `loratools.naming`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from loratools_formats.contract.commands import command_on
from loratools_formats.contract.format import Loss
from loratools_formats.core.adapter import Adapter, Addition, Replacement
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.single_file_keys import Naming, Role, parse
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk.errors import UnsupportedError
from loratools_formats.formats.singlefile.dialects import BFL_CONTROL
from loratools_formats.formats.singlefile.scale import (
    METADATA_KEY,
    alpha_tensor,
    packed,
    states_scale,
)

_KOHYA: dict[Role, str] = {
    "a": ".lora_down.weight", "b": ".lora_up.weight", "mid": ".lora_mid.weight",
    "alpha": ".alpha", "magnitude": ".dora_scale",
}  # fmt: skip
_PEFT: dict[Role, str] = {
    "a": ".lora_A.weight", "b": ".lora_B.weight", "alpha": ".alpha", "bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector", "embedding_a": ".lora_embedding_A",
    "embedding_b": ".lora_embedding_B",
}  # fmt: skip
_COMFYUI: dict[Role, str] = _PEFT | {"magnitude": ".dora_scale", "mid": ".lora_mid.weight"}
LEAVES: dict[Naming, dict[Role, str]] = {
    "kohya": _KOHYA, "diffusers": _PEFT, "comfyui": _COMFYUI, "safetensors": _PEFT,
}  # fmt: skip
_OTHER_LEAVES: dict[str, dict[str, str]] = {
    "tucker": {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"},
    "loha": {
        "w1_a": "hada_w1_a", "w1_b": "hada_w1_b", "w2_a": "hada_w2_a", "w2_b": "hada_w2_b",
        "t1": "hada_t1", "t2": "hada_t2",
    },
    "lokr": {
        "w1": "lokr_w1", "w1_a": "lokr_w1_a", "w1_b": "lokr_w1_b", "w2": "lokr_w2",
        "w2_a": "lokr_w2_a", "w2_b": "lokr_w2_b", "w2_t": "lokr_t2",
    },
    "full": {"diff": "diff"},
    "lycoris_glora": {f"{side}{n}": f"{side}{n}.weight" for side in "ab" for n in "12"},
    "diag_oft": {"blocks": "oft_blocks", "gain": "rescale"},
    "butterfly_oft": {"blocks": "oft_blocks", "gain": "rescale"},
    "lycoris_ia3": {"gain": "weight", "on_input": "on_input"},
}  # fmt: skip
_PROBE = ".lora_A.weight"
_ON_BASE = frozenset({"diag_oft", "butterfly_oft", "lycoris_glora", "lycoris_ia3"})
"""Kinds whose change depends on the base's weights."""


def _made_plain(adapter: Adapter | None, change: ModuleChange) -> str:
    """Return the hint to make a plain LoRA of a change."""
    options = ["--base MODEL"] if change.is_dora or change.kind in _ON_BASE else []
    options += ["--rank RANK"] if options or change.kind == "full" else []
    return f"Make it a plain LoRA first: {command_on(adapter, 'to-lora', *options)}"


@dataclass(frozen=True)
class Spelling:
    """How one module's tensors are called.

    Attributes:
        start: what comes before the leaf.
        leaves: leaf of each role.
    """

    start: str
    leaves: Mapping[Role, str]

    @classmethod
    def of(cls, key: str) -> Spelling:
        """Return the spelling that a key of a module has, or a module's name asks for."""
        parsed = parse(key)
        if parsed is None:
            naming = naming_of(key)
            return cls(key, LEAVES[naming or "safetensors"])
        leaves = LEAVES[parsed.naming]
        if parsed.style in ("kohya", "lycoris"):
            leaves = leaves | _KOHYA
        for text in sorted({*_KOHYA.values(), *_PEFT.values()}, key=len, reverse=True):
            if key.endswith(text):
                return cls(key.removesuffix(text), leaves)
        return cls(parsed.module, leaves)

    def key(self, role: Role) -> str:
        """Return the key of a role's tensor.

        Raises:
            UnsupportedError: files of this naming have none.
        """
        if role not in self.leaves:
            raise UnsupportedError(
                f"files of this naming have no key for a {role}", tensor=self.start
            )
        return self.start + self.leaves[role]


def naming_of(module: str) -> Naming | None:
    """Return the class of files that a module's name belongs to, None if to none."""
    parsed = parse(module + _PROBE)
    return None if parsed is None or parsed.module != module else parsed.naming


def spelling_losses(adapter: Adapter, target: Naming) -> list[Loss]:
    """Return what a single file of a naming could not hold of an adapter."""
    found = [
        Loss(name, f"is understood by no loader of {target} files")
        for name, tensor in adapter.carried.items()
        if tensor.numel and not _is_alpha(name)
    ]
    if target == "diffusers":
        found += [
            Loss(
                name,
                f"is a {delta.kind} change, which few of diffusers' pipelines load",
                _made_plain(adapter, delta),
            )
            for name, delta in adapter.modules.items()
            if delta.factors is None
        ]
        inputs = [name for name, delta in adapter.modules.items() if _is_of_inputs(delta)]
        found += [
            Loss(
                name,
                "is a DoRA with a magnitude for each input, for which diffusers has no place",
                _made_plain(adapter, adapter.modules[name]),
            )
            for name in inputs
        ]
        found += [
            Loss(
                name,
                "is a DoRA beside plain modules, which diffusers cannot load",
                _made_plain(adapter, adapter.modules[name]),
            )
            for name in _beside_plain(adapter.modules)
            if name not in inputs
        ]
        found += [
            Loss(key, "is added to what the base has, which diffusers does not do")
            for key in adapter.additions
        ]
    found += [
        Loss(key, f"replaces what the base has, for which {target} files have no key")
        for key, replacement in adapter.replacements.items()
        if target != "comfyui" or not _is_whole_weight(replacement)
    ]
    return found


def _is_alpha(key: str) -> bool:
    """Return whether a tensor is an alpha that belongs to no module, so that it has no effect."""
    parsed = parse(key)
    return parsed is not None and parsed.role == "alpha"


def _is_of_inputs(delta: ModuleChange) -> bool:
    return delta.kind == "dora" and delta.axis == "input"


def _beside_plain(modules: Mapping[str, ModuleChange]) -> list[str]:
    """Return the DoRAs in components that have plain factors too.

    diffusers makes all modules of a component DoRAs if one is, and those without a magnitude are
    left without memory for it, so that the model cannot run.
    """
    mixed = {n.partition(".")[0] for n, delta in modules.items() if delta.kind == "lora"}
    doras = [name for name, delta in modules.items() if delta.kind == "dora"]
    return [name for name in doras if name.partition(".")[0] in mixed]


def _is_whole_weight(replacement: Replacement) -> bool:
    known = replacement.target.endswith((".weight", ".scale"))
    return known and replacement.kind in ("other", "module")


def respelled(adapter: Adapter, target: Naming) -> Adapter:
    """Return the adapter with every key as files of a naming have it, and without its losses.

    An adapter of that naming loses nothing: what only some of its loaders understand stays.

    Raises:
        UnsupportedError: a module's name is not of that naming, or a tensor has no key there.
    """
    own = adapter.format == target
    lost = set() if own else {loss.name for loss in spelling_losses(adapter, target)}
    kept = {name: delta for name, delta in adapter.modules.items() if name not in lost}
    for name in kept:
        if target != "safetensors" and naming_of(name) != target:
            raise UnsupportedError(
                f"module name is not one of a {target} file",
                tensor=name,
                hint="Give modules other names: "
                f"loratools convert ADAPTER -o converted.safetensors --to {target}",
            )
    added = {k: addition for k, addition in adapter.additions.items() if k not in lost}
    targets = {addition.target for addition in added.values()}
    additions = {_added_key(addition.target, targets): addition for addition in added.values()}
    modules = {}
    for name, delta in kept.items():
        modules[name], bias = _module(name, delta, target)
        if bias is not None:
            additions[f"{name}.diff_b"] = Addition(f"{name}.bias", bias)
    replacements = {
        key if own else f"{replacement.target.removesuffix('.weight')}.set_weight": replacement
        for key, replacement in adapter.replacements.items()
        if key not in lost
    }
    reshaping = _reshaping(adapter, modules) if target == "comfyui" else {}
    return replace(
        adapter,
        format=target,
        modules=modules,
        additions=additions,
        replacements=replacements,
        carried=adapter.carried if own else reshaping,
        metadata=_metadata(adapter, modules, target),
        config={},
        dialects=(),
    )


def _reshaping(adapter: Adapter, modules: Mapping[str, ModuleChange]) -> dict[str, TensorRef]:
    """Return what tells ComfyUI that BFL's control adapters widen the model's input."""
    input_ = modules.get(_INPUT)
    if (
        input_ is None
        or input_.kind != "lora"
        or all(d.name != BFL_CONTROL for d in adapter.dialects)
    ):
        return {}
    key = f"{_INPUT}.reshape_weight"
    return {key: in_memory(key, np.array(input_.shape, dtype=np.int64))}


_INPUT = "diffusion_model.img_in"
_ADDED_LEAVES = {"weight": ".w_norm", "modulation": ".diff_m"}


def _added_key(target: str, targets: Collection[str]) -> str:
    """Return the key of what is added to a parameter, beside what is added to others.

    ComfyUI reads a `b_norm` only beside a `w_norm`, and a `diff_b` anywhere.
    """
    module, _, leaf = target.rpartition(".")
    if leaf == "bias":
        return module + (".b_norm" if f"{module}.weight" in targets else ".diff_b")
    return module + _ADDED_LEAVES[leaf]


def _metadata(
    adapter: Adapter, modules: Mapping[str, ModuleChange], target: Naming
) -> dict[str, str]:
    metadata = {k: v for k, v in adapter.metadata.items() if k != METADATA_KEY}
    if target == "diffusers":
        parts = [delta.factors for delta in modules.values()]
        if any(part is not None and part.scale != 1.0 for part in parts):
            metadata[METADATA_KEY] = packed(modules, {})
        metadata.setdefault("format", "pt")
    return metadata


def _module(
    name: str, delta: ModuleChange, target: Naming
) -> tuple[ModuleChange, TensorRef | None]:
    """Return a module's delta under its keys, and a bias that the target keeps elsewhere."""
    spelling = Spelling(name, LEAVES[target])
    part, bias = delta.factors, None
    if part is None:
        return _other(name, delta), None
    if part.bias is not None and target != "diffusers":
        bias = _scaled(part.bias, part.scale)
        part = replace(part, bias=None)
    magnitude = _magnitude(delta, spelling, target)
    return replace(delta, direction=_low_rank(part, spelling, target), magnitude=magnitude), bias


def _scaled(bias: TensorRef, scale: float) -> TensorRef:
    """Return scale · bias in its own type, or in float32 where that rounds less."""
    if scale == 1.0:
        return bias
    return in_memory(bias.key, bias.load(np.float64) * scale, "F32")


def _low_rank(delta: LowRank, spelling: Spelling, target: Naming) -> LowRank:
    embedding = delta.layer.kind == "embedding"
    a = delta.a.renamed(spelling.key("embedding_a" if embedding else "a"))
    b = delta.b.renamed(spelling.key("embedding_b" if embedding else "b"))
    bias = None if delta.bias is None else delta.bias.renamed(spelling.key("bias"))
    alpha: TensorRef | None = None
    if target == "kohya" or (target != "diffusers" and delta.scale != 1.0):
        key = spelling.key("alpha")
        stored = delta.alpha_tensor
        keeps = stored is not None and states_scale(stored, delta)
        alpha = stored.renamed(key) if keeps and stored else alpha_tensor(key, delta)
    return replace(delta, a=a, b=b, bias=bias, alpha_tensor=alpha)


def _magnitude(delta: ModuleChange, spelling: Spelling, target: Naming) -> TensorRef | None:
    if delta.magnitude is None:
        return None
    kernel = delta.layer.kernel
    out = delta.require_factors().shape[0]
    shape = delta.magnitude.shape
    if delta.axis == "output":
        ones = (1,) * len(kernel)
        if target == "diffusers":
            shape = (1, out, *ones) if kernel else (out,)
        else:
            shape = (out, 1, *ones)
    # PEFT's magnitudes are of outputs.
    key = spelling.key("magnitude") if delta.axis == "output" else f"{spelling.start}.dora_scale"
    return delta.magnitude.reshaped(shape).renamed(key)


def _other(name: str, whole: ModuleChange) -> ModuleChange:
    leaves, delta = _OTHER_LEAVES.get(whole.kind), whole.kind_delta
    if leaves is None or delta is None or delta.shared or delta.bias is not None:
        raise UnsupportedError(
            f"a weight change of kind {whole.kind} has no place in a single file",
            tensor=name,
            hint=_made_plain(None, whole),
        )
    magnitude, alpha = whole.magnitude, delta.alpha_tensor
    direction = replace(
        delta,
        parts={
            part: tensor.renamed(f"{name}.{leaves[part]}") for part, tensor in delta.parts.items()
        },
        alpha_tensor=None if alpha is None else alpha.renamed(f"{name}.alpha"),
    )
    renamed = None if magnitude is None else magnitude.renamed(f"{name}.dora_scale")
    return replace(whole, direction=direction, magnitude=renamed)
