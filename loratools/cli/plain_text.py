"""Signs in ASCII, for the locale C and for streams that can hold nothing else.

Python writes UTF-8 where no locale is set, as in most containers, and so do we. `LANG=C` or
`LC_ALL=POSIX` that somebody did set means a terminal which shows bytes.
"""

from __future__ import annotations

import os
import sys

_SIGNS = {
    "→": "->", "←": "<-", "‖": "|", "Δ": "d", "×": "x", "–": "-", "—": "-", "…": "...", "±": "+-",
    "≤": "<=", "≥": ">=", "−": "-", "·": "*", "√": "sqrt", "²": "^2", "₀": "0", "₁": "1",
    "₂": "2", "σ": "sigma", "α": "alpha", "λ": "lambda", "ε": "epsilon", "β": "beta",
    "└": "`", "├": "|", "─": "-", "│": "|", "∥": "|", "’": "'", "“": '"', "”": '"',
    "▁": "_", "▂": ".", "▃": ":", "▄": "-", "▅": "=", "▆": "+", "▇": "*", "█": "#",
}  # fmt: skip
_TABLE = str.maketrans(_SIGNS)


def is_ascii() -> bool:
    """Return whether signs are to be spelled in ASCII."""
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        value = os.environ.get(name)
        if value:
            return value in ("C", "POSIX")
    return not _encodes("→")


def _encodes(sign: str) -> bool:
    try:
        sign.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def spelled(text: str) -> str:
    """Return text in the signs that the terminal is asked to show."""
    return text.translate(_TABLE) if not text.isascii() and is_ascii() else text
