"""Write what every command's help says beside this file, for the test that compares it.

Run it after a change that is meant: python tests/help/write_help.py
"""

from pathlib import Path

import click
from click.testing import CliRunner

from loratools.cli import cli

FOLDER = Path(__file__).parent


def help_texts():
    """Return the help of the group and of every command, by the name of its file."""
    texts = {}
    for names in ((), *_commands(cli)):
        done = CliRunner().invoke(
            cli,
            [*names, "--help"],
            prog_name="loratools",
            terminal_width=100,
            catch_exceptions=False,
        )
        texts[f"{'-'.join(names) or 'loratools'}.txt"] = done.output
    return texts


def _commands(group, before=()):
    """Yield the names that call each command of a group, and those of its own groups."""
    for name in group.list_commands(None):
        yield (*before, name)
        command = group.get_command(None, name)
        if isinstance(command, click.Group):
            yield from _commands(command, (*before, name))


if __name__ == "__main__":
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for file, text in help_texts().items():
        (FOLDER / file).write_text(text)
