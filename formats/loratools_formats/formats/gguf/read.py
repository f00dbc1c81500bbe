"""Reading GGUF adapters: pairs `T.lora_a`, `T.lora_b` for a tensor T of the base.

Modules keep the file's names and layout. What llama.cpp refuses or crashes on is an error; vectors
of norms, which it loads and ignores, are carried.
Source: llama-adapter.cpp of llama.cpp b10605; crashes and refusals were measured.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools_formats.containers.gguf.container import GgufFile, GgufTensor, KeyValue, read_gguf
from loratools_formats.containers.gguf.cursor import ARRAY, STRING
from loratools_formats.containers.gguf.ggml_types import decode
from loratools_formats.containers.gguf.splits import COUNT
from loratools_formats.core import alora
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import Buffer, TensorRef, in_file
from loratools_formats.disk.errors import AdapterError, UnsupportedError

ALPHA = "adapter.lora.alpha"
INVOCATION_KEY = "adapter.alora.invocation_tokens"
QUANTISATION = "general.quantization_version"
EMBEDDING = "token_embd"
ARCHITECTURE = "general.architecture"
STRUCTURAL_KEYS = {
    ARCHITECTURE: None,
    "general.type": "adapter",
    "adapter.type": "lora",
}
"""Keys every adapter must have, and what they must say; None if it varies."""

_REPOSITORY = "general.base_model.0.repo_url"
_BASE_NAME = "general.base_model.0.name"
_HUB = "https://huggingface.co/"
_DERIVED_KEYS = frozenset(
    {*STRUCTURAL_KEYS, ALPHA, QUANTISATION, "general.alignment", "general.file_type"}
)
_MAX_LOADED_BYTES = 1 << 22
_NORM = re.compile(r"(?:blk\.\d+\.)?\w*_norm\.weight")


def read(path: Path) -> Adapter:
    """Read a GGUF adapter's header.

    Raises:
        MissingFileError: nothing is there.
        AdapterError: malformed, or something that llama.cpp refuses.
        UnsupportedError: a GGUF file that is no LoRA adapter.
    """
    file = read_gguf(path)
    try:
        return _read(file, path)
    except (AdapterError, UnsupportedError) as error:
        error.path = error.path or str(path)
        raise


def _read(file: GgufFile, path: Path) -> Adapter:
    for key, wanted in STRUCTURAL_KEYS.items():
        value = file.get(key, STRING)
        if value is None or (wanted is not None and value != wanted):
            raise UnsupportedError(
                "is a GGUF file, but not a LoRA adapter",
                got=f"{key} {value}",
                expected=wanted or "its architecture",
                hint="A GGUF model is a base, given as `base`, or: "
                f"loratools fuse {shlex.quote(str(path))} ADAPTER -o fused.gguf"
                if value == "model" or (value is None and key == "general.type")
                else None,
            )
    if (file.get(COUNT, "u16") or 1) > 1:
        raise UnsupportedError("adapter is split into several files, which llama.cpp does not read")
    alpha = file.get(ALPHA, "f32")
    if alpha is not None and not abs(alpha) < float("inf"):
        raise AdapterError("alpha is not finite", got=alpha)
    modules, carried = _modules(file, alpha)
    findings = []
    if carried:
        ignored = f"llama.cpp ignores trained norms: {', '.join(sorted(carried))}"
        findings.append(Finding("norms-ignored", "warning", None, ignored))
    if any(tensor.kind.name not in DTYPES for tensor in file.tensors.values()):
        read = "quantised factors are read as the float32 values they stand for"
        findings.append(Finding("quantised-factors", "note", None, read))
    metadata = {
        key: entry.value
        for key, entry in file.keys.items()
        if entry.type == STRING and key not in _DERIVED_KEYS and entry.value is not None
    }
    others = {k: e for k, e in file.keys.items() if k not in _DERIVED_KEYS and k not in metadata}
    nbytes = sum(entry.end - entry.offset for entry in others.values())
    if nbytes > _MAX_LOADED_BYTES:
        raise AdapterError(
            "too many values in the keys of an adapter",
            got=f"{nbytes} bytes",
            expected=f"at most {_MAX_LOADED_BYTES}",
        )
    keys = {
        key: KeyValue(entry.type, file.load(entry), entry.item, entry.count)
        for key, entry in others.items()
    }
    return Adapter(
        format="gguf",
        source=path,
        modules=modules,
        carried=carried,
        config={"architecture": file.get(ARCHITECTURE, STRING), "keys": keys},
        metadata=metadata,
        base_model=base_model(metadata),
        findings=(*_caveats(keys), *findings),
        inputs=(file.file,),
    )


def base_model(metadata: Mapping[str, str]) -> str | None:
    """Return the base model that an adapter's keys name, None if they name none."""
    repository = metadata.get(_REPOSITORY, "")
    if repository.startswith(_HUB):
        return repository.removeprefix(_HUB)
    return metadata.get(_BASE_NAME)


def base_model_keys(name: str) -> dict[str, str]:
    """Return the keys that name a base model; of a local path only its last part.

    >>> base_model_keys("somebody/model")["general.base_model.0.repo_url"]
    'https://huggingface.co/somebody/model'
    >>> base_model_keys("/home/me/models/tiny/")
    {'general.base_model.0.name': 'tiny'}
    """
    parts = name.split("/")
    if len(parts) == 2 and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts):
        return {
            _BASE_NAME: parts[1],
            "general.base_model.0.organization": parts[0],
            _REPOSITORY: f"{_HUB}{name}",
        }
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return {_BASE_NAME: last} if last else {}


def _caveats(keys: Mapping[str, KeyValue]) -> tuple[Finding, ...]:
    found = keys.get(INVOCATION_KEY)
    if found is None:
        return ()
    if (found.type, found.item) != (ARRAY, "u32"):
        raise AdapterError(
            f"key {INVOCATION_KEY} has the wrong type",
            got=f"{found.type} {found.item}",
            expected="array of u32",
        )
    return (alora.ACTIVATED,) if found.value else ()


def _modules(
    file: GgufFile, alpha: float | None
) -> tuple[dict[str, ModuleChange], dict[str, TensorRef]]:
    pairs: dict[str, dict[str, GgufTensor]] = {}
    carried: dict[str, TensorRef] = {}
    for name, tensor in file.tensors.items():
        target, _, part = name.rpartition(".")
        if part in ("lora_a", "lora_b") and target.endswith(".weight"):
            pairs.setdefault(target.removesuffix(".weight"), {})[part] = tensor
        elif _NORM.fullmatch(name) and len(tensor.shape) == 1:
            carried[name] = _reference(tensor)
        else:
            raise AdapterError(
                "tensor is no factor of an adapter",
                tensor=name,
                expected="a name ending in .weight.lora_a or .weight.lora_b",
            )
    modules: dict[str, ModuleChange] = {}
    for target in sorted(pairs):
        pair = pairs[target]
        if len(pair) != 2:
            (part,) = pair
            raise AdapterError(
                "module lacks one of its two factors",
                tensor=target,
                got=part,
                expected="lora_a and lora_b",
            )
        factors = _delta(target, pair["lora_a"], pair["lora_b"], alpha)
        modules[target] = ModuleChange(factors)
    return modules, carried


def _delta(target: str, stored_a: GgufTensor, stored_b: GgufTensor, alpha: float | None) -> LowRank:
    a, b = _reference(stored_a), _reference(stored_b)
    layer = Layer("linear")
    if target == EMBEDDING:
        layer = Layer("embedding")
        a = a.transposed((1, 0)) if len(a.shape) == 2 else a
    elif len(a.shape) == 3:
        layer = Layer("experts")
    stated = alpha or None  # llama.cpp takes 0 for none
    scale = 1.0 if stated is None else stated / b.shape[-1]
    return LowRank(a, b, scale, layer, alpha=stated)


def _reference(tensor: GgufTensor) -> TensorRef:
    kind = tensor.kind
    if kind.is_float:
        dtype = DTYPES[kind.name]
        if kind.name not in ("F32", "F16", "BF16"):
            raise AdapterError(
                "llama.cpp crashes on adapter factors of this type",
                tensor=tensor.name,
                got=kind.name,
                expected="floats of 32 or 16 bits, or quantised ones",
            )
        return in_file(tensor.name, dtype, tensor.shape, tensor.file, tensor.offset)

    def read() -> Buffer:
        import numpy as np

        values: Any = decode(tensor.raw(), kind, tensor.shape)
        return np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8).data

    return TensorRef(tensor.name, DTYPES["F32"], tensor.shape, read)
