"""What a file is that no format recognises as an adapter, and the next step.

Its name is asked first, then its first bytes, then the names of its tensors.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from loratools_formats.containers.sniffing import tensor_names
from loratools_formats.core.file_names import (
    ADAPTER_CONFIG,
    PICKLE_ENDINGS,
    TRAINING_STATE,
    WEIGHT_ENDINGS,
)
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.first_bytes import (
    ARCHIVE_START,
    FETCH_AGAIN,
    NAME_ANOTHER,
    Kind,
    is_cut_safetensors,
    kind_by_first_bytes,
    kind_of_text,
)

_OF_MODELS = re.compile(
    r"(?:^|\.)(?:(?:\w*_)?(?:blocks?|layers?)|h)\.\d+\.(?:.*\.)?"
    r"(?:_?weight(?:[._][\w.]*)?|bias|qweight|qzeros|scales|biases|g_idx|W_q|input_scale"
    r"|scale_weight|scale_input|comfy_quant|\w+_(?:blocks|scales))$"
    r"|(?:^|\.)(?:embed_tokens|lm_head|wte|wpe|norm|ln_f)\.(?:weight|bias)$"
)
_OF_ADAPTERS = re.compile(r"lora|adapter|hada_|lokr_|oft|delta|\.diff(?!usion)", re.IGNORECASE)
OF_MODEL = "is a model's weights, not an adapter"
_MOST_HEADER_BYTES = 1 << 20
_TWO = 2
_BROKEN_OFF = (".part", ".incomplete", ".crdownload", ".aria2", ".download", ".partial")
_NAMES = (
    (
        TRAINING_STATE,
        "holds the state of a training run, not weights of an adapter",
        "Name the folder or the file of the adapter that the run saved",
    ),
    (
        (
            r"(?:tokenizer|spiece|sentencepiece\.bpe|tekken)\.(?:model|json)"
            r"|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.\w+"
            r"|merges\.txt"
        ),
        "is a file of a tokenizer",
        NAME_ANOTHER,
    ),
    (
        r"trainer_state\.json|events\.out\.tfevents\..*",
        "is the record of a training run",
        NAME_ANOTHER,
    ),
)
_ENDINGS = {
    ".onnx": "is a model for ONNX",
    ".pb": "is a file of protocol buffers, as TensorFlow saves models",
    ".msgpack": "is a file of Flax's weights",
    ".h5": "is an HDF5 file, as Keras saves weights",
    ".tflite": "is a model of TensorFlow Lite",
    ".mlmodel": "is a model for Core ML",
    ".engine": "is a program of TensorRT",
}


def file_kind(path: Path) -> Kind:
    """Return what a file is that no format recognises as an adapter."""
    known = not_weights(path)
    if known is not None:
        return known
    start = _start_of(path)
    if start[8:9] == b"{":
        return _by_names(path, [n.decode("utf-8", "replace") for n in tensor_names(start)])
    if start.startswith((ARCHIVE_START, b"\x80")):
        return _pickled(path)
    return Kind(
        f"is not a weight file that loratools reads; it begins with the bytes {start[:8].hex(' ')}",
        "Adapters are safetensors, GGUF or what torch saves; name such a file, or its folder",
    )


def not_weights(path: Path) -> Kind | None:
    """Return what a file is that holds no weights; None if it may hold some."""
    if not path.is_file():  # opening a pipe would wait for ever
        return Kind("is no regular file", NAME_ANOTHER)
    try:
        size = path.stat().st_size
        start = _start_of(path)
    except OSError:
        return None
    if path.name == ADAPTER_CONFIG:
        return Kind("is an adapter's configuration", f"Name its folder: {quoted(path.parent)}")
    if path.suffix in _BROKEN_OFF:
        return Kind("is a download that has not ended", "Let it end, or fetch the file again")
    return (
        kind_by_first_bytes(start, size)
        or _by_name(path)
        or _archive(path, start)
        or _text(path, start)
        or _cut(start, size)
    )


def quoted(path: Path) -> str:
    """Return a path as a shell takes it."""
    return shlex.quote(os.fspath(path))


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST_HEADER_BYTES)


def _by_name(path: Path) -> Kind | None:
    for pattern, what, hint in _NAMES:
        if re.fullmatch(pattern, path.name):
            return Kind(what, hint)
    found = _ENDINGS.get(path.suffix)
    return None if found is None else Kind(f"{found}, which is not read", NAME_ANOTHER)


def _cut(start: bytes, size: int) -> Kind | None:
    if not is_cut_safetensors(start, size):
        return None
    return Kind("is a safetensors file that ends within its header", FETCH_AGAIN)


def _archive(path: Path, start: bytes) -> Kind | None:
    if not start.startswith((ARCHIVE_START, b"PK\x05\x06")) or path.suffix in PICKLE_ENDINGS:
        return None
    if path.suffix == ".safetensors":
        own = f"mv {quoted(path)} {quoted(path.with_suffix('.bin'))}"
        return Kind("is no safetensors file, but a zip archive", f"If torch saved it: {own}")
    return Kind("is an archive", "Unpack it, and name what is inside")


def _text(path: Path, start: bytes) -> Kind | None:
    """Return what a text is; None if it is none."""
    kind = None if start.startswith(b"GGUF") else kind_of_text(start)
    if kind is None or path.suffix in WEIGHT_ENDINGS:
        return kind
    text = start.decode("utf-8", "ignore")
    if text.lstrip()[:1] not in ("{", "["):
        return Kind("is a text file", NAME_ANOTHER)
    if '"weight_map"' in text:
        return Kind(
            "is the index of a model's weight files", f"Name its folder: {quoted(path.parent)}"
        )
    if '"peft_type"' in text:
        named = quoted(path.with_name(ADAPTER_CONFIG))
        return Kind(
            "is an adapter's configuration under another name",
            f"Beside the weights it is called {ADAPTER_CONFIG}: mv {quoted(path)} {named}",
        )
    if '"model_type"' in text or '"_class_name"' in text:
        return Kind("is a model's configuration", NAME_ANOTHER)
    return Kind("is a JSON file", NAME_ANOTHER)


def _pickled(path: Path) -> Kind:
    """Return what a pickle is, as far as it can be told without running it."""
    from loratools_formats.containers.pickles import read_bin  # which imports much

    try:
        file = read_bin(path)
    except AdapterError as error:
        return _untidy_pickle(path, error)
    names = list(file.tensors)
    file.file.close()
    return _by_names(path, names)


def _untidy_pickle(path: Path, error: AdapterError) -> Kind:
    from loratools_formats.containers.torch_states import NO_TORCH_ARCHIVE

    start = _start_of(path)
    if b"string_to_param" in start:
        return Kind(*_INVERSION)
    if b"param_groups" in start or b"TrainingArguments" in start:
        return Kind(*_NAMES[0][1:])
    key = next((k for k in _STATES if b"X" + len(k).to_bytes(4, "little") + k in start), None)
    if key is not None:
        name = key.decode()
        made = path.with_name(f"{path.stem}-saved.safetensors")
        code = (
            "import torch, safetensors.torch as s; "
            f"d = torch.load({os.fspath(path)!r}, 'cpu', weights_only=True)[{name!r}]; "
            f"s.save_file({{k: v.clone() for k, v in d.items()}}, {os.fspath(made)!r})"
        )
        return Kind(
            f"is a checkpoint of a trainer, whose tensors are below {name!r}",
            f"To take them out, where you trust the file: python -c {shlex.quote(code)}",
        )
    if b"code/__torch__" in start:
        return Kind("is a program of TorchScript, not weights", NAME_ANOTHER)
    if "truncated" in error.message:
        return Kind("is an archive that ends too early", FETCH_AGAIN)
    if error.message == NO_TORCH_ARCHIVE:
        return Kind("is an archive that torch did not save", "Unpack it, and name what is inside")
    got = "" if error.got is None else f" ({error.got})"
    starts = error.message.startswith("is ")
    what = error.message if starts else f"holds no plain weights: {error.message}"
    return Kind(f"{what}{got}", error.hint or NAME_ANOTHER)


_STATES = (b"state_dict", b"model_state_dict", b"module", b"model")
_INVERSION = (
    "is a textual inversion: vectors of new words, which change no weight",
    "Load it beside the model: no command of loratools has a use for it",
)


def is_of_model(names: Iterable[str]) -> bool:
    """Return whether tensors are a model's weights and no adapter's, by their names."""
    found = list(names)
    of_model = sum(_OF_MODELS.search(name) is not None for name in found)
    return 2 * of_model > len(found) and not any(_OF_ADAPTERS.search(name) for name in found)


def header_names(path: Path) -> list[str]:
    """Return the names of tensors at the start of a safetensors file."""
    return [name.decode("utf-8", "replace") for name in tensor_names(_start_of(path))]


def _by_names(path: Path, names: list[str]) -> Kind:
    """Return what a file of tensors is."""
    if not names:
        return Kind("holds no tensors", FETCH_AGAIN)
    kind = next((found for rule in _RULES if (found := rule(path, names))), None)
    if kind is not None:
        return kind
    held = f"the tensor {names[0]}"
    if len(names) > 1:
        held = f"{names[0]} and {len(names) - 1} other tensors"
        held = held.removesuffix("s") if len(names) == _TWO else held
    return Kind(
        f"holds {held}, which no known format recognises as an adapter",
        "`loratools formats` lists those that are read",
    )


def _of_peft(path: Path, names: list[str]) -> Kind | None:
    if not any(name.startswith("base_model.model.") for name in names):
        return None
    return Kind(
        f"holds PEFT's weights, and {ADAPTER_CONFIG}, which tells their scale, is not beside it",
        f"Fetch {ADAPTER_CONFIG} from where the adapter came from, into {quoted(path.parent)}",
    )


def _of_inversion(path: Path, names: list[str]) -> Kind | None:
    del path
    if not names or not set(names) <= {"emb_params", "clip_l", "clip_g", "t5xxl"}:
        return None
    return Kind(*_INVERSION)


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
    if not is_of_model(names):
        return None
    if path.suffix != ".safetensors":
        return Kind(OF_MODEL, NAME_ANOTHER)
    return Kind(
        OF_MODEL,
        f"To put an adapter into it: loratools fuse {quoted(path)} ADAPTER -o fused.safetensors",
    )


_RULES: tuple[Callable[[Path, list[str]], Kind | None], ...] = (
    _of_peft,
    _of_inversion,
    _of_known_system,
    _of_model,
)
