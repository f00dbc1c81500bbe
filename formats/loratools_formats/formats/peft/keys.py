"""The grammar of tensor names in a PEFT LoRA file.

A name is `base_model.model.<module path><suffix>`, without the adapter's own name. Suffixes are
matched whole, never searched for: module paths may contain `lora_`, `weight` or digits.
Source: peft 0.21.2, `get_peft_model_state_dict` and the layers' attribute names.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from loratools_formats.core.peft_facts import PREFIX

Part = Literal[
    "a",
    "b",
    "b_bias",
    "diagonal",
    "embedding_a",
    "embedding_b",
    "embedding_middle",
    "magnitude",
    "middle",
    "token_rows",
]

SUFFIXES: dict[str, Part] = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_diag": "diagonal",
    ".lora_N.weight": "middle",
    ".lora_embedding_N": "embedding_middle",
    ".default_lora_latent_mapping.weight": "middle",
    "_lora_latent_mapping.weight": "middle",
    ".token_adapter.trainable_tokens_delta": "token_rows",
}
_SUFFIX_OF = {part: suffix for suffix, part in reversed(SUFFIXES.items())}  # the first of each

SAMPLER = ".lora_monteclora_sampler."
"""Part of the names of MonteCLoRA's sampler, whose shapes hold the rank."""

SPREAD = ".lora_A_rho"
"""End of the names of the spread of A in a Bayesian LoRA (BLoB, TFB), whose mean A is."""

TRAINING_SUFFIXES = (".lora_velora_embed", SAMPLER.rstrip("."))
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
    return f"{PREFIX}{path}{_SUFFIX_OF[part]}"


def setting_name(path: str) -> str:
    """Return the path that PEFT matches rank and alpha patterns against for a module.

    It adapts both projections of an `nn.MultiheadAttention` as one module, of the attention's
    path, and puts the output projection's factors under its `base_layer`.

    >>> setting_name("blocks.0.attn.base_layer.out_proj")
    'blocks.0.attn'
    """
    return path.removesuffix(".base_layer.out_proj")


def base_tensor(name: str) -> str | None:
    """Return the base tensor a name would be loaded over, None if it is not of that form.

    PEFT copies any remaining tensor over the base tensor of the same name; `.base_layer` is the
    wrapper it puts around adapted modules, `.token_adapter` the one around trained token rows.

    >>> base_tensor("base_model.model.lm_head.base_layer.weight")
    'lm_head.weight'
    >>> base_tensor("base_model.model.embed.token_adapter.base_layer.weight")
    'embed.weight'
    """
    if not name.startswith(PREFIX):
        return None
    path, _, leaf = name[len(PREFIX) :].rpartition(".")
    if not path:
        return None
    path = path.replace(".token_adapter.base_layer", ".base_layer")
    return ".".join([part for part in path.split(".") if part != "base_layer"] + [leaf])


def saved_again(name: str) -> tuple[str, ...]:
    """Return the tensors that a name may repeat; empty if it is not of that form.

    Asked to save a whole embedding which is in `modules_to_save` too, PEFT writes it three times:
    under its name, under its wrapper's, and as it was before training. It loads the first. Asked
    for all biases, it writes those of saved modules so, too, and the adapter's name stays in them.

    >>> saved_again("base_model.model.lm_head.original_module.weight")
    ('base_model.model.lm_head.weight',)
    >>> saved_again("base_model.model.score.modules_to_save.default.dense.bias")[1]
    'base_model.model.score.dense.bias'
    """
    for wrapper in (".original_module.", ".modules_to_save."):
        head, found, tail = name.rpartition(wrapper)
        if found:
            of_adapter, _, inner = tail.partition(".")
            return (f"{head}.{tail}", *([f"{head}.{inner}"] if of_adapter and inner else []))
    return ()
