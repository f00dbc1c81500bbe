"""What formats look at to recognise a file, before anything of it is parsed."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from loratools_formats.core.file_names import ADAPTER_CONFIG, PICKLE_ENDINGS, WEIGHTS_OF_ADAPTERS

# Quotes within metadata are escaped; the entry after them must not be looked for at each of them.
_ENTRY = re.compile(
    rb'(?<!\\)"((?!")[^"\\]*+(?:\\.[^"\\]*+)*+)":\s*\{\s*"(?:dtype|shape|data_offsets)"'
)
_SNIFFED_BYTES = 1 << 16
# A name in a safetensors header, or a short string in a pickle.
_PEFT_NAME = re.compile(rb'(?:(?<!\\)"|X.\x00\x00\x00)base_model\.model\.', re.DOTALL)


def tensor_names(header: bytes) -> list[bytes]:
    """Return the names of tensors in a piece of a safetensors header.

    >>> tensor_names(b'{"a.weight":{"dtype":"F32","shape":[1],"data_off')
    [b'a.weight']
    """
    return list(_in_piece(header)) if len(header) <= _SNIFFED_BYTES else list(_in(header))


def _in(header: bytes) -> tuple[bytes, ...]:
    return tuple(found[1] for found in _ENTRY.finditer(header))


_in_piece = functools.lru_cache(maxsize=4)(_in)  # twenty formats look at the same pieces


def is_part_of_folder(path: Path) -> bool:
    """Return whether a weight file belongs to a PEFT or MLX folder: a configuration is beside."""
    if path.name in WEIGHTS_OF_ADAPTERS:
        return (path.parent / ADAPTER_CONFIG).is_file()
    return is_beside_peft_config(path)


def is_beside_peft_config(path: Path) -> bool:
    """Return whether a weight file has PEFT's names, and PEFT's configuration beside it.

    It may be called anything: PEFT calls it `adapter_model`, and people rename it.
    """
    if path.suffix not in (".safetensors", *PICKLE_ENDINGS) or not path.is_file():
        return False
    config = path.parent / ADAPTER_CONFIG
    try:
        return (
            config.is_file()
            and b'"peft_type"' in _start_of(config)
            and _PEFT_NAME.search(_start_of(path)) is not None
        )
    except OSError:
        return False


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_SNIFFED_BYTES)
