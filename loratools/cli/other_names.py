"""The names that other programs give to our commands and options, for messages about unknown names.

A suggestion by likeness alone would name `--from` for `--force`.
"""

from __future__ import annotations

from collections.abc import Collection

COMMANDS = {
    "apply": "fuse",
    "average": "merge",
    "bake": "fuse",
    "combine": "merge",
    "compress": "squeeze",
    "diff": "compare",
    "export": "convert",
    "inspect": "info",
    "lint": "check",
    "list": "info",
    "ls": "info",
    "merge-and-unload": "fuse",
    "prune": "squeeze",
    "publish": "push",
    "quantise": "quantize",
    "reduce": "squeeze",
    "resize": "squeeze",
    "show": "info",
    "shrink": "squeeze",
    "stats": "spectrum",
    "svd": "squeeze",
    "truncate": "squeeze",
    "upload": "push",
    "validate": "check",
    "version": "--version",
}
"""Commands of ours, by what others call them."""

_OPTIONS = {
    "--base-model": "--base",
    "--bits": "--quant-type",
    "--clobber": "--overwrite",
    "--compression": "--budget",
    "--dest": "--output",
    "--destination": "--output",
    "--diff": "--dry-run",
    "--dim": "--rank",
    "--energy-threshold": "--energy",
    "--for": "--target",
    "--force": "--overwrite",
    "--format": "--output-format",
    "--jobs": "--workers",
    "--level": "--fail-on",
    "--lora-rank": "--rank",
    "--max-size": "--budget",
    "--model": "--base",
    "--network-dim": "--rank",
    "--new-rank": "--rank",
    "--num-workers": "--workers",
    "--out": "--output",
    "--out-file": "--output",
    "--out-type": "--dtype",
    "--outdir": "--out-dir",
    "--output-dir": "--out-dir",
    "--output-file": "--output",
    "--outfile": "--output",
    "--output-path": "--output",
    "--precision": "--dtype",
    "--replace": "--overwrite",
    "--save-precision": "--dtype",
    "--save": "--output",
    "--save-path": "--output",
    "--save-to": "--output",
    "--severity": "--fail-on",
    "--size": "--budget",
    "--strict": "--fail-on",
    "--target-rank": "--rank",
    "--target-size": "--budget",
    "--threads": "--workers",
    "--torch-dtype": "--dtype",
    "--type": "--quant-type",
    "--yes": "--overwrite",
    "-b": "--base",
    "-f": "--overwrite",
    "-j": "--workers",
    "-o": "--output",
    "-t": "--to",
    "-w": "--workers",
    "-y": "--overwrite",
}
MISSING = {"index": "Make one: loratools fleet index ADAPTERS -o INDEX"}
"""Where what an option needs comes from, by its name."""

_WEIGHTS = ("--weight", "--weights", "--scale", "--scales", "--alpha", "-w")
_TAKE_WEIGHTS = ("merge", "fuse", "verify")
_TO = ("--to", "--target-format", "--output-format", "--format")
_INPUTS = {
    "ADAPTER": ("--adapter", "--adapters", "--adapter-path", "--lora", "--lora-path", "--peft"),
    "BASE": ("--model", "--base", "--base-model", "--model-path", "--checkpoint"),
    "CHECKPOINT": ("--model", "--base", "--base-model", "--model-path", "--checkpoint"),
    "": ("--input", "--in", "--input-file", "--source", "--src", "-i"),
}
"""Flags of others for inputs that stand here without one, by the name that usage gives those."""


def other_option(flag: str, command: str, known: Collection[str], usage: str = "") -> str | None:
    """Return what to type instead of an unknown flag, as a sentence; None if that is not known.

    Args:
        flag: as it was typed.
        command: the command's name.
        known: its flags.
        usage: the command with its arguments.
    """
    typed = flag.replace("_", "-")
    if flag in _WEIGHTS and command in _TAKE_WEIGHTS:
        return "A weight follows its adapter: ADAPTER:0.5"
    if typed in _TO and not {"--to", "--output-format"} & {*known}:
        return "To change the format: loratools convert ADAPTER -o NEW --to FORMAT"
    meant = typed if typed in known else _OPTIONS.get(typed, "")
    if typed == "--alpha" and "--set" in known:
        return "Did you mean '--set alpha=VALUE'?"
    if meant in known:
        return f"Did you mean '{meant}'?"
    if meant == "--output" and "--json" in known:
        return f"What it finds is printed: {usage} --json > FILE"
    arguments = usage.split()[2:]
    called = [name for name, flags in _INPUTS.items() if typed in flags]
    is_argument = any(word.startswith(name) for name in called for word in arguments)
    if is_argument and typed[:-1] not in known:
        return f"It stands without a flag: {usage}"
    return None
