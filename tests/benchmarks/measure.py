"""Time child processes: wall seconds, processor seconds and peak memory of each.

Every figure comes from a process of its own, started from this small one: the kernel counts the
parent's memory at the moment of the start into a child's peak, so whoever imports this module must
not import NumPy or hold data.

Runs of what is compared are interleaved, so that a disturbance of the machine hits all of them;
the best of several runs is the one least disturbed. How many cores other processes kept busy
meanwhile is measured too, where the system tells.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
_BIN = Path(sys.executable).parent


def tool(name: str) -> str:
    """Return the path of a console script installed beside this interpreter."""
    return str(_BIN / name)


@dataclass(frozen=True)
class Command:
    """A command to time.

    Attributes:
        arguments: program and arguments, relative to the folder it runs in.
        before: called before each run, untimed; it removes the output of the run before.
    """

    arguments: Sequence[str]
    before: Callable[[], None] | None = None

    def __str__(self) -> str:
        """Return the command as one would type it, programs without their folders."""
        program, *rest = self.arguments
        words = [Path(program).name if os.path.isabs(program) else program, *rest]
        return " ".join(f'"{word}"' if " " in word else word for word in words)


@dataclass(frozen=True)
class Sample:
    """One run.

    Attributes:
        seconds: wall time.
        cpu_seconds: processor time of all its threads.
        peak_bytes: peak memory.
        other_cores: how many cores other processes kept busy meanwhile; None if not known.
        stdout: what it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    other_cores: float | None
    stdout: str


@dataclass(frozen=True)
class Timing:
    """Several runs of one command."""

    command: Command
    samples: Sequence[Sample]

    @property
    def best(self) -> float:
        """Shortest wall time."""
        return min(sample.seconds for sample in self.samples)

    @property
    def median(self) -> float:
        """Median wall time."""
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def middle(self) -> Sample:
        """The run of the median time, or the one just above."""
        ordered = sorted(self.samples, key=lambda sample: sample.seconds)
        return ordered[len(ordered) // 2]

    @property
    def cpu(self) -> float:
        """Least processor time."""
        return min(sample.cpu_seconds for sample in self.samples)

    @property
    def other_cores(self) -> float | None:
        """Cores that other processes kept busy during the best run."""
        return min(self.samples, key=lambda sample: sample.seconds).other_cores

    @property
    def peak_bytes(self) -> int:
        """Largest peak memory."""
        return max(sample.peak_bytes for sample in self.samples)


def environment(folder: Path) -> dict[str, str]:
    """Return an environment for children that keeps compiled Python in `folder`.

    So the first run compiles and later ones do not, whatever the caller's settings are, for us and
    for everything we compare with.
    """
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str((folder / "pycache").resolve())}


def _busy_seconds() -> float | None:
    """Return the processor seconds that all processes together, and the hypervisor, have used."""
    with contextlib.suppress(OSError):
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _, _, interrupts, soft, stolen = map(int, fields[1:9])
        ticks = user + nice + system + interrupts + soft + stolen
        return ticks / os.sysconf("SC_CLK_TCK")
    return None


def run(command: Command, folder: Path) -> Sample:
    """Run a command in `folder` and measure it.

    Raises:
        RuntimeError: it failed.
    """
    if command.before is not None:
        command.before()
    os.sync()  # no run pays for bytes that another one wrote
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        busy = _busy_seconds()
        start = time.perf_counter()
        process = subprocess.Popen(
            command.arguments, cwd=folder, env=environment(folder), stdout=out, stderr=err
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        busy_after = _busy_seconds()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command}: exit {process.returncode}\n{err.read()[-2000:]}")
        print(f"  {seconds:7.3f} s  {command}", file=sys.stderr)
        cpu = usage.ru_utime + usage.ru_stime
        others = None
        if busy is not None and busy_after is not None:
            others = max(0.0, busy_after - busy - cpu) / seconds
        return Sample(seconds, cpu, usage.ru_maxrss * _MAXRSS_UNIT, others, out.read())


def interleaved(commands: Mapping[str, Command], folder: Path, rounds: int) -> dict[str, Timing]:
    """Run each command once unmeasured, then all of them in turn, `rounds` times over."""
    for command in commands.values():
        run(command, folder)
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            samples[name].append(run(command, folder))
    return {name: Timing(commands[name], found) for name, found in samples.items()}
