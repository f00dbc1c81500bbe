"""Layouts of experts in PEFT folders that PEFT itself does not write, one file for each.

A layout is a `Layout`: `read` turns its tensors and configuration into those of PEFT's own two
layouts, of stacked parameters and of experts one by one, which the rest of the package knows.
Bytes move and no value changes. The order in which they are asked is that of `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools_formats.core.file_names import ADAPTER_CONFIG
from loratools_formats.core.tensors import TensorRef
from loratools_formats.formats.peft.config import check_value
from loratools_formats.formats.peft.experts import flat_3d, projections, tinker
from loratools_formats.formats.peft.experts.layout import Layout, Plain

LAYOUTS: tuple[Layout, ...] = (tinker.LAYOUT, projections.LAYOUT, flat_3d.LAYOUT)


def plain(values: Mapping[str, Any], tensors: Mapping[str, TensorRef], folder: Path) -> Plain:
    """Return a folder's configuration and tensors as PEFT has them.

    Args:
        values: the configuration.
        tensors: under names that PEFT saves.
        folder: for messages.

    Raises:
        AdapterError: tensors of a layout do not fit together.
        UnsupportedError: the number of experts cannot be told.
    """
    found = Plain(values, tensors)
    for layout in LAYOUTS:
        if layout.claims(found.tensors):
            check_value(values, "target_parameters", folder / ADAPTER_CONFIG)
            found = layout.read(found, folder).after(found)
    return found
