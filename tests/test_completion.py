"""Shells complete commands, options, formats, methods, types, targets and rules."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loratools.cli import cli
from loratools.operations.merge.methods import registered_methods
from loratools_formats.contract.registry import registered_formats

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "completion.md"
FORMATS = [entry.format for entry in registered_formats()]


def completed(line, shell="bash"):
    """Return what a shell would offer after a line."""
    words = ["loratools", *line.split(" ")]
    done = subprocess.run(
        [sys.executable, "-m", "loratools"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "_LORATOOLS_COMPLETE": f"{shell}_complete",
            "COMP_WORDS": " ".join(words[:-1]) if shell == "fish" else " ".join(words),
            "COMP_CWORD": words[-1] if shell == "fish" else str(len(words) - 1),
        },
    )
    assert done.returncode == 0, done.stderr
    return {re.split(r"[,\t]", one)[1] for one in done.stdout.splitlines() if "," in one}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("", set(cli.list_commands(None))),
        ("squ", {"squeeze"}),
        ("merge --method ", {entry.name for entry in registered_methods()}),
        ("merge --method ti", {"ties"}),
        ("convert --to ", {one.name for one in FORMATS if one.is_writable}),
        ("convert --to GG", {"gguf"}),
        ("info --from ", {one.name for one in FORMATS if one.is_readable}),
        ("squeeze --dtype ", {"f32", "f16", "bf16"}),
        ("convert --dtype q", {"q8_0"}),
        ("fuse --dtype q5", {"q5_0", "q5_1"}),
        ("check --target vl", {"vllm"}),
        ("rule lt101", {"LT101"}),
        ("quantize --quant-type ", {"nf4", "fp4"}),
        ("squeeze --svd r", {"rsvd"}),
    ],
)
def test_values_are_offered(line, offered):
    assert completed(line) == offered


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "info ad",
        "squeeze ad",
        "merge ad",
        "fuse base ad",
        "verify fused base ad",
        "verify fused --adapter ad",
        "compare ad",
        "fleet squeeze ad",
        "fleet share ad",
        "fleet index ad",
    ],
)
def test_adapters_are_completed_as_paths(line):
    words = ["loratools", *line.split()]
    asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "loratools"],
        capture_output=True,
        text=True,
        env={**os.environ, "_LORATOOLS_COMPLETE": "bash_complete", **asked},
        check=False,
    )
    assert done.stdout == "file,ad\n"


def test_flags_are_offered():
    assert {"--rank", "--max-rank", "--out-dir"} <= completed("squeeze --")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_guide_says_how_for_each_shell(shell):
    variable = f"_LORATOOLS_COMPLETE={shell}_source"
    assert f"{variable} loratools" in GUIDE.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "loratools"],
        capture_output=True,
        text=True,
        env={**os.environ, "_LORATOOLS_COMPLETE": f"{shell}_source"},
    )
    # Click looks at the version of a Bash that is not there on every machine.
    assert "_loratools_completion" in done.stdout or "bash" in done.stderr.lower()
