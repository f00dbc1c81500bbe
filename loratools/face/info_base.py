"""`info_base`: what a base checkpoint is, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratools.face.declare import public
from loratools.face.result import Result
from loratools.face.source import CopiedModel, model
from loratools.operations.info_base import BaseInfo, describe_base, describe_gguf
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.containers.gguf.container import is_gguf
from loratools_formats.containers.gguf.splits import read_model


@dataclass(frozen=True, kw_only=True, repr=False)
class BaseInfoResult(Result, BaseInfo):
    """What a base checkpoint is."""

    operation: ClassVar[str] = "info-base"


@public()
def info_base(base: CopiedModel) -> BaseInfoResult:
    """Return what a base checkpoint is: how its weights are quantised, and its size.

    >>> import loratools as lt
    >>> found = lt.info_base("examples/tiny-llama/model")
    >>> found.model, found.quantised
    ('LlamaForCausalLM', ())

    Args:
        base: a checkpoint: a folder, a safetensors file, or a GGUF model.

    Raises:
        MissingFileError: nothing is there.
        AdapterError: not a sound checkpoint, or malformed quantised weights.
        UnsupportedError: its weights are rotated.
    """
    if not isinstance(base, Checkpoint) and is_gguf(Path(base)):
        return BaseInfoResult.of(describe_gguf(read_model(Path(base))))
    return BaseInfoResult.of(describe_base(model(base)))
