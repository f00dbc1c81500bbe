"""By what ComfyUI tells that layers of a checkpoint are quantised, and how.

Its older checkpoints in eight bits have `scaled_fp8` and `scale_weight`. Its present ones have a
JSON object for each layer: in a tensor `comfy_quant` beside the weight, or for all layers in
`_quantization_metadata` in the file's metadata, under the layer's full name.

Source: ComfyUI, `comfy/utils.py` (`convert_old_quants`) and `comfy/ops.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.strict_json import parsed_object

MARKS = ("scaled_fp8", "comfy_quant", "scale_weight")
"""Last parts of the names of tensors that only ComfyUI's quantised checkpoints have."""

_OF_LAYER = f".{MARKS[1]}"
_METADATA = "_quantization_metadata"
_MOST_BYTES = 1 << 16


def stated_layers(
    tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]
) -> dict[str, Mapping[str, Any]]:
    """Return what a checkpoint says of each of its quantised layers, by the layer's name.

    Raises:
        AdapterError: it is not sound.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name, said in _of_metadata(metadata)[1].items():
        if not isinstance(said, Mapping):
            raise AdapterError(f"metadata {_METADATA} says nothing of a layer", tensor=name)
        found[name] = said
    for key, tensor in tensors.items():
        if key.endswith(_OF_LAYER):
            if tensor.nbytes > _MOST_BYTES:
                raise AdapterError("no description of a quantised layer", tensor=key)
            text = bytes(tensor.raw())
            found[key.removesuffix(_OF_LAYER)] = parsed_object(text, key, path=None, max_depth=16)
    return found


def _of_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a file's metadata says, and of which layers; both empty if nothing."""
    text = metadata.get(_METADATA)
    if text is None:
        return {}, {}
    stated = parsed_object(text.encode(), _METADATA, path=None, max_depth=16)
    layers = stated.get("layers")
    if not isinstance(layers, dict):
        raise AdapterError(f"metadata {_METADATA} lists no layers")
    return stated, layers


def marks_of_comfyui(tensors: Mapping[str, TensorRef], weights: Collection[str]) -> list[str]:
    """Return the names of tensors by which ComfyUI tells that some weights are in eight bits.

    The mark of a whole model stands below the prefix that its weights have in a file of several.
    """
    of_weights = [f"{key.rpartition('.')[0]}.{MARKS[1]}" for key in weights]
    of_models = [
        key
        for key in tensors
        if key.rpartition(".")[2] == MARKS[0]
        and any(weight.startswith(key.removesuffix(MARKS[0])) for weight in weights)
    ]
    return [*of_models, *(key for key in of_weights if key in tensors)]


def unmarked(metadata: Mapping[str, str], weights: Collection[str]) -> dict[str, str]:
    """Return a file's metadata, in which ComfyUI finds some weights in eight bits no more.

    Raises:
        AdapterError: what it says of layers is not sound.
    """
    stated, layers = _of_metadata(metadata)
    if not stated:
        return dict(metadata)
    modules = {key.rpartition(".")[0] for key in weights}
    kept = {name: layer for name, layer in layers.items() if name not in modules}
    rest = {key: value for key, value in metadata.items() if key != _METADATA}
    return rest | (
        {_METADATA: strict_json.dumps({**stated, "layers": kept}, ensure_ascii=True)}
        if kept
        else {}
    )
