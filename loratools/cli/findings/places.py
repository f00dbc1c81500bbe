"""Where a finding is: a file, relative to the current folder as it was named."""

from __future__ import annotations

import os
from pathlib import Path

from loratools.operations.check.outcome import CheckFinding
from loratools_formats.core.file_names import WEIGHTS_OF_ADAPTERS


def file_of(finding: CheckFinding) -> str:
    """Return the file of a finding, with `/` between folders; of weights the weight file."""
    if "://" in finding.adapter:  # on the Hub: it has no path here
        return "/".join(filter(None, [finding.adapter.rstrip("/"), finding.file]))
    path = Path(finding.adapter)
    if path.is_dir():
        # A card that is missing has no place of its own.
        named = (finding.file, *WEIGHTS_OF_ADAPTERS)
        path /= next((each for each in named if each and (path / each).is_file()), "")
    elif finding.file is not None and (path.parent / finding.file).is_file():
        path = path.parent / finding.file
    if path.is_absolute():
        try:
            path = path.relative_to(Path.cwd())
        except ValueError:
            path = Path(os.path.relpath(path))
    return path.as_posix()
