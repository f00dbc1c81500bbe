"""Files that belong beside an output that is one file: checked first, put there, or taken back."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools_formats.disk.errors import OutputError, OutputExistsError
from loratools_formats.disk.renames import has_become, take_new_name, unlink
from loratools_formats.disk.temporaries import temporary_beside

_LARGEST_BYTES = 64 << 20


def check_beside(
    path: str | os.PathLike[str], beside: Mapping[str, bytes], *, overwrite: bool = False
) -> None:
    """Refuse, before any work is done, files beside an output that may not be replaced.

    Raises:
        OutputExistsError: one exists, and is not ours or belongs to an output that stays.
        OutputError: one cannot be written.
    """
    for name, mark in beside.items():
        place = Path(f"{os.fspath(path)}.{name}")
        try:
            status = os.lstat(place)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise OutputError(
                f"a file beside the output cannot be written: {getattr(error, 'strerror', error)}",
                path=place,
            ) from error
        ours = stat.S_ISREG(status.st_mode) and _holds(place, status.st_size, mark)
        if not ours or (os.path.lexists(path) and not overwrite):
            raise OutputExistsError(
                f"a file that belongs beside the output exists{'' if ours else ' and is not ours'}",
                path=place,
                hint="Move it away or choose another output",
            )


def _holds(path: Path, nbytes: int, mark: bytes) -> bool:
    try:
        return nbytes <= _LARGEST_BYTES and mark in path.read_bytes()
    except OSError:
        return False


@dataclass(frozen=True)
class Beside:
    """One file that is put beside an output.

    `take_back` finds out from the disk how far `put` came, since a signal may stop it anywhere.

    Attributes:
        place: where it is to lie.
        content: its bytes.
        replaces: whether a file of ours lies there.
        temporary: its name before it has its place.
        aside: the name of what it replaces, until that is taken back or removed.
    """

    place: Path
    content: bytes
    replaces: bool
    temporary: Path
    aside: Path

    @classmethod
    def of(cls, place: Path, content: bytes) -> Beside:
        """Choose the names of a file; nothing is written yet."""
        names = temporary_beside(place), temporary_beside(place)
        return cls(place, content, os.path.lexists(place), *names)

    def put(self) -> None:
        """Write the file, flush it, and rename it to its place; what is there goes aside.

        Raises:
            OutputExistsError: something appeared there meanwhile.
            OSError: the system refused.
        """
        with open(self.temporary, "xb") as file:
            file.write(self.content)
            file.flush()
            os.fsync(file.fileno())
        if self.replaces:
            os.rename(self.place, self.aside)
        take_new_name(self.temporary, self.place, self.place)

    def keep(self) -> None:
        """Remove what was replaced."""
        if self.replaces:
            with contextlib.suppress(OSError):
                unlink(self.aside)

    def take_back(self) -> None:
        """Leave what lay there before."""
        with contextlib.suppress(OSError):
            if os.path.lexists(self.aside):
                os.replace(self.aside, self.place)
            elif not self.replaces and self._is_there:
                self.place.unlink()
        with contextlib.suppress(OSError):
            self.temporary.unlink()

    @property
    def _is_there(self) -> bool:
        written = has_become(self.temporary, self.place)
        return written and self.place.read_bytes() == self.content
