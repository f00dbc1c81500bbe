"""Options of the library, the command line and recipes, declared once: as fields of dataclasses.

A field has the name, the type and the default of an option. Its help is its entry in the class's
docstring, under `Attributes:`. What only some users of a declaration need (a heading, a short flag,
old spellings, how text is read) is in the field's metadata; `option` puts it there.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import keyword
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.disk.errors import OptionError

HEADINGS = ("Input", "Method", "Selection", "Rank", "Computing", "Output", "Report")
"""Groups of options, in the order in which help shows them."""

_KEY = "loratools"
_WORDS = {"from": "format"}
"""What Python callers say where the command line's word is one of Python's own."""


@dataclass(frozen=True)
class Option:
    """One option, as its declaration says.

    Attributes:
        field: name of the dataclass field; recipes use it.
        name: name of the option; a trailing underscore keeps it apart from a word of Python.
        type: what the value is: `bool`, `int`, `float`, `str`, `Path` or what `parse` makes.
        default: the field's default; None if a factory makes it.
        help: one sentence.
        choices: the allowed values, empty if there is no list of them.
        multiple: whether the field is a tuple, and the flag repeatable.
        heading: the group that it belongs to in help, one of `HEADINGS`.
        short: a flag of one letter.
        aliases: older flags that mean the same; help does not show them.
        metavar: how help names the value.
        parse: reads the value from text; None if the type alone tells how.
        reference: what on the Hub it may name instead of a path; None if nothing.
        word: the keyword argument, where it does not follow from the name.
    """

    field: str
    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...]
    multiple: bool
    heading: str
    short: str | None
    aliases: tuple[str, ...]
    metavar: str | None
    parse: Callable[[str], Any] | None
    reference: str | None = None
    word: str | None = None

    @property
    def keyword(self) -> str:
        """The keyword argument: `set` for `set_`, `lambda_` for itself, `format` for `from_`."""
        if self.word is not None:
            return self.word
        word = self.name.rstrip("_")
        return _WORDS.get(word, self.name if keyword.iskeyword(word) else word)

    @property
    def flag(self) -> str:
        """The long flag: `--max-rank` for `max_rank`."""
        return "--" + self.name.rstrip("_").replace("_", "-")

    @property
    def reads_numbers(self) -> bool:
        """Whether a number may be given for a size that `parse` makes something else of."""
        return self.metavar == "SIZE" and dataclasses.is_dataclass(self.type)

    def _is_size(self, given: Any) -> bool:
        """Return whether a number stands for what text is read into: 12000000 for `12MB`."""
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        return is_number and self.reads_numbers

    def value(self, given: Any) -> Any:
        """Return the field's value for what a caller gave: text is read, several become a tuple.

        Raises:
            OptionError: the text is no value, or not one of the choices.
        """
        if not self.multiple:
            return self.one(given)
        if isinstance(given, Mapping):
            return tuple(given.items())
        items = (given,) if isinstance(given, str) else given
        return tuple(self.one(item) for item in items)

    def one(self, given: Any) -> Any:
        """Return one of the values, which text is read for.

        Raises:
            OptionError: the text is no value, or not one of the choices.
        """
        value = given
        if self.parse is not None and (isinstance(given, str) or self._is_size(given)):
            value = self.parse(str(given))
        if self.choices and isinstance(value, str):
            value = next((c for c in self.choices if c.lower() == value.lower()), value)
        if self.choices and value not in self.choices:
            close = difflib.get_close_matches(str(value), self.choices, n=1)
            raise OptionError(
                f"{self.name} has no such value",
                got=given,
                expected=" or ".join(self.choices),
                hint=f"Did you mean {close[0]}?" if close else None,
            )
        return value


def option(
    default: Any = dataclasses.MISSING,
    *,
    heading: str,
    factory: Callable[[], Any] | None = None,
    name: str | None = None,
    short: str | None = None,
    aliases: tuple[str, ...] = (),
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    reference: str | None = None,
    word: str | None = None,
) -> Any:
    """Declare an option as a dataclass field; the arguments are those of `Option`.

    Args:
        default: the field's default.
        heading: the group in help.
        factory: makes the default instead, where it depends on the machine.
        name: name of the option where it is not the field's.
        short: a flag of one letter.
        aliases: older flags.
        metavar: how help names the value.
        parse: reads the value from text.
        reference: what on the Hub it may name instead of a path.
        word: the keyword argument, where it does not follow from the name.
    """
    made = {
        "heading": heading, "name": name, "short": short, "aliases": aliases, "metavar": metavar,
        "parse": parse, "reference": reference, "word": word,
    }  # fmt: skip
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata={_KEY: made})
    return dataclasses.field(default=default, metadata={_KEY: made})


def declared(cls: type, *names: str) -> tuple[Option, ...]:
    """Return the options that a dataclass declares, in the order of its fields.

    Args:
        cls: a dataclass whose fields are made by `option`; others are no options.
        names: only the options of these names.

    Raises:
        KeyError: no option has one of the names, or the docstring does not describe a field.
    """
    options = _every(cls)
    return tuple(options[name] for name in names or options)


@functools.cache  # asked again for every adapter of a call
def _every(cls: Any) -> dict[str, Option]:
    texts = _attributes(cls)
    hints = typing.get_type_hints(cls)
    return {
        made.name: made
        for field in dataclasses.fields(cls)
        if _KEY in field.metadata
        for made in [_option(field, hints[field.name], texts[field.name])]
    }


def build(cls: type, given: Mapping[str, Any]) -> Any:
    """Return the dataclass for values by option name; those that are None keep their defaults.

    Raises:
        TypeError: the class declares no option of that name.
        OptionError: a text does not mean a value, or the class refuses the values.
    """
    known = {made.name: made for made in declared(cls)}
    for name in given:
        if name not in known:
            raise TypeError(f"{cls.__name__} has no option {name}")
    values = {
        known[name].field: known[name].value(value)
        for name, value in given.items()
        if value is not None
    }
    return cls(**values)


def flags(*groups: Any) -> list[str]:
    """Return the flags that say what instances of such dataclasses hold beside their defaults."""
    found: list[str] = []
    for group in groups:
        for made in declared(type(group)):
            value = getattr(group, made.field)
            if value is None or value == made.default:
                continue
            for one in value if made.multiple else (value,):
                if made.type is bool:
                    found.append(made.flag)
                elif isinstance(one, tuple):
                    found += [made.flag, "=".join(map(str, one))]
                else:
                    found += [made.flag, os.fspath(one) if isinstance(one, Path) else str(one)]
    return found


def _option(field: dataclasses.Field[Any], hint: Any, text: str) -> Option:
    made = dict(field.metadata[_KEY])
    kind, multiple, choices = _kind(hint)
    return Option(
        field=field.name,
        type=kind,
        multiple=multiple,
        choices=choices,
        default=None if field.default is dataclasses.MISSING else field.default,
        help=f"{text[0].upper()}{text[1:]}",
        **{**made, "name": made["name"] or field.name},
    )


def _kind(hint: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """Return an annotation's type without None, whether it is a tuple, and its choices."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    multiple = typing.get_origin(hint) is tuple
    if multiple:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        return str, multiple, typing.get_args(hint)
    return hint, multiple, ()


def _attributes(cls: type) -> dict[str, str]:
    """Return what a class and its bases say of each attribute under `Attributes:`."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(owner.__doc__ or "").partition("\nAttributes:\n")
        lines = re.split(r"\n(?=\S)", section)[0]
        for entry in re.split(r"^ {4}(?=\w)", lines, flags=re.MULTILINE)[1:]:
            name, _, text = entry.partition(":")
            found[name] = " ".join(text.split())
    return found
