"""Commands that an error names as the next step: complete, so that they can be pasted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from loratools_formats.contract.registry import registered_formats
from loratools_formats.core.adapter import Adapter

FUSE_INSTEAD = "Fuse the adapter into its base instead: loratools fuse BASE ADAPTER -o FUSED"
"""The next step where a program or a format has no place for a part of an adapter."""


def command_on(adapter: Adapter | None, verb: str, *options: str, output: str = "plain") -> str:
    """Return a command that makes another adapter of one.

    What only the user knows stands in capitals: the path of an adapter that has none, and values of
    options such as `--base MODEL`.

    >>> command_on(None, "squeeze", "--uniform", output="uniform")
    'loratools squeeze ADAPTER --uniform -o uniform'

    Args:
        adapter: the one to start from, None where only its module is known.
        verb: the command.
        options: in the words of the command line.
        output: name of the result, without a suffix.
    """
    if adapter is None or adapter.source is None:
        return " ".join(["loratools", verb, "ADAPTER", *options, "-o", output])
    source, suffix = str(adapter.source), ""
    words = " ".join(options).split()
    target = words[words.index("--to") + 1] if "--to" in words[:-1] else adapter.format
    for entry in registered_formats():
        written = entry.format if entry.name == target else None
        if written is not None and written.is_writable and not written.is_folder:
            of_source = [s for s in written.suffixes if source.lower().endswith(s)]
            usual = written.suffixes if target != adapter.format else ()
            suffix = next(iter((*of_source, *usual)), "")
    return " ".join(["loratools", verb, shlex.quote(source), *options, "-o", output + suffix])


def module_paths_hint(source: Path | None) -> str:
    """Return the next step where module paths are asked for that an adapter does not have.

    Args:
        source: the adapter's path, if it has one.
    """
    named = shlex.quote(str(source or "ADAPTER"))
    return f"Module paths are listed by: loratools info {named} -v"


_COMMAND = re.compile(r"(?P<start>loratools (?P<verb>[a-z-]+) .*?)(?P<output> -o \S+)$")


def completed(hint: str, verb: str, flags: Sequence[str], output: str | None) -> str:
    """Return a hint whose command repeats the options that a user gave, if it is the same command.

    >>> hint = "Give the base: loratools convert lora --base BASE -o converted"
    >>> completed(hint, "convert", ["--experts", "each", "--base", "x"], "out.gguf")
    'Give the base: loratools convert lora --base BASE --experts each -o out.gguf'

    Args:
        hint: of an error; its command is what it ends with.
        verb: the command that the user gave.
        flags: and its options, values behind their flags; those that the hint has stay as they are.
        output: where the user wanted the result; None if nowhere.
    """
    match = _COMMAND.search(hint)
    if match is None or match["verb"] != verb:
        return hint
    have = set(shlex.split(match["start"]))
    added: list[str] = []
    is_new = True
    for word in flags:
        if word.startswith("--"):
            is_new = word not in have
        if is_new:
            added.append(shlex.quote(word))
    end = match["output"] if output is None else f" -o {shlex.quote(output)}"
    return hint[: match.start()] + " ".join([match["start"], *added]) + end
