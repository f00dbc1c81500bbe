"""What functions take: adapters by path or as they are, weights beside them, and base models."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from loratools.face.output_names import check_name
from loratools.folding.zeros import require_change
from loratools.hub.references import Wanted, path_of
from loratools.work.provenance import path_of_input
from loratools.work.requests import Reading, Writing
from loratools.work.selection import Dropping
from loratools_formats.checkpoints.checkpoint import Checkpoint, read_checkpoint
from loratools_formats.checkpoints.pipelines import is_pipeline
from loratools_formats.contract.files import check_target, read_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import OptionError, OutputExistsError
from loratools_formats.disk.hub_cache import cached_place, shown_name

Place = Annotated[str | os.PathLike[str], Wanted("adapter")]
"""The path of an adapter, or a reference to one on the Hub."""

_Source = str | os.PathLike[str] | Adapter
Source = Annotated[_Source, Wanted("adapter")]
"""An adapter: the path of a file or folder, a reference, or one that was read or made already."""

Described = Annotated[_Source, Wanted("adapter", headers=True)]
"""An adapter of which only headers are read; of a large one on the Hub nothing else is fetched."""

ModelPlace = Annotated[str | os.PathLike[str], Wanted("model")]
"""The path of a base model, or a reference to one on the Hub."""

Model = Annotated[str | os.PathLike[str] | Checkpoint, Wanted("model")]
"""A base model: the path of a folder or a safetensors file, a reference, or one read already."""

CardedModel = Annotated[str | os.PathLike[str] | Checkpoint, Wanted("model", beside="card")]
"""A base model whose card is read, too."""

CopiedModel = Annotated[str | os.PathLike[str] | Checkpoint, Wanted("model", beside="all")]
"""A base model whose other files the output gets."""

_Weighted = (
    _Source | Mapping[str, float] | Mapping[Path, float] | Sequence[_Source | tuple[_Source, float]]
)
Weighted = Annotated[_Weighted, Wanted("adapter")]
"""Adapters: one, several, or each with its weight; the weight is 1 where none is given."""

Mergeable = Annotated[_Weighted, Wanted("adapter", text="file")]
"""Adapters as in `Weighted`; but a text alone is the path of a recipe."""


READING: tuple[str, ...] = ("from_", "carry_unknown", "ignore_key")
WRITING: tuple[str, ...] = ("output", "overwrite")
IN_PLACE: tuple[str, ...] = (*WRITING, "in_place")


def opened(source: Any, reading: Reading, dropping: Dropping | None = None) -> Adapter:
    """Return the adapter that a source is, without the modules that are to leave.

    Raises:
        OptionError: it is no source, a format was given for an adapter that is read already, or no
            module is of those that are to leave.
        LoratoolsError: nothing there, unknown format, or not a sound adapter.
        AdapterError: all that it holds is zero.
    """
    if isinstance(source, Adapter):
        if reading.from_ is not None:
            raise OptionError(
                "the adapter has been read already, so a format cannot be chosen", got=source.format
            )
        return left([ignoring(source, reading.ignore_key)], dropping)[0]
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise OptionError(
            "not an adapter", got=repr(source), expected="the path of a file or folder, or one read"
        )
    return left([_read(source, reading)], dropping)[0]


def left(adapters: Sequence[Adapter], dropping: Dropping | None) -> list[Adapter]:
    """Return adapters that an operation takes together, without the modules that are to leave.

    Raises:
        OptionError: no module is of those that are to leave.
        AdapterError: nothing is left of one, or all that is left is zero.
    """
    if dropping is not None and dropping.is_given:
        from loratools.operations.drop import without_modules  # numpy, which `info` does without

        adapters = without_modules(adapters, dropping)
    return [require_change(adapter) for adapter in adapters]


def _read(path: str | os.PathLike[str], reading: Reading) -> Adapter:
    adapter = read_adapter(path, reading.from_, carry_unknown=reading.carry_unknown)
    return ignoring(adapter, reading.ignore_key)


def ignoring(adapter: Adapter, keys: Sequence[str]) -> Adapter:
    """Return an adapter in which configuration keys that are not known hinder nothing.

    Raises:
        OptionError: a key is known, and has an effect.
    """
    if not keys:
        return adapter
    known = [
        each.where
        for each in adapter.caveats
        if each.where in keys and each.code != "unknown-config-key"
    ]
    if known:
        raise OptionError(
            "the key is known to matter, and cannot be ignored", path=adapter.source, got=known[0]
        )
    findings = tuple(_ignored(each) if each.where in keys else each for each in adapter.findings)
    told = {each.where for each in adapter.findings}
    findings += tuple(
        Finding("ignored-config-key", "note", key, f"config key {key} to ignore is not there")
        for key in keys
        if key not in told and key not in adapter.config
    )
    return replace(adapter, findings=findings)


def _ignored(finding: Finding) -> Finding:
    if finding.code != "unknown-config-key":
        return finding
    text = f"config key {finding.where} is not known, and is ignored as requested"
    return Finding("ignored-config-key", "note", finding.where, text)


@dataclass(frozen=True)
class Trained:
    """An adapter relative to its original base.

    Attributes:
        adapter: to work on.
        inputs: all adapters that it was read from.
    """

    adapter: Adapter
    inputs: tuple[Adapter, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What reading it found that a user should know."""
        return self.inputs[0].notices


def trained(
    source: Any, initial: Any, reading: Reading, dropping: Dropping | None = None
) -> Trained:
    """Return the adapter to work on; `initial` is the one saved before training, None if none.

    Modules that are to leave are in neither.

    Raises:
        OptionError: the adapter was not trained against a changed base.
        LoratoolsError: as `opened`.
    """
    adapter = opened(source, reading, dropping)
    if initial is None:
        return Trained(adapter, (adapter,))
    from loratools.lowrank.initial import subtract_initial

    # Before training, the change itself may be zero.
    first = initial if isinstance(initial, Adapter) else _read(initial, reading)
    if dropping is not None and dropping.is_given:
        from loratools.operations.drop import without_modules

        (first,) = without_modules([first], dropping)
    return Trained(subtract_initial(adapter, first), (adapter, first))


def model(base: Any) -> Checkpoint:
    """Return the checkpoint that a base is.

    Raises:
        OptionError: it is neither a path nor a checkpoint.
        LoratoolsError: nothing there, or not a sound checkpoint.
    """
    if isinstance(base, Checkpoint):
        return base
    if not isinstance(base, str | os.PathLike) or not os.fspath(base):
        raise OptionError("not a base model", got=repr(base), expected="a path, or one read")
    return read_checkpoint(path_of(base))


def model_or_pipeline(base: Any) -> Checkpoint:
    """Return the checkpoint that a base is, or all components of a diffusion pipeline as one.

    Raises:
        OptionError: it is neither a path nor a checkpoint.
        LoratoolsError: nothing there, or not a sound checkpoint.
    """
    is_path = isinstance(base, str | os.PathLike) and os.fspath(base)
    if not (is_path and is_pipeline(path_of(base))):
        return model(base)
    from loratools.base.pipelines import read_base  # numpy, which an adapter's info does without

    return read_base(path_of(base))


def weighted(adapters: Any) -> list[tuple[Any, float]]:
    """Return adapters with their weights, 1 where none is given.

    >>> weighted({"a": 0.7, "b": 0.3}), weighted("a"), weighted(["a", ("b", 2)])
    ([('a', 0.7), ('b', 0.3)], [('a', 1.0)], [('a', 1.0), ('b', 2.0)])

    Raises:
        OptionError: none, or a weight that is not a finite number.
    """
    pairs: list[Any]
    if isinstance(adapters, Mapping):
        pairs = list(adapters.items())
    elif isinstance(adapters, str | os.PathLike | Adapter):
        pairs = [(adapters, 1.0)]
    elif isinstance(adapters, Iterable):
        pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in adapters]
    else:
        raise OptionError(
            "not adapters", got=repr(adapters), expected="a path, a sequence, or {path: weight}"
        )
    if not pairs:
        raise OptionError("no adapters given")
    for pair in pairs:
        if len(pair) != 2 or isinstance(pair[1], bool) or not isinstance(pair[1], float | int):
            raise OptionError("not an adapter with its weight", got=repr(pair))
        if not math.isfinite(pair[1]):
            raise OptionError("not a finite weight", got=pair[1])
    return [(source, float(weight)) for source, weight in pairs]


def label(source: Any) -> str:
    """Return what reports call an adapter: the name of its file or folder."""
    path = source.source if isinstance(source, Adapter) else source
    return "adapter" if path is None else shown_name(path)


def destination(
    writing: Writing,
    source: Adapter | None,
    inputs: Iterable[Any],
    format_name: str | None = None,
) -> Writing:
    """Return where the result goes, refusing before any work an output that cannot be published.

    Args:
        writing: what was asked for.
        source: the adapter to replace, if the result is to be written in place.
        inputs: adapters, checkpoints and paths that are read.
        format_name: of the adapter that is made, where it is known before.

    Raises:
        OptionError: the result is to go over an adapter that has no path, or to two places, or is
            named as another kind of file.
        OutputExistsError: the output exists and may not be replaced, is an input, or lies inside an
            input or around one.
        OutputError: the folder that it would be in does not exist.
    """
    if writing.in_place:
        place = None if source is None else source.source
        if place is not None and cached_place(place) is not None:
            raise OptionError(
                "`in_place` writes over the input, which is on the Hub",
                hint="Name an output: `output=hf://USER/NAME` publishes it",
            )
        if source is None or place is None or writing.output not in (None, place):
            raise OptionError("`in_place` writes over the input, which is no such path")
        writing = replace(writing, output=source.source, overwrite=True)
    output = writing.output
    if output is None:
        return writing
    if str(output) == "-":
        raise OptionError(
            "results are files and folders, and cannot go to stdout",
            got="-",
            hint="Name a place: `output=PATH`",
        )
    check_target(output, [], overwrite=writing.overwrite)
    _require_elsewhere(output)
    for path in filter(None, map(path_of_input, inputs)):
        if os.path.realpath(output) == os.path.realpath(path) and not writing.in_place:
            raise OutputExistsError(
                "the output is an input, and inputs are never changed",
                path=output,
                hint="Choose another output"
                + (
                    ", or pass `in_place=True`"
                    if source is not None and path == source.source
                    else ""
                ),
            )
        check_target(output, [path], overwrite=writing.overwrite)
    if format_name is not None:
        check_name(output, format_name)
    return writing


def _require_elsewhere(output: Path) -> None:
    """Refuse to replace the current folder, or one around it.

    Whoever stands in it, such as a shell, would be left in a folder that is gone.
    """
    here, place = Path(os.path.realpath(os.curdir)), Path(os.path.realpath(output))
    if place == here or place in here.parents:
        raise OutputExistsError(
            "the current folder is the output or lies inside it, and would be replaced",
            path=output,
            hint=f"Go to another folder, and name {shlex.quote(str(place))} there",
        )


def beside(writing: Writing) -> Path | None:
    """Return the folder where results may wait: beside the output, which must hold them anyway."""
    return None if writing.output is None else Path(os.path.realpath(writing.output)).parent
