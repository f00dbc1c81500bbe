"""What a path is that was given as an adapter or a model and is neither, and the next step.

Every command in a hint can be pasted; what only the user knows stands in capitals.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
from pathlib import Path
from typing import Any

from loratools_formats.contract.file_kinds import (
    file_kind,
    header_names,
    is_of_model,
    quoted,
)
from loratools_formats.core.file_names import (
    ADAPTER_CONFIG,
    MODEL_WEIGHTS,
    TRAINING_STATE,
    WEIGHT_ENDINGS,
    WEIGHTS_OF_ADAPTERS,
)
from loratools_formats.disk.errors import LoratoolsError, MissingFileError
from loratools_formats.disk.first_bytes import NAME_ANOTHER, Kind
from loratools_formats.disk.strict_json import read_object

_HUB_ID = re.compile(r"(?:hf:/{1,2}|https?:/{1,2}huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)/?")
_ADDRESS = re.compile(r"(https?:)/+")
_FILE_ADDRESS = re.compile(r"file:/+")
_WEIGHTED = re.compile(r"(.+?)[=*@,](-?(?:\d+\.?\d*|\.\d+))")
_OF_FILES = (*WEIGHT_ENDINGS, ".json")
_OTHER_WEIGHTS = {
    ".h5": "Keras",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".ot": "rust-bert",
    ".tflite": "TensorFlow Lite",
}
_MOST_JSON_BYTES = 16 << 20
_MOST_SHOWN = 4
_MOST_NAMES = 10_000  # looked at for one that is nearly as typed


def missing(path: str | os.PathLike[str]) -> MissingFileError:
    """Return the error for a path where nothing is: a link to nothing, or a name on the Hub."""
    text = os.fspath(path)
    try:
        target = os.readlink(text) if os.path.islink(text) else None
    except (OSError, ValueError):
        target = None
    if target is not None and _is_circle(text):
        return MissingFileError(
            f"is a link to {target}, which leads back to it", path=path, hint=NAME_ANOTHER
        )
    if target is not None:
        return MissingFileError(
            f"is a link to {target}, which does not exist",
            path=path,
            hint="Fetch what the link leads to, or name the file or folder itself",
        )
    if _ADDRESS.match(text) and _HUB_ID.fullmatch(text) is None:
        return MissingFileError(
            "is an address, and only files here and names on the Hugging Face Hub are read",
            path=_ADDRESS.sub(r"\1//", text),  # of which a path keeps one slash
            hint="Download the file, and name it",
        )
    if text == "-":
        return MissingFileError(
            "adapters and models are not read from stdin", path=path, hint=NAME_ANOTHER
        )
    meant = _spelled_for_here(text)
    if meant is not None:
        return MissingFileError("no such file or folder", path=path, hint=f"Did you mean {meant}?")
    weighted = _WEIGHTED.fullmatch(text)
    if weighted is not None and os.path.exists(weighted[1]):
        return MissingFileError(
            "no such file or folder",
            path=path,
            hint=f"A weight follows a colon: {shlex.quote(f'{weighted[1]}:{weighted[2]}')}",
        )
    found = None if text.endswith(_OF_FILES) else _HUB_ID.fullmatch(text)
    parent = os.path.dirname(text)
    if found is None or (not text.startswith(("hf:", "http")) and os.path.isdir(parent)):
        near = nearly_as_typed(text)
        hint = None if near is None else f"Did you mean {near}?"
        return MissingFileError("no such file or folder", path=path, hint=hint)
    name = found[1]
    local = shlex.quote(name.rpartition("/")[2])
    return MissingFileError(
        "no such file or folder",
        path=path,
        hint=f"If it is on the Hugging Face Hub: hf download {name} --local-dir {local}",
    )


def _spelled_for_here(text: str) -> str | None:
    """Return a path that exists, quoted for a shell, of one spelled for another place.

    That is `~` where no shell expands it, an address of a file, or the separators of Windows.
    """
    plain = _FILE_ADDRESS.sub("/", text)
    for meant in (os.path.expanduser(plain), plain, plain.replace("\\", "/")):
        if meant != text and os.path.lexists(meant):
            return shlex.quote(meant)
    return None


def nearly_as_typed(text: str) -> str | None:
    """Return a path that exists and is nearly as typed, quoted for a shell; None for none."""
    parent, name = os.path.split(text.rstrip("/"))
    try:
        names = [one for one in os.listdir(parent or ".")[:_MOST_NAMES] if not one.startswith(".")]
    except (OSError, ValueError):
        return None
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return shlex.quote(os.path.join(parent, close[0])) if close else None


def _is_circle(link: str) -> bool:
    try:
        os.stat(link)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def kind_of(path: Path) -> Kind | None:
    """Return what a path is that no format recognises as an adapter; None if that is not known."""
    return _of_folder(path) if path.is_dir() else file_kind(path)


def of_nothing_below(folder: Path) -> Kind:
    """Return what a folder is that has sub-folders, and adapters in none of them."""
    model = next((child for child in sorted(folder.iterdir()) if is_model(child)), None)
    if model is None:
        return Kind(
            "is a folder that holds no adapter, and its sub-folders hold none", NAME_ANOTHER
        )
    return Kind(
        "is a folder that holds no adapter, and its sub-folders hold models",
        f"To put an adapter into one: loratools fuse {quoted(model)} ADAPTER -o fused",
    )


def is_model(path: Path) -> bool:
    """Return whether a folder holds a model's weights."""
    try:
        return path.is_dir() and any(MODEL_WEIGHTS.fullmatch(each) for each in os.listdir(path))
    except OSError:
        return False


def cached(path: Path) -> Kind | None:
    """Return what a folder of the Hugging Face cache is; None for others."""
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or not snapshots.is_dir():
        return None
    try:
        main = (path / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        main = ""
    found = sorted(child.name for child in snapshots.iterdir() if child.is_dir())
    if not found:
        return Kind("is a folder of the Hugging Face cache without a snapshot")
    chosen = main if main in found else found[-1]
    return Kind(
        "is a folder of the Hugging Face cache, which holds snapshots",
        f"Name one: {quoted(snapshots / chosen)}",
    )


def is_base(path: Path) -> bool:
    """Return whether a folder or file is a model's weights and no adapter, by its names."""
    if path.is_dir():
        names = sorted(os.listdir(path))
        others = _cached_or_pipeline(path, names) or _without_config(path, names)
        return others is None and ADAPTER_CONFIG not in names and _model(path, names) is not None
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return is_of_model(header_names(path))


def architecture(folder: Path) -> str:
    """Return the class of a model in brackets, after a space; empty if its config has none."""
    try:
        names: Any = read_object(folder / "config.json", _MOST_JSON_BYTES).get("architectures")
    except (LoratoolsError, OSError):
        return ""
    return f" ({names[0]})" if isinstance(names, list) and names else ""


def _of_folder(folder: Path) -> Kind | None:
    names = sorted(os.listdir(folder))
    if not names:
        return Kind("is an empty folder", "Fetch the adapter into it, or name another folder")
    names = [name for name in names if not name.startswith("._")] or names
    for found in (
        _cached_or_pipeline,
        _without_config,
        _distributed,
        _model,
        _weights,
        _other_model,
        _state,
    ):
        kind = found(folder, names)
        if kind is not None:
            return kind
    if ADAPTER_CONFIG in names:
        return None
    if any((folder / name).is_dir() and not name.startswith(".") for name in names):
        return None
    others = ", …" if len(names) > _MOST_SHOWN else ""
    held = ", ".join(names[:_MOST_SHOWN])
    return Kind(
        f"is a folder without weights; it holds {held}{others}",
        "Fetch the adapter into it, or name another folder",
    )


def _cached_or_pipeline(folder: Path, names: list[str]) -> Kind | None:
    if "model_index.json" in names:
        return Kind(
            "is a diffusion pipeline, not an adapter",
            f"To put an adapter into it: loratools fuse {quoted(folder)} ADAPTER -o fused",
        )
    return cached(folder)


def _without_config(folder: Path, names: list[str]) -> Kind | None:
    found = next((name for name in WEIGHTS_OF_ADAPTERS if name in names), None)
    if found is None or ADAPTER_CONFIG in names:
        return None
    hint = f"Fetch {ADAPTER_CONFIG} from where the adapter came from"
    if found.startswith("adapter_model"):
        hint += (
            f", or: loratools to-lora {quoted(folder / found)} --set alpha=VALUE "
            "--set variant=VALUE -o plain"
        )
    return Kind(f"{found} is there, {ADAPTER_CONFIG} is not", hint)


def _model(folder: Path, names: list[str]) -> Kind | None:
    if not any(map(MODEL_WEIGHTS.fullmatch, names)):
        return None
    return Kind(
        f"is a model{architecture(folder)}, not an adapter",
        f"To put an adapter into it: loratools fuse {quoted(folder)} ADAPTER -o fused",
    )


def _weights(folder: Path, names: list[str]) -> Kind | None:
    found = [
        name
        for name in names
        if name.endswith(WEIGHT_ENDINGS)
        and not TRAINING_STATE.fullmatch(name)
        and not name.startswith("._")
    ]
    if not found:
        return None
    if len(found) == 1:
        return Kind(
            f"is a folder that holds {found[0]}", f"Name the file: {quoted(folder / found[0])}"
        )
    return Kind(
        f"is a folder that holds {len(found)} weight files",
        f"Name one, such as {quoted(folder / found[0])}",
    )


def distributed(folder: Path) -> Kind | None:
    """Return what a folder is that torch saved in pieces of many ranks; None for others."""
    if not (folder / ".metadata").is_file() or not any(folder.glob("__*.distcp")):
        return None
    if (folder / "metadata.json").is_file():
        return Kind(
            "is a distributed checkpoint of Megatron, whose tensors are in pieces",
            "Export it with export_adapter_ckpt of Megatron-Bridge, or gather its tensors in one "
            "file",
        )
    made = folder.with_name(f"{folder.name}-gathered.bin")
    return Kind(
        "is a distributed checkpoint of torch, whose tensors are in pieces",
        "Put them together: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{quoted(folder)} {quoted(made)}",
    )


def _distributed(folder: Path, names: list[str]) -> Kind | None:
    del names
    return distributed(folder)


def _other_model(folder: Path, names: list[str]) -> Kind | None:
    """Return what a folder is that has a model's configuration, and weights that are not read."""
    found = next((name for name in names if Path(name).suffix in _OTHER_WEIGHTS), None)
    if "config.json" not in names:
        return None
    if found is None:
        return Kind(
            f"is the folder of a model{architecture(folder)} without its weights",
            "Fetch them into it as safetensors",
        )
    made_by = _OTHER_WEIGHTS[Path(found).suffix]
    return Kind(
        f"is a model{architecture(folder)} whose weights are {made_by}'s ({found}), not an adapter",
        "Fetch its weights as safetensors to work with it",
    )


def _state(folder: Path, names: list[str]) -> Kind | None:
    """Return what a folder is in which a trainer keeps what it needs to go on."""
    if "zero_to_fp32.py" in names:
        there = quoted(folder)
        return Kind(
            "is a checkpoint of DeepSpeed, whose tensors are in pieces",
            f"Put them together: python {quoted(folder / 'zero_to_fp32.py')} {there} gathered",
        )
    state = [name for name in names if TRAINING_STATE.fullmatch(name)]
    if not state:
        return None
    return Kind(
        f"holds the state of a training run ({', '.join(state[:_MOST_SHOWN])}) and no weights",
        "Name the folder of the adapter that the run saved",
    )
