"""Reading adapters of any format, and publishing written ones.

Formats only encode and decode. Making an output appear whole, with its provenance beside it,
happens here for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from loratools_formats.contract.registry import find_format, get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.nothing import require_tensors
from loratools_formats.disk.errors import (
    LoratoolsError,
    OutputError,
    OutputExistsError,
    UnsupportedError,
)
from loratools_formats.disk.one_folder import of_one_folder
from loratools_formats.disk.provenance import (
    MADE_HERE,
    PREDICATE_TYPE,
    PROVENANCE_FILE,
    RECIPE_FILE,
    statement,
    statement_of_one,
)
from loratools_formats.disk.publish import (
    check_file,
    is_vacant,
    publish_folder,
    publish_with,
    resolved,
)


def read_adapter(
    path: str | os.PathLike[str], format_name: str | None = None, *, carry_unknown: bool = False
) -> Adapter:
    """Read an adapter's headers; its tensors load on demand.

    Args:
        path: file or folder.
        format_name: read it as this format instead of recognising it.
        carry_unknown: keep tensors that the format does not know, where it would refuse them.

    Raises:
        LoratoolsError: nothing there, unknown format, no tensors, or not a sound adapter.
    """

    def read() -> Adapter:
        chosen = find_format(path) if format_name is None else get_format(format_name)
        reader = chosen.read_with_unknown if carry_unknown else chosen.read
        return require_tensors(reader(Path(path)))

    return of_one_folder(path, read)


def check_target(
    path: str | os.PathLike[str], sources: Iterable[Path], *, overwrite: bool = False
) -> None:
    """Refuse, before any work is done, an output that could not be published.

    Raises:
        OutputError: the folder that it would be in does not exist.
        OutputExistsError: it exists and may not be replaced, lies inside or around a source, or is
            a file that belongs to one.
    """
    target, sources = resolved(path), list(sources)
    if not target.parent.is_dir():
        raise OutputError("the folder to write into does not exist", path=target.parent)
    reals = [Path(os.path.realpath(source)) for source in sources]
    if os.path.lexists(target) and not (target.is_file() or target.is_dir()):
        raise OutputExistsError(
            "exists, and is neither a file nor a folder", path=path, hint="Choose another output"
        )
    if os.path.lexists(path) and not overwrite and (target in reals or not is_vacant(path)):
        raise OutputExistsError(
            "output exists", path=path, hint="Pass `overwrite=True` to replace it"
        )
    for real in reals:
        if real != target and (target in real.parents or real in target.parents):
            raise OutputExistsError(
                "the output lies inside the input or around it",
                path=path,
                hint="Choose an output beside it",
            )
    for source in sources:
        if target in _belonging(source):
            raise OutputExistsError(
                "the output is a file that belongs to the input, and inputs are never changed",
                path=path,
                got=str(source),
                hint="Choose another output",
            )


def _belonging(path: Path) -> list[Path]:
    """Return where the statement and the recipe of an adapter that is one file lie."""
    if path.is_dir():
        return []
    ends = (PROVENANCE_FILE, RECIPE_FILE)
    return [
        resolved(f"{os.fspath(place)}.{end}") for place in (path, resolved(path)) for end in ends
    ]


def check_apart(path: str | os.PathLike[str], others: Iterable[Path | None]) -> None:
    """Refuse a further output that is an input or the output itself, or lies in or around one.

    Raises:
        OutputExistsError: it does, or belongs to one.
    """
    target = resolved(path)
    for other in filter(None, others):
        real = resolved(other)
        inside = real in target.parents and real.is_dir()
        if real == target or target in real.parents or inside or target in _belonging(other):
            raise OutputExistsError(
                "it is an input or the output, or lies inside one or around it",
                path=path,
                got=str(other),
                hint="Choose a place beside them",
            )


def check_further(
    path: str | os.PathLike[str], others: Iterable[Path | None], *, overwrite: bool = False
) -> None:
    """Refuse, before any work is done, a further output that could not be published after it.

    By then the output itself is there, and an error would leave one without the other.

    Args:
        path: where the further output goes.
        others: what is read, and the output itself.
        overwrite: whether a file that exists may be replaced.

    Raises:
        OutputError: the folder does not exist, or no such file can be made in it.
        OutputExistsError: it exists and may not be replaced, or is not apart from the others.
    """
    check_apart(path, others)
    check_file(path, overwrite=overwrite)


def check_output(
    adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Refuse, before any work is done, an output of an adapter that could not be published.

    Raises:
        OutputError: the folder that it would be in does not exist.
        OutputExistsError: it exists and may not be replaced, or lies inside or around the input.
    """
    sources = [] if adapter.source is None else [adapter.source]
    check_target(path, sources, overwrite=overwrite)


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format_name: str,
    *,
    overwrite: bool = False,
    check: Callable[[Path], Mapping[str, Any] | None] | None = None,
) -> None:
    """Write an adapter so that it appears whole or not at all, with its provenance beside it.

    Args:
        adapter: what to write.
        path: where.
        format_name: in which format.
        overwrite: whether an output that exists may be replaced.
        check: looks at the output before it appears; by raising it keeps it from appearing. What
            it returns is the report that the statement has.

    Raises:
        OutputExistsError: the output exists and `overwrite` is false, or holds foreign files.
        OutputError: the system refused; nothing was changed.
        UnsupportedError: the adapter is of another format, and was not converted.
    """
    chosen = get_format(format_name)
    if not chosen.is_writable:
        raise UnsupportedError(f"format {chosen.name} can be read but not written")
    if adapter.format != chosen.name:
        from loratools_formats.contract.commands import command_on

        convert = command_on(adapter, "convert", "--to", chosen.name, output="converted")
        raise UnsupportedError(
            f"an adapter of format {adapter.format} cannot be written as {chosen.name} "
            "without a conversion",
            path=adapter.source,
            hint=f"Convert it first, with loratools.write or: {convert}",
        )
    check_output(adapter, path, overwrite=overwrite)

    def make(temporary: Path) -> Mapping[str, Any] | None:
        chosen.write(adapter, temporary)
        found = None if check is None else _checked(check, temporary, Path(path))
        adapter.check_unchanged()
        if found is None or adapter.provenance is None:
            return adapter.provenance
        return {**adapter.provenance, "report": found}

    if chosen.is_folder:
        with publish_folder(path, overwrite=overwrite) as temporary:
            made_how = make(temporary)
            if made_how is not None:
                files = sorted(p for p in temporary.rglob("*") if p.is_file() and p.suffix != ".md")
                record = statement(made_how, files, folder=temporary, output=Path(path))
                (temporary / PROVENANCE_FILE).write_bytes(record)
        return
    made = {name: c for name, c in adapter.attachments.items() if isinstance(c, bytes)}
    with publish_with(path, marks_beside(made), overwrite=overwrite) as (temporary, beside):
        made_how = make(temporary)
        for name, content in made.items():
            beside[name] += content
        if made_how is not None:
            beside[PROVENANCE_FILE] += statement_of_one(made_how, Path(path), temporary)


def _checked(
    check: Callable[[Path], Mapping[str, Any] | None], temporary: Path, path: Path
) -> Mapping[str, Any] | None:
    """Look at an output before it appears; errors name where it was to appear.

    Raises:
        LoratoolsError: as the check raises.
    """
    try:
        return check(temporary)
    except LoratoolsError as error:
        if error.path is not None:
            error.path = error.path.replace(os.fspath(temporary), os.fspath(path))
        raise


def marks_beside(names: Iterable[str] = ()) -> dict[str, bytes]:
    """Return what every file of ours beside a single-file output holds, by the end of its name."""
    return {PROVENANCE_FILE: PREDICATE_TYPE.encode(), **dict.fromkeys(names, MADE_HERE)}
