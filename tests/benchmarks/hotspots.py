"""Where a command's time goes, by function: the reason given when a target is missed."""

from __future__ import annotations

import pstats
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from measure import Command, run
from report import Row, Table

_SHOWN = 10


@dataclass(frozen=True)
class Hotspots:
    """Seconds spent in each function itself, longest first, and in all."""

    by_function: Mapping[str, float]
    total: float

    def __str__(self) -> str:
        """Name the first few."""
        top = list(self.by_function.items())[:3]
        return ", ".join(f"{name} {value:.2g} s" for name, value in top)

    def table(self, what: str) -> Table:
        """Return the longest ones as a table."""
        rows = [
            Row(name, [f"{value:.3f} s", f"{value / self.total:.0%}"])
            for name, value in list(self.by_function.items())[:_SHOWN]
        ]
        remark = f"One worker under cProfile, {self.total:.2f} s in all."
        title = f"Where the time goes, {what}"
        return Table(title, ["function", "time in itself", "share"], rows, remark)


def profile(command: Command, folder: Path) -> Hotspots:
    """Profile a loratools command with one worker: that runs in the thread cProfile watches."""
    arguments = [sys.executable, "-m", "cProfile", "-o", "profile", *command.arguments]
    run(Command([*arguments, "--workers", "1"], command.before), folder)
    stats = vars(pstats.Stats(str(folder / "profile")))
    own: Counter[str] = Counter()
    for (path, _, function), (_, _, own_seconds, _, _) in stats["stats"].items():
        where = "" if path == "~" else f"{'/'.join(Path(path).parts[-2:])}:"
        own[where + function] += own_seconds
    return Hotspots(dict(own.most_common()), stats["total_tt"])
