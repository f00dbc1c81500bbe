"""Hints can be pasted: every command in a message is one that loratools takes, and works.

Every text of both packages that names a command is parsed here, wherever it stands; commands that
are printed in a real situation are run.
"""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from loratools.cli import cli

ROOT = Path(__file__).parents[1]
# What stands for something of the user's, and what it might be.
VALUES = {
    "RANK": "8",
    "R": "8",
    "N": "8",
    "VALUE": "8",
    "FORMAT": "peft",
    "alpha=VALUE": "alpha=8",
    "…": "8",
}
WITHOUT_INPUT = {"formats", "methods"}
# Titles and names of programs, and pieces that are put together with a path.
NO_COMMANDS = {"github.py", "junit.py", "sarif.py", "schema.py", "remedy.py"}
_COMMAND = re.compile(
    r"(?<![\w./])loratools (?=(?:--?[a-z]|[a-z]+(?:-[a-z]+)?\b))([^`\n;]+?)"
    r"(?=`|;|\n|, (?:and|or|if|which)|\.(?:\s|$)|,\s|$|'$"
    r"| (?:lists|gives|says|and|needs|does|can|to|tells|has)\b)"
)


def texts(path):
    """Yield every text of a module that is no docstring, with a name for each value in it."""
    source = path.read_text()
    if "loratools " not in source:  # most modules, which need not be parsed
        return
    nodes = list(ast.walk(ast.parse(source)))
    left_out = set()
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in node.values}
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            left_out |= {id(first.value)} if isinstance(first, ast.Expr) else set()
    for node in nodes:
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = [
                str(one.value) if isinstance(one, ast.Constant) else "NAME" for one in node.values
            ]
            yield node.lineno, "".join(parts)


def commands(text):
    """Return the commands that a text names, as words."""
    found = []
    for match in _COMMAND.finditer(text):
        verb, *rest = match[1].split()
        if verb in cli.list_commands(None) and (
            verb != "fleet" or (len(rest) > 1 and rest[0].islower())
        ):
            found.append([verb, *rest])
    return found


EVERY = sorted(
    {
        (f"{path.relative_to(ROOT)}:{line}", " ".join(words))
        for package in ("loratools", "formats")
        for path in (ROOT / package).rglob("*.py")
        for line, text in texts(path)
        for words in commands(text)
        if path.name not in NO_COMMANDS
    }
)


def parsed(words):
    """Let click read a command, without running it; returns what it read."""
    words = [VALUES.get(word, word) for word in words]
    name, *arguments = words
    command = cli.get_command(None, name)
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.get_command(None, name)
    with command.make_context(name, arguments, help_option_names=["-h", "--help"]) as context:
        return context.params


def test_commands_are_found():
    assert len(EVERY) > 50
    assert commands("Fetch it, or: loratools to-lora a --set alpha=8 -o x. More") == [
        ["to-lora", "a", "--set", "alpha=8", "-o", "x"]
    ]


@pytest.mark.parametrize(("place", "line"), EVERY)
def test_a_command_in_a_message_is_one_that_is_taken(place, line):
    words = shlex.split(line)
    params = parsed(words)
    inputs = [
        params.get(key)
        for key in (
            "shared",
            "adapter",
            "adapters",
            "base",
            "fused",
            "name",
            "path",
            "recipe",
        )
    ]
    given = [one for one in inputs if one]
    assert given or words[0] in WITHOUT_INPUT, f"{place}: nothing to work on: {line}"
    writes = {"convert", "squeeze", "merge", "fuse", "to-lora", "to-dora", "repair", "dequantize"}
    if words[0] in writes or words[0] == "fleet":
        place_given = params.get("output") or params.get("place") or params.get("in_place")
        several = len(params.get("adapters") or ()) == 2 and words[0] in ("convert", "squeeze")
        assert place_given or several, f"{place}: no output: {line}"
