"""Write what every command's help says beside this file, for the test that compares it.

Run it after a change that is meant: python tests/help/write_help.py
"""

from pathlib import Path

from click.testing import CliRunner

from loratools.cli import cli

FOLDER = Path(__file__).parent


def help_texts():
    """Return the help of the group and of every command, by the name of its file."""
    texts = {}
    for name in ("", *cli.list_commands(None)):
        arguments = [*([name] if name else []), "--help"]
        done = CliRunner().invoke(
            cli, arguments, prog_name="loratools", terminal_width=100, catch_exceptions=False
        )
        texts[f"{name or 'loratools'}.txt"] = done.output
    return texts


if __name__ == "__main__":
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for file, text in help_texts().items():
        (FOLDER / file).write_text(text)
