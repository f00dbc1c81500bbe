"""The documents tell the truth: their commands run and print what they show."""

import re
import shutil
from pathlib import Path

import consoles
import pytest

from loratools.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [block for document in consoles.DOCUMENTS for block in consoles.blocks(document)]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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
    exec(compile(code, "README", "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 0.3


def test_options_named_in_the_readme_exist():
    known = {option for name in cli.list_commands(None) for option in _options(name)}
    named = set(re.findall(r"`(--[a-z-]+)[ `]", README))
    assert named <= known


def _options(name):
    command = cli.get_command(None, name)
    return {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def test_files_named_in_the_documents_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), target
