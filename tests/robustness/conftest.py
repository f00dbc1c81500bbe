"""The real command in a child process, watched from outside."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":  # limits, /dev and the measurement are Linux's
    collect_ignore_glob = ["test_*.py"]

HERE = Path(__file__).parent
for folder in ("formats", "benchmarks"):  # for handmade and synthetic
    sys.path.insert(0, str(HERE.parent / folder))

ADDRESS_SPACE_BYTES = 8 << 30


@dataclasses.dataclass(frozen=True)
class Run:
    """How a command ended, what it printed and what it cost."""

    code: int
    seconds: float
    peak_bytes: int
    out: str
    err: str

    @property
    def remarks(self):
        """Lines on stderr that are no notes."""
        return [line for line in self.err.splitlines() if not line.startswith("note: ")]


@pytest.fixture(scope="session")
def executable():
    """The path of the installed command."""
    return str(Path(sys.executable).with_name("loratools"))


@pytest.fixture
def loratools(executable, tmp_path_factory):
    """Return a function that runs `loratools ARGUMENTS` and waits for its end."""
    out = tmp_path_factory.mktemp("stdout") / "out"

    def run(*arguments, stdout=out, cwd=None, limits=None, seconds=30, **environment):
        out.write_bytes(b"")
        job = {
            "command": [executable, *(os.fspath(argument) for argument in arguments)],
            "stdout": str(stdout),
            "limits": {"RLIMIT_AS": ADDRESS_SPACE_BYTES} | (limits or {}),
            "seconds": seconds,
            "environment": dict(os.environ) | environment,
        }
        launcher = subprocess.run(
            [sys.executable, "-I", "-S", HERE / "launcher.py"],
            input=json.dumps(job),
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=True,
            cwd=cwd,
        )
        report = json.loads(launcher.stdout)
        text = out.read_text(encoding="utf-8", errors="surrogateescape")
        result = Run(**report, out=text, err=launcher.stderr)
        print(f"{result.seconds:.2f} s, {result.peak_bytes / 1e6:.0f} MB\n{result.err!r}")
        return result

    return run
