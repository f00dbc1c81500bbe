"""`fuse` in several processes: the result of one part, and how a cluster gets the parts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from loratools.face.result import Result
from loratools.operations.fuse.parts import Spreading
from loratools.work.cluster import Engine, connected
from loratools.work.memory import keep_memory
from loratools.work.requests import Progress
from loratools.work.shard import Shard
from loratools_formats.disk.errors import OptionError


@dataclass(frozen=True, kw_only=True, repr=False)
class FusePart(Result):
    """A part of a fusion that was written, while others are awaited.

    Attributes:
        shard: the part, as I/N.
        written: weight files that were written now.
        awaited: weight files that are not there yet; none if another process has put all together.
    """

    operation: ClassVar[str] = "fuse"

    shard: str
    written: tuple[str, ...]
    awaited: tuple[str, ...]


def spread(
    address: str, given: Mapping[str, Any], count: int, progress: Progress | None
) -> list[Any]:
    """Let workers of Dask write the weight files of a fusion, each a task; return their results.

    Args:
        address: of the scheduler.
        given: arguments of `fuse` by name, with an output that workers and launcher share.
        count: number of weight files.
        progress: called with (files done, files in all).

    Raises:
        OptionError: the base or an adapter is in memory only.
        ClusterError: the scheduler cannot be reached.
        LoratoolsError: as `fuse` does, from a worker.
    """
    from distributed import as_completed

    writing = given["writing"]
    absolute = {
        **given,
        "base": _placed(given["base"]),
        "adapters": _placed(given["adapters"]),
        "writing": type(writing)(
            output=Path(os.path.abspath(writing.output)), overwrite=writing.overwrite
        ),
    }
    with connected(Engine(1, address, None)) as client:
        futures = [
            client.submit(_write_part, absolute, Shard(number, count), pure=False)
            for number in range(1, count + 1)
        ]
        try:
            for done, _ in enumerate(as_completed(futures), 1):
                if progress is not None:
                    progress(done, count)
            return [future.result() for future in futures]
        finally:
            client.cancel(futures)


def _write_part(given: Mapping[str, Any], part: Shard) -> Any:
    """Write one weight file, in a worker; the last one puts all together."""
    from loratools.face.fuse import fuse

    keep_memory()
    options = replace(given["options"], workers=1)
    return fuse(**{**given, "options": options, "spreading": Spreading(shard=part)})


def _placed(value: Any) -> Any:
    """Return absolute paths, which every process can read."""
    if isinstance(value, str | os.PathLike):
        return os.path.abspath(value)
    if isinstance(value, Mapping):
        return {_placed(path): weight for path, weight in value.items()}
    if isinstance(value, Sequence):
        return [
            (_placed(one[0]), one[1]) if isinstance(one, tuple) else _placed(one) for one in value
        ]
    raise OptionError("a cluster needs paths, not what is in memory", got=type(value).__name__)
