"""What the pickles of torch call, as data: a storage, a view of one, a map of names.

A storage is a stretch of the file, and a tensor a view of one. Anything else that a pickle names is
refused by that name; nothing of torch runs.

Source: the functions of `torch/_utils.py` whose names begin with `_rebuild_`, of torch 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loratools_formats.containers.pickle_machine import Global, malformed
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import AdapterError

_MOST_AXES = 8
SAVE_AGAIN = "Load them with torch where you trust them, and save the tensors as safetensors"
_STORAGES = {
    "Float": "F32", "Double": "F64", "Half": "F16", "BFloat16": "BF16", "Byte": "U8", "Char": "I8",
    "Short": "I16", "Int": "I32", "Long": "I64", "Bool": "BOOL", "ComplexFloat": "C64",
}  # fmt: skip
_OF_TORCH = {dtype.torch: code for code, dtype in DTYPES.items() if dtype.torch is not None}


@dataclass(frozen=True)
class Storage:
    """A stretch of numbers; `code` is None if only the tensors say of which type."""

    key: str
    code: str | None
    nbytes: int


@dataclass(frozen=True)
class View:
    """A tensor: elements of a storage from an offset on, some steps apart along each axis."""

    storage: Storage
    code: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Size of an element as torch counts them: pairs of four bits are one."""
        return max(8, DTYPES[self.code].bits)

    @property
    def nbytes(self) -> int:
        """Size of all elements."""
        return math.prod(self.shape) * self.bits // 8

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one behind the other, in order."""
        expected = 1
        for size, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def extent(self) -> int:
        """Bytes from the first element to behind the last."""
        steps = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return (steps + 1) * self.bits // 8 if math.prod(self.shape) else 0


def kind_of(value: object) -> str:
    """Return what a value is, for messages: the name of a global, or of its type."""
    if isinstance(value, View):
        return "Tensor"
    return value.name if isinstance(value, Global) else type(value).__name__


def persistent(identifier: object) -> Storage:
    """Return a storage from ("storage", type, key, device, count) and, before 1.6, a view."""
    if not isinstance(identifier, tuple) or len(identifier) not in (5, 6):
        raise malformed("a persistent identifier that is no storage")
    if identifier[0] != "storage" or identifier[5:] not in ((), (None,)):
        raise malformed("a persistent identifier that is no storage")
    _, kind, key, _, count = identifier[:5]
    if not isinstance(kind, Global) or not isinstance(key, str) or not is_count(count):
        raise malformed("a storage without type, key or size")
    name = kind.name.removeprefix("torch.cuda.").removeprefix("torch.storage.")
    name = name.removeprefix("torch.").removesuffix("Storage")
    if name == "Untyped":
        return Storage(key, None, count)
    if name not in _STORAGES:
        raise AdapterError("unsupported type of numbers", got=kind.name, hint=SAVE_AGAIN)
    return Storage(key, _STORAGES[name], count * DTYPES[_STORAGES[name]].bits // 8)


def is_count(value: object) -> bool:
    """Return whether a value may be a number of elements or bytes."""
    return type(value) is int and 0 <= value < 1 << 62


def called(name: str, arguments: tuple[Any, ...]) -> object:
    """Return what a call of a global makes, as data.

    Raises:
        AdapterError: it is not one of those that a state dict consists of.
    """
    maker = _MAKERS.get(name)
    if maker is None:
        raise AdapterError(
            "pickled weights are not a plain map of names to tensors",
            got=f"a call of {name}",
            hint=SAVE_AGAIN,
        )
    try:
        return maker(*arguments)
    except TypeError as error:
        raise malformed(f"{name} with {len(arguments)} arguments") from error


def _map(pairs: list[Any] | None = None) -> dict[object, object]:
    made: dict[object, object] = {}
    for pair in [] if pairs is None else pairs:
        if type(pair) not in (list, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise malformed("a map that is no list of names and values")
        if pair[0] in made:
            raise malformed(f"two entries of one name: {pair[0]}")
        made[pair[0]] = pair[1]
    return made


def _size(values: object = ()) -> tuple[Any, ...]:
    if not isinstance(values, tuple):
        raise malformed("a size that is no tuple")
    return values


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _gradient: object = False,
    _hooks: object = None,
    metadata: object = None,
    *,
    code: str | None = None,
) -> View:
    if not isinstance(storage, Storage):
        raise malformed("a tensor without a storage")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) > _MOST_AXES:
        raise malformed("a tensor without a shape")
    if len(shape) != len(strides) or not all(map(is_count, (offset, *shape, *strides))):
        raise malformed("a tensor with an impossible shape or stride")
    if isinstance(metadata, dict) and any(metadata.values()):
        raise AdapterError("tensor is conjugate or negated", hint=SAVE_AGAIN)
    code = code or storage.code
    if code is None:
        raise malformed("a tensor without a type")
    assert isinstance(offset, int)
    return View(storage, code, offset, shape, strides)


def _tensor_of_type(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    gradient: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> View:
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
    if name not in _OF_TORCH:
        raise AdapterError("unsupported type of numbers", got=kind_of(dtype), hint=SAVE_AGAIN)
    return _tensor(storage, offset, shape, strides, gradient, hooks, metadata, code=_OF_TORCH[name])


def _parameter(data: object, *_: object) -> object:
    return data


def _sparse(*_: object) -> object:
    raise AdapterError("sparse tensors are not read", hint=SAVE_AGAIN)


def _encoded(text: object, _encoding: object = "") -> object:
    """Bytes, as protocol 2 writes them; nothing here looks at any."""
    return text


def _with_attributes(function: object, _kind: object, arguments: object, _state: object) -> object:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise malformed("a tensor that nothing makes")
    if function.name not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        return called(f"{function.name} by torch._tensor._rebuild_from_type_v2", arguments)
    return called(function.name, arguments)


_MAKERS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _map,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.serialization._get_layout": _sparse,
    "_codecs.encode": _encoded,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}
