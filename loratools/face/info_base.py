"""`info_base`: what a base checkpoint is, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loratools.face.declare import public
from loratools.face.result import Result
from loratools.face.source import CopiedModel, model
from loratools.operations.info_base import BaseInfo, describe_base


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
        base: a checkpoint: a folder, or a safetensors file.

    Raises:
        MissingFileError: nothing is there.
        AdapterError: not a sound checkpoint, or malformed quantised weights.
        UnsupportedError: its weights are rotated.
    """
    return BaseInfoResult.of(describe_base(model(base)))
