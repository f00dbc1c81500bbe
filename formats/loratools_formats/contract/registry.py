"""Finding the format of a path, reading it, and publishing what is written.

Formats are entry points of the group `loratools.formats`, ours and third parties' alike. A plugin
that cannot be loaded stays visible as a broken entry and stops nothing else. Formats only encode
and decode; making the output appear whole, with its provenance, happens here for all of them.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.contract.plugins import Plugin, load_group
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import (
    MissingFileError,
    OutputError,
    OutputExistsError,
    UnknownFormatError,
    UnsupportedError,
    printable,
)
from loratools_formats.disk.provenance import PROVENANCE_FILE, statement
from loratools_formats.disk.publish import publish_file, publish_folder, resolved

GROUP = "loratools.formats"


@dataclass(frozen=True)
class Loss:
    """Something of an adapter that a format cannot hold.

    Attributes:
        name: the module or tensor.
        reason: why not, to be read after the name.
        remedy: what the user can do instead of leaving it out; empty for nothing.
    """

    name: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Context:
    """What translating between a format's module names and the base model's may need.

    Attributes:
        base: folder or file of the base model; only headers and configuration are read.
        dtype: type to store factors in, one of the format's `dtypes`; None for its own choice.
    """

    base: Path | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Format:
    """A format: how to recognise, read and write it. Plugins register one of these.

    Readers hand out modules under the names and in the layout of the file, and writers take them
    so: squeezing or merging files of one format needs no names of the base model. Converting to
    another does, and goes through the base model's names: `to_model` of the one format, then
    `from_model` of the other.

    Attributes:
        name: what users type, such as `peft`.
        description: one line for `loratools formats`.
        suffixes: endings of its files' names, or of its folders' if they have one of their own.
        is_folder: whether an adapter is a folder rather than a file.
        sniff: whether a path looks like this format. Reads at most 64 KiB and never raises.
        read: read headers only; tensors load later. None if it cannot be read.
        read_with_unknown: the same, carrying tensors that `read` refuses since it does not know
            them; None if there are none such.
        losses: what the format could not hold of an adapter.
        write: write to a path that does not exist yet. Whoever calls it publishes the result
            atomically. None if it cannot be written.
        weights_nbytes: size of the weight file that `write` would make; None if not writable.
        merged_config: configuration of an adapter made from several, ranks and scales aside;
            None if the format has no configuration.
        to_model: give an adapter of this format the base model's module names and layout. None if
            it has them as read.
        from_model: give an adapter with the base model's names and layout those of this format,
            and everything else that `write` wants; what `losses` lists is left out. Changes no
            ΔW, unless the context asks for a type that cannot hold it. None if any adapter can be
            written as it is.
        dtypes: types that the context may ask `from_model` to store factors in.
        caveats_kept: codes of caveats that this format expresses, so that they hinder no
            conversion into it.
        plain_config: configuration of the same adapter once its modules are plain factors; None
            if the format has no configuration.
    """

    name: str
    description: str
    suffixes: tuple[str, ...]
    is_folder: bool
    sniff: Callable[[Path], bool]
    read: Callable[[Path], Adapter] | None = None
    read_with_unknown: Callable[[Path], Adapter] | None = None
    losses: Callable[[Adapter], list[Loss]] | None = None
    write: Callable[[Adapter, Path], None] | None = None
    weights_nbytes: Callable[[Adapter], int] | None = None
    merged_config: Callable[[Sequence[Adapter]], Mapping[str, Any]] | None = None
    to_model: Callable[[Adapter, Context], Adapter] | None = None
    from_model: Callable[[Adapter, Context], Adapter] | None = None
    dtypes: tuple[str, ...] = ()
    caveats_kept: tuple[str, ...] = ()
    plain_config: Callable[[Adapter], Mapping[str, Any]] | None = None


class FormatEntry(Plugin[Format]):
    """A registered format, or why it could not be loaded."""

    @property
    def format(self) -> Format | None:
        """The format; None if broken."""
        return self.loaded


@functools.cache
def registered_formats() -> tuple[FormatEntry, ...]:
    """Return every registered format sorted by name, broken ones included."""
    return tuple(FormatEntry(p.point, p.loaded, p.error) for p in load_group(GROUP, Format))


def get_format(name: str) -> Format:
    """Return the format registered as `name`, in capital or small letters.

    Raises:
        UnknownFormatError: there is none, it is broken, or two packages claim the name.
    """
    entries = registered_formats()
    named = [entry for entry in entries if entry.name == name]
    named = named or [entry for entry in entries if entry.name.lower() == name.lower()]
    matches = [entry for entry in named if entry.format is not None] or named
    if len(matches) > 1:
        packages = ", ".join(entry.package for entry in matches)
        raise UnknownFormatError(f"format {name!r} is registered by several packages: {packages}")
    if not matches:
        known = [entry.name for entry in entries]
        close = difflib.get_close_matches(name, known, n=1)
        raise UnknownFormatError(
            f"no format named {name!r}",
            expected=" or ".join(known),
            hint=f"Did you mean {close[0]!r}?" if close else None,
        )
    if matches[0].format is None:
        raise UnknownFormatError(f"format {name!r} is broken", got=matches[0].error)
    return matches[0].format


def _sniffs(entry: FormatEntry, path: Path) -> bool:
    if entry.format is None:
        return False
    try:
        return bool(entry.format.sniff(path))
    except Exception as error:  # noqa: BLE001 - a plugin breaking its contract must not stop others
        print(f"note: format {entry.name}: sniff failed: {printable(error)}", file=sys.stderr)
        return False


def find_format(path: str | os.PathLike[str]) -> Format:
    """Return the one format that recognises `path`.

    Raises:
        MissingFileError: nothing is there.
        UnknownFormatError: none recognises it, or several do.
    """
    target = Path(path)
    try:
        exists = os.path.lexists(target)
    except ValueError:
        exists = False
    if not exists:
        raise MissingFileError("no such file or folder", path=path)
    found = [entry for entry in registered_formats() if _sniffs(entry, target)]
    if len(found) == 1 and found[0].format is not None:
        return found[0].format
    if found:
        names = ", ".join(entry.name for entry in found)
        raise UnknownFormatError(
            f"several formats recognise it: {names}", path=path, hint="Name one with `format`"
        )
    known = ", ".join(entry.name for entry in registered_formats() if entry.format is not None)
    hint = f"Known formats: {known}"
    if target.is_dir():
        below = _adapters_below(target)
        if below:
            hint = f"It holds adapters in sub-folders; name one of: {', '.join(below)}"
    raise UnknownFormatError("no known format recognises it as an adapter", path=path, hint=hint)


def format_for_output(path: str | os.PathLike[str]) -> Format:
    """Return the one writable format whose outputs are named like `path`.

    Raises:
        UnknownFormatError: none, or several.
    """
    name = os.path.basename(os.fspath(path)).lower()
    writable = [e.format for e in registered_formats() if e.format and e.format.write]
    found = [f for f in writable if any(name.endswith(suffix) for suffix in f.suffixes)]
    if not found and "." not in name:
        found = [f for f in writable if f.is_folder and not f.suffixes]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f.name for f in found or writable)
    raise UnknownFormatError(
        "several formats have outputs named so" if found else "no format has outputs named so",
        path=path,
        hint=f"Name one with `to`: {names}",
    )


def _adapters_below(folder: Path) -> list[str]:
    try:
        children = sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError:
        return []
    return [
        child.name
        for child in children
        if any(_sniffs(entry, child) for entry in registered_formats())
    ]


def read_adapter(
    path: str | os.PathLike[str], format_name: str | None = None, *, carry_unknown: bool = False
) -> Adapter:
    """Read an adapter's headers; its tensors load on demand.

    Args:
        path: file or folder.
        format_name: read it as this format instead of recognising it.
        carry_unknown: keep tensors that the format does not know, where it would refuse them.

    Raises:
        LoratoolsError: nothing there, unknown format, or not a sound adapter.
    """
    chosen = find_format(path) if format_name is None else get_format(format_name)
    if chosen.read is None:
        raise UnsupportedError(f"format {chosen.name} can be written but not read", path=path)
    if carry_unknown and chosen.read_with_unknown is not None:
        return chosen.read_with_unknown(Path(path))
    return chosen.read(Path(path))


def check_target(
    path: str | os.PathLike[str], sources: Iterable[Path], *, overwrite: bool = False
) -> None:
    """Refuse, before any work is done, an output that could not be published.

    Raises:
        OutputError: the folder that it would be in does not exist.
        OutputExistsError: it exists and may not be replaced, or lies inside or around a source.
    """
    target = resolved(path)
    if not target.parent.is_dir():
        raise OutputError("the folder to write into does not exist", path=target.parent)
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(
            "output exists", path=path, hint="Pass `overwrite=True` to replace it"
        )
    for source in sources:
        real = Path(os.path.realpath(source))
        if real != target and (target in real.parents or real in target.parents):
            raise OutputExistsError(
                "the output lies inside the input or around it",
                path=path,
                hint="Choose an output beside it",
            )


def check_output(
    adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Refuse, before any work is done, an output of an adapter that could not be published.

    Raises:
        OutputError: the folder that it would be in does not exist.
        OutputExistsError: it exists and may not be replaced, or lies inside or around the input.
    """
    sources = [] if adapter.source is None else [adapter.source]
    check_target(path, sources, overwrite=overwrite)


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format_name: str,
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write an adapter so that it appears whole or not at all, with its provenance beside it.

    Args:
        adapter: what to write.
        path: where.
        format_name: in which format.
        overwrite: whether an output that exists may be replaced.
        check: looks at the output before it appears; by raising it keeps it from appearing.

    Raises:
        OutputExistsError: the output exists and `overwrite` is false, or holds foreign files.
        OutputError: the system refused; nothing was changed.
        UnsupportedError: the adapter is of another format, and was not converted.
    """
    chosen = get_format(format_name)
    if chosen.write is None:
        raise UnsupportedError(f"format {chosen.name} can be read but not written")
    if adapter.format != chosen.name:
        raise UnsupportedError(
            f"an adapter of format {adapter.format} is not in the terms of format {chosen.name}",
            path=adapter.source,
            hint="Convert it first: loratools.write, or loratools convert",
        )
    check_output(adapter, path, overwrite=overwrite)
    publish = publish_folder if chosen.is_folder else publish_file
    with publish(path, overwrite=overwrite) as temporary:
        chosen.write(adapter, temporary)
        if check is not None:
            check(temporary)
        adapter.check_unchanged()
        if adapter.provenance is not None and chosen.is_folder:
            files = sorted(p for p in temporary.iterdir() if p.suffix != ".md")
            (temporary / PROVENANCE_FILE).write_bytes(statement(adapter.provenance, files))
    if chosen.is_folder:
        return
    for name, content in _beside(adapter, Path(path)).items():
        with publish_file(Path(f"{os.fspath(path)}.{name}"), overwrite=True) as temporary:
            temporary.write_bytes(content)


def _beside(adapter: Adapter, path: Path) -> dict[str, bytes]:
    """Return what goes beside an output that is one file: its record, and what was made with it."""
    made = {name: c for name, c in adapter.attachments.items() if isinstance(c, bytes)}
    if adapter.provenance is None:
        return made
    return {**made, PROVENANCE_FILE: statement(adapter.provenance, [path])}
