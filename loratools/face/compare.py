"""`compare`: how adapters relate; and `compare_bases`: how bases differ where an adapter acts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratools.face.declare import public
from loratools.face.result import Reported
from loratools.face.shelf import Shelf, named_adapters
from loratools.face.source import READING, Model, Source, model_or_pipeline, opened
from loratools.operations.compare import bases, operation
from loratools.operations.compare import result as measured
from loratools.operations.compare.operation import CompareOptions
from loratools.page.measured import bases_sections, compare_sections
from loratools.page.parts import Section
from loratools.work.parallel import Workers
from loratools.work.requests import Progress, Reading
from loratools.work.selection import Selection
from loratools_formats.contract.path_kinds import is_model
from loratools_formats.disk.errors import UnknownFormatError


@dataclass(frozen=True, kw_only=True, repr=False)
class CompareResult(Reported, measured.CompareResult):
    """How adapters relate."""

    operation: ClassVar[str] = "compare"

    def title(self) -> str:
        """Return the heading of its page."""
        return f"Comparison of {len(self.names)} adapters"

    def sections(self) -> Sequence[Section]:
        """Return the parts of its page, findings first."""
        return compare_sections(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class BasesResult(Reported, measured.BasesResult):
    """How far two bases differ where an adapter acts."""

    operation: ClassVar[str] = "compare-bases"

    def title(self) -> str:
        """Return the heading of its page."""
        return f"Two bases where {self.source or 'an adapter'} acts"

    def sections(self) -> Sequence[Section]:
        """Return the parts of its page."""
        return bases_sections(self)


@public(reading=READING)
def compare(
    adapters: Shelf,
    *,
    base: Model | None = None,
    options: CompareOptions,
    selection: Selection,
    threads: Workers,
    reading: Reading,
    progress: Progress | None = None,
) -> CompareResult:
    """Compare adapters where their modules match: angles, shared spaces, signs, families.

    Two adapters are compared module by module, more of them as a matrix.

    >>> import loratools as lt
    >>> found = lt.compare(["examples/tiny-llama/lora", "examples/tiny-llama/rslora"])
    >>> found.names, len(found.modules)
    (('lora', 'rslora'), 28)

    Args:
        adapters: at least two, or a mapping from their names.
        base: the base model, for DoRA and kinds that need it.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: fewer than two adapters, one given twice, or a number out of range.
        AdapterError: they share no module, or values are not finite.
        UnsupportedError: a change depends on the base, or is not known.
    """
    try:
        named = named_adapters(adapters, reading)
    except UnknownFormatError as error:
        if error.path is not None and is_model(Path(error.path)):
            error.hint = (
                "compare measures adapters; to compare two models where an adapter acts: "
                f"loratools compare ADAPTER --bases {shlex.quote(str(error.path))} MODEL"
            )
        raise
    found = operation.compare(
        named,
        base=None if base is None else model_or_pipeline(base),
        options=options,
        selection=selection,
        workers=threads.workers,
        progress=progress,
    )
    notices = dict.fromkeys(each for one in named.values() for each in one.notices)
    return CompareResult.of(found, findings=(*notices, *found.findings))


@public(reading=READING)
def compare_bases(
    source: Source,
    base: Model,
    other: Model,
    *,
    selection: Selection,
    threads: Workers,
    reading: Reading,
) -> BasesResult:
    """Compare two base models where an adapter acts, which tells whether it can move to the other.

    >>> import loratools as lt
    >>> model = "examples/tiny-llama/model"
    >>> lt.compare_bases("examples/tiny-llama/lora", model, model).modules[0].outputs
    0.0

    Args:
        source: an adapter of any kind.
        base: the model that it was trained on.
        other: the model to which it would be moved.

    Raises:
        AdapterError: no module fits both bases.
        UnsupportedError: a change is not known.
        OptionError: an argument is neither a path nor what was read.
    """
    found = bases.compare_bases(
        opened(source, reading),
        model_or_pipeline(base),
        model_or_pipeline(other),
        selection=selection,
        workers=threads.workers,
    )
    return BasesResult.of(found)
