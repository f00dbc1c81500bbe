"""What every place of a fleet's outputs can do.

Outputs are whole or not there. In a folder the operations see to that. An object store shows each
file whole, and the statement comes last and only if none is there: an output without its statement
is not done, and the second of two launchers gets an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loratools_formats.disk.errors import LoratoolsError
from loratools_formats.disk.provenance import parsed_statement

Made = TypeVar("Made")

OWN = ".loratools-fleet"
"""Folder of marks among the outputs; it is gone when nothing runs."""


class Store(ABC):
    """A place of outputs by name."""

    @abstractmethod
    def shown(self, name: str = "") -> str:
        """Return what reports call an output, or the place itself."""

    @abstractmethod
    def statement(self, name: str) -> tuple[dict[str, Any], int | None] | None:
        """Return what is said of an output that is there, and when it was, in ns if known.

        Returns:
            None if the output or its statement is not there, or not sound.
        """

    @abstractmethod
    def exists(self, name: str, claim: bytes) -> bool:
        """Return whether something has an output's name that a process has not begun by a claim."""

    @abstractmethod
    def holds(self, name: str, subjects: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the files of an output are there, by what its statement says of them."""

    @abstractmethod
    def make(
        self, name: str, work: Callable[[Path], Made], claim: bytes, *, overwrite: bool
    ) -> Made:
        """Let `work` write an output to the path it is called with, and keep it.

        Args:
            name: of the output.
            work: what makes it.
            claim: equal for processes that make the same output, and for no others.
            overwrite: whether an output of another run may be replaced.

        Raises:
            OutputExistsError: the output came in the meantime, and may not be replaced.
            OutputError: it could not be written.
        """

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return a small file; None if it is not there.

        Raises:
            LoratoolsError: something else is there, or it cannot be read.
        """

    @abstractmethod
    def write(self, name: str, data: bytes, *, new: bool = False) -> bool:
        """Write a small file whole; return False if it should be new and one is there.

        Raises:
            OutputError: it could not be written.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a small file, if it is there."""

    def is_new(self) -> bool:
        """Return whether the place itself is not there yet."""
        return False

    def drop(self) -> None:  # noqa: B027 - only a folder can be there and empty
        """Remove the place itself, if it is there and empty."""


def parsed_predicate(data: bytes, place: str) -> dict[str, Any] | None:
    """Return a statement's predicate; None if it is not sound."""
    try:
        found = parsed_statement(data, place)
    except LoratoolsError:
        return None
    return {**found["predicate"], "subject": found["subject"]}
