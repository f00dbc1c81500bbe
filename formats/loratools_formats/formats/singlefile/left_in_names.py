"""What training code leaves in the keys of single files, and keys without it.

Wrappers of torch stay in paths, and a prefix is put before keys that have it already, or comes from
the program's own objects. Most loaders leave such keys out, with a line in a log for each.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.core.wrapped_names import unwrapped
from loratools_formats.disk.errors import AdapterError, printable

_INSTEAD = {
    "module.": "",  # DistributedDataParallel's
    "pipe.dit.": "diffusion_model.",  # DiffSynth-Studio's
    "model.diffusion_model.": "diffusion_model.",
    "diffusion_model.diffusion_model.": "diffusion_model.",
    "transformer.transformer.": "transformer.",
    "unet.unet.": "unet.",
    "lora_unet_lora_unet_": "lora_unet_",
    "lora_unet__orig_mod_": "lora_unet_",
    "lora_unet_diffusion_model_": "lora_unet_",
    "lora_unet_model_diffusion_model_": "lora_unet_",
    "lora_transformer_lora_transformer_": "lora_transformer_",
    "lora_transformer__orig_mod_": "lora_transformer_",
}
_STARTS = tuple(_INSTEAD)


def cleaned(key: str) -> str:
    """Return a key without what training code left in it.

    >>> cleaned("model.diffusion_model.blocks.0._orig_mod.ffn.0.lora_A.weight")
    'diffusion_model.blocks.0.ffn.0.lora_A.weight'
    >>> cleaned("lora_unet__orig_mod_blocks_0_ffn_0.alpha")
    'lora_unet_blocks_0_ffn_0.alpha'
    """
    key = unwrapped(key)
    while key.startswith(_STARTS):
        start = next(start for start in _STARTS if key.startswith(start))
        key = _INSTEAD[start] + key.removeprefix(start)
    return key


def as_loaders_know(
    tensors: Mapping[str, TensorRef],
) -> tuple[dict[str, TensorRef], list[Finding]]:
    """Return a file's tensors under keys that loaders know, with a note if they had others.

    Raises:
        AdapterError: two tensors have one key then.
    """
    result: dict[str, TensorRef] = {}
    first: str | None = None
    for old, tensor in tensors.items():
        new = cleaned(old)
        if new in result:
            raise AdapterError(
                "two tensors have one name without what training code left in their names",
                tensor=old,
                got=result[new].key,
            )
        result[new] = tensor if new == old else tensor.renamed(new)
        first = old if first is None and new != old else first
    if first is None:
        return result, []
    text = (
        f"names are read without what training code left in them ({printable(first)} is "
        f"{printable(cleaned(first))}); most loaders leave them out, and what is written "
        "has names that they know"
    )
    return result, [Finding("wrapped-names", "note", printable(first), text)]
