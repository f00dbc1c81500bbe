"""Run the benchmarks and write their results with a description of the machine.

A benchmark is a module `bench_<name>.py` beside this file with `run(workdir: Path) -> Report`.
To add one, write it and put its name into BENCHMARKS.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from machine import describe
from report import markdown

ALWAYS = [
    "squeeze",
    "merge",
    "fuse",
    "nf4",
    "codecs",
    "fourbits",
    "fold",
    "gguf",
    "dialects",
    "kernels",
    "limits",
    "spectrum",
    "check",
    "fleet",
    "training",
    "share",
]
BENCHMARKS = [*ALWAYS, "versions"]  # the last needs an earlier version beside this one
RESULTS = Path(__file__).resolve().parent / "RESULTS.md"

_MARK = "<!-- {} -->\n"
_HEAD = """\
# Benchmark results

Written by `make bench` (`python tests/benchmarks/bench.py [NAME]...`); do not edit. The sections
`robustness` and `speed` are of long runs, and are written by hand.
"""


def _section(name: str, workdir: Path) -> str:
    """Run one benchmark; returns its part of the results, with when and where it was made."""
    start = time.monotonic()
    print(f"{name}:", file=sys.stderr)
    made = [
        f"- Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        *(f"- {line}" for line in describe()),
    ]
    report = import_module(f"bench_{name}").run(workdir)
    print(f"{name} took {time.monotonic() - start:.0f} s", file=sys.stderr)
    title, _, rest = markdown(report).partition("\n")
    return "\n".join([_MARK.format(name), title, "", *made, rest.rstrip(), ""])


def _kept(results: Path) -> dict[str, str]:
    """Return the parts of an earlier results file, by benchmark."""
    if not results.exists():
        return {}
    text = results.read_text(encoding="utf-8")
    found = re.split(_MARK.format(r"(\w+)"), text)
    return {
        name: _MARK.format(name) + part.rstrip() + "\n"
        for name, part in zip(found[1::2], found[2::2], strict=True)
    }


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help=f"file to write, by default {RESULTS.name} beside this script; parts of benchmarks "
        "that are not run stay",
    )
    parser.add_argument("--workdir", type=Path, help="keep the files here; temporary by default")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    names = arguments.names or ALWAYS
    with tempfile.TemporaryDirectory(prefix="loratools-bench-") as temporary:
        workdir = (arguments.workdir or Path(temporary)).resolve()
        workdir.mkdir(parents=True, exist_ok=True)
        sections = _kept(arguments.results) | {name: _section(name, workdir) for name in names}
    # Campaigns and comparisons that take hours have sections written by hand; those stay.
    order = [*BENCHMARKS, *(name for name in sections if name not in BENCHMARKS)]
    ordered = [sections[name] for name in order if name in sections]
    document = "\n".join([_HEAD, *ordered])
    print(document, end="")
    arguments.results.write_text(document, encoding="utf-8")
    print(f"wrote {arguments.results}", file=sys.stderr)


if __name__ == "__main__":
    main()
