"""Base checkpoints: one safetensors file, or shards listed by an index; headers only.

Source: the `model.safetensors.index.json` convention of transformers and diffusers. The index comes
from a stranger too: it may name only files in its own folder, and must agree with what they hold.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.checkpoints.no_checkpoint import (
    STEMS,
    no_checkpoint,
    no_weights,
)
from loratools_formats.containers.safetensors_read import (
    SafetensorsFile,
    read_safetensors,
    safetensors_names,
)
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.distant import is_distant, is_there
from loratools_formats.disk.errors import AdapterError, MissingFileError
from loratools_formats.disk.files import RegularFile, inside
from loratools_formats.disk.one_folder import of_one_folder
from loratools_formats.disk.strict_json import read_object

CONFIG_FILE = "config.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_MAX_CONFIG_BYTES = 16 << 20  # lists of labels can be long
_MAX_JSON_BYTES = 64 << 20
_TYPES: dict[str, tuple[type, str]] = {
    "model_type": (str, "a string"),
    "quant_method": (str, "a string"),
    "quantization_config": (dict, "an object"),
}
"""Values of a configuration that distinguish models and formats."""


@dataclass(frozen=True)
class Checkpoint:
    """A base model's tensors by name, its configuration, and the files that hold them.

    Attributes:
        path: the folder, or the file if it is a single one without a configuration.
        tensors: by name.
        config: `config.json`, empty if there is none.
        files: the shards.
        stem: what the names of the weight files begin with.
        index: the parsed index; None if there is a single file.
        read: the files that configuration and index were read from.
        components: of a whole diffusion pipeline, the folders whose tensors these are; the name of
            each begins with its folder. Empty for a checkpoint of one model.
    """

    path: Path
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    files: tuple[SafetensorsFile, ...]
    stem: str = "model"
    index: Mapping[str, Any] | None = None
    read: tuple[RegularFile, ...] = ()
    components: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder with a configuration rather than a bare file."""
        return self.files[0].file.path != self.path

    @property
    def index_file(self) -> str:
        """Name of the index file of its shards."""
        return f"{self.stem}.safetensors.index.json"

    def check_unchanged(self) -> None:
        """Raise `AdapterError` if a file was written to since it was opened.

        What was read of the configuration and the index must be what lies there, since outputs
        carry copies of the files.
        """
        for file in self.files:
            file.file.check_unchanged()
        for other in self.read:
            other.check_in_place()

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
    return of_one_folder(target, lambda: _read(target))


def _read(target: Path) -> Checkpoint:
    if target.is_file() or is_distant(target):
        try:
            file = read_safetensors(target)
        except AdapterError as error:
            raise (no_weights(target) or error) from error
        return Checkpoint(target, file.tensors, {}, (file,))
    place = target / CONFIG_FILE
    read = (RegularFile(place),) if place.exists() else ()
    config = _config(read[0]) if read else {}
    for stem in STEMS:
        index_file = target / f"{stem}.safetensors.index.json"
        if index_file.exists():
            listing = RegularFile(index_file)
            index = _json(listing)
            files, tensors = _shards(index_file, index)
            return Checkpoint(target, tensors, config, files, stem, index, (*read, listing))
        if is_there(target / f"{stem}.safetensors"):
            file = read_safetensors(inside(target, f"{stem}.safetensors"))
            return Checkpoint(target, file.tensors, config, (file,), stem, read=read)
    raise no_checkpoint(target)


def checkpoint_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of a checkpoint's tensors, from its header or its index alone.

    Args:
        path: a file (only its header is needed), an index, or a folder that holds one of them.

    Raises:
        MissingFileError: nothing there.
        AdapterError: malformed.
    """
    target = Path(path)
    if target.is_dir():
        for stem in STEMS:
            names = (f"{stem}.safetensors.index.json", f"{stem}.safetensors")
            found = next((target / name for name in names if is_there(target / name)), None)
            if found is not None:
                return checkpoint_names(found)
        raise no_checkpoint(target)
    if target.suffix == ".json":
        return list(_listed(target, _json(target)))
    return safetensors_names(target)


def config_of(base: Path) -> dict[str, Any]:
    """Return the configuration of a model, whose weights need not be there; empty if it has none.

    Raises:
        AdapterError: it is malformed.
    """
    place = base / CONFIG_FILE
    if not place.exists():
        return {}
    file = RegularFile(place)
    try:
        return _config(file)
    finally:
        file.close()


def _config(file: RegularFile) -> dict[str, Any]:
    config = read_object(file, _MAX_CONFIG_BYTES, name="config", max_depth=None)
    sections: list[Mapping[str, Any]] = [config]
    while sections:  # a section for the text, the images, the quantisation, in any depth
        section = sections.pop()
        for key, (kind, expected) in _TYPES.items():
            if not isinstance(section.get(key), kind | None):
                raise AdapterError(
                    f"config value {key} is wrong",
                    path=file.path,
                    got=type(section[key]).__name__,
                    expected=expected,
                )
        sections += [value for value in section.values() if isinstance(value, dict)]
    return config


def _json(file: Path | RegularFile) -> dict[str, Any]:
    return read_object(file, _MAX_JSON_BYTES, name="file", max_depth=None)


def _listed(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
        raise AdapterError("index has no weight_map of names to files", path=path)
    return listed


def _shards(
    path: Path, index: Mapping[str, Any]
) -> tuple[tuple[SafetensorsFile, ...], dict[str, TensorRef]]:
    folder = path.parent
    listed = _listed(path, index)
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
        if not is_there(folder / name):
            raise MissingFileError(
                "is listed in the index and is not there",
                path=folder / name,
                hint="Fetch it, or the whole model again",
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
    if not files:
        raise AdapterError("index lists no tensors", path=path)
    missing = sorted(set(listed) - set(tensors))
    if missing:
        raise AdapterError("a tensor of the index is in no shard", path=path, tensor=missing[0])
    return tuple(files), tensors
