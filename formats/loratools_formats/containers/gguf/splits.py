"""GGUF models, in one file or split into several as `llama-gguf-split` does.

The first part, `NAME-00001-of-0000N.gguf`, holds the model's keys; each holds some tensors and says
which part it is. All of that is checked, as llama.cpp does, and parts are not looked for under
other names.
Source: `llama_model_loader` of llama.cpp b10605, and gguf-split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.containers.gguf.container import GgufFile, GgufTensor, read_gguf
from loratools_formats.disk.errors import AdapterError, MissingFileError

NUMBER, COUNT, TENSORS = SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")

_MAX_PARTS = 512
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufModel:
    """A model's open files.

    Attributes:
        parts: the files, the first of which holds the model's keys.
        tensors: those of all parts by name, in order.
    """

    parts: tuple[GgufFile, ...]
    tensors: Mapping[str, GgufTensor]

    @property
    def first(self) -> GgufFile:
        """The part that holds the model's keys."""
        return self.parts[0]

    @property
    def path(self) -> Path:
        """Path of the first part."""
        return self.first.file.path

    def get(self, key: str, *types: str) -> Any:
        """Return the value of a key of one of some types, None if it is absent."""
        return self.first.get(key, *types)

    def check_unchanged(self) -> None:
        """Raise `AdapterError` if a part was written to since it was opened."""
        for part in self.parts:
            part.file.check_unchanged()


def read_model(path: Path) -> GgufModel:
    """Read the headers of a model, of all its parts if it is split.

    Raises:
        MissingFileError: the file or another part is missing.
        AdapterError: malformed, no model, not the first part, or parts that do not belong together.
    """
    first = read_gguf(path)
    kind = first.get("general.type", "string")
    if kind not in (None, "model"):
        raise AdapterError("is not a model", path=path, got=f"general.type {kind}")
    count = _split_count(first)
    if count == 1:
        return GgufModel((first,), first.tensors)
    number, prefix = first.get(NUMBER, "u16"), _prefix(path, count)
    if number != 0:
        raise AdapterError(
            "is not the first part of a split model",
            path=path,
            got=f"{NUMBER} {number}",
            hint=f"Name {_part_name(prefix, 0, count)}",
        )
    others = [
        _read_part(path.with_name(_part_name(prefix, index, count)), index, count)
        for index in range(1, count)
    ]
    return GgufModel((first, *others), _all_tensors([first, *others]))


def _split_count(file: GgufFile) -> int:
    count = file.get(COUNT, "u16")
    if count is None:
        return 1
    if not 1 <= count <= _MAX_PARTS:
        raise AdapterError(
            f"key {COUNT} is wrong", path=file.file.path, got=count, expected=f"1 to {_MAX_PARTS}"
        )
    return int(count)


def _part_name(prefix: str, index: int, count: int) -> str:
    return f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf"


def _prefix(path: Path, count: int) -> str:
    found = _NAME.fullmatch(path.name)
    if found is None or int(found[3]) != count:
        raise AdapterError(
            "part of a split model has another name, so that the others cannot be found",
            path=path,
            expected=_part_name("NAME", 0, count),
        )
    return found[1]


def _read_part(path: Path, index: int, count: int) -> GgufFile:
    try:
        part = read_gguf(path)
    except MissingFileError as error:
        raise MissingFileError(f"part {index + 1} of {count} is missing", path=path) from error
    for key, wanted in ((NUMBER, index), (COUNT, count)):
        if (found := part.get(key, "u16")) != wanted:
            raise AdapterError(
                "part does not belong to the split model",
                path=path,
                got=f"{key} {found}",
                expected=wanted,
            )
    others = sorted(set(part.keys) - set(SPLIT_KEYS))
    if others:
        raise AdapterError(
            "part of a split model has keys of its own",
            path=path,
            got=", ".join(others[:3]),
            expected="none but those about splitting",
        )
    return part


def _all_tensors(parts: list[GgufFile]) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise AdapterError(
                    "tensor is in two parts of the model", path=part.file.path, tensor=name
                )
            tensors[name] = tensor
    wanted = parts[0].get(TENSORS, "i32", "u32", "u16")
    if wanted != len(tensors):
        raise AdapterError(
            "the parts of the model do not hold the tensors they should",
            path=parts[0].file.path,
            got=len(tensors),
            expected=f"{TENSORS} {wanted}",
        )
    return tensors
