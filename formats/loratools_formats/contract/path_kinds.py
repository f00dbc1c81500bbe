"""What a path is that was given as an adapter or a model and is none, and the next step.

Every command in a hint can be pasted; what only the user knows stands in capitals.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from loratools_formats.containers.sniffing import tensor_names
from loratools_formats.disk.errors import LoratoolsError, MissingFileError
from loratools_formats.disk.strict_json import read_object

_CONFIG = "adapter_config.json"
_WEIGHTS_OF_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
_MODEL_WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model|pytorch_model|consolidated)[-.\w]*\.(?:safetensors|bin)"
    r"(?:\.index\.json)?"
)
_HUB_ID = re.compile(r"(?:hf:/{1,2}|https?:/{1,2}huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)/?")
_OF_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".nemo", ".json")
_OF_MODELS = re.compile(
    r"(?:^|\.)(?:(?:\w*_)?(?:blocks?|layers?)|h)\.\d+\.(?:.*\.)?(?:weight|bias)$"
    r"|(?:^|\.)(?:embed_tokens|lm_head|wte|wpe|norm|ln_f)\.(?:weight|bias)$"
)
_OF_ADAPTERS = re.compile(r"lora|adapter|hada_|lokr_|oft|delta|\.diff(?!usion)", re.IGNORECASE)
_MOST_JSON_BYTES = 16 << 20
_MOST_HEADER_BYTES = 1 << 20
_SMALL_BYTES = 1024
_STARTS = (
    (b"%PDF-", "is a PDF document"),
    (b"\x89PNG\r\n", "is an image"),
    (b"\xff\xd8\xff", "is an image"),
    (b"GIF8", "is an image"),
    (b"<svg", "is an image"),
)
_ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that torch saves, which are zip archives, too."""
_TAR = slice(257, 262)
_NAME_ANOTHER = "Name the folder or the file of an adapter"


class Kind(NamedTuple):
    """What a path is, and the next step; an empty hint for none."""

    what: str
    hint: str = ""


def missing(path: str | os.PathLike[str]) -> MissingFileError:
    """Return the error for a path where nothing is: a link to nothing, or a name on the Hub."""
    text = os.fspath(path)
    try:
        target = os.readlink(text) if os.path.islink(text) else None
    except (OSError, ValueError):
        target = None
    if target is not None:
        return MissingFileError(
            f"is a link to {target}, which does not exist",
            path=path,
            hint="Fetch what the link leads to, or name the file or folder itself",
        )
    found = None if text.endswith(_OF_FILES) else _HUB_ID.fullmatch(text)
    parent = os.path.dirname(text)
    if found is None or (not text.startswith(("hf:", "http")) and os.path.isdir(parent)):
        return MissingFileError("no such file or folder", path=path)
    name = found[1]
    local = shlex.quote(name.rpartition("/")[2])
    return MissingFileError(
        "no such file or folder",
        path=path,
        hint=f"If it is on the Hugging Face Hub: hf download {name} --local-dir {local}",
    )


def kind_of(path: Path) -> Kind | None:
    """Return what a path is that no format recognises as an adapter; None if that is not known."""
    return _of_folder(path) if path.is_dir() else _of_file(path)


def is_model(path: Path) -> bool:
    """Return whether a folder holds a model's weights."""
    try:
        return path.is_dir() and any(_MODEL_WEIGHTS.fullmatch(each) for each in os.listdir(path))
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
        f"Name one: {_quoted(snapshots / chosen)}",
    )


def is_base(path: Path) -> bool:
    """Return whether a folder or file is a model's weights and no adapter, by its names."""
    if path.is_dir():
        names = sorted(os.listdir(path))
        others = _cached_or_pipeline(path, names) or _without_config(path, names)
        return others is None and _CONFIG not in names and _model(path, names) is not None
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with path.open("rb") as file:
        found = tensor_names(file.read(_MOST_HEADER_BYTES))
    return _of_model(path, [name.decode("utf-8", "replace") for name in found]) is not None


def architecture(folder: Path) -> str:
    """Return the class of a model in brackets, after a space; empty if its config has none."""
    try:
        names: Any = read_object(folder / "config.json", _MOST_JSON_BYTES).get("architectures")
    except (LoratoolsError, OSError):
        return ""
    return f" ({names[0]})" if isinstance(names, list) and names else ""


def _quoted(path: Path) -> str:
    return shlex.quote(os.fspath(path))


def _of_folder(folder: Path) -> Kind | None:
    names = sorted(os.listdir(folder))
    if not names:
        return Kind("is an empty folder", "Fetch the adapter into it, or name another folder")
    for found in (_cached_or_pipeline, _without_config, _model, _weights):
        kind = found(folder, names)
        if kind is not None:
            return kind
    if _CONFIG in names or any((folder / name).is_dir() for name in names):
        return None
    return Kind("is a folder without weights", _NAME_ANOTHER)


def _cached_or_pipeline(folder: Path, names: list[str]) -> Kind | None:
    if "model_index.json" in names:
        return Kind(
            "is a diffusion pipeline, not an adapter",
            f"To put an adapter into it: loratools fuse {_quoted(folder)} ADAPTER -o fused",
        )
    return cached(folder)


def _without_config(folder: Path, names: list[str]) -> Kind | None:
    found = next((name for name in _WEIGHTS_OF_ADAPTERS if name in names), None)
    if found is None or _CONFIG in names:
        return None
    hint = f"Fetch {_CONFIG} from where the adapter came from"
    if found.startswith("adapter_model"):
        hint += (
            f", or: loratools to-lora {_quoted(folder / found)} --set alpha=VALUE "
            "--set variant=VALUE -o plain"
        )
    return Kind(f"{found} is there, {_CONFIG} is not", hint)


def _model(folder: Path, names: list[str]) -> Kind | None:
    if not any(map(_MODEL_WEIGHTS.fullmatch, names)):
        return None
    return Kind(
        f"is a model{architecture(folder)}, not an adapter",
        f"To put an adapter into it: loratools fuse {_quoted(folder)} ADAPTER -o fused",
    )


def _weights(folder: Path, names: list[str]) -> Kind | None:
    found = [name for name in names if name.endswith((".safetensors", ".gguf", ".pt", ".bin"))]
    if not found:
        return None
    if len(found) == 1:
        return Kind(
            f"is a folder that holds {found[0]}", f"Name the file: {_quoted(folder / found[0])}"
        )
    return Kind(
        f"is a folder that holds {len(found)} weight files",
        f"Name one, such as {_quoted(folder / found[0])}",
    )


def _of_file(path: Path) -> Kind | None:
    known = not_weights(path)
    if known is not None or path.suffix != ".safetensors":
        return known
    try:
        with path.open("rb") as file:
            start = file.read(_MOST_HEADER_BYTES)
    except OSError:
        return None
    names = [name.decode("utf-8", "replace") for name in tensor_names(start)]
    return next((found for rule in _RULES if (found := rule(path, names))), None)


def not_weights(path: Path) -> Kind | None:
    """Return what a file is that holds no weights, by its first bytes; None if it may hold some."""
    if not path.is_file():  # opening a pipe would wait for ever
        return Kind("is no regular file", _NAME_ANOTHER)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_MOST_HEADER_BYTES)
    except OSError:
        return None
    if size == 0:
        return Kind("is an empty file", "Fetch it again")
    if size < _SMALL_BYTES and start.startswith(b"version https://git-lfs"):
        return Kind("is a Git LFS pointer, not the file itself", "Run: git lfs pull")
    if start[:_SMALL_BYTES].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return Kind("is a web page", "Fetch the file itself instead of the page that shows it")
    if path.name == _CONFIG:
        return Kind("is an adapter's configuration", f"Name its folder: {_quoted(path.parent)}")
    return _archive(path, start) or _document(start) or _text(path, start)


def _archive(path: Path, start: bytes) -> Kind | None:
    is_zip = start.startswith((b"PK\x03\x04", b"PK\x05\x06")) and path.suffix not in _TORCH
    if is_zip and path.suffix == ".safetensors":
        own = f"mv {_quoted(path)} {_quoted(path.with_suffix('.bin'))}"
        return Kind("is no safetensors file, but a zip archive", f"If torch saved it: {own}")
    if is_zip or start.startswith(_ARCHIVES) or start[_TAR] == b"ustar":
        return Kind("is an archive", "Unpack it, and name what is inside")
    return None


def _document(start: bytes) -> Kind | None:
    found = next((what for first, what in _STARTS if start.startswith(first)), None)
    return None if found is None else Kind(found, _NAME_ANOTHER)


def _text(path: Path, start: bytes) -> Kind | None:
    """Return what a text is; None if it is none."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # not in the last character, which may be cut
            return None
        text = start[: error.start].decode("utf-8")
    if start.startswith(b"GGUF") or any(ord(c) < 32 and c not in "\t\n\r\f\x1b" for c in text):
        return None
    if text.lstrip()[:1] not in ("{", "["):
        return Kind("is a text file", _NAME_ANOTHER)
    if '"weight_map"' in text:
        folder = _quoted(path.parent)
        return Kind("is the index of a model's weight files", f"Name its folder: {folder}")
    if '"peft_type"' in text:
        named = _quoted(path.with_name(_CONFIG))
        return Kind(
            "is an adapter's configuration under another name",
            f"Beside the weights it is called {_CONFIG}: mv {_quoted(path)} {named}",
        )
    return Kind("is a JSON file", _NAME_ANOTHER)


def _of_peft(path: Path, names: list[str]) -> Kind | None:
    if not any(name.startswith("base_model.model.") for name in names):
        return None
    return Kind(
        f"holds PEFT's weights, and {_CONFIG}, which tells their scale, is not beside it",
        f"Fetch {_CONFIG} from where the adapter came from, into {_quoted(path.parent)}",
    )


def _of_inversion(path: Path, names: list[str]) -> Kind | None:
    del path
    if not names or not set(names) <= {"emb_params", "clip_l", "clip_g", "t5xxl"}:
        return None
    return Kind(
        "is a textual inversion: vectors of new words, which change no weight",
        "Load it beside the model: no command of loratools has a use for it",
    )


_NAMED = (
    (
        re.compile(r"\.oft_R\.weight$"),
        "holds OneTrainer's OFT, whose rotations depend on settings that are in no file",
        "Train or export it as LoRA or LoHa; PEFT's OFT with its configuration is read",
    ),
    (
        re.compile(r"^oft_(?:unet|te\d?)_.+\.oft_blocks(?:\.\d+)?$"),
        "holds sd-scripts' OFT, which turns a layer's outputs with its bias, and is not supported",
        "LyCORIS' diag-oft is read, and PEFT's OFT",
    ),
    (
        re.compile(r"\.(?:q_layer|p_layer)\.weight$|\.lambda_layer$"),
        "holds LyCORIS' T-LoRA, whose weight change differs from step to step of denoising",
        "No command of loratools has a use for it",
    ),
    (
        re.compile(r"\.lora_(?:down|up)$"),
        "is made for Nunchaku's kernels, which pack rows and fuse projections",
        "Take the LoRA that it was converted from",
    ),
)
"""Adapters that are known and not read: names of their tensors, what they are, the next step."""


def _of_known_system(path: Path, names: list[str]) -> Kind | None:
    del path
    for pattern, what, hint in _NAMED:
        if any(pattern.search(name) for name in names):
            return Kind(what, hint)
    return None


def _of_model(path: Path, names: list[str]) -> Kind | None:
    of_model = sum(_OF_MODELS.search(name) is not None for name in names)
    if 2 * of_model <= len(names) or any(_OF_ADAPTERS.search(name) for name in names):
        return None
    return Kind(
        "is a model's weights, not an adapter",
        f"To put an adapter into it: loratools fuse {_quoted(path)} ADAPTER -o fused.safetensors",
    )


_RULES: tuple[Callable[[Path, list[str]], Kind | None], ...] = (
    _of_peft,
    _of_inversion,
    _of_known_system,
    _of_model,
)
