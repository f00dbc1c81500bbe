"""What a path is that was given as a base model and is not one, and the next step.

Every command in a hint can be pasted; what only the user knows stands in capitals.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from loratools_formats.contract.file_kinds import (
    OF_MODEL,
    file_kind,
    not_weights,
    quoted,
)
from loratools_formats.contract.path_kinds import (
    architecture,
    cached,
    is_model,
    kind_of,
    missing,
)
from loratools_formats.core.file_names import (
    ADAPTER_CONFIG,
    PICKLE_ENDINGS,
    TRAINING_STATE,
    WEIGHTS_OF_ADAPTERS,
    WRITTEN_ENDINGS,
)
from loratools_formats.disk.errors import MissingFileError
from loratools_formats.disk.first_bytes import ARCHIVE_START, Kind

STEMS = ("model", "diffusion_pytorch_model")
PIPELINE_INDEX = "model_index.json"
WEIGHT_SUFFIXES = (
    *WRITTEN_ENDINGS, *PICKLE_ENDINGS, ".h5", ".msgpack", ".onnx", ".npz", ".ot",
)  # fmt: skip
_NAME_MODEL = "Name a model's folder, or its weights"
_START_BYTES = 512


def is_weights(path: Path) -> bool:
    """Return whether a file is where `read_checkpoint` looks for weights in a folder."""
    endings = (".safetensors", ".safetensors.index.json")
    return path.is_file() and path.name in {f"{s}{e}" for s in STEMS for e in endings}


def no_checkpoint(target: Path) -> MissingFileError:
    """Return the error for a path that holds no checkpoint."""
    if not target.exists():
        return missing(target)
    kind = _of_folder(target) if target.is_dir() else not_weights(target)
    if kind is not None:
        return MissingFileError(kind.what, path=target, hint=_for_model(kind.hint))
    return MissingFileError(
        "no checkpoint there",
        path=target,
        expected=" or ".join(f"{stem}.safetensors[.index.json]" for stem in STEMS),
        hint=_other_weights(target),
    )


def no_weights(target: Path) -> MissingFileError | None:
    """Return the error for a file that is no safetensors; None if it is not known what it is."""
    if not target.is_file():
        return None
    kind = _of_file(target)
    if kind is None:
        return None
    return MissingFileError(kind.what, path=target, hint=_for_model(kind.hint))


def _for_model(hint: str) -> str | None:
    """Return a hint about adapters as one about models."""
    return (_NAME_MODEL if "adapter" in hint.lower() and "loratools" not in hint else hint) or None


def _of_folder(target: Path) -> Kind | None:
    found = cached(target)
    if found is not None:
        return found
    if any((target / name).is_file() for name in (ADAPTER_CONFIG, *WEIGHTS_OF_ADAPTERS)):
        fused = f"loratools fuse MODEL {quoted(target)} -o fused"
        return Kind("is an adapter, not a model", f"To put it into its model: {fused}")
    if (target / PIPELINE_INDEX).is_file():
        return Kind(
            "is a whole diffusion pipeline, and one component's folder is needed",
            f"Give one of its folders: {_components(target)}",
        )
    if any(name.endswith((".safetensors", ".bin")) for name in _weights_in(target)):
        return None
    inner = next((child for child in sorted(target.iterdir()) if is_model(child)), None)
    if inner is not None:
        return Kind("is a folder whose sub-folders hold models", f"Name one: {quoted(inner)}")
    found = kind_of(target)
    if found is None:
        return Kind("is a folder without a model's weights", _NAME_MODEL)
    return found._replace(what=found.what.removesuffix(", not an adapter"))


def _components(pipeline: Path) -> str:
    """Return the folders of a pipeline that hold checkpoints."""
    found = [
        quoted(folder)
        for folder in sorted(pipeline.iterdir())
        if folder.is_dir() and any(map(is_weights, folder.iterdir()))
    ]
    return ", ".join(found) or "none holds weights as safetensors"


def _weights_in(folder: Path) -> list[str]:
    """Return the names of weight files in a folder that `read_checkpoint` does not look for."""
    listed = (path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    return sorted(n for n in listed if not n.startswith(".") and not TRAINING_STATE.fullmatch(n))


def _other_weights(folder: Path) -> str | None:
    """Return a hint about weight files of other kinds or names."""
    found = _weights_in(folder)
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


def _of_file(path: Path) -> Kind | None:
    kind = not_weights(path)
    if kind is not None:
        return kind
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if start.startswith(b"GGUF") or start[8:9] == b"{":
        return None
    kind = file_kind(path)
    if not start.startswith((ARCHIVE_START, b"\x80")) or kind.what != OF_MODEL:
        return kind
    made = os.fspath(path.with_name(f"{path.stem}-saved.safetensors"))
    code = (
        "import torch, safetensors.torch as s; "
        f"d = torch.load({os.fspath(path)!r}, 'cpu', weights_only=True); "
        f"s.save_file({{k: v.clone() for k, v in d.items()}}, {made!r})"
    )
    return Kind(
        "holds pickled weights, and bases are read from safetensors",
        f"To save them so, where you trust the file: python -c {shlex.quote(code)}",
    )
