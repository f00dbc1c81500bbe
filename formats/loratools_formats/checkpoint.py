"""Base checkpoints: one safetensors file, or shards listed by an index; headers only.

Source: the `model.safetensors.index.json` convention of transformers. The index comes from a
stranger too: it may name only files in its own folder, and must agree with what they hold.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats import strict_json
from loratools_formats.errors import AdapterError, MissingFileError
from loratools_formats.files import inside, read_small_file
from loratools_formats.safetensors_io import SafetensorsFile, read_safetensors
from loratools_formats.tensors import TensorRef

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A base model's tensors by name, its configuration, and the files that hold them."""

    path: Path
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    files: tuple[SafetensorsFile, ...]

    def weight(self, module: str) -> TensorRef:
        """Return the weight of a module, whatever prefix either side puts before its path.

        Raises:
            AdapterError: no tensor fits, or several do.
        """
        wanted = f"{module}.weight"
        if wanted in self.tensors:
            return self.tensors[wanted]
        found = [
            key
            for key in self.tensors
            if key.endswith(f".{wanted}")
            or (key.endswith(".weight") and wanted.endswith(f".{key}"))
        ]
        if len(found) == 1:
            return self.tensors[found[0]]
        close = found or difflib.get_close_matches(wanted, self.tensors, n=3, cutoff=0.4)
        raise AdapterError(
            "several base tensors fit the module" if found else "no base tensor fits the module",
            path=self.path,
            tensor=module,
            expected=wanted,
            hint=f"Nearest names: {', '.join(close)}" if close else None,
        )


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint: a file, or a folder with one file or an index.

    Raises:
        MissingFileError: nothing there, or a shard is missing.
        AdapterError: malformed, or index and shards disagree.
    """
    target = Path(path)
    if target.is_file():
        file = read_safetensors(target)
        return Checkpoint(target, file.tensors, {}, (file,))
    config = _json(target / "config.json") if (target / "config.json").exists() else {}
    if (target / INDEX_FILE).exists():
        files, tensors = _shards(target)
        return Checkpoint(target, tensors, config, files)
    if not (target / SINGLE_FILE).exists():
        raise MissingFileError(
            "no checkpoint there", path=path, expected=f"{SINGLE_FILE} or {INDEX_FILE}"
        )
    file = read_safetensors(inside(target, SINGLE_FILE))
    return Checkpoint(target, file.tensors, config, (file,))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = strict_json.loads(read_small_file(path, _MAX_JSON_BYTES))
    except strict_json.StrictJsonError as error:
        raise AdapterError(f"not sound JSON: {error}", path=path) from error
    if not isinstance(value, dict):
        raise AdapterError("not a JSON object", path=path, got=type(value).__name__)
    return value


def _shards(folder: Path) -> tuple[tuple[SafetensorsFile, ...], dict[str, TensorRef]]:
    path = folder / INDEX_FILE
    listed = _json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
        raise AdapterError("index has no weight_map of names to files", path=path)
    tensors: dict[str, TensorRef] = {}
    files = []
    for name in sorted(set(listed.values())):
        if not _SHARD_NAME.fullmatch(name) or name.startswith("."):
            raise AdapterError(
                "index names a file outside the folder",
                path=path,
                got=name,
                expected="a plain name ending in .safetensors",
            )
        file = read_safetensors(inside(folder, name))
        files.append(file)
        for key, tensor in file.tensors.items():
            if listed.get(key) != name:
                raise AdapterError(
                    "index and shards disagree",
                    path=path,
                    tensor=key,
                    got=name,
                    expected=listed.get(key, "an entry in the index"),
                )
            tensors[key] = tensor
    missing = sorted(set(listed) - set(tensors))
    if missing:
        raise AdapterError("a tensor of the index is in no shard", path=path, tensor=missing[0])
    return tuple(files), tensors
