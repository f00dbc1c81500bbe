"""Giving every tensor of an adapter a key in a naming: kohya's, diffusers' or ComfyUI's.

Only leaves and the form of scales change here. Module names must already be of the naming; making
them so may need a list of names or a table, which is the business of `loratools.naming`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratools_formats.adapter import (
    Adapter,
    Addition,
    Delta,
    Dora,
    LowRank,
    OtherDelta,
    Replacement,
)
from loratools_formats.errors import UnsupportedError
from loratools_formats.registry import Loss
from loratools_formats.singlefile.grammar import Class, Role, parse
from loratools_formats.singlefile.scale import (
    METADATA_KEY,
    alpha_tensor,
    packed,
    plain_part,
    states_scale,
)
from loratools_formats.tensors import TensorRef

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
LEAVES: dict[Class, dict[Role, str]] = {
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
}  # fmt: skip
_PROBE = ".lora_A.weight"


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


def naming_of(module: str) -> Class | None:
    """Return the class of files that a module's name belongs to, None if to none."""
    parsed = parse(module + _PROBE)
    return None if parsed is None or parsed.module != module else parsed.naming


def spelling_losses(adapter: Adapter, target: Class) -> list[Loss]:
    """Return what a single file of a naming could not hold of an adapter."""
    return [Loss(name, f"is understood by no loader of {target} files") for name in adapter.carried]


def respelled(adapter: Adapter, target: Class) -> Adapter:
    """Return the adapter with every key as files of a naming have it.

    Raises:
        UnsupportedError: a module's name is not of that naming, or a tensor has no key there.
    """
    for name in adapter.modules:
        if target != "safetensors" and naming_of(name) != target:
            raise UnsupportedError(
                f"module name is not one of a {target} file",
                tensor=name,
                hint="loratools convert gives modules other names",
            )
    modules = {name: _module(name, delta, target) for name, delta in adapter.modules.items()}
    additions: dict[str, Addition] = {}
    for addition in adapter.additions.values():
        module, _, leaf = addition.target.rpartition(".")
        text = {"bias": ".diff_b", "weight": ".w_norm"}.get(leaf, f".{leaf}")
        additions[module + text] = addition
    replacements: dict[str, Replacement] = {}
    for key, replacement in adapter.replacements.items():
        module, _, leaf = replacement.target.rpartition(".")
        if leaf != "weight" or replacement.kind != "other":
            replacements[key] = replacement
        else:
            replacements[f"{module}.set_weight"] = replacement
    metadata = {k: v for k, v in adapter.metadata.items() if k != METADATA_KEY}
    if target == "diffusers":
        parts = {name: plain_part(delta) for name, delta in modules.items()}
        settings = {n: (p.rank, p.scale) for n, p in parts.items() if p is not None}
        if any(scale != 1.0 for _, scale in settings.values()):
            metadata[METADATA_KEY] = packed(settings, {})
        metadata.setdefault("format", "pt")
    return replace(
        adapter,
        format=target,
        modules=modules,
        additions=additions,
        replacements=replacements,
        metadata=metadata,
        config={},
    )


def _module(name: str, delta: Delta, target: Class) -> Delta:
    spelling = Spelling(name, LEAVES[target])
    if isinstance(delta, OtherDelta):
        return _other(name, delta)
    if isinstance(delta, Dora):
        return _dora(delta, spelling, target)
    return _low_rank(delta, spelling, target)


def _low_rank(delta: LowRank, spelling: Spelling, target: Class) -> LowRank:
    embedding = delta.layer.kind == "embedding"
    a = delta.a.renamed(spelling.key("embedding_a" if embedding else "a"))
    b = delta.b.renamed(spelling.key("embedding_b" if embedding else "b"))
    bias = None if delta.bias is None else delta.bias.renamed(spelling.key("bias"))
    alpha: TensorRef | None = None
    if target == "kohya" or (target != "diffusers" and delta.scale != 1.0):
        key = spelling.key("alpha")
        alpha = alpha_tensor(key, delta)
        stored = delta.alpha_tensor
        if stored is not None and states_scale(stored, delta):
            alpha = stored.renamed(key)
    return replace(delta, a=a, b=b, bias=bias, alpha_tensor=alpha)


def _dora(delta: Dora, spelling: Spelling, target: Class) -> Dora:
    direction = _low_rank(delta.direction, spelling, target)
    if target == "diffusers" and delta.axis == "input":
        raise UnsupportedError(
            "a DoRA with a magnitude for each input has no place in a diffusers file",
            tensor=delta.magnitude.key,
            got=list(delta.magnitude.shape),
            hint="Make it a plain LoRA first: loratools to-lora",
        )
    kernel = direction.layer.kernel
    out = delta.direction.shape[0]
    shape = delta.magnitude.shape
    if delta.axis == "output":
        ones = (1,) * len(kernel)
        if target == "diffusers":
            shape = (1, out, *ones) if kernel else (out,)
        else:
            shape = (out, 1, *ones)
    magnitude = delta.magnitude.reshaped(shape).renamed(spelling.key("magnitude"))
    return replace(delta, direction=direction, magnitude=magnitude)


def _other(name: str, delta: OtherDelta) -> OtherDelta:
    leaves = _OTHER_LEAVES.get(delta.kind)
    if leaves is None or delta.shared or delta.bias is not None:
        raise UnsupportedError(
            f"a weight change of kind {delta.kind} has no place in a single file",
            tensor=name,
            hint="Make it a plain LoRA first: loratools to-lora",
        )
    return replace(
        delta,
        parts={
            part: tensor.renamed(f"{name}.{leaves[part]}") for part, tensor in delta.parts.items()
        },
        magnitude=None
        if delta.magnitude is None
        else delta.magnitude.renamed(f"{name}.dora_scale"),
        alpha_tensor=None
        if delta.alpha_tensor is None
        else delta.alpha_tensor.renamed(f"{name}.alpha"),
    )
