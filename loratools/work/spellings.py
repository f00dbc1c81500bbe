"""What people write, read in one way everywhere: types of elements, shares, key=value pairs."""

from __future__ import annotations

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
