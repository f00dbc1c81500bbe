"""Write `tests/locked.txt`: what `make` installs for tests, with the hash of every file.

    python tests/release/make_lock.py [--find-links FOLDER]

The versions are those of `tests/constraints.txt`, the packages those of the groups `lint` and
`test`, and all that they need on Linux x86-64 with Python 3.11. Other systems and Pythons need
other wheels, and are not locked: there `make` installs the same versions without hashes. The hashes
are of every file of a release, as the index has them; torch alone is the wheel for processors, so
that no index can bring gigabytes of CUDA in its place. It needs uv, and an index that has that
wheel, or a folder with it; afterwards `make test` must pass.

Source: https://docs.astral.sh/uv/pip/compile and pip's "Secure installs".
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "tests" / "locked.txt"
HEAD = """\
# Made by tests/release/make_lock.py; for Linux x86-64 with Python 3.11.
# torch is the wheel for processors: https://download.pytorch.org/whl/cpu has it.
"""
# The glibc of the oldest wheels that all packages have: that of mlx.
PLATFORM = "x86_64-manylinux_2_35"


def main() -> int:
    """Resolve, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--find-links", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--index", default="https://pypi.org/simple", metavar="URL")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "locked.txt"
        command = [
            "uv", "pip", "compile", "pyproject.toml", "--group", "lint", "--group", "test",
            "--constraints", "tests/constraints.txt", "--index-url", given.index,
            *(word for folder in given.find_links for word in ("--find-links", folder)),
            "--python-version", "3.11", "--python-platform", PLATFORM,
            "--generate-hashes", "--no-annotate", "--no-header", "--output-file", str(made),
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        text = made.read_text(encoding="utf-8")
    if "\ntorch==2" not in text or "+cpu" not in text or "\nnvidia-" in text:
        print("torch is not the wheel for processors; add --find-links", file=sys.stderr)
        return 1
    LOCK.write_text(HEAD + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
