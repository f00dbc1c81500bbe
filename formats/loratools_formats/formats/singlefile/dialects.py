"""The dialects of single files, and what shows each of them.

A dialect is a combination of prefix and leaf. Nothing depends on which it is called; `info` shows
it, so that a user knows what a file is and what it was recognised by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loratools_formats.core.adapter import Dialect
from loratools_formats.core.single_file_keys import Key


@dataclass(frozen=True)
class _Rule:
    name: str
    why: str
    holds: Callable[[Key], bool]


BFL_CONTROL = "BFL control"

_BFL_PATHS = ("double_blocks.", "single_blocks.", "img_in", "txt_in", "final_layer.")

_RULES = (
    _Rule("OneTrainer embedding", "bundle_emb", lambda k: k.role == "learned_embedding"),
    _Rule("XLabs", "processor of FLUX blocks, down/up", lambda k: k.style == "xlabs"),
    _Rule("ControlLoRA", "lora_controlnet beside down/up", lambda k: k.style == "control"),
    _Rule("SimpleTuner LyCORIS", "prefix lycoris_", lambda k: k.prefix == "lycoris_"),
    _Rule("Wan-Fun", "prefix lora_unet__", lambda k: k.prefix == "lora_unet__"),
    _Rule(
        "OneTrainer",
        "prefix lora_transformer_, lora_prior_ or lora_decoder_",
        lambda k: k.prefix in ("lora_transformer_", "lora_prior_", "lora_decoder_"),
    ),
    _Rule("LyCORIS", "flat path, LyCORIS leaf", lambda k: k.flat and k.style == "lycoris"),
    _Rule(
        "kohya",
        "prefix lora_unet_ or lora_te_, flat path",
        lambda k: k.flat and k.style == "kohya",
    ),
    _Rule("kohya with other leaves", "flat path", lambda k: k.flat),
    _Rule("old diffusers", "down/up after an attention processor", lambda k: k.style == "old"),
    _Rule("Mochi", "lora_A/lora_B without weight", lambda k: k.style == "bare"),
    _Rule("PEFT with adapter name", "a name before weight", lambda k: k.style == "infix"),
    _Rule(
        "PEFT in one file",
        "base_model.model. before the path",
        lambda k: "base_model.model." in k.prefix,
    ),
    _Rule(
        "ComfyUI",
        "prefix diffusion_model. or text_encoders.",
        lambda k: k.naming == "comfyui",
    ),
    _Rule(
        "diffusers",
        "component before a dotted path, lora_A/lora_B",
        lambda k: k.naming == "diffusers" and k.style == "peft",
    ),
    _Rule(
        "OneTrainer in diffusers naming",
        "component before a dotted path, leaves as kohya's or LyCORIS'",
        lambda k: k.naming == "diffusers",
    ),
    _Rule(
        BFL_CONTROL,
        "unprefixed FLUX paths, with scales of norms",
        lambda k: k.path.startswith(_BFL_PATHS) or k.role == "norm_scale",
    ),
    _Rule("unprefixed", "a dotted path without component", lambda k: not k.flat),
)


def dialects(keys: Mapping[str, Key]) -> tuple[Dialect, ...]:
    """Return the dialects met among a file's keys, most frequent first."""
    found: dict[str, list[str]] = {}
    is_control = any(key.role == "norm_scale" for key in keys.values())
    rules = [rule for rule in _RULES if is_control or rule.name != BFL_CONTROL]
    for name, key in keys.items():
        rule = next(rule for rule in rules if rule.holds(key))
        found.setdefault(rule.name, []).append(name)
    reasons = {rule.name: rule.why for rule in _RULES}
    ordered = sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return tuple(Dialect(name, reasons[name], keys[0], len(keys)) for name, keys in ordered)
