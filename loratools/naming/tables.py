"""Tables of the two namings of an architecture: data files, read and checked, and looked up.

A table has rows: a module of the original naming, and the modules that stand for it in diffusers'
naming, one, or several that divide its rows. Patterns have `{}` for numbers. A table also tells
its architecture from its neighbours': the proportion of a weight's rows to its columns, and how
many blocks there are. A user's own table is a file of the same form.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from loratools.naming.form import check_form
from loratools_formats.disk.errors import OptionError
from loratools_formats.disk.files import read_small_file

Scheme = Literal["original", "trained", "diffusers"]
"""The namings of an architecture: ComfyUI's and mostly that of its first checkpoint; that of its
trainers and of other checkpoints, where a table has one; and diffusers'."""
Shape = tuple[int | None, int | None]
"""(out, in) of a weight as a matrix; None for a side that is not known."""

_MAX_FILE_BYTES = 1 << 20
_MOST_ROWS = 4096
_NUMBERS = re.compile(r"(?:\{\}|\d)+")
_UNCLEAR = re.compile(r"\{\}(?:\{\}|\d)")
_TEXT_ENCODERS = "text_encoders"
_NO_TABLES = (_TEXT_ENCODERS, "neighbours")


@dataclass(frozen=True)
class Row:
    """One module of the original naming.

    Attributes:
        original: its name there.
        diffusers: the names of what stands for it, in the order of its rows.
        parts: how many of the equal parts of its rows each of them has.
        swapped_halves: whether the two halves of its outputs are in the other order.
        shape: its rows and columns, in proportion; None if that varies.
        kernel: the kernel that its weight has as a convolution; None if the table does not tell.
        component: the component that it is of in diffusers' naming, where that is not the table's;
            its original name begins with a prefix of its own, then. Empty otherwise.
        trained: what trainers call it, or each of its parts; empty if they use its original name.
    """

    original: str
    diffusers: tuple[str, ...]
    parts: tuple[int, ...]
    swapped_halves: bool = False
    shape: tuple[int, int] | None = None
    kernel: tuple[int, ...] | None = None
    component: str = ""
    trained: tuple[str, ...] = ()

    def fits(self, covered: tuple[int, ...], shape: Shape) -> bool:
        """Return whether some of its parts may be of that shape."""
        rows, columns = shape
        if self.shape is None or rows is None or columns is None:
            return True
        share = sum(self.parts[part] for part in covered)
        return rows * self.shape[1] * sum(self.parts) == columns * self.shape[0] * share

    def names(self, scheme: Scheme) -> tuple[str, ...]:
        """Return what its parts are called in a naming; one name if they are one module there."""
        if scheme == "diffusers":
            return self.diffusers
        return self.trained if scheme == "trained" and self.trained else (self.original,)

    @property
    def stack(self) -> str:
        """Name of the list of blocks that it is in; empty if it is in none."""
        return self.original.partition(".{}.")[0] if ".{}." in self.original else ""


@dataclass(frozen=True)
class Place:
    """Where a name stands in a table.

    Attributes:
        row: the row.
        numbers: what its `{}` are.
        covered: which of the row's parts the name covers, in order.
        scheme: the naming that the name is of.
        component: the component of a pipeline that the name has; empty if it has none.
    """

    row: Row
    numbers: tuple[str, ...]
    covered: tuple[int, ...]
    scheme: Scheme
    component: str = ""


@dataclass(frozen=True)
class TextEncoder:
    """What a text encoder is called.

    Attributes:
        kohya: prefix of its flattened names.
        comfyui: its name after `text_encoders.`.
        paths: its modules, as transformers names them.
        also: other prefixes of its flattened names, which are read.
        outer: what paths begin with in ComfyUI's files only, since others name modules within it.
    """

    kohya: str
    comfyui: str
    paths: tuple[str, ...]
    also: tuple[str, ...] = ()
    outer: str = ""


class Table:
    """The names of one architecture.

    Args:
        name: what users type.
        values: the parsed file.
        path: a user's file, for messages.

    Raises:
        OptionError: it is not such a table.
    """

    def __init__(self, name: str, values: Mapping[str, Any], path: str | None = None) -> None:
        check_form(values, _paths(), path)
        self.name = name
        self.title: str = values["title"]
        self.component: str = values["diffusers"]
        self.components = (self.component, *values.get("experts", ()))
        self.kohya: Scheme = values["kohya"]
        # Whether diffusers' names have diffusers' prefixes only.
        self.unmixed: bool = bool(values.get("unmixed"))
        self.classes: tuple[str, ...] = tuple(values.get("classes", ()))
        self._known_as = [re.compile(text, re.IGNORECASE) for text in values.get("known_as", ())]
        self._blocks: dict[str, tuple[int, ...]] = {
            name: tuple(counts) for name, counts in values.get("blocks", {}).items()
        }
        self.text_encoders = {
            role: TextEncoder(
                entry["kohya"],
                entry["comfyui"],
                _paths()[entry["paths"]],
                tuple(entry.get("also", ())),
                entry.get("outer", ""),
            )
            for role, entry in values.get("text_encoders", {}).items()
        }
        try:
            _check_number(values)
            self._rows = [row for group in values["modules"] for row in _rows(group)]
            by_name = {row.original: row for row in reversed(self._rows)}
            aliases = [alias for group in values.get("aliases", ()) for alias in _rows(group)]
            self._aliases = [_aliased(alias, by_name) for alias in aliases]
        except ValueError as error:
            raise OptionError(
                f"a row of the table of names is wrong: {error}",
                path=path,
                hint="The bundled tables show the form: loratools/naming/data",
            ) from error

    @functools.cached_property
    def other_components(self) -> tuple[str, ...]:
        """Components of rows that are of another than the table's."""
        return tuple(sorted({row.component for row in self._rows} - {""}))

    def is_known_as(self, text: str) -> bool:
        """Return whether a file's metadata means this architecture by a text."""
        return any(pattern.search(text) for pattern in self._known_as)

    def is_complete(self, places: Iterable[Place]) -> bool:
        """Return whether places are in all blocks of each list of blocks that they are in."""
        last: dict[str, int] = {}
        for place in places:
            stack = place.row.stack
            if stack in self._blocks:
                last[stack] = max(last.get(stack, 0), int(place.numbers[0]))
        return bool(last) and all(n + 1 in self._blocks[stack] for stack, n in last.items())

    def locate(
        self,
        path: str,
        *,
        flat: bool,
        schemes: tuple[Scheme, ...],
        shape: Shape = (None, None),
        component: str = "",
    ) -> Place | None:
        """Return where a module's path stands, None if it is in none of the schemes.

        Args:
            path: within the component.
            flat: whether `_` stands for `.` in it.
            schemes: namings it may be of.
            shape: of the module's weight; a place must have the proportion of its sides.
            component: of the rows that may be meant; empty for the table's own.

        Raises:
            OptionError: several rows have that flattened name.
        """
        found = [
            place
            for scheme in schemes
            for place in self._index(scheme, flat).look_up(path)
            if place.row.component == component
            and place.row.fits(place.covered, shape)
            and self._has_block(place)
        ]
        if len({(place.row, place.numbers, place.covered) for place in found}) > 1:
            raise OptionError(f"several modules of {self.title} have that name", got=path)
        return found[0] if found else None

    def _has_block(self, place: Place) -> bool:
        counts = self._blocks.get(place.row.stack)
        return counts is None or int(place.numbers[0]) < max(counts)

    @functools.cache  # noqa: B019 - tables live as long as the process
    def _index(self, scheme: Scheme, flat: bool) -> _Index:
        entries: list[tuple[str, Row, tuple[int, ...]]] = []
        for row in self._rows:
            names = row.trained if scheme == "trained" else row.names(scheme)
            if len(names) == 1:
                entries.append((names[0], row, tuple(range(len(row.parts)))))
            else:
                entries += [(name, row, (part,)) for part, name in enumerate(names)]
        if scheme == "original":
            entries += self._aliases
        return _Index(entries, scheme, flat)


def _check_number(values: Mapping[str, Any]) -> None:
    """Refuse more rows than any model has kinds of modules: each is compared with each name."""
    groups = (*values["modules"], *values.get("aliases", ()))
    rows = sum(len(group["pairs"]) * len(group.get("blocks") or [1]) for group in groups)
    if rows > _MOST_ROWS:
        raise ValueError(f"there are {rows} rows, and at most {_MOST_ROWS} are allowed")


def _aliased(alias: Row, rows: Mapping[str, Row]) -> tuple[str, Row, tuple[int, ...]]:
    """Return an alias, its row, and the parts of the row that it covers, which are its first ones.

    Raises:
        ValueError: there is no such row, or it has no such parts.
    """
    row = rows.get(alias.diffusers[0])
    if row is None:
        raise ValueError(f"{alias.original} stands for {alias.diffusers[0]}, which is no module")
    if len(alias.diffusers) != 1:
        raise ValueError(f"{alias.original} stands for several modules")
    if len(alias.parts) == 1:
        return alias.original, row, tuple(range(len(row.parts)))
    share, whole = alias.parts
    counts = [n for n in range(1, len(row.parts) + 1) if sum(row.parts[:n]) == share]
    if not counts or whole != sum(row.parts):
        raise ValueError(f"{row.original} has no part of {share} in {whole} rows")
    return alias.original, row, tuple(range(counts[0]))


class _Index:
    """Rows by name; names with numbers by regular expression."""

    def __init__(
        self, entries: list[tuple[str, Row, tuple[int, ...]]], scheme: Scheme, flat: bool
    ) -> None:
        self._scheme: Scheme = scheme
        self._exact: dict[str, list[Place]] = {}
        self._patterns: dict[str, list[tuple[re.Pattern[str], Row, tuple[int, ...]]]] = {}
        for name, row, covered in entries:
            spelled = flattened(name) if flat else name
            if "{}" in name:
                text = re.escape(spelled).replace(re.escape("{}"), r"(\d{1,4})")
                found = (re.compile(text), row, covered)
                self._patterns.setdefault(_NUMBERS.sub("#", spelled), []).append(found)
            else:
                self._exact.setdefault(spelled, []).append(Place(row, (), covered, scheme))

    def look_up(self, path: str) -> Iterator[Place]:
        yield from self._exact.get(path, ())
        for pattern, row, covered in self._patterns.get(_NUMBERS.sub("#", path), ()):
            found = pattern.fullmatch(path)
            if found is not None:
                yield Place(row, found.groups(), covered, self._scheme)


def _rows(group: Mapping[str, Any]) -> Iterator[Row]:
    first, second = ("alias", "original") if "alias" in group else ("original", "diffusers")
    blocks = group.get("blocks") or [[group.get(first, ""), group.get(second, "")]]
    for start, other_start in blocks:
        pairs: list[list[str]] = group["pairs"]
        trained: list[list[str]] = group.get("trained") or [[] for _ in pairs]
        if len(trained) != len(pairs):
            raise ValueError(f"{len(trained)} lists of trained names are beside {len(pairs)} pairs")
        for (name, *others), names in zip(pairs, trained, strict=True):
            parts = tuple(group.get("rows") or [1] * len(others))
            whole_given = "alias" in group and len(parts) == 2
            if not others or (len(parts) != len(others) and not whole_given):
                count = "1 module" if len(others) == 1 else f"{len(others)} modules"
                raise ValueError(f"{name} stands for {count} in {len(parts)} parts")
            row = Row(
                start + name,
                tuple(other_start + other for other in others),
                parts,
                bool(group.get("swapped_halves")),
                tuple(group["shape"]) if "shape" in group else None,
                tuple(group["kernel"]) if "kernel" in group else None,
                group.get("component", ""),
                tuple(start + other for other in names),
            )
            if len(names) not in (0, 1, len(parts)):
                raise ValueError(f"{name} has {len(names)} trained names for {len(parts)} parts")
            texts = (*row.diffusers, *row.trained)
            if any(_UNCLEAR.search(text) for text in (row.original, *texts)):
                raise ValueError(f"a digit, or another number, follows a number in {name}")
            if any(text.count("{}") != row.original.count("{}") for text in texts):
                raise ValueError(f"{name} has other numbers than what it stands for")
            yield row


def flattened(path: str) -> str:
    """Return a path as kohya's files have it.

    >>> flattened("down_blocks.0.attn1.to_q")
    'down_blocks_0_attn1_to_q'
    """
    return path.replace(".", "_")


def filled(pattern: str, numbers: tuple[str, ...]) -> str:
    """Return a name with its numbers in place.

    >>> filled("blocks.{}.ffn.{}", ("3", "0"))
    'blocks.3.ffn.0'
    """
    pieces = pattern.split("{}")
    return "".join(piece + number for piece, number in zip(pieces, (*numbers, ""), strict=True))


@functools.cache
def _paths() -> dict[str, tuple[str, ...]]:
    import tomllib

    text = _data().joinpath(f"{_TEXT_ENCODERS}.toml").read_text(encoding="utf-8")
    return {name: tuple(entry["paths"]) for name, entry in tomllib.loads(text).items()}


def _data() -> Any:
    return resources.files("loratools.naming").joinpath("data")


@functools.cache
def bundled_tables() -> tuple[Table, ...]:
    """Return the tables that come with loratools, by name."""
    import tomllib

    files = sorted(f.name for f in _data().iterdir() if f.name.endswith(".toml"))
    names = [file.removesuffix(".toml") for file in files]
    return tuple(
        Table(name, tomllib.loads(_data().joinpath(f"{name}.toml").read_text(encoding="utf-8")))
        for name in names
        if name not in _NO_TABLES
    )


def find_table(name: str) -> Table:
    """Return a bundled table by its name, or a user's by its path.

    Raises:
        OptionError: there is none of that name, or the file is no table.
        MissingFileError: no such file.
    """
    for table in bundled_tables():
        if table.name == name:
            return table
    if not name.endswith(".toml"):
        known = [table.name for table in bundled_tables()]
        close = [one for one in known if name and one.startswith(name.lower())]
        close = close or difflib.get_close_matches(name, known, n=1)
        raise OptionError(
            "there is no table of names with this name",
            got=name,
            expected=", ".join(known) + " or FILE.toml",
            hint=f"Did you mean {' or '.join(close)}?" if close else None,
        )
    from loratools_formats.disk import strict_toml

    try:
        values = strict_toml.loads(read_small_file(name, _MAX_FILE_BYTES))
    except strict_toml.StrictTomlError as error:
        raise OptionError(f"not a TOML file: {error}", path=name) from error
    return Table(Path(name).stem, values, name)
