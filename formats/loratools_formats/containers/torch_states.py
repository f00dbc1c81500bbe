"""What a file of `torch.save` says of its tensors: where each lies, and how; torch is not needed.

Both containers are read, the archive of torch 1.6 and later and the plain pickles before it. Only
maps of names to dense tensors are understood (`torch_globals.py`); a tensor must lie within its
storage, and the storage within the file.

Source: `torch/serialization.py` (`_save`, `_legacy_save`) of torch 2.13.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from loratools_formats.containers.pickle_machine import Machine, malformed
from loratools_formats.containers.torch_globals import (
    SAVE_AGAIN,
    Storage,
    View,
    called,
    kind_of,
    persistent,
)
from loratools_formats.containers.zip_members import Bytes, Member, data_offset, zip_members
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import AdapterError

ARCHIVE_START, PICKLE_START = b"PK\x03\x04", b"\x80"
NO_TORCH_ARCHIVE = "is not an archive of torch"
_LATEST_VERSION = 10  # `kMaxSupportedFileFormatVersion` of torch 2.13
_LARGEST_PICKLE = 64 << 20
_MOST_TENSORS = 200_000
_MOST_SHARING = 2  # tied embeddings are stored once under two names
_MOST_SAME = 4096
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_WRAPPED = ("model_state_dict", "state_dict", "model", "module")
"""The only entry of a file around its tensors: loralib's examples, accelerate, DeepSpeed."""


@dataclass(frozen=True)
class Found:
    """A tensor of a file.

    Attributes:
        name: its name.
        code: its type, as safetensors calls it.
        shape: dimensions.
        begin: its first byte in the file.
        steps: elements between neighbours along each axis; None if it is contiguous.
        same_as: the name of an earlier tensor that is the same bytes.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    steps: tuple[int, ...] | None
    same_as: str | None


def tensors_in(file: Bytes) -> list[Found]:
    """Return the tensors of a file that `torch.save` made.

    Raises:
        AdapterError: no such file, not a plain map of names to dense tensors, or one claims more
            than the file holds.
    """
    archive = file.read_at(0, min(4, file.nbytes)) == ARCHIVE_START
    state, begins = _from_archive(file) if archive else _from_pickles(file)
    views = _views(state)
    starts = {key: begins(storage) for key, storage in _storages(views, file.nbytes).items()}
    found: list[Found] = []
    first: dict[object, str] = {}
    total = 0
    for name, view in views.items():
        begin = starts[view.storage.key] + view.offset * view.bits // 8
        _check_within(name, view, file.nbytes)
        place = (begin, view.code, view.shape, view.strides)
        twin = first.setdefault(place, name) if view.nbytes else name
        total += view.nbytes if twin == name else 0
        steps = None if view.is_contiguous else view.strides
        same_as = None if twin == name else twin
        found.append(Found(name, view.code, _shape(name, view), begin, steps, same_as))
    if (count := sum(one.same_as is not None for one in found)) > _MOST_SAME:
        raise AdapterError(f"{count} tensors have several names", hint=SAVE_AGAIN)
    if total > _MOST_SHARING * file.nbytes:
        raise AdapterError(
            f"tensors share storage and claim {total} bytes, many times the file", hint=SAVE_AGAIN
        )
    return found


def _shape(name: str, view: View) -> tuple[int, ...]:
    """Return the shape as safetensors counts elements: four-bit pairs are two."""
    if DTYPES[view.code].bits >= 8:
        return view.shape
    if not view.shape or not view.is_contiguous:
        raise AdapterError("four-bit tensor is not contiguous", tensor=name, hint=SAVE_AGAIN)
    return (*view.shape[:-1], view.shape[-1] * 2)


def _views(state: object) -> dict[str, View]:
    if isinstance(state, dict) and len(state) == 1 and next(iter(state)) in _WRAPPED:
        inner = next(iter(state.values()))
        state = inner if isinstance(inner, dict) else state
    if not isinstance(state, dict):
        raise AdapterError(
            f"content is of type {kind_of(state)}, not a map of names to tensors", hint=SAVE_AGAIN
        )
    if len(state) > _MOST_TENSORS:
        raise AdapterError("too many tensors", got=len(state), expected=f"at most {_MOST_TENSORS}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, View):
            raise AdapterError(
                f"entry {name!r} is of type {kind_of(value)}, not a tensor with a name",
                hint=SAVE_AGAIN,
            )
    return state


def _storages(views: dict[str, View], file_nbytes: int) -> dict[str, Storage]:
    storages: dict[str, Storage] = {}
    for name, view in views.items():
        storage = storages.setdefault(view.storage.key, view.storage)
        if storage != view.storage:
            raise AdapterError("storage is described in two ways", tensor=name, got=storage.key)
        if storage.nbytes > file_nbytes:
            raise AdapterError(
                "storage is larger than the file",
                tensor=name,
                got=f"{storage.nbytes} bytes",
                expected=f"at most {file_nbytes}",
            )
    return storages


def _check_within(name: str, view: View, file_nbytes: int) -> None:
    within = view.offset * view.bits // 8 + view.extent
    if view.nbytes > min(view.storage.nbytes, file_nbytes) or within > view.storage.nbytes:
        raise AdapterError(
            f"tensor claims {max(view.nbytes, within)} bytes, more than its storage has",
            tensor=name,
            expected=f"at most {view.storage.nbytes}",
        )


def _from_archive(file: Bytes) -> tuple[object, Callable[[Storage], int]]:
    members = zip_members(file)
    tops = [name[: -len(b"data.pkl")] for name in members if name.endswith(b"/data.pkl")]
    if len(tops) != 1:
        raise AdapterError(
            NO_TORCH_ARCHIVE, got=f"{len(tops)} members called data.pkl", expected="one"
        )
    top = tops[0]
    if top + b"constants.pkl" in members:
        raise AdapterError("is a TorchScript program, not a state dict", hint=SAVE_AGAIN)
    order = members.get(top + b"byteorder")
    if order is not None and _content(file, order) != b"little":
        raise AdapterError("pickled weights are big-endian", hint=SAVE_AGAIN)
    version = members.get(top + b"version")
    number = b"" if version is None else _content(file, version).strip()
    if version is not None and not (number.isdigit() and int(number[:9]) <= _LATEST_VERSION):
        raise AdapterError(
            "is an archive of a version of torch's format that is not known",
            got=number[:9].decode("ascii", "backslashreplace"),
            expected=f"at most {_LATEST_VERSION}",
            hint=SAVE_AGAIN,
        )

    def begin(storage: Storage) -> int:
        member = members.get(top + b"data/" + storage.key.encode())
        if member is None or member.nbytes != storage.nbytes:
            raise AdapterError(
                f"storage {storage.key} has another size in the archive",
                got="no bytes" if member is None else f"{member.nbytes} bytes",
                expected=f"{storage.nbytes}",
            )
        return data_offset(file, member)

    return _run(_content(file, members[top + b"data.pkl"]))[0], begin


def _content(file: Bytes, member: Member) -> bytes:
    if member.nbytes > _LARGEST_PICKLE:
        raise AdapterError(
            "pickle is too long",
            got=f"{member.nbytes} bytes",
            expected=f"at most {_LARGEST_PICKLE}",
        )
    return file.read_at(data_offset(file, member), member.nbytes)


def _from_pickles(file: Bytes) -> tuple[object, Callable[[Storage], int]]:
    """Read the five pickles of torch before 1.6; the storages lie behind them."""
    data = file.read_at(0, min(file.nbytes, _LARGEST_PICKLE))
    values, at = [], 0
    for place in range(5):
        value, at = _run(data, at)
        values.append(value)
        if place < 2 and value != (_LEGACY_MAGIC, _LEGACY_PROTOCOL)[place]:
            raise AdapterError(
                "is a pickle that torch.save did not make",
                got=f"a {kind_of(values[0])}",
                hint=SAVE_AGAIN,
            )
    _, _, system, state, keys = values
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise AdapterError("pickled weights are big-endian", hint=SAVE_AGAIN)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise malformed("a list of storages that is no list")
    behind = at

    def begin(storage: Storage) -> int:
        if not starts:
            sizes = {view.storage.key: view.storage for view in _views(state).values()}
            starts.update(_legacy_starts(file, behind, keys, sizes))
        if storage.key not in starts:
            raise AdapterError(f"storage {storage.key} is not in the file")
        return starts[storage.key]

    starts: dict[str, int] = {}
    return state, begin


def _legacy_starts(
    file: Bytes, at: int, keys: list[str], storages: dict[str, Storage]
) -> dict[str, int]:
    """Return where each storage begins: they follow one another, each behind its count."""
    starts: dict[str, int] = {}
    for key in keys:
        if at + 8 > file.nbytes:
            raise AdapterError("pickled weights end early", got=f"no storage {key}")
        (count,) = struct.unpack("<q", file.read_at(at, 8))
        storage = storages.get(key)
        if storage is None:
            raise malformed(f"a storage {key} that no tensor has")
        width = DTYPES[storage.code or "U8"].bits // 8
        if count * width != storage.nbytes:
            raise AdapterError(
                f"storage {key} has another size in the file",
                got=f"{count * width} bytes",
                expected=f"{storage.nbytes}",
            )
        starts[key] = at + 8
        at += 8 + storage.nbytes
        if at > file.nbytes:
            raise AdapterError("pickled weights end early", got=f"a part of storage {key}")
    return starts


def _run(data: bytes, at: int = 0) -> tuple[object, int]:
    machine = Machine(data, persistent, called, at)
    return machine.run(), machine.at
