"""What formats look at to recognise a file, before anything of it is parsed."""

from __future__ import annotations

import re
from pathlib import Path

# Quotes within metadata are escaped; the entry after them must not be looked for at each of them.
_ENTRY = re.compile(rb'(?<!\\)"((?:[^"\\]|\\.)++)":\s*\{\s*"(?:dtype|shape|data_offsets)"')
_CONFIG = "adapter_config.json"
_OF_FOLDERS = ("adapter_model.bin", "adapter_model.safetensors", "adapters.safetensors")


def tensor_names(header: bytes) -> list[bytes]:
    """Return the names of tensors in a piece of a safetensors header.

    >>> tensor_names(b'{"a.weight":{"dtype":"F32","shape":[1],"data_off')
    [b'a.weight']
    """
    return [found[1] for found in _ENTRY.finditer(header)]


def is_part_of_folder(path: Path) -> bool:
    """Return whether a weight file belongs to a PEFT or MLX folder: a configuration is beside."""
    return path.name in _OF_FOLDERS and (path.parent / _CONFIG).is_file()
