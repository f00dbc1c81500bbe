"""Commands that an error names as the next step: complete, so that they can be pasted."""

from __future__ import annotations

import shlex

from loratools_formats.contract.registry import registered_formats
from loratools_formats.core.adapter import Adapter


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
    for entry in registered_formats():
        written = entry.format if entry.name == adapter.format else None
        if written is not None and written.write is not None and not written.is_folder:
            suffix = next((s for s in written.suffixes if source.lower().endswith(s)), "")
    return " ".join(["loratools", verb, shlex.quote(source), *options, "-o", output + suffix])
