"""The grammar of keys in single-file adapters: prefix, path, leaf.

Files mix dialects freely, so every key is matched whole and by itself; no dialect is ever inferred
from a part of a name. A key is `<prefix><path><leaf>`: the prefix says which component of a
pipeline is meant and whether the path is dotted or flattened, the leaf says which tensor of a
module it is. What no rule claims is not an adapter's key.

Sources: the writers of sd-scripts, LyCORIS, diffusers, ComfyUI, OneTrainer, musubi-tuner and XLabs,
and the readers of diffusers and ComfyUI.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal[
    "a", "b", "mid", "alpha", "bias", "magnitude", "embedding_a", "embedding_b",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "diff", "diff_b", "diff_m", "w_norm", "b_norm", "set_weight", "reshape_weight", "norm_scale",
    "a1", "a2", "b1", "b2", "oft_blocks", "rescale", "on_input", "ia3",
    "learned_embedding", "refused",
]  # fmt: skip

Naming = Literal["kohya", "diffusers", "comfyui", "safetensors"]
"""A file's naming as a whole: all flat, all by component, all `diffusion_model.`, or otherwise."""

NAMINGS: tuple[Naming, ...] = get_args(Naming)


@dataclass(frozen=True)
class Prefix:
    """The start of a key.

    Attributes:
        pattern: what it matches.
        naming: the class of files that use it.
        flat: whether the path after it has `_` for `.`.
    """

    pattern: str
    naming: Naming
    flat: bool


FLAT_COMPONENTS = ("unet", "te", "te1", "te2", "te3", "te4", "transformer", "prior", "decoder")
COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3",
    "prior", "decoder", "controlnet", "connectors",
)  # fmt: skip

_PREFIXES = (
    Prefix("lycoris_", "kohya", flat=True),
    Prefix("lora_unet__", "kohya", flat=True),
    Prefix(f"lora_(?:{'|'.join(FLAT_COMPONENTS)})_", "kohya", flat=True),
    Prefix(r"diffusion_model\.", "comfyui", flat=False),
    Prefix(r"text_embedding_projection\.", "comfyui", flat=False),
    Prefix(r"text_encoders\.[A-Za-z0-9_]+\.(?:transformer\.)?", "comfyui", flat=False),
    Prefix(rf"(?:{'|'.join(COMPONENTS)})\.(?:base_model\.model\.)?", "diffusers", flat=False),
    Prefix(r"base_model\.model\.", "safetensors", flat=False),
    Prefix("", "safetensors", flat=False),
)

_SEGMENT = r"[^\s./\\]+"
_FLAT_PATH = r"[A-Za-z0-9_-]+"
_DOTTED_PATH = rf"{_SEGMENT}(?:\.{_SEGMENT})*"
_NAME = r"[A-Za-z0-9_-]+"

Style = Literal["kohya", "peft", "infix", "bare", "old", "xlabs", "lycoris", "comfyui", "control"]


@dataclass(frozen=True)
class Leaf:
    """The end of a key.

    Attributes:
        text: what it is, dot included.
        role: which tensor of a module it is.
        style: whose habit it is.
        path: what the path must look like, if not every path will do.
    """

    text: str
    role: Role
    style: Style
    path: re.Pattern[str] | None = None


_XLABS = re.compile(r"(?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]?")
_NORM = re.compile(
    r"(?:double|single)_blocks\.\d+\.(?:(?:img|txt)_attn\.)?norm\.(?:query|key)_norm"
)
# Elsewhere a bare leaf is loralib's, whose scale is in no file.
_BLOCKS = re.compile(r"(?:transformer\.|diffusion_model\.)?(?:transformer_)?blocks\.\d+\..+")
_LYCORIS: tuple[Role, ...] = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "w_norm", "b_norm",
)  # fmt: skip
_GLORA: tuple[Role, ...] = ("a1", "a2", "b1", "b2")
_ROTATION: tuple[Role, ...] = ("oft_blocks", "rescale", "on_input")
_REFUSED = (".bm.weight", ".oft_diag", ".boft_blocks", ".scalar")
IA3_MARK = ".on_input"

_LEAVES = (
    Leaf(".lora_down.weight", "a", "kohya"),
    Leaf(".lora_up.weight", "b", "kohya"),
    Leaf(".lora_mid.weight", "mid", "lycoris"),
    Leaf(".alpha", "alpha", "kohya"),
    Leaf(".dora_scale", "magnitude", "lycoris"),
    Leaf(".lora_A.weight", "a", "peft"),
    Leaf(".lora_B.weight", "b", "peft"),
    Leaf(".lora_B.bias", "bias", "peft"),
    Leaf(".lora_embedding_A", "embedding_a", "peft"),
    Leaf(".lora_embedding_B", "embedding_b", "peft"),
    Leaf(".lora_magnitude_vector", "magnitude", "peft"),
    Leaf(".lora_magnitude_vector.weight", "magnitude", "peft"),
    Leaf(".lora_A", "a", "bare", _BLOCKS),
    Leaf(".lora_B", "b", "bare", _BLOCKS),
    Leaf(".down.weight", "a", "xlabs", _XLABS),
    Leaf(".up.weight", "b", "xlabs", _XLABS),
    Leaf(".lora.down.weight", "a", "old"),
    Leaf(".lora.up.weight", "b", "old"),
    Leaf(".lora_linear_layer.down.weight", "a", "old"),
    Leaf(".lora_linear_layer.up.weight", "b", "old"),
    *(Leaf(f".{role}", role, "lycoris") for role in _LYCORIS),
    Leaf(".diff", "diff", "comfyui"),
    Leaf(".diff_b", "diff_b", "comfyui"),
    Leaf(".diff_m", "diff_m", "comfyui"),
    Leaf(".set_weight", "set_weight", "comfyui"),
    Leaf(".reshape_weight", "reshape_weight", "comfyui"),
    Leaf(".scale", "norm_scale", "comfyui", _NORM),
    *(Leaf(f".{role}.weight", role, "lycoris") for role in _GLORA),
    *(Leaf(f".{role}", role, "lycoris") for role in _ROTATION),
    *(Leaf(text, "refused", "lycoris") for text in _REFUSED),
)
_TABLE = {leaf.text: leaf for leaf in _LEAVES}
_CONTROL_TABLE = {
    leaf.text: leaf for leaf in (Leaf(".down", "a", "control"), Leaf(".up", "b", "control"))
}
_MOST_PIECES = max(leaf.text.count(".") for leaf in _LEAVES)
_WITH_NAMES: tuple[tuple[re.Pattern[str], Role, Style], ...] = (
    (re.compile(rf"(.+)(\.lora_A\.{_NAME}\.weight)"), "a", "infix"),
    (re.compile(rf"(.+)(\.lora_B\.{_NAME}\.weight)"), "b", "infix"),
    (re.compile(rf"(.+)(\.lora_B\.{_NAME}\.bias)"), "bias", "infix"),
    (re.compile(rf"(.+)(\.lora_magnitude_vector\.{_NAME}(?:\.weight)?)"), "magnitude", "infix"),
    (re.compile(rf"(.+)(\.lora_embedding_A\.{_NAME})"), "embedding_a", "infix"),
    (re.compile(rf"(.+)(\.lora_embedding_B\.{_NAME})"), "embedding_b", "infix"),
    (re.compile(r"(.+)(_lora\.down\.weight)"), "a", "old"),
    (re.compile(r"(.+)(_lora\.up\.weight)"), "b", "old"),
)

_LEARNED_EMBEDDING = re.compile(r"bundle_emb\.[^\s]+")


@dataclass(frozen=True)
class Key:
    """A key taken apart.

    Attributes:
        module: the module's name: component and path, without what only a dialect adds.
        path: the path within the component, as spelled there.
        prefix: the start of the key, before the path.
        role: which tensor of the module it is.
        style: whose leaf it has.
        naming: the class of files that have such prefixes.
        flat: whether the path is flattened.
    """

    module: str
    path: str
    prefix: str
    role: Role
    style: Style
    naming: Naming
    flat: bool


@functools.cache
def _heads() -> tuple[tuple[re.Pattern[str], Prefix], ...]:
    return tuple(
        (re.compile(f"({p.pattern})({_FLAT_PATH if p.flat else _DOTTED_PATH})"), p)
        for p in _PREFIXES
    )


@functools.lru_cache(maxsize=4096)  # recognising and reading, and files of one model, share them
def parse(key: str, *, control: bool = False) -> Key | None:
    """Return the parts of a key, None if no rule claims it.

    Args:
        key: as in the file.
        control: whether the file is a ControlLoRA, whose leaves are too short to be told otherwise.

    >>> parse("lora_unet_mid_block_attn_to_q.lora_down.weight").module
    'lora_unet_mid_block_attn_to_q'
    >>> parse("unet.mid_block.attn.processor.to_out_lora.up.weight").module
    'unet.mid_block.attn.to_out.0'
    >>> parse("unet.mid_block.attn.to_q.weight") is None
    True
    """
    if _LEARNED_EMBEDDING.fullmatch(key):
        return Key(key, key, "", "learned_embedding", "kohya", "safetensors", flat=False)
    for module, role, style in _endings(key, control):
        for head, prefix in _heads():
            parts = head.fullmatch(module)
            if parts is not None:
                path = _modern(parts[2]) if style == "old" else parts[2]
                if prefix.flat:
                    path = path.removesuffix("_")
                name = parts[1].replace("base_model.model.", "") + path
                return Key(name, path, parts[1], role, style, prefix.naming, prefix.flat)
    return None


def is_first_factor(key: str, module: str) -> bool:
    """Return whether a tensor's key is that of a module's first factor, as a file would have it.

    Factors that an operation makes of something else get other keys, until they are written.

    >>> is_first_factor("lora_unet_proj_in.lora_down.weight", "lora_unet_proj_in")
    True
    >>> is_first_factor("lora_unet_proj_in.hada_w1_a", "lora_unet_proj_in")
    False
    """
    parsed = parse(key, control=True)
    return parsed is not None and (parsed.module, parsed.role) in (
        (module, "a"),
        (module, "embedding_a"),
    )


def _endings(key: str, control: bool) -> Iterator[tuple[str, Role, Style]]:
    """Yield what comes before each leaf that the key could end in, the longest leaf first."""
    pieces = key.split(".")
    for count in range(min(_MOST_PIECES, len(pieces) - 1), 0, -1):
        text = "." + ".".join(pieces[-count:])
        leaf = _TABLE.get(text) or (_CONTROL_TABLE.get(text) if control else None)
        module = key.removesuffix(text)
        if leaf is not None and (leaf.path is None or leaf.path.fullmatch(module)):
            yield module, leaf.role, leaf.style
    for pattern, role, style in _WITH_NAMES:
        found = pattern.fullmatch(key)
        if found is not None:
            yield found[1], role, style


def _modern(path: str) -> str:
    """Return the path that a module has without its old attention processor."""
    segments = [segment for segment in path.split(".") if segment != "processor"]
    if segments[-1] == "to_out":
        segments.append("0")
    return ".".join(segments)
