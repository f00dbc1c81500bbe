"""Names that need no table: by the component before a path, and flattened.

What is asked of a table is in `rename.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.naming.choice import in_no_table
from loratools.naming.named_modules import NamedModules
from loratools.naming.places import Target, module_key
from loratools.naming.tables import flattened
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.single_file_keys import COMPONENTS

_FLAT_OF = {
    "unet.": "lora_unet_",
    "diffusion_model.": "lora_unet_",
    "transformer.": "lora_transformer_",
    "prior.": "lora_prior_",
    "decoder.": "lora_decoder_",
    "text_encoder_2.": "lora_te2_",
    "text_encoder_3.": "lora_te3_",
}


def other_prefix(
    names: Mapping[str, str], target: Target, component: str | None
) -> dict[str, str] | None:
    """Return names with the component that was asked for, where no table knows them.

    None if none was asked for, or a name is flattened.
    """
    is_wanted = component == "diffusion_model" if target == "comfyui" else component in COMPONENTS
    if not is_wanted or target not in ("comfyui", "diffusers"):
        return None
    result = {}
    for old, new in names.items():
        key = module_key(new)
        if key is None or key.flat:
            return None
        of_text = key.prefix.startswith("text_encoder")
        result[old] = new if is_of(new, target) or of_text else f"{component}.{key.path}"
    return result


def is_of(name: str, target: Target) -> bool:
    """Return whether a name is one of the naming's, by how it begins."""
    key = module_key(name)
    if key is None:
        return False
    if target == "bare":
        return not key.flat
    return key.naming == target


def without_table(adapter: Adapter, names: Mapping[str, str], target: Target) -> dict[str, str]:
    """Return names that need no table: flattened ones of dotted ones.

    Raises:
        AdapterError: others.
    """
    if target != "kohya":
        missing = [new for new in names.values() if not is_of(new, target)]
        raise in_no_table(NamedModules.of(adapter, names), missing)
    second = any(new.startswith("text_encoder_2.") for new in names.values())
    flat_of = {**_FLAT_OF, "text_encoder.": "lora_te1_" if second else "lora_te_"}
    result = {}
    for old, new in names.items():
        key = module_key(new)
        if key is not None and key.flat:
            result[old] = new
            continue
        prefix = next((p for p in flat_of if new.startswith(p)), None)
        if prefix is None:
            raise in_no_table(NamedModules.of(adapter, names), [new])
        result[old] = flat_of[prefix] + flattened(new.removeprefix(prefix))
    return result
