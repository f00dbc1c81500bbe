"""Adapters on disk to adapters in memory and back; no mathematics on ΔW, no command line.

>>> import loratools_formats
>>> loratools_formats.get_format("peft").name
'peft'
"""

from loratools_formats.contract.files import read_adapter, write_adapter
from loratools_formats.contract.format import Context, Format, Loss
from loratools_formats.contract.registry import (
    FormatEntry,
    find_format,
    format_for_output,
    get_format,
    registered_formats,
)
from loratools_formats.core.adapter import Adapter, Replacement
from loratools_formats.core.change import KindDelta, Layer, LowRank, ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import LoratoolsError

__all__ = [
    "Adapter",
    "Context",
    "Finding",
    "Format",
    "FormatEntry",
    "KindDelta",
    "Layer",
    "LoratoolsError",
    "Loss",
    "LowRank",
    "ModuleChange",
    "Replacement",
    "TensorRef",
    "find_format",
    "format_for_output",
    "get_format",
    "read_adapter",
    "registered_formats",
    "write_adapter",
]
