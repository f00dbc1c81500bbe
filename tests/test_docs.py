"""The README tells the truth: its commands run and print what it shows."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loratools.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONSOLE = re.findall(r"```console\n\$ (.*?)\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Return a folder that has the example adapters where the README says."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "shown"), CONSOLE, ids=[c for c, _ in CONSOLE])
def test_commands_print_what_is_shown(clone, command, shown):
    arguments = shlex.split(command)
    for earlier, _ in CONSOLE:
        if earlier != command and {shlex.split(earlier)[-1]} & set(arguments[1:-1]):
            _run(earlier)
    assert _run(command) == shown


def _run(command):
    program, *arguments = shlex.split(command)
    assert program == "loratools"
    return subprocess.run(
        [sys.executable, "-c", "from loratools.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    ).stdout


def test_every_command_has_an_example():
    shown = {command.split()[1] for command, _ in CONSOLE}
    assert shown == set(cli.list_commands(None))


@pytest.mark.parametrize("code", PYTHON)
def test_python_examples_run(clone, code, capsys):
    exec(compile(code, "README", "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 0.3


def test_options_named_in_the_readme_exist():
    known = {option for name in cli.list_commands(None) for option in _options(name)}
    named = set(re.findall(r"`(--[a-z-]+)[ `]", README))
    assert named <= known


def _options(name):
    command = cli.get_command(None, name)
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts)}


def test_files_named_in_the_documents_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), target
