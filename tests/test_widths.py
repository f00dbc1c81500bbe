"""What commands print fits the terminal, in any locale, and a reader that leaves is no error."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import loratools as lt
from loratools.cli import cli
from loratools.cli.by_type import Column, print_modules
from loratools.cli.table import shortened, table_lines

LLAMA = Path(__file__).parents[1] / "examples" / "tiny-llama"
COMMANDS = {
    "squeeze": [
        "squeeze lora", "squeeze lora --rank 4 --dry-run", "squeeze lora --rank 4 --dry-run -v",
    ],
    "merge": ["merge lora rslora --rank 8 --dry-run -v"],
    "fuse": ["fuse model lora --dry-run -v"],
    "verify": ["verify fused model lora -v", "verify fused model rslora"],
    "info": ["info lora -v", "info .", "info nf4", "info dora"],
    "formats": ["formats"],
    "methods": ["methods"],
    "rule": ["rule LT506"],
    "check": ["check lora --target vllm --base model --no-config"],
    "spectrum": ["spectrum lora", "spectrum dora --base model --intruders 4"],
    "compare": [
        "compare lora rslora", "compare lora rslora dora", "compare lora --bases model fused",
    ],
    "repair": ["repair lora --base model --lambda 0.5 --dry-run"],
    "provenance": ["provenance fused"],
    "replay": ["replay fused --input ."],
    "run": ["run recipe.yaml --dry-run"],
    "to-lora": ["to-lora dora --base model --rank 4 --dry-run -v"],
    "to-dora": ["to-dora lora --base model --dry-run -v"],
    "extract": ["extract model fused --rank 4 --dry-run -v"],
    "convert": ["convert lora --to mlx --dry-run"],
    "quantize": ["quantize model --dry-run"],
    "dequantize": ["dequantize nf4 --dry-run"],
    "plan-squeeze": ["plan-squeeze --from 64 --to 8 --steps 3000"],
}  # fmt: skip
LINES = [line for lines in COMMANDS.values() for line in lines]
LINES += [f"{name} --help".strip() for name in ("", *cli.list_commands(None))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with adapters and models."""
    folder = tmp_path_factory.mktemp("widths")
    for name in ("lora", "rslora", "dora", "model"):
        shutil.copytree(LLAMA / name, folder / name)
    lt.fuse(LLAMA / "model", LLAMA / "lora", output=folder / "fused")
    lt.quantize(LLAMA / "model", output=folder / "nf4")
    steps = "[{name: small, do: squeeze, source: lora, rank: 4}]"
    (folder / "recipe.yaml").write_text(f"version: 1\nsteps: {steps}\n")
    return folder


def run(place, line, **variables):
    return subprocess.run(
        [sys.executable, "-m", "loratools", *line.split()],
        cwd=place,
        capture_output=True,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def test_every_command_is_here():
    # push has tests/hub, and fleet its own tests
    assert {*COMMANDS, "push", "fleet"} == set(cli.list_commands(None))


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_nothing_is_wider_than_the_terminal(place, line):
    done = run(place, line, COLUMNS="80", LANG="en_US.UTF-8")
    assert done.returncode in (0, 1), done.stderr.decode()
    text = done.stdout.decode()
    assert text
    wide = [one for one in text.splitlines() if len(one) > 80]
    assert [one for one in wide if not one.lstrip(" `").startswith("loratools ")] == []
    assert "\x1b" not in text


@pytest.mark.slow
@pytest.mark.parametrize("line", [lines[0] for lines in COMMANDS.values()])
def test_the_locale_c_gets_ascii(place, line):
    done = run(place, line, LC_ALL="C", COLUMNS="80")
    assert done.returncode in (0, 1), done.stderr.decode()
    assert done.stdout.isascii()
    assert b"\\u" not in done.stdout
    assert done.stderr.isascii()


@pytest.mark.slow
@pytest.mark.parametrize("line", [lines[0] for lines in COMMANDS.values()])
def test_a_reader_that_leaves_is_no_error(place, line):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "loratools", *line.split(), *(["--json"] if "info" in line else [])],
        cwd=place,
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    os.close(write)
    assert b"Traceback" not in done.stderr
    assert b"rror" not in done.stderr.replace(b"relative error", b"")
    assert done.returncode in (0, 1)


def test_pipes_get_whole_names(place):
    name = "model.layers.3.self_attn.q_proj.weight"
    variables = {**os.environ, "COLUMNS": "80", "LINES": "24"}  # as readline sets both
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "fuse", "model", "lora", "--dry-run", "-v"],
        cwd=place, capture_output=True, text=True, env=variables,
    )  # fmt: skip
    assert name in done.stdout


def test_names_stay_apart_when_they_are_shortened():
    names = [
        f"model.layers.{layer}.{part}"
        for layer in (0, 1, 10, 31)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
    ]
    for width in range(23, 40):
        short = [shortened(name, width) for name in names]
        assert all(len(one) <= width for one in short)
        assert len(set(short)) == len(names), width


def test_a_table_loses_no_column_and_no_number():
    header = ["module", *(f"a number {n}" for n in range(12))]
    rows = [
        [f"model.layers.{i}.self_attn.q_proj", *(f"{i}.{n:03}" for n in range(12))]
        for i in range(3)
    ]
    lines = table_lines(header, "<" + ">" * 12, rows, 80)
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    for row in rows:
        assert all(cell in words for cell in row[1:])
    assert all(re.search(rf"\b{n}\b", " ".join(lines)) for n in range(12))


def test_none_is_the_worst_where_all_are_alike(capsys):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(20)]
    errors = [0.0] * 19 + [0.5]
    for found, expected in ((errors[:1] * 20, "--verbose lists each"), (errors, "The worst 5 of")):
        columns = [Column("relative error", found, summed=True)]
        print_modules("module", names, columns, found, verbose=False)
        told = capsys.readouterr().out
        assert expected in told
        assert ("The worst" in told) == ("layers.19" in told) == (0.5 in found)
