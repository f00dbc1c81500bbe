"""Adapters trained on a base in four bits (QLoRA), and how their files show it.

Such an adapter makes up for the rounding of its base, too. On the plain base it acts on other
weights: `--trained-on` gives it those that it was trained on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from loratools.base.fourbit.encode import FourBitOptions
from loratools_formats.checkpoints.checkpoint import CONFIG_FILE
from loratools_formats.checkpoints.quantization import quantization_of
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.file_names import CARD
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, OptionError, printable
from loratools_formats.disk.files import is_trouble
from loratools_formats.disk.strict_json import read_object

_SPELLINGS = {
    "nf4": FourBitOptions("nf4", double_quant=False),
    "nf4:double": FourBitOptions("nf4", double_quant=True),
    "fp4": FourBitOptions("fp4", double_quant=False),
    "fp4:double": FourBitOptions("fp4", double_quant=True),
}
_IN_NAMES = re.compile(
    r"(?:bnb|nf4|fp4|qlora|bitsandbytes).?4?.?bit|bnb.?nf4|[-_]nf4(?:[-_]|$)", re.IGNORECASE
)
_IN_CARDS = re.compile(r"^\W*_?load_in_4bit\W+True", re.MULTILINE)
_KIND_IN_CARDS = re.compile(r"^\W*bnb_4bit_quant_type\W+(nf4|fp4)", re.MULTILINE)
_DOUBLE_IN_CARDS = re.compile(r"^\W*bnb_4bit_use_double_quant\W+True", re.MULTILINE)
_MOST_BYTES = 1 << 20


def four_bits(spelling: str) -> FourBitOptions:
    """Return the four bits that a spelling means: `nf4`, `nf4:double`, `fp4` or `fp4:double`.

    Raises:
        OptionError: it means none.
    """
    if spelling not in _SPELLINGS:
        raise OptionError(
            "no such format to have been trained on", got=spelling, expected=", ".join(_SPELLINGS)
        )
    return _SPELLINGS[spelling]


def trained_on_notes(adapters: Iterable[Adapter]) -> Iterator[Finding]:
    """Yield a note for each adapter whose own files say that its base was in four bits."""
    for adapter in adapters:
        found = _told(adapter)
        if found is not None:
            where, spelling = found
            name = printable(str(adapter.source or adapter.base_model))
            yield Finding(
                "trained-on-four-bits",
                "note",
                None,
                f"{name} was trained on a base in four bits, as {where} says; "
                f'`trained_on="{spelling}"` fuses it into the weights that it was trained on',
            )


def _told(adapter: Adapter) -> tuple[str, str] | None:
    """Return where four bits are mentioned, and how they are spelled; None if they are not."""
    card = _card(adapter)
    if _IN_CARDS.search(card):
        found = _KIND_IN_CARDS.search(card)
        kind = "nf4" if found is None else found[1]
        double = ":double" if _DOUBLE_IN_CARDS.search(card) else ""
        return "its README.md", f"{kind}{double}"
    base = adapter.base_model
    if base is None:
        return None
    stated = _stated(Path(base)) if os.path.isdir(base) else {}
    said = stated.get("bnb_4bit_quant_type")
    if stated.get("load_in_4bit") and said in ("nf4", "fp4"):
        double = ":double" if stated.get("bnb_4bit_use_double_quant") else ""
        return printable(base), f"{said}{double}"
    if _IN_NAMES.search(base):
        return f"the name of its base, {printable(base)},", "nf4:double"
    return None


def _card(adapter: Adapter) -> str:
    """Return the text of an adapter's card; empty if it has none."""
    kept = adapter.attachments.get(CARD)
    if isinstance(kept, bytes):
        return kept[:_MOST_BYTES].decode("utf-8", "replace")
    folder = adapter.source
    path = kept or (folder / CARD if folder is not None and folder.is_dir() else None)
    if path is None or not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_MOST_BYTES).decode("utf-8", "replace")


def _stated(base: Path) -> dict[str, object]:
    try:
        config = read_object(base / CONFIG_FILE, _MOST_BYTES, max_depth=None)
    except AdapterError as error:
        if is_trouble(error):
            raise
        return {}
    found = quantization_of(config)
    return dict(found) if isinstance(found, dict) else {}
