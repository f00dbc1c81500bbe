"""Base checkpoints: one safetensors file, or shards listed by an index; headers only.

Source: the `model.safetensors.index.json` convention of transformers and diffusers. The index comes
from a stranger too: it may name only files in its own folder, and must agree with what they hold.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.containers.safetensors_read import (
    SafetensorsFile,
    read_safetensors,
    safetensors_names,
)
from loratools_formats.contract.path_kinds import architecture, cached, missing, not_weights
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.distant import is_distant, is_there
from loratools_formats.disk.errors import AdapterError, MissingFileError
from loratools_formats.disk.files import RegularFile, inside
from loratools_formats.disk.strict_json import read_object

_STEMS = ("model", "diffusion_pytorch_model")
CONFIG_FILE = "config.json"
PIPELINE_INDEX = "model_index.json"
_ADAPTER_CONFIG = "adapter_config.json"
_NAME_MODEL = "Name a model's folder, or its weights"
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz",
    ".ot",
)  # fmt: skip
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_MAX_CONFIG_BYTES = 16 << 20  # lists of labels can be long
_MAX_JSON_BYTES = 64 << 20
_TYPES: dict[str, tuple[type, str]] = {
    "model_type": (str, "a string"),
    "quant_method": (str, "a string"),
    "quantization_config": (dict, "an object"),
}
"""Values of a configuration by which models and formats are told apart."""


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


def is_weights(path: Path) -> bool:
    """Return whether a file is where `read_checkpoint` looks for weights in a folder."""
    endings = (".safetensors", ".safetensors.index.json")
    return path.is_file() and path.name in {f"{s}{e}" for s in _STEMS for e in endings}


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint: a file, or a folder with one file or an index.

    Raises:
        MissingFileError: nothing there, or a shard is missing.
        AdapterError: malformed, or index and shards disagree.
    """
    target = Path(path)
    if target.is_file() or is_distant(target):
        try:
            file = read_safetensors(target)
        except AdapterError as error:
            kind = not_weights(target) if target.is_file() else None
            if kind is None:
                raise
            raise MissingFileError(
                kind.what,
                path=target,
                hint=kind.hint if "adapter" not in kind.hint else _NAME_MODEL,
            ) from error
        return Checkpoint(target, file.tensors, {}, (file,))
    place = target / CONFIG_FILE
    read = (RegularFile(place),) if place.exists() else ()
    config = _config(read[0]) if read else {}
    for stem in _STEMS:
        index_file = target / f"{stem}.safetensors.index.json"
        if index_file.exists():
            listing = RegularFile(index_file)
            index = _json(listing)
            files, tensors = _shards(index_file, index)
            return Checkpoint(target, tensors, config, files, stem, index, (*read, listing))
        if is_there(target / f"{stem}.safetensors"):
            file = read_safetensors(inside(target, f"{stem}.safetensors"))
            return Checkpoint(target, file.tensors, config, (file,), stem, read=read)
    raise _nothing_there(target)


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
        for stem in _STEMS:
            names = (f"{stem}.safetensors.index.json", f"{stem}.safetensors")
            found = next((target / name for name in names if is_there(target / name)), None)
            if found is not None:
                return checkpoint_names(found)
        raise _nothing_there(target)
    if target.suffix == ".json":
        return list(_listed(target, _json(target)))
    return safetensors_names(target)


def _nothing_there(target: Path) -> MissingFileError:
    if not target.exists():
        return missing(target)
    kind = cached(target) if target.is_dir() else None
    if kind is not None:
        return MissingFileError(kind.what, path=target, hint=kind.hint)
    if (target / _ADAPTER_CONFIG).is_file():
        fused = f"loratools fuse MODEL {shlex.quote(os.fspath(target))} -o fused"
        return MissingFileError(
            "is an adapter, not a model", path=target, hint=f"To put it into its model: {fused}"
        )
    if (target / PIPELINE_INDEX).is_file():
        return MissingFileError(
            "is a whole diffusion pipeline, and one component's folder is needed",
            path=target,
            hint=f"Give one of its folders: {_components(target)}",
        )
    return MissingFileError(
        "no checkpoint there",
        path=target,
        expected=" or ".join(f"{stem}.safetensors[.index.json]" for stem in _STEMS),
        hint=_other_weights(target),
    )


def _components(pipeline: Path) -> str:
    """Return the folders of a pipeline that hold checkpoints."""
    found = [
        shlex.quote(os.fspath(folder))
        for folder in sorted(pipeline.iterdir())
        if folder.is_dir() and any(map(is_weights, folder.iterdir()))
    ]
    return ", ".join(found) or "none holds weights as safetensors"


def _other_weights(folder: Path) -> str | None:
    """Return a hint about weight files of other kinds or names."""
    if not folder.is_dir():
        return None
    found = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in found):
        return f"Its weights are pickled; make safetensors of them: {_from_pickles(folder)}"
    return f"It holds {', '.join(found[:3])}; name a .safetensors file itself" if found else None


def _from_pickles(folder: Path) -> str:
    """Return a command that saves a model's pickled weights as safetensors, with transformers."""
    name = architecture(folder).strip(" ()")
    of_class = name if name.isidentifier() else "AutoModel"
    source, target = os.fspath(folder), f"{os.fspath(folder).rstrip('/')}-safetensors"
    code = (
        f"import transformers as t; t.{of_class}.from_pretrained({source!r}, dtype='auto')"
        f".save_pretrained({target!r})"
    )
    return f"python -c {shlex.quote(code)}"


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
