"""Writing GGUF adapters: one alpha for all, everything else folded into B.

llama.cpp multiplies B·A by alpha / rank, with one alpha and each tensor's own rank. Where that
gives every module its scale, factors keep their bytes. Where it does not (rank-stabilised
LoRA, alpha patterns, squeezed modules), the file states no alpha, which llama.cpp takes for a
scale of 1, and each scale is multiplied into its B.

The file is made by `gguf.GGUFWriter`, keys and tensors sorted, one tensor in memory at a time.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.containers.gguf.container import MAX_NAME_BYTES, KeyValue, read_gguf
from loratools_formats.containers.gguf.cursor import ARRAY, STRING, VALUE_CODES
from loratools_formats.containers.gguf.ggml_types import BY_NAME, GgmlType, decode, encode, package
from loratools_formats.contract.format import Loss
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.factors import NOT_FINITE
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.gguf.read import ALPHA, ARCHITECTURE, QUANTISATION, STRUCTURAL_KEYS

_MAX_ALPHA = 2.0**127
_QUANTISATION_VERSION = 2
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}


def losses(adapter: Adapter) -> list[Loss]:
    """Return what a GGUF adapter cannot hold of an adapter of another format."""
    if adapter.format == "gguf":
        return []
    found = [
        Loss(
            key,
            "replaces a tensor of the base, which llama.cpp adapters cannot",
            "Fuse the adapter into the base: loratools fuse MODEL ADAPTER -o fused",
        )
        for key in adapter.replacements
    ]
    others = [*adapter.additions, *adapter.carried]
    found += [Loss(key, "has no place in a GGUF adapter") for key in others]
    return found


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its name, type and row-major shape, and the tensor to take it from.

    Attributes:
        name: in the file.
        kind: type to store.
        shape: row-major.
        source: values, of this shape.
        scale: multiplies them.
    """

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    source: TensorRef
    scale: float = 1.0

    def data(self) -> Any:
        """Return the stored bytes.

        Raises:
            AdapterError: NaN or infinite values, or values beyond the type.
        """
        import numpy as np

        if self.scale == 1.0 and self.kind.name == self.source.dtype.code:
            values = stored = self.source.load()
        else:
            unscaled = self.scale == 1.0
            wide = self.source.load() if unscaled else self.scale * self.source.load(np.float64)
            stored = encode(wide, self.kind)
            values = decode(stored.data, self.kind, self.shape)
        if not np.isfinite(values.astype(np.float32, copy=False)).all():
            raise AdapterError(
                NOT_FINITE,
                tensor=self.source.key,
                expected=f"numbers within the range of {self.kind.name}",
            )
        return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def plan(adapter: Adapter) -> tuple[dict[str, KeyValue], list[Planned]]:
    """Return the keys and tensors of the file to write.

    Raises:
        UnsupportedError: a module cannot be expressed.
        AdapterError: a name is too long.
    """
    alpha = _common_alpha(adapter.modules.values())
    tensors = [
        planned
        for name, delta in sorted(adapter.modules.items())
        for planned in _pair(name, delta, alpha is None, adapter.config.get("storage"))
    ]
    tensors += [
        Planned(key, _kind(tensor, "f32"), tensor.shape, tensor)
        for key, tensor in sorted(adapter.carried.items())
    ]
    for planned in tensors:
        if len(planned.name.encode()) > MAX_NAME_BYTES:
            raise UnsupportedError(
                "llama.cpp takes no tensor names this long",
                tensor=planned.name,
                expected=f"at most {MAX_NAME_BYTES} bytes",
            )
    return _keys(adapter, alpha, tensors), tensors


def _keys(adapter: Adapter, alpha: float | None, tensors: Sequence[Planned]) -> dict[str, KeyValue]:
    keys = {key: KeyValue(STRING, value) for key, value in STRUCTURAL_KEYS.items() if value}
    keys[ARCHITECTURE] = KeyValue(STRING, adapter.config["architecture"])
    if alpha is not None:
        keys[ALPHA] = KeyValue("f32", alpha)
    kinds = {planned.kind.name for planned in tensors if planned.name.endswith(".lora_a")}
    if len(kinds) == 1 and (code := _FILE_TYPES.get(*kinds)) is not None:
        keys["general.file_type"] = KeyValue("u32", code)
    if not all(planned.kind.is_float for planned in tensors):
        keys[QUANTISATION] = KeyValue("u32", _QUANTISATION_VERSION)
    added = {key: KeyValue(STRING, value) for key, value in adapter.metadata.items()}
    for key, entry in {**adapter.config.get("keys", {}), **added}.items():
        if key in keys:
            raise AdapterError("key is set by the format itself", got=key)
        if entry.value or entry.type != ARRAY:  # gguf writes no empty arrays; they say nothing
            keys[key] = entry
    return dict(sorted(keys.items()))


def _pair(
    name: str, delta: ModuleChange, is_folded: bool, storage: str | None
) -> Iterator[Planned]:
    part = delta.require_factors()
    if delta.is_dora or part.bias is not None:
        kind = "DoRA magnitude" if delta.is_dora else "bias"
        raise UnsupportedError(f"a GGUF adapter cannot hold a {kind}", tensor=name)
    a = part.a.transposed((1, 0)) if part.layer.kind == "embedding" else part.a
    scale = part.scale if is_folded else 1.0
    kind_b = _kind(part.b, storage)
    if scale != 1.0 and storage is None:
        kind_b = BY_NAME["F32"]
    yield Planned(f"{name}.weight.lora_a", _kind(a, storage), a.shape, a)
    yield Planned(f"{name}.weight.lora_b", kind_b, part.b.shape, part.b, scale)


def dtype_fallbacks(
    modules: Mapping[str, ModuleChange], storage: str | None
) -> tuple[Finding, ...]:
    """Return a finding if some factors cannot be stored in the type asked for."""
    pairs = [pair for name, delta in modules.items() for pair in _pair(name, delta, False, storage)]
    count = sum(storage is not None and pair.kind.name != storage.upper() for pair in pairs)
    if not count or storage is None:
        return ()
    name = storage.upper()
    text = (
        f"{count} of {len(pairs)} factors are F16, since their rows are no whole blocks of {name}"
    )
    return (Finding("dtype-fallback", "note", None, text),)


def _kind(tensor: TensorRef, storage: str | None) -> GgmlType:
    if storage is None:
        return BY_NAME[tensor.dtype.code if tensor.dtype.code in ("F16", "BF16") else "F32"]
    kind = BY_NAME[storage.upper()]
    return kind if tensor.shape[-1] % kind.block == 0 else BY_NAME["F16"]


def _common_alpha(deltas: Iterable[ModuleChange]) -> float | None:
    """Return the alpha that gives every module its scale exactly, None if there is none."""
    parts = [delta.require_factors() for delta in deltas]
    alphas = {part.scale * part.rank for part in parts}
    if len(alphas) != 1:
        return None
    (alpha,) = alphas
    exact = all(alpha / part.rank == part.scale for part in parts)
    if not exact or alpha == 0.0 or abs(alpha) >= _MAX_ALPHA:
        return None
    (rounded,) = struct.unpack("<f", struct.pack("<f", alpha))
    return float(rounded) if rounded == alpha else None


def write(adapter: Adapter, path: Path) -> None:
    """Write a file that does not exist yet.

    Raises:
        MissingDependencyError: the `gguf` package is not installed.
        UnsupportedError: the adapter cannot be expressed.
        AdapterError: NaN or infinite values.
    """
    keys, tensors = plan(adapter)
    writer = _writer(path, keys, tensors)
    try:
        _write_header(writer)
        for planned in tensors:
            writer.write_tensor_data(planned.data())
    finally:
        writer.close()
    read_gguf(path)


def weights_nbytes(adapter: Adapter) -> int:
    """Return the size of the file that `write` would make.

    Raises:
        MissingDependencyError: the `gguf` package is not installed.
        UnsupportedError: the adapter cannot be expressed.
    """
    keys, tensors = plan(adapter)
    writer = _writer(None, keys, tensors)
    header = io.BytesIO()
    writer.fout, writer.state = [header], package().gguf_writer.WriterState.EMPTY
    _write_header(writer)
    position = header.tell()
    for planned in tensors:
        nbytes = planned.kind.nbytes(planned.shape)
        position = sum(writer.ggml_pad(n, writer.data_alignment) for n in (position, nbytes))
    return position


def _writer(path: Path | None, keys: Mapping[str, KeyValue], tensors: Iterable[Planned]) -> Any:
    """Return a `GGUFWriter` that knows all but the values of tensors; nothing is written yet."""
    import numpy as np

    gguf = package()
    writer = gguf.GGUFWriter(path, keys[ARCHITECTURE].value)
    for key, entry in keys.items():
        if key != ARCHITECTURE:
            kinds = [gguf.GGUFValueType(VALUE_CODES[t]) for t in (entry.type, entry.item) if t]
            writer.add_key_value(key, entry.value, *kinds)
    for planned in tensors:
        code = gguf.GGMLQuantizationType(planned.kind.code)
        nbytes = planned.kind.nbytes(planned.shape)
        writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), nbytes, code)
    return writer


def _write_header(writer: Any) -> None:
    writer.write_header_to_file()
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except UnicodeEncodeError as error:
        raise AdapterError("names or metadata hold lone surrogates", got=error.object) from error


def merged_config(adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    """Return the configuration of an adapter made from several.

    Raises:
        AdapterError: they are for different architectures.
    """
    names = [str(adapter.config["architecture"]) for adapter in adapters]
    if len(set(names)) > 1:
        raise AdapterError("the adapters are for different architectures", got=", ".join(names))
    return adapters[0].config
