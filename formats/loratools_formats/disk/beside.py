"""Files that belong beside an output that is one file: checked first, put there, or taken back."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools_formats.disk.errors import LoratoolsError, OutputError, OutputExistsError
from loratools_formats.disk.renames import has_become, rename_new, take_new_name, unlink
from loratools_formats.disk.temporaries import marked_beside

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
            ours = stat.S_ISREG(status.st_mode) and _holds(place, status.st_size, mark)
        except FileNotFoundError:  # or it is gone by now, which another run took away
            continue
        except (OSError, ValueError) as error:
            raise OutputError(
                f"a file beside the output cannot be written: {getattr(error, 'strerror', error)}",
                path=place,
            ) from error
        if not ours or (os.path.lexists(path) and not overwrite):
            raise OutputExistsError(
                f"a file that belongs beside the output exists{'' if ours else ' and is not ours'}",
                path=place,
                hint="Move it away or choose another output",
            )


def _holds(path: Path, nbytes: int, mark: bytes) -> bool:
    """Return whether a file that can be read holds a mark.

    Raises:
        FileNotFoundError: it is gone.
    """
    try:
        return nbytes <= _LARGEST_BYTES and mark in path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError:
        return False


@dataclass(frozen=True)
class Beside:
    """One file that is put beside an output, whose statement never lies beside another output.

    It is written first, under a temporary name. Then what lies in its place goes aside, the output
    gets its name, and the file its place: a process that is killed meanwhile leaves an output
    without the file, and the next run puts the right one there (`temporaries`). The other methods
    find out from the disk how far that came, since a signal may stop it anywhere.

    Attributes:
        place: where it is to lie.
        content: its bytes.
        temporary: its name before it has its place.
        aside: the name of what it replaces, until that is taken back or removed.
    """

    place: Path
    content: bytes
    temporary: Path
    aside: Path

    @classmethod
    def of(cls, place: Path, content: bytes, output: Path) -> Beside:
        """Choose the names of a file; nothing is written yet.

        Args:
            place: where it is to lie.
            content: its bytes.
            output: the temporary name of the output that it belongs to.
        """
        new, old = (marked_beside(place, output, mark) for mark in ("new", "old"))
        return cls(place, content, new, old)

    def write(self) -> None:
        """Write the file under its temporary name, and flush it.

        Raises:
            OSError: the system refused.
        """
        with open(self.temporary, "xb") as file:
            file.write(self.content)
            file.flush()
            os.fsync(file.fileno())

    def withdraw(self) -> None:
        """Let what lies in its place go aside.

        Raises:
            OSError: the system refused.
        """
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.place, self.aside)

    def put(self) -> None:
        """Give the file its place, unless it has it; once more if the system refused.

        Raises:
            OutputError: something lies there, or the system refused. The output is in place.
        """
        for tries_left in (1, 0):
            try:
                if not self._is_there:
                    take_new_name(self.temporary, self.place, self.place)
            except (OSError, OutputExistsError) as error:
                if tries_left:
                    continue
                raise OutputError(
                    "the output is in place, but the file beside it is not: "
                    f"{getattr(error, 'strerror', None) or error}",
                    path=self.place,
                ) from error
            return

    @property
    def _is_there(self) -> bool:
        written = has_become(self.temporary, self.place)
        return written and self.place.read_bytes() == self.content


def end_beside(files: Sequence[Beside], *, published: bool) -> None:
    """Put files beside an output in their places, or leave there what lay there before.

    What cannot be put there keeps its temporary name, which tells the next run what to do.

    Args:
        files: the files.
        published: whether the output has got its name.
    """
    for one in files:
        with contextlib.suppress(OSError, LoratoolsError):
            if published and os.path.lexists(one.temporary):
                one.put()
            elif not published and os.path.lexists(one.aside):
                rename_new(one.aside, one.place)
            for leftover in (one.temporary, one.aside):
                if os.path.lexists(leftover):
                    unlink(leftover)
