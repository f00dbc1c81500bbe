"""The registered formats, and which of them a path or an output's name belongs to.

Formats are entry points of the group `loratools.formats`, ours and third parties' alike. A plugin
that cannot be loaded stays visible as a broken entry and stops nothing else.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import shlex
import warnings
from pathlib import Path

from loratools_formats.contract.format import Format
from loratools_formats.contract.plugins import Plugin, load_group
from loratools_formats.disk.distant import is_there
from loratools_formats.disk.errors import (
    AdapterError,
    PluginWarning,
    UnknownFormatError,
    printable,
)
from loratools_formats.disk.files import is_closed

GROUP = "loratools.formats"


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


def _working() -> list[Format]:
    return [entry.format for entry in registered_formats() if entry.format is not None]


_OF_PROGRAMS = {
    "a1111": "kohya", "aitoolkit": "diffusers", "automatic1111": "kohya", "bfl": "comfyui",
    "diffusionpipe": "comfyui", "forge": "kohya", "hf": "peft", "huggingface": "peft",
    "kohyass": "kohya", "llamacpp": "gguf", "lycoris": "kohya", "mlxlm": "mlx",
    "musubi": "kohya", "musubituner": "kohya", "ollama": "gguf", "onetrainer": "kohya",
    "sdscripts": "kohya", "sdwebui": "kohya", "transformers": "peft", "vllm": "peft",
    "webui": "kohya",
}  # fmt: skip
"""Formats of ours, by the programs that read or write them."""


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
        of_program = _OF_PROGRAMS.get(re.sub(r"[^a-z0-9]", "", name.lower()))
        close = [of_program] if of_program else difflib.get_close_matches(name, known, n=1)
        raise UnknownFormatError(
            f"no format named {name!r}",
            hint=f"Did you mean {close[0]!r}?" if close else f"Known formats: {', '.join(known)}",
        )
    if matches[0].format is None:
        raise UnknownFormatError(f"format {name!r} is broken", got=matches[0].error)
    return matches[0].format


def _recognises(found: Format, path: Path) -> bool:
    try:
        return bool(found.sniff(path))
    except Exception as error:  # noqa: BLE001 - a plugin breaking its contract must not stop others
        text = f"format {found.name}: sniff failed: {printable(error)}"
        warnings.warn(text, PluginWarning, stacklevel=2)
        return False


def is_recognised(path: str | os.PathLike[str]) -> bool:
    """Return whether a format, or several, take a path for an adapter."""
    return any(_recognises(one, Path(path)) for one in _working())


def find_format(path: str | os.PathLike[str]) -> Format:
    """Return the one format that recognises `path`.

    Warns:
        PluginWarning: a format raised an error where it should have said no.

    Raises:
        MissingFileError: nothing is there.
        UnknownFormatError: no format recognises it, or several do.
        AdapterError: it is a folder that may not be looked into.
    """
    target = Path(path)
    try:
        exists = is_there(target)
    except ValueError:
        exists = False
    if not exists:
        from loratools_formats.contract.path_kinds import missing

        raise missing(path)
    if is_closed(target):
        raise AdapterError(
            "is a folder that may not be looked into",
            path=path,
            hint="Change its permissions, or name another",
        )
    found = [one for one in _working() if _recognises(one, target)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(one.name for one in found)
        raise UnknownFormatError(
            f"several formats recognise it: {names}", path=path, hint="Name one with `format`"
        )
    below = _adapters_below(target) if target.is_dir() else []
    if below:
        raise UnknownFormatError(
            "is a folder with adapters in sub-folders",
            path=path,
            hint=f"Name one of them: {', '.join(below)}",
        )
    from loratools_formats.contract.path_kinds import kind_of, of_nothing_below

    kind = kind_of(target) or of_nothing_below(target)
    raise UnknownFormatError(kind.what, path=path, hint=kind.hint or None)


def _adapters_below(folder: Path) -> list[str]:
    try:
        folders = sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError:
        return []
    formats = _working()
    return [
        shlex.quote(os.fspath(child))
        for child in folders
        if not is_closed(child) and any(_recognises(one, child) for one in formats)
    ]


def format_for_output(path: str | os.PathLike[str]) -> Format:
    """Return the one writable format whose outputs are named like `path`.

    Raises:
        UnknownFormatError: the name fits no format, or several.
    """
    name = os.path.basename(os.fspath(path))
    writable = [one for one in _working() if one.is_writable]
    found = [one for one in writable if one.fits(name)]
    if not found and "." not in name:
        found = [one for one in writable if one.is_folder and not one.suffixes]
    if len(found) == 1:
        return found[0]
    names = ", ".join(one.name for one in found or writable)
    raise UnknownFormatError(
        f"the file name fits {'several formats' if found else 'no format'}",
        path=path,
        hint=f"Name one with `to`: {names}",
    )
