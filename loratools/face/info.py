"""`read` and `info`: an adapter, and what it is, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loratools.face.declare import public
from loratools.face.result import Result
from loratools.face.source import READING, Described, Place, opened
from loratools.operations.info import AdapterInfo, describe
from loratools.work.requests import Reading
from loratools_formats.core.adapter import Adapter


@dataclass(frozen=True, kw_only=True, repr=False)
class InfoResult(Result, AdapterInfo):
    """What an adapter is."""

    operation: ClassVar[str] = "info"


@public(reading=READING)
def read(path: Place, *, reading: Reading) -> Adapter:
    """Read an adapter's headers; its tensors load on demand.

    `adapter.modules` maps each module's path to its change.

    >>> import loratools as lt
    >>> adapter = lt.read("examples/tiny-llama/lora")
    >>> adapter.format, len(adapter.modules)
    ('peft', 28)

    Args:
        path: a file or folder.

    Raises:
        MissingFileError: nothing is there.
        UnknownFormatError: no format recognises it, or several do.
        AdapterError: it is not a sound adapter.
    """
    return opened(path, reading)


@public(reading=READING)
def info(source: Described, *, reading: Reading) -> InfoResult:
    """Return what an adapter is; no tensor is loaded.

    >>> import loratools as lt
    >>> lt.info("examples/tiny-llama/lora").modules[0].rank
    32

    Args:
        source: an adapter of any kind.

    Raises:
        LoratoolsError: as for `read`.
    """
    return InfoResult.of(describe(opened(source, reading)))
