"""Folders that an output is to lie in: made where they are missing, and gone again if it fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from loratools_formats.disk.errors import OutputError


@contextlib.contextmanager
def parents_made(output: Path | None) -> Iterator[None]:
    """Make the folders above `output` for a block that writes it, as `mkdir -p` does.

    If the block raises, those that were made go again, unless they hold something.

    Raises:
        OutputError: one cannot be made.
    """
    missing: list[Path] = []
    if output is not None:
        missing = [path for path in output.parents if not os.path.lexists(path)]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            try:
                path.mkdir(exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot make the folder: {error.strerror}", path=path) from error
            made.append(path)
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
