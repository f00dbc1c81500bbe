"""The documents tell the truth: their commands run and print what they show."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import consoles
import pytest

from loratools.cli import cli

ROOT = Path(__file__).parent.parent
TEXT = "".join(document.read_text() for document in consoles.DOCUMENTS)
BLOCKS = [block for document in consoles.DOCUMENTS for block in consoles.blocks(document)]
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Return a folder that has the example adapters where the README says."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=[block[-1][0] for block in BLOCKS])
def test_commands_print_what_is_shown(clone, block):
    for command, shown in block:
        assert consoles.printed(command, clone) == shown


def test_every_command_has_an_example():
    shown = {command.split()[1] for block in BLOCKS for command, _ in block}
    assert shown == set(cli.list_commands(None))


@pytest.mark.parametrize("code", PYTHON)
def test_python_examples_run(clone, code, capsys):
    exec(compile(code, "documents", "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 0.3


def test_options_that_documents_name_exist():
    known = _options(cli)
    others = {"rules.md", "README.md"}  # of the examples, whose scripts have options of their own
    ours = [path for path in consoles.DOCUMENTS if path.name not in others]
    named = {n for path in ours for n in re.findall(r"`(--[a-z-]+)[ `]", path.read_text())}
    assert named <= known | {"--help", "--max-lora-rank"}  # vLLM has the last


def _options(command):
    """Return the flags of a command, or of all that a group has."""
    if isinstance(command, click.Group):
        inner = (command.get_command(None, name) for name in command.list_commands(None))
        return set().union(*map(_options, inner))
    return {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def test_files_named_in_the_documents_exist():
    for document in [*consoles.DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    # With --quiet, mkdocs neither shows warnings nor counts them.
    command = ["mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "commands" / "squeeze" / "index.html").is_file()


def test_the_readme_is_short_and_the_index_has_every_command():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    linked = re.findall(r"\(commands/([a-z-]+)\.md\)", (ROOT / "docs" / "index.md").read_text())
    of_fleets = [page.stem for page in ROOT.glob("docs/commands/fleet-*.md")]
    assert sorted(linked) == sorted([*cli.list_commands(None), *of_fleets])
