"""Names of outputs: those of another kind of file are refused, and those without an ending told."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from loratools_formats.contract.registry import get_format, registered_formats
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import OptionError

_OF_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".ckpt")
_OF_OTHER_FILES = frozenset(
    f".{ending}"
    for group in (
        ("csv", "html", "json", "jsonl", "log", "md", "sarif", "toml", "txt", "xml", "yaml", "yml"),
        ("7z", "gz", "tar", "xz", "zip", "zst"),
        ("npy", "npz", "onnx", "pkl", "png", "svg"),
    )
    for ending in group
)
"""Endings of files that are no adapters, which a folder may not have."""


def check_name(output: Path, format_name: str, *, asked: bool = False) -> None:
    """Refuse to make an adapter that is named as another kind of file.

    Args:
        output: where it is to go.
        format_name: its format.
        asked: whether the format is one that the user chose for this output.

    Raises:
        OptionError: a folder has the name of a file, or a file has the ending of another format.
    """
    written = get_format(format_name)
    if written.fits(output.name):
        return
    is_other_adapter = _is_named_as_adapter(output)
    if not is_other_adapter and output.suffix.lower() not in _OF_OTHER_FILES:
        return
    if written.is_folder:
        folder = shlex.quote(str(_without_endings(output)))
        more = f", and make the file of it: {_conversion(folder, output)}"
        raise OptionError(
            f"format {format_name} is a folder, and the output is named as a file",
            got=str(output),
            hint=f"Pass `output={folder}`" + (more if is_other_adapter and not asked else ""),
        )
    if written.suffixes:
        ending = written.suffixes[0]
        better = shlex.quote(f"{_without_endings(output)}{ending}")
        raise OptionError(
            f"format {format_name} is a {ending} file, and the output is named as another kind",
            got=str(output),
            hint=f"Pass `output={better}`",
        )


def _is_named_as_adapter(output: Path) -> bool:
    """Return whether a name has the ending of a format whose adapters are one file."""
    formats = [entry.format for entry in registered_formats()]
    return any(one is not None and not one.is_folder and one.fits(output.name) for one in formats)


def _without_endings(output: Path) -> Path:
    """Return a path without the endings of files; of a name that is but an ending, without its dot.

    >>> [_without_endings(Path(p)).as_posix() for p in ("v1.5/small.tar.gz", "a/.gguf")]
    ['v1.5/small', 'a/gguf']
    """
    while output.suffix and (
        output.suffix.lower() in _OF_OTHER_FILES or _is_named_as_adapter(output)
    ):
        output = output.with_suffix("")
    is_ending = not output.suffix and _is_named_as_adapter(output)
    return output.with_name(output.name.lstrip(".")) if is_ending else output


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
    if output is None or output.suffix.lower() not in (*_OF_FILES, *_OF_OTHER_FILES):
        return
    other = output.suffix.lower()
    if other == kind:
        return
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
