"""Run the benchmarks and write their results with a description of the machine.

A benchmark is a module `bench_<name>.py` beside this file with `run(workdir: Path) -> Report`.
To add one, write it and put its name into BENCHMARKS.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from machine import describe
from report import markdown

BENCHMARKS = ["squeeze"]
RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def _document(names: list[str], workdir: Path) -> str:
    command = f"python tests/benchmarks/bench.py {' '.join(names)}"
    lines = [
        "# Benchmark results",
        "",
        f"Written by `{command}` (`make bench`); do not edit.",
        "",
        f"- Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        *(f"- {line}" for line in describe()),
    ]
    for name in names:
        start = time.monotonic()
        print(f"{name}:", file=sys.stderr)
        report = import_module(f"bench_{name}").run(workdir)
        lines += ["", markdown(report).rstrip()]
        print(f"{name} took {time.monotonic() - start:.0f} s", file=sys.stderr)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"file to write; {RESULTS.name} beside this script if all benchmarks are run",
    )
    parser.add_argument("--workdir", type=Path, help="keep the files here; temporary by default")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    names = arguments.names or BENCHMARKS
    with tempfile.TemporaryDirectory(prefix="loratools-bench-") as temporary:
        workdir = (arguments.workdir or Path(temporary)).resolve()
        workdir.mkdir(parents=True, exist_ok=True)
        document = _document(names, workdir)
    print(document, end="")
    results = arguments.results or (RESULTS if set(names) == set(BENCHMARKS) else None)
    if results is not None:
        results.write_text(document, encoding="utf-8")
        print(f"wrote {results}", file=sys.stderr)


if __name__ == "__main__":
    main()
