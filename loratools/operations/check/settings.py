"""Settings of `check` from the caller's folder: `loratools.toml`, or `pyproject.toml`.

The adapter's own folder is never asked: a stranger's file would decide what is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.disk import strict_toml
from loratools_formats.disk.errors import OptionError
from loratools_formats.disk.files import read_small_file

_MAX_BYTES = 1 << 20
_LISTS = ("select", "ignore", "target")
_TEXTS = ("fail-on", "base", "baseline")
_FLAGS = ("headers-only",)


@dataclass(frozen=True)
class Settings:
    """Settings, by the words of the command line.

    Attributes:
        path: the file; None if there is none.
        values: what it says.
    """

    path: Path | None
    values: Mapping[str, Any]

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, empty if there is none."""
        return tuple(self.values.get(key, ()))

    def text(self, key: str) -> str | None:
        """Return a text, None if there is none."""
        found: str | None = self.values.get(key)
        return found

    def file(self, key: str) -> Path | None:
        """Return a path, which is relative to the file that names it."""
        text = self.text(key)
        return None if text is None or self.path is None else self.path.parent / text


def settings_in(folder: Path) -> Settings:
    """Return the settings in a folder; `loratools.toml` before `pyproject.toml`.

    Raises:
        OptionError: the file is no TOML, or has an unknown key or a value of the wrong type.
    """
    own, project = folder / "loratools.toml", folder / "pyproject.toml"
    if own.is_file():
        return _checked(own, _read(own).get("check", {}))
    if project.is_file():
        tool = _read(project).get("tool", {}).get("loratools", {})
        return _checked(project, tool.get("check", {}))
    return Settings(None, {})


def _read(path: Path) -> dict[str, Any]:
    try:
        return strict_toml.loads(read_small_file(path, _MAX_BYTES))
    except strict_toml.StrictTomlError as error:
        raise OptionError(f"not TOML: {error}", path=path) from error


def _checked(path: Path, values: Any) -> Settings:
    if not isinstance(values, dict):
        raise OptionError("the table check is wrong", path=path, got=type(values).__name__)
    known = (*_LISTS, *_TEXTS, *_FLAGS)
    for key, value in values.items():
        if key not in known:
            raise OptionError(
                "no such setting of check", path=path, got=key, expected=" or ".join(known)
            )
        is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
        fits = is_list if key in _LISTS else isinstance(value, str if key in _TEXTS else bool)
        if not fits:
            wanted = "a list of texts" if key in _LISTS else "a text"
            wanted = "true or false" if key in _FLAGS else wanted
            raise OptionError(f"setting {key} is wrong", path=path, got=value, expected=wanted)
    return Settings(path, values)
