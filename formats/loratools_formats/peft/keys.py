"""The grammar of tensor names in a PEFT LoRA file.

A name is `base_model.model.<module path><suffix>`, without the adapter's own name. Suffixes are
matched whole, never searched for: module paths may contain `lora_`, `weight` or digits.
Source: peft 0.21.2, `get_peft_model_state_dict` and the layers' attribute names.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

PREFIX = "base_model.model."

Part = Literal["a", "b", "b_bias", "embedding_a", "embedding_b", "magnitude", "token_rows"]

SUFFIXES: dict[str, Part] = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".token_adapter.trainable_tokens_delta": "token_rows",
}

TRAINING_SUFFIXES = (".lora_diag", ".lora_velora_embed", ".lora_monteclora_sampler")
"""Tensors of variants whose config key already says so; kept, and used by no operation."""


class Key(NamedTuple):
    """A parsed name: module path, and which part of the module's adapter it is."""

    path: str
    part: Part


def parse(name: str) -> Key | None:
    """Return the parts of an adapter tensor's name, None if it is something else.

    >>> parse("base_model.model.layers.0.q_proj.lora_A.weight")
    Key(path='layers.0.q_proj', part='a')
    >>> parse("base_model.model.classifier.weight") is None
    True
    """
    if not name.startswith(PREFIX):
        return None
    for suffix, part in SUFFIXES.items():
        if name.endswith(suffix) and len(name) > len(PREFIX) + len(suffix):
            return Key(name[len(PREFIX) : -len(suffix)], part)
    return None


def compose(path: str, part: Part) -> str:
    """Return the tensor name of a part of a module's adapter."""
    suffix = next(suffix for suffix, p in SUFFIXES.items() if p == part)
    return f"{PREFIX}{path}{suffix}"


def base_tensor(name: str) -> str | None:
    """Return the base tensor a name would be loaded over, None if it is not of that form.

    PEFT copies any remaining tensor over the base tensor of the same name; `.base_layer` is the
    wrapper it puts around adapted modules.

    >>> base_tensor("base_model.model.lm_head.base_layer.weight")
    'lm_head.weight'
    """
    if not name.startswith(PREFIX):
        return None
    path, _, leaf = name[len(PREFIX) :].rpartition(".")
    if not path:
        return None
    return f"{path.removesuffix('.base_layer')}.{leaf}"
