"""Entry points of a group, loaded so that one that fails stays visible and stops nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from loratools_formats.contract.entry_points import EntryPoint, entry_points

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin(Generic[T]):
    """A registered name: what it stands for, or why that could not be loaded.

    Attributes:
        point: the entry point.
        loaded: None if broken.
        error: why it is broken, else None.
    """

    point: EntryPoint
    loaded: T | None
    error: str | None

    @property
    def name(self) -> str:
        """The registered name."""
        return self.point.name

    @property
    def package(self) -> str:
        """The distribution that registered it; read from its metadata when asked for."""
        return self.point.package()


def load_group(group: str, kind: type[T]) -> list[Plugin[T]]:
    """Return every entry point of a group, sorted by name.

    Args:
        group: name of the group.
        kind: what each must be; anything else is broken.
    """
    points = sorted(entry_points(group), key=lambda point: (point.name, point.value))
    return [_load(point, kind) for point in points]


def _load(point: EntryPoint, kind: type[T]) -> Plugin[T]:
    try:
        found = point.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a failure becomes a visible entry
        return Plugin(point, None, f"{type(error).__name__}: {error}")
    if not isinstance(found, kind):
        return Plugin(point, None, f"is a {type(found).__name__}, not a {kind.__name__}")
    return Plugin(point, found, None)
