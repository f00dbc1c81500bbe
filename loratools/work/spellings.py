"""What people write, read in one way everywhere: types of elements, shares, key=value pairs."""

from __future__ import annotations

import re

from loratools_formats.disk.errors import OptionError

_DTYPES = {
    "f32": ("f32", "fp32", "float32", "float"),
    "f16": ("f16", "fp16", "float16", "half"),
    "bf16": ("bf16", "bfloat16"),
}
_SPELLED = {spelling: name for name, spellings in _DTYPES.items() for spelling in spellings}


def dtype(text: str) -> str:
    """Return the short name of an element type; a GGUF type such as Q8_0 in small letters.

    >>> dtype("float16"), dtype("BFloat16"), dtype("Q8_0")
    ('f16', 'bf16', 'q8_0')
    """
    name = text.strip().lower().removeprefix("torch.")
    return _SPELLED.get(name, name)


_NUMBER = r"(\d{1,30}\.?\d{0,30}|\.\d{1,30})"
_SIZE = re.compile(rf"{_NUMBER}\s*(?:([kmgt])(i?))?b?", re.IGNORECASE | re.ASCII)
_PERCENT = re.compile(rf"{_NUMBER}\s*%", re.ASCII)
_BARE_FRACTION = re.compile(r"0*\.\d*[1-9]\d*", re.ASCII)


def nbytes(text: str) -> int:
    """Return a size in bytes; `k`, `M`, `G` and `T` are powers of 1000, with an `i` of 1024.

    >>> nbytes("5GB"), nbytes("1.5 kb"), nbytes("4GiB"), nbytes("300")
    (5000000000, 1500, 4294967296, 300)

    Raises:
        OptionError: not a size, or not above zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise OptionError("not a size", got=text, expected="such as 5GB, 500MB or 4GiB")
    from fractions import Fraction  # with decimal; few runs read a size

    power = " kmgt".index((match[2] or " ").lower())
    size = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)
    if size <= 0:
        raise OptionError("not a size above zero", got=text)
    return size


def share_or_nbytes(text: str) -> tuple[float | None, int | None]:
    """Return a share written as a percentage, or a size in bytes; the other is None.

    >>> share_or_nbytes("25%"), share_or_nbytes("12MB")
    ((0.25, None), (None, 12000000))

    Raises:
        OptionError: it is neither, or not above zero.
    """
    bare = text.strip()
    percent = _PERCENT.fullmatch(bare)
    if percent is not None and float(percent[1]) > 0:
        return float(percent[1]) / 100, None
    if _BARE_FRACTION.fullmatch(bare):
        meant = f"{float(bare) * 100:g}%"
        raise OptionError(f"{bare} is a size in bytes; did you mean {meant}?")
    if percent is not None:
        raise OptionError("not a share above zero", got=text)
    if _SIZE.fullmatch(bare) is None:
        raise OptionError(
            "not a budget", got=text, expected="a size such as 12MB, or a share such as 25%"
        )
    return None, nbytes(bare)


def share(text: str) -> float:
    """Return a share: `0.9`, or `90%`.

    >>> share("0.9"), share("90%")
    (0.9, 0.9)

    Raises:
        OptionError: not a number.
    """
    number = text.strip()
    percent = number.endswith("%")
    try:
        value = float(number.removesuffix("%"))
    except ValueError as error:
        raise OptionError("not a share", got=text, expected="such as 0.9 or 90%") from error
    return value / 100 if percent else value


def key_value(text: str) -> tuple[str, str]:
    """Return the key and the value of `KEY=VALUE`; the value may hold further `=`.

    >>> key_value("note=a=b")
    ('note', 'a=b')

    Raises:
        OptionError: no key, or no `=`.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise OptionError("not a pair", got=text, expected="KEY=VALUE")
    return key.strip(), value
