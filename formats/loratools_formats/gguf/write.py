"""Writing GGUF adapters: one alpha for all, everything else folded into B.

llama.cpp multiplies B·A by alpha / rank, with one alpha and each tensor's own rank. Where that
gives every module its scale, factors keep their bytes. Where it does not (rank-stabilised
LoRA, alpha patterns, squeezed modules), the file states no alpha, which llama.cpp takes for a
scale of 1, and each scale is multiplied into its B.

The writer is our own: keys and tensors sorted, one tensor in memory at a time. A test compares its
bytes with those of `gguf.GGUFWriter`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.adapter import Adapter, Delta, Dora, low_rank_part
from loratools_formats.errors import AdapterError, UnsupportedError
from loratools_formats.gguf.container import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_NAME_BYTES,
    KeyValue,
    read_gguf,
)
from loratools_formats.gguf.cursor import ARRAY, LAYOUTS, STRING, VALUE_CODES
from loratools_formats.gguf.ggml_types import BY_NAME, GgmlType, decode, encode
from loratools_formats.gguf.read import ALPHA, QUANTISATION, STRUCTURAL_KEYS
from loratools_formats.registry import Loss
from loratools_formats.tensors import TensorRef

_VERSION = 3
_MAX_ALPHA = 2.0**127
_QUANTISATION_VERSION = 2
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}


def losses(adapter: Adapter) -> list[Loss]:
    """Return what a GGUF adapter cannot hold of an adapter of another format."""
    if adapter.format == "gguf":
        return []
    found = [
        Loss(key, "replaces a tensor of the base, which llama.cpp adapters cannot")
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
                "factor holds NaN or infinite values",
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
    keys["general.architecture"] = KeyValue(STRING, adapter.config["architecture"])
    if alpha is not None:
        keys[ALPHA] = KeyValue("f32", alpha)
    kinds = {planned.kind.name for planned in tensors if planned.name.endswith(".lora_a")}
    if len(kinds) == 1 and (code := _FILE_TYPES.get(*kinds)) is not None:
        keys["general.file_type"] = KeyValue("u32", code)
    if not all(planned.kind.is_plain for planned in tensors):
        keys[QUANTISATION] = KeyValue("u32", _QUANTISATION_VERSION)
    added = {key: KeyValue(STRING, value) for key, value in adapter.metadata.items()}
    for key, entry in {**adapter.config.get("keys", {}), **added}.items():
        if key in keys:
            raise AdapterError("key is set by the format itself", got=key)
        keys[key] = entry
    return dict(sorted(keys.items()))


def _pair(name: str, delta: Delta, is_folded: bool, storage: str | None) -> Iterator[Planned]:
    part = low_rank_part(delta)
    if isinstance(delta, Dora) or part.bias is not None:
        kind = "DoRA magnitude" if isinstance(delta, Dora) else "bias"
        raise UnsupportedError(f"a GGUF adapter cannot hold a {kind}", tensor=name)
    a = part.a.transposed((1, 0)) if part.layer.kind == "embedding" else part.a
    scale = part.scale if is_folded else 1.0
    kind_b = _kind(part.b, storage)
    if scale != 1.0 and storage is None:
        kind_b = BY_NAME["F32"]
    yield Planned(f"{name}.weight.lora_a", _kind(a, storage), a.shape, a)
    yield Planned(f"{name}.weight.lora_b", kind_b, part.b.shape, part.b, scale)


def _kind(tensor: TensorRef, storage: str | None) -> GgmlType:
    if storage is None:
        return BY_NAME[tensor.dtype.code if tensor.dtype.code in ("F16", "BF16") else "F32"]
    kind = BY_NAME[storage.upper()]
    return kind if tensor.shape[-1] % kind.block == 0 else BY_NAME["F16"]


def _common_alpha(deltas: Iterable[Delta]) -> float | None:
    """Return the alpha that gives every module its scale exactly, None if there is none."""
    parts = [low_rank_part(delta) for delta in deltas]
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
        UnsupportedError: the adapter cannot be expressed.
        AdapterError: NaN or infinite values.
    """
    keys, tensors = plan(adapter)
    with open(path, "xb") as out:
        out.write(header(keys, tensors))
        for planned in tensors:
            data = planned.data()
            out.write(data)
            out.write(b"\0" * (-len(data) % DEFAULT_ALIGNMENT))
    read_gguf(path)


def weights_nbytes(adapter: Adapter) -> int:
    """Return the size of the file that `write` would make.

    Raises:
        UnsupportedError: the adapter cannot be expressed.
    """
    keys, tensors = plan(adapter)
    return len(header(keys, tensors)) + sum(_padded(t.kind.nbytes(t.shape)) for t in tensors)


def _padded(nbytes: int) -> int:
    return -(-nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def header(keys: Mapping[str, KeyValue], tensors: Iterable[Planned]) -> bytes:
    """Return everything before the tensors' data."""
    entries = [_string(key) + value_bytes(entry) for key, entry in keys.items()]
    infos, position = [], 0
    for planned in tensors:
        sizes = tuple(reversed(planned.shape))
        infos.append(
            _string(planned.name)
            + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
            + struct.pack("<IQ", planned.kind.code, position)
        )
        position += _padded(planned.kind.nbytes(planned.shape))
    start = MAGIC + struct.pack("<IQQ", _VERSION, len(infos), len(entries))
    text = b"".join([start, *entries, *infos])
    return text.ljust(_padded(len(text)), b"\0")


def _string(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise AdapterError("names or metadata hold lone surrogates", got=text) from error
    return struct.pack("<Q", len(data)) + data


def value_bytes(entry: KeyValue) -> bytes:
    """Return the type and value of a key as stored."""
    code = struct.pack("<I", VALUE_CODES[entry.type])
    if entry.type == STRING:
        return code + _string(entry.value)
    if entry.type != ARRAY:
        return code + struct.pack(LAYOUTS[entry.type], entry.value)
    start = code + struct.pack("<IQ", VALUE_CODES[entry.item], len(entry.value))
    if entry.item == STRING:
        return start + b"".join(map(_string, entry.value))
    return start + b"".join(struct.pack(LAYOUTS[entry.item], item) for item in entry.value)


def merged_config(adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    """Return the configuration of an adapter made from several.

    Raises:
        AdapterError: they are for different architectures.
    """
    names = [str(adapter.config["architecture"]) for adapter in adapters]
    if len(set(names)) > 1:
        raise AdapterError("the adapters are for different architectures", got=", ".join(names))
    return adapters[0].config
