"""What GGUF adapters need to know of a base model: its architecture and a few sizes.

From a folder's config.json or from the header of a GGUF file; no weights are read.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.checkpoints.checkpoint import CONFIG_FILE, read_checkpoint
from loratools_formats.checkpoints.facts import (
    head_of,
    is_tied,
    model_types,
    says_tied,
    text_values,
)
from loratools_formats.checkpoints.no_checkpoint import no_checkpoint, no_weights
from loratools_formats.containers.gguf.container import is_gguf
from loratools_formats.containers.gguf.splits import GgufModel, read_model
from loratools_formats.contract.path_kinds import is_model
from loratools_formats.disk.errors import AdapterError, MissingFileError, UnsupportedError
from loratools_formats.disk.files import RegularFile, inside
from loratools_formats.disk.strict_json import read_object
from loratools_formats.formats.gguf.architectures import (
    ARCHITECTURES,
    BY_CLASS,
    REFUSED,
    Architecture,
)
from loratools_formats.formats.gguf.layouts import Sizes

_MAX_CONFIG_BYTES = 4 << 20
_MAX_SIZE = 1 << 24


@dataclass(frozen=True)
class Base:
    """Facts about a base model.

    Attributes:
        architecture: how its modules become GGUF tensors.
        sizes: what layouts depend on.
        tied: whether its output layer is its embedding, None if that is not known.
        prefix: how its class begins paths that begin with `model.` in the table.
        shapes: row-major shapes of its tensors by GGUF name; None if only its configuration is
            known.
        files: what it was read from, as far as digests of it are worth their time.
    """

    architecture: Architecture
    sizes: Sizes
    tied: bool | None
    prefix: str = "model."
    shapes: Mapping[str, tuple[int, ...]] | None = None
    files: tuple[RegularFile, ...] = ()

    def has(self, tensor: str) -> bool:
        """Return whether it has a GGUF tensor, by its name without `.weight`."""
        if self.shapes is None:
            return self.architecture.has(tensor)
        return f"{tensor}.weight" in self.shapes


def read_base(path: Path) -> Base:
    """Read the needed facts of a base model: a folder with config.json, or a GGUF file.

    Raises:
        MissingFileError: there is neither.
        AdapterError: malformed.
        UnsupportedError: an architecture that is not in the table.
    """
    if is_gguf(path):
        return base_of_gguf(read_model(path))
    if path.is_file() and path.name != CONFIG_FILE:
        raise no_weights(path) or AdapterError(
            "is not a GGUF model",
            path=path,
            expected="GGUF, or a model's folder",
            hint=f"Name the folder, if its {CONFIG_FILE} is beside it",
        )
    folder = path.parent if path.is_file() else path
    if not (folder / CONFIG_FILE).is_file():
        raise _no_config(path)
    return _of_config(inside(folder, CONFIG_FILE))


def _no_config(path: Path) -> MissingFileError:
    if not is_model(path):
        return no_checkpoint(path)
    return MissingFileError(
        f"{CONFIG_FILE} of the base model is not there",
        path=path,
        expected=f"{CONFIG_FILE} in a folder, or a GGUF file",
        hint=f"Fetch {CONFIG_FILE} from where the model came from",
    )


def _of_config(path: Path) -> Base:
    values = read_object(path, _MAX_CONFIG_BYTES)
    names = values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise AdapterError("config names no architecture", path=path, got=names)
    # Like the converter's: what the text's own section names comes first.
    inner = text_values(values).get("architectures")
    inner = inner[0] if isinstance(inner, list) and inner and inner != names else None
    name = names[0]
    if name not in BY_CLASS:
        if inner not in BY_CLASS:
            raise _unknown(path, name, sorted(BY_CLASS))
        name = inner
    architecture = BY_CLASS[name]
    tied = not architecture.outputs or _is_tied(path, values, architecture)
    values = _with_sections(text_values(values))
    heads = _size(values, path, "num_attention_heads", "n_head", "n_heads", default=0)
    hidden = _size(values, path, "hidden_size", "n_embd", "d_model", "dim")
    experts = _size(
        values, path, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts",
        default=0,
    )  # fmt: skip
    return Base(
        architecture=architecture,
        sizes=Sizes(
            heads=heads,
            kv_heads=_kv_heads(values, path, heads),
            hidden=hidden,
            head_width=_size(values, path, "head_dim", default=hidden // max(heads, 1)),
            experts=experts,
            expert_width=_expert_width(values, path) if experts else 0,
            linear_keys=_size(values, path, "linear_num_key_heads", default=0),
            linear_values=_size(values, path, "linear_num_value_heads", default=0),
            linear_key_width=_size(values, path, "linear_key_head_dim", default=0),
        ),
        tied=tied,
        prefix=architecture.classes[name],
        files=(RegularFile(path),),
    )


def _is_tied(path: Path, config: Mapping[str, Any], architecture: Architecture) -> bool | None:
    """Return whether a model is tied, None if its weights are needed to tell and not there."""
    try:
        said = says_tied(config)
    except AdapterError as error:
        error.path = str(path)
        raise
    if said is not None:
        return said
    try:
        tensors = read_checkpoint(path.parent).tensors
    except MissingFileError:
        return None
    names = (architecture.embedding.rpartition(".")[2], head_of(sorted(model_types(config))))
    embedding, head = (
        next((t for key, t in tensors.items() if f".{key}".endswith(f".{name}.weight")), None)
        for name in names
    )
    return is_tied(config, embedding, head)


def _kv_heads(values: Mapping[str, Any], path: Path, heads: int) -> int:
    """Return the number of key and value heads; Falcon has three ways to say it."""
    if values.get("new_decoder_architecture") is False:
        return 1 if values.get("multi_query") is True else heads
    names = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
    return _size(values, path, *names, default=heads)


def _expert_width(values: Mapping[str, Any], path: Path) -> int:
    names = ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size")
    return _size(values, path, *names, default=0)


def _with_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with what DBRX says of its layers in sections of their own."""
    sections = (values.get(name) for name in ("attn_config", "ffn_config"))
    inner = [section for section in sections if isinstance(section, Mapping)]
    return {key: value for section in (*inner, values) for key, value in section.items()}


def _size(values: Mapping[str, Any], path: Path, *names: str, default: int | None = None) -> int:
    for name in names:
        value = values.get(name)
        if value is None:
            continue
        if type(value) is not int or not 0 < value < _MAX_SIZE:
            raise AdapterError(
                f"config value {name} is wrong", path=path, got=value, expected="a size"
            )
        return value
    if default is None:
        raise AdapterError(f"config lacks {names[0]}", path=path)
    return default


def base_of_gguf(model: GgufModel) -> Base:
    """Return the facts about a base model that a GGUF model holds.

    Raises:
        AdapterError: a key is missing or wrong.
        UnsupportedError: another architecture.
    """
    path = model.path
    name = model.get("general.architecture", "string")
    if name not in ARCHITECTURES:
        raise _unknown(path, str(name), sorted(ARCHITECTURES))
    heads = _key(model, f"{name}.attention.head_count", 1)
    hidden = _key(model, f"{name}.embedding_length")
    expert_width = _key(model, f"{name}.expert_feed_forward_length", 0)
    return Base(
        architecture=ARCHITECTURES[name],
        sizes=Sizes(
            heads=heads,
            kv_heads=_key(model, f"{name}.attention.head_count_kv", heads),
            hidden=hidden,
            head_width=_key(model, f"{name}.attention.key_length", hidden // heads),
            experts=_key(model, f"{name}.expert_count", 0),
            expert_width=expert_width or _key(model, f"{name}.feed_forward_length", 0),
            linear_keys=_key(model, f"{name}.ssm.group_count", 0),
            linear_values=_key(model, f"{name}.ssm.time_step_rank", 0),
            linear_key_width=_key(model, f"{name}.ssm.state_size", 0),
        ),
        tied="output.weight" not in model.tensors,
        shapes={key: tensor.shape for key, tensor in model.tensors.items()},
    )


def _key(model: GgufModel, name: str, default: int | None = None) -> int:
    value = model.get(name, "u32", "i32", "u64", "i64")
    if value is None and default is not None:
        return default  # also of a list, one value for each layer, which no layout here needs
    least = 0 if default == 0 else 1
    if value is None or not least <= value < _MAX_SIZE:
        raise AdapterError(f"key {name} is missing or wrong", path=model.path, got=value)
    return int(value)


def _unknown(path: Path, name: str, known: list[str]) -> UnsupportedError:
    why = REFUSED.get(name, "llama.cpp's converter has no such class")
    if why.startswith(("no tiny model", "the converter does not take it")):
        why = "its layout has not been compared with the converter's"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return UnsupportedError(
        f"GGUF adapters of this architecture are not supported: {why}",
        path=path,
        got=name,
        expected=", ".join(near) if near else f"one of {len(known)} architectures",
        hint="Fuse the adapter into the model that this one was made from, and convert that: "
        "loratools fuse MODEL ADAPTER -o fused"
        if path.suffix == ".gguf"
        else "Fuse the adapter, and convert the model: "
        f"loratools fuse {shlex.quote(os.fspath(path))} ADAPTER -o fused",
    )
