"""Names of outputs: those of another kind of file are refused, and those without an ending told."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from loratools_formats.contract.registry import get_format, registered_formats
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import OptionError

_OF_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".ckpt")


def check_name(output: Path, format_name: str, *, asked: bool = False) -> None:
    """Refuse to make a folder that is named as a file of another format.

    Args:
        output: where it is to go.
        format_name: its format.
        asked: whether the format is one that the user chose for this output.

    Raises:
        OptionError: the name has the suffix of a format that is one file.
    """
    if not get_format(format_name).is_folder:
        return
    for entry in registered_formats():
        other = entry.format
        if other is not None and not other.is_folder and other.fits(output.name):
            folder = shlex.quote(str(output.with_suffix("")))
            more = f", and make the file of it: {_conversion(folder, output)}"
            raise OptionError(
                f"format {format_name} is a folder, and the output is named as a file",
                got=str(output),
                hint=f"Pass `output={folder}`" + ("" if asked else more),
            )


def about_name(output: Path, format_name: str) -> list[Finding]:
    """Return a finding if the name of a file lacks the ending by which programs know it."""
    written = get_format(format_name)
    endings = written.suffixes
    if written.is_folder or not endings or written.fits(output.name):
        return []
    text = f"{output.name} does not end in {endings[0]}, by which other programs know it"
    return [Finding("name-without-suffix", "note", str(output), text)]


def _conversion(folder: str, output: Path) -> str:
    """Return the command that makes a file of a folder, as an output is named or safetensors."""
    if output.suffix.lower() == ".gguf":
        return f"loratools convert --to gguf --base MODEL {folder} -o {shlex.quote(str(output))}"
    file = shlex.quote(str(output.with_suffix(".safetensors")))
    return f"loratools convert --to safetensors {folder} -o {file}"


def check_model_name(output: Path | None, kind: Literal["folder", ".safetensors", ".gguf"]) -> None:
    """Refuse to write a model under the name of another kind of file.

    Args:
        output: where the model goes; None if it is not written.
        kind: what it will be: a folder, or a file with this ending.

    Raises:
        OptionError: the name has the ending of another kind.
    """
    if output is None or output.suffix.lower() not in _OF_FILES or output.suffix.lower() == kind:
        return
    other = output.suffix.lower()
    better = output.with_suffix("" if kind == "folder" else kind)
    named = shlex.quote(str(better))
    hint = f"Pass `output={named}`"
    if other == ".gguf":
        hint += ", and make the GGUF of it with llama.cpp's converter, or name a GGUF model as base"
    what = "a folder" if kind == "folder" else f"a {kind} file"
    raise OptionError(
        f"the result is {what}, as the base is, and the output is named as a {other} file",
        got=str(output),
        hint=hint,
    )
