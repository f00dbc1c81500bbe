"""Outputs that are references to the Hub: written to a temporary place here, and then published."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.hub.options import PushOptions
from loratools.hub.references import Reference, parse_target
from loratools.hub.upload import Target, may_publish
from loratools_formats.contract.registry import get_format
from loratools_formats.core.file_names import WRITTEN_ENDINGS
from loratools_formats.disk.temporaries import temporary_folder


def published(
    output: str | os.PathLike[str],
    arguments: Mapping[str, Any],
    *,
    dry_run: bool,
    run: Callable[[Path], Any],
) -> Any:
    """Run a function with an output here, publish what it wrote, and return its result.

    A repository that does not exist is made, for its owner alone.

    Args:
        output: the reference.
        arguments: what the function is called with, by name; the first is what it reads.
        dry_run: whether nothing is to be published.
        run: calls the function with a path to write to.

    Raises:
        LoratoolsError: nothing can be published there, or the function's own errors.
    """
    from loratools.face.push import push

    reference = parse_target(output)
    folder, name = _name(reference, arguments)
    if not dry_run:
        may_publish(Target(reference, "private"))
    with temporary_folder("loratools-staging") as place:
        local = place / name
        result = run(local)
        if not dry_run and os.path.lexists(local):
            done = push(local, str(folder), options=PushOptions(private=True))
            object.__setattr__(result, "published", done)
    return result


def _name(reference: Reference, arguments: Mapping[str, Any]) -> tuple[Reference, str]:
    """Return the folder on the Hub to publish to, and the name of the output in it.

    An output that is one file needs a name: that of the reference, else the repository's with the
    ending of the format or of the input.
    """
    folder, _, last = reference.inside.rpartition("/")
    if last.endswith(WRITTEN_ENDINGS):
        return reference.at(folder), last
    name = last or reference.repo.rpartition("/")[2]
    return reference, name + _suffix(arguments)


def _suffix(arguments: Mapping[str, Any]) -> str:
    to = getattr(arguments.get("options"), "to", None)
    if isinstance(to, str):
        return get_format(to).ending
    first: Any = next(iter(arguments.values()))
    while isinstance(first, Mapping | Sequence) and not isinstance(first, str):
        first = next(iter(first), None)
    path = getattr(first, "source", first)
    if isinstance(path, str | os.PathLike) and os.path.isfile(path):
        ending = Path(path).suffix
        return ending if ending in WRITTEN_ENDINGS else ""
    return ""
