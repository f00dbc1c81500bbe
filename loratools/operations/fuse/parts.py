"""One fusion by several processes: each writes some weight files, the last one puts all together.

Files wait in a folder beside the output, whose name holds the fusion's key: only parts of the same
inputs, options and version meet there. A part appears whole, with what was measured in it. Whoever
finds that all are there writes the rest and publishes the output, as a single run does: the index
is last, and the bytes are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.result import FuseResult
from loratools.operations.fuse.tensor import TensorReport
from loratools.work.declared import option
from loratools.work.parallel import one_blas_thread
from loratools.work.requests import Progress
from loratools.work.shard import Shard, shard
from loratools_formats.checkpoints.shards import write_shards
from loratools_formats.disk.errors import OutputError, OutputExistsError

_REPORT = ".report.json"


@dataclass(frozen=True)
class Spreading:
    """How one fusion is spread over processes.

    Attributes:
        shard: write only part I of N of the weight files; the process that completes them writes
            the rest.
        scheduler: let workers of Dask write the weight files; the address of the scheduler, tcp://
            or tls://.
    """

    shard: Shard | None = option(None, heading="Selection", metavar="I/N", parse=shard)
    scheduler: str | None = option(None, heading="Computing", metavar="ADDRESS")

    @property
    def is_given(self) -> bool:
        """Whether it is spread at all."""
        return self.shard is not None or self.scheduler is not None


class Parts:
    """The parts of a fusion on their way to an output.

    Args:
        fusion: of a checkpoint that is a folder.
        output: where all of it goes.
    """

    def __init__(self, fusion: Fusion, output: Path) -> None:
        self._fusion, self._output = fusion, output
        record = {k: v for k, v in fusion.record.items() if k != "environment"}
        names = [each.name for each in fusion.new.shards]
        key = hashlib.sha256(json.dumps([record, names], sort_keys=True).encode()).hexdigest()
        home = Path(os.path.realpath(output))
        self.folder = home.parent / f".{home.name}.{key[:16]}.parts"

    def write(self, part: Shard, workers: int, progress: Progress | None) -> list[str]:
        """Write the weight files of a part that are not there, and return their names.

        Raises:
            OutputError: not enough space, or writing failed.
            AdapterError: an input is malformed, or values are not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        written = []
        for each in part.of(self._fusion.new.shards):
            if (self.folder / each.name).exists():
                continue
            known = set(self._fusion.reports)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as place:
                with one_blas_thread():
                    write_shards(Path(place), [each], workers=workers, progress=progress)
                found = [r for key, r in self._fusion.reports.items() if key not in known]
                text = json.dumps([asdict(report) for report in found])
                (Path(place) / _REPORT).write_text(text, encoding="utf-8")
                os.replace(Path(place) / _REPORT, self.folder / f"{each.name}{_REPORT}")
                os.replace(Path(place) / each.name, self.folder / each.name)
            written.append(each.name)
        self._fusion.new.check_unchanged()
        return written

    def missing(self) -> list[str]:
        """Return the names of the weight files that are not there."""
        names = [each.name for each in self._fusion.new.shards]
        return [name for name in names if not (self.folder / name).exists()]

    def finish(self, *, overwrite: bool) -> FuseResult | None:
        """Publish the output of all parts; return None if another process has done it.

        Raises:
            OutputError: not enough space, or writing failed; nothing was changed.
            UnsupportedError: less than half of the change survives.
        """
        try:
            for each in self._fusion.new.shards:
                text = (self.folder / f"{each.name}{_REPORT}").read_text(encoding="utf-8")
                self._fusion.reports.update({r.key: r for r in map(_report, json.loads(text))})
            done = self._fusion.write(self._output, overwrite=overwrite, ready=self.folder)
        except (FileNotFoundError, OutputError, OutputExistsError):
            if not self._output.exists() or (overwrite and self.folder.exists()):
                raise
            return None
        shutil.rmtree(self.folder, ignore_errors=True)
        return done


def _report(values: dict[str, Any]) -> TensorReport:
    return TensorReport(**{**values, "modules": tuple(values["modules"])})
