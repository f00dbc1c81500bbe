"""The components of a base checkpoint: a bare one, or several below the prefixes of one file.

All-in-one files of Stable Diffusion and of ComfyUI hold a denoiser and text encoders; prefixes tell
them apart. Text encoders have transformers' paths there, or OpenCLIP's, which keeps queries, keys
and values of a layer in one matrix. VAEs are no component that adapters change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from loratools.naming.tables import flattened
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.pipelines import ADAPTED
from loratools_formats.core.single_file_keys import Key

DENOISER = "denoiser"

_BELOW = {
    "model.diffusion_model.": DENOISER,
    "diffusion_model.": DENOISER,
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
"""Prefixes of the all-in-one files of Stability AI and ComfyUI, with the component below each."""
FOLDERS = {name: DENOISER if name in ("unet", "transformer") else name for name in ADAPTED}
"""Components of diffusers' pipelines by their folder, as `roles_of` names them."""
_COMFYUI = re.compile(r"text_encoders\.([A-Za-z0-9_]+)\.(?:transformer\.)?")
_TEXT = tuple(f"text_encoder{number}" for number in ("", "_2", "_3", "_4", "_5", "_6"))
_CLIP = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_T5 = "t5"

_ROLES_OF = {
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2", "text_encoder"),  # T5; alone in Chroma
    "lora_te4_": ("text_encoder_4",),
    "transformer_2.": ("transformer_2", DENOISER),
    "prior.": ("prior", DENOISER),
    "decoder.": ("decoder", DENOISER),
    "lora_prior_": ("prior", DENOISER),
    "lora_decoder_": ("decoder", DENOISER),
    "connectors.": ("connectors",),
    "text_embedding_projection.": ("connectors", DENOISER),
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",),
}
"""Components that the prefixes of single files may mean, the likeliest first."""
_ANY_T5 = ("text_encoder_3", "text_encoder_2", "text_encoder")

_OUTER = "text_model."
_IN_LAYER = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
"""Modules of a layer of CLIP in transformers and OpenCLIP; there the first three are one matrix."""
_AROUND = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
}
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")


@dataclass(frozen=True)
class BaseComponent:
    """One component of a base checkpoint.

    Attributes:
        role: `denoiser`, or what diffusers calls a text encoder; empty for a bare checkpoint, which
            may be any.
        prefix: of its tensors.
        paths: of its modules and of its tensors, without the prefix.
    """

    role: str
    prefix: str
    paths: frozenset[str]

    @property
    def full_prefix(self) -> str:
        """What tables expect before its modules' names; of a denoiser with a prefix."""
        is_original = self.prefix.endswith("diffusion_model.")
        return "diffusion_model." if is_original else self.prefix

    @cached_property
    def _known(self) -> Mapping[str, str]:
        """What each module may be called, and what it is."""
        known = {path: path for path in self.paths}
        for number in {m[1] for path in self.paths if (m := _RESBLOCK.match(path)) is not None}:
            for name, own in _IN_LAYER.items():
                path = f"text_model.encoder.layers.{number}.{name}"
                known.setdefault(path, f"transformer.resblocks.{number}.{own}")
            for name, own in _AROUND.items():
                known.setdefault(name, own)
        for path, own in list(known.items()):
            other = path.removeprefix(_OUTER) if path.startswith(_OUTER) else _OUTER + path
            known.setdefault(other, own)
        return known

    @cached_property
    def _flat(self) -> Mapping[str, set[str]]:
        flat: dict[str, set[str]] = {}
        for path, own in self._known.items():
            flat.setdefault(flattened(path), set()).add(own)
        return flat

    def full(self, path: str, *, flat: bool = False) -> str | None:
        """Return the base's name of a module or parameter; None if it has none, or several.

        Args:
            path: within the component.
            flat: whether `_` stands for `.` in it.
        """
        if not flat:
            own = self._known.get(path)
            return None if own is None else self.prefix + own
        found = self._flat.get(path, set())
        return self.prefix + next(iter(found)) if len(found) == 1 else None


def components_of(base: Checkpoint) -> list[BaseComponent]:
    """Return the components of a checkpoint; one without prefixes is one that may be any.

    Args:
        base: the checkpoint.
    """
    found: dict[str, set[str]] = {}
    if base.components:
        for folder in base.components:
            keys = [key for key in base.tensors if key.startswith(f"{folder}.")]
            paths = {key.removeprefix(f"{folder}.") for key in keys}
            found[folder] = paths | {path.rpartition(".")[0] for path in paths} - {""}
        return [
            BaseComponent(FOLDERS[folder], f"{folder}.", frozenset(paths))
            for folder, paths in found.items()
        ]
    for key in base.tensors:
        for prefix in _prefixes(key):
            path = key.removeprefix(prefix)
            found.setdefault(prefix, set()).update((path, path.rpartition(".")[0]))
    if not found:
        paths = {name for key in base.tensors for name in (key, key.rpartition(".")[0])}
        return [BaseComponent("", "", frozenset(paths - {""}))]
    roles = _roles(found)
    return [BaseComponent(roles[p], p, frozenset(paths - {""})) for p, paths in found.items()]


def _prefixes(key: str) -> Iterator[str]:
    for prefix in _BELOW:
        if key.startswith(prefix):
            yield prefix
    of_comfyui = _COMFYUI.match(key)
    if of_comfyui is not None:
        yield of_comfyui[0]


def _roles(prefixes: Mapping[str, object]) -> dict[str, str]:
    """Return the component below each prefix; the T5 of ComfyUI is the last text encoder."""
    roles = {prefix: _BELOW[prefix] for prefix in prefixes if prefix in _BELOW}
    names = {p: m[1] for p in prefixes if (m := _COMFYUI.match(p)) is not None}
    roles |= {prefix: _CLIP[name] for prefix, name in names.items() if name in _CLIP}
    taken = {role for role in roles.values() if role != DENOISER}
    for prefix, name in names.items():
        if name not in _CLIP:
            roles[prefix] = next(role for role in _TEXT if role not in taken)
            taken.add(roles[prefix])
    return roles


def roles_of(key: Key) -> tuple[str, ...]:
    """Return the components that a single file's module may be of, the likeliest first."""
    if key.prefix in _ROLES_OF:
        return _ROLES_OF[key.prefix]
    of_comfyui = _COMFYUI.fullmatch(key.prefix)
    if of_comfyui is None:
        return (DENOISER,)
    name = of_comfyui[1]
    if name in _CLIP:
        return (_CLIP[name],)
    return _ANY_T5 if name.startswith(_T5) else ("text_encoder", *_ANY_T5[:2], "text_encoder_4")


def transformers_paths(path: str) -> tuple[str, ...]:
    """Return what transformers calls a module of a text encoder; several divide its rows equally.

    >>> transformers_paths("transformer.resblocks.0.mlp.c_fc")
    ('text_model.encoder.layers.0.mlp.fc1',)
    >>> transformers_paths("encoder.block.0.layer.0.SelfAttention.q")
    ('encoder.block.0.layer.0.SelfAttention.q',)
    """
    found = _RESBLOCK.match(path)
    if found is None:
        around = {own: name for name, own in _AROUND.items()}
        return (around.get(path, path),)
    layer, own = f"text_model.encoder.layers.{found[1]}.", path[found.end() :]
    if own == "attn.in_proj":
        return tuple(f"{layer}self_attn.{part}_proj" for part in "qkv")
    names = {theirs: ours for ours, theirs in _IN_LAYER.items()}
    return (layer + names.get(own, own),)
