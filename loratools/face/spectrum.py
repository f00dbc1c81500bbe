"""`spectrum`: what is in an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from loratools.base.decompositions import IntruderOptions
from loratools.face.declare import public
from loratools.face.result import Result
from loratools.face.source import READING, Model, Source, model_or_pipeline, opened
from loratools.folding.expert_order import overruled
from loratools.operations.spectrum import operation
from loratools.operations.spectrum import result as measured
from loratools.operations.spectrum.against import read_references
from loratools.operations.spectrum.options import SpectrumOptions
from loratools.page.measured import spectrum_sections
from loratools.page.parts import Section
from loratools.work.parallel import Workers
from loratools.work.requests import Progress, Reading
from loratools.work.selection import Selection
from loratools_formats.core.findings import Finding


@dataclass(frozen=True, kw_only=True, repr=False)
class SpectrumResult(Result, measured.SpectrumResult):
    """What is in an adapter.

    Attributes:
        notes: the messages of `notices`.
    """

    operation: ClassVar[str] = "spectrum"

    notes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(each.message for each in self.notices))

    def title(self) -> str:
        """Return the heading of its page."""
        return f"Spectrum of {self.source or 'an adapter'}"

    def sections(self) -> Sequence[Section]:
        """Return the parts of its page, findings first."""
        return spectrum_sections(self)


@public(reading=READING)
def spectrum(
    source: Source,
    *,
    base: Model | None = None,
    options: SpectrumOptions,
    judging: IntruderOptions,
    selection: Selection,
    threads: Workers,
    reading: Reading,
    progress: Progress | None = None,
) -> SpectrumResult:
    """Measure what is in an adapter: spectra, ranks, strength, and what stands out.

    Without a base everything comes from the factors, at O(d r²); with it also the size of the
    change beside the weight, intruder dimensions, and the true change of a DoRA.

    >>> import loratools as lt
    >>> found = lt.spectrum("examples/tiny-llama/lora")
    >>> found.matrices[0].name, found.matrices[0].measures.energy_rank_90
    ('model.layers.0.mlp.down_proj', 14)

    Args:
        source: an adapter of any kind.
        base: the base model.
        progress: called with (modules done, modules in all).

    Raises:
        UnsupportedError: a change depends on the base, or is not known.
        AdapterError: no module is selected, or tensors that do not fit.
        OptionError: a number out of range.
    """
    adapter, settings = overruled(opened(source, reading), dict(options.set_))
    references, others = (
        ([], []) if options.against is None else read_references(options.against, adapter)
    )
    found = operation.spectrum(
        adapter,
        base=None if base is None else model_or_pipeline(base),
        intruders=judging,
        entries=options.entries,
        selection=selection,
        given=settings,
        references=references,
        workers=threads.workers,
        progress=progress,
    )
    if found.directional:
        message = "DoRA modules are given by their directions; `base` tells their true changes"
        others.append(Finding("direction-only", "warning", None, message))
    return SpectrumResult.of(replace(found, notices=(*adapter.notices, *others, *found.notices)))
