"""`convert` and `write`: an adapter in another format, compared with the original."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from loratools.base.named_base import about_base
from loratools.face.declare import public
from loratools.face.result import AdapterResult, Reported, check_error
from loratools.face.source import IN_PLACE, READING, ModelPlace, Source, destination, opened
from loratools.folding.expert_order import overruled
from loratools.operations.about_outputs import about_output
from loratools.operations.convert.compare_written import ConversionCheck, compared
from loratools.operations.convert.experts.choice import format_of
from loratools.operations.convert.experts.layouts import Wanted
from loratools.operations.convert.operation import Conversion, prepare
from loratools.operations.convert.operation import write as write_converted
from loratools.operations.convert.options import ConvertOptions, SingleFileOptions
from loratools.operations.reported import written_nbytes
from loratools.work.declared import flags
from loratools.work.json_object import hidden, named
from loratools.work.requests import Progress, Reading, Writing
from loratools.work.selection import Dropping
from loratools_formats.contract.commands import completed
from loratools_formats.contract.files import write_adapter
from loratools_formats.contract.format import Context, Loss
from loratools_formats.contract.registry import format_for_output, get_format, registered_formats
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import LoratoolsError, LossyError, OptionError


@dataclass(frozen=True)
class ConvertedModule:
    """One converted module.

    Attributes:
        name: module path, as the target names it.
        rank: of the factors; None for a kind without factors.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of what was written; None if nothing was.
    """

    name: str
    rank: int | None
    relative_error: float | None


@dataclass(frozen=True, kw_only=True, repr=False)
class ConvertResult(AdapterResult):
    """An adapter in another format, written or not.

    Attributes:
        from_: format of the input.
        to: format of the output.
        bytes_out: size of the output's weight file.
        losses: what the target cannot hold; `adapter` is without it.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of the written file, over all modules; None if nothing was
            written.
        other_error: largest relative error of its tensors that are no factors.
        modules: one entry each, in path order.
        conversion: how to write it.
    """

    operation: ClassVar[str] = "convert"

    from_: str = named("from")
    to: str
    bytes_out: int
    losses: tuple[Loss, ...]
    relative_error: float | None
    other_error: float | None
    modules: tuple[ConvertedModule, ...]
    conversion: Conversion = hidden()

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the adapter whole or not at all, read it again, and return where.

        Raises:
            OutputExistsError: the output exists and `overwrite` is false.
            OutputError: writing failed, or the output lacks a part or holds infinite values.
        """
        write_converted(self.conversion, Path(path), overwrite=overwrite)
        return Path(path)


@dataclass(frozen=True, kw_only=True, repr=False)
class WriteResult(Reported):
    """An adapter that was written, and read again.

    Attributes:
        path: where.
        format: in which format.
        losses: what the format cannot hold and is left out.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of the written file, over all modules.
        other_error: largest relative error of its tensors that are no factors.
    """

    operation: ClassVar[str] = "write"

    path: Path
    format: str
    losses: tuple[Loss, ...]
    relative_error: float
    other_error: float


@public(
    reading=READING,
    writing=(*IN_PLACE, "max_error"),
    single=("names", "names_from", "component", "strip_training_metadata"),
)
def convert(
    source: Source,
    *,
    base: ModelPlace | None = None,
    options: ConvertOptions,
    single: SingleFileOptions,
    dropping: Dropping,
    reading: Reading,
    writing: Writing,
    progress: Progress | None = None,
) -> ConvertResult:
    """Convert an adapter to another format, and compare the written file with the adapter.

    The format is `to`, or found from the name of the output.

    >>> import loratools as lt
    >>> lt.convert("examples/tiny-llama/lora", to="safetensors").modules[0].rank
    32

    Args:
        source: an adapter of any kind.
        base: the base model, if a format needs its names or layout.
        progress: called with (modules compared, modules in all).

    Raises:
        OptionError: neither `to` nor an output, or an option that no format involved supports.
        LossyError: the format cannot hold all of the adapter; the error carries the result.
        InexactError: the error is above `max_error`; the error carries the result.
        UnsupportedError: a translation would be a guess.
        AdapterError: names that cannot be translated, or values that are not finite.
        OutputExistsError: the output exists and `overwrite` is false.
        OutputError: the output could not be written, or lacks a part.
    """
    adapter, metadata = overruled(opened(source, reading, dropping), dict(options.set_))
    inputs = [adapter, None if base is None else Path(base), single.names_from]
    writing = writing if writing.dry_run else destination(writing, adapter, inputs)
    to, experts = _request(options)
    target, as_it_is = _target(adapter.format, to, writing.output)
    output = None if writing.dry_run else writing.output
    try:
        conversion = prepare(
            adapter,
            target,
            Context(None if base is None else Path(base), options.dtype),
            allow_lossy=True,
            metadata=metadata,
            single=replace(single, alpha=options.alpha, as_it_is=as_it_is),
            names_of=options.names_of,
            experts=experts,
        )
    except LoratoolsError as error:
        if error.hint is not None:
            read = reading if base is None else replace(reading, base=Path(base))
            given = flags(options, single, dropping, read)
            error.hint = completed(error.hint, "convert", given, _text(output))
        raise
    about = about_base([adapter], None if base is None else Path(base))
    conversion = replace(conversion, findings=(*about, *conversion.findings))
    if conversion.losses and not options.allow_lossy:
        raise _lossy(conversion)
    check = None
    if output is not None:
        check = write_converted(
            conversion,
            output,
            overwrite=writing.overwrite,
            max_error=writing.max_error,
            progress=progress,
        )
    result = _result(conversion, check)
    if check is not None:
        check_error(result, writing.max_error)
    return result


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _request(options: ConvertOptions) -> tuple[str | None, Wanted | str]:
    """Return the format if one is asked for, and the layout of experts or the reader.

    Raises:
        OptionError: there is no such program, or it loads another format than is asked for.
    """
    if options.for_ is not None:
        own = format_of(options.for_)
        if options.to not in (None, own):
            raise OptionError(f"{options.for_} loads {own}", got=f"`to={options.to}`")
        return own, options.for_
    if options.to is not None and options.to.lower() == "tinker":
        if options.experts is not None:
            raise OptionError("Tinker has a layout of its own: leave out `experts`")
        return "peft", Wanted(layout="tinker", uniform=True)
    wanted = Wanted(layout=options.experts, peft=options.peft_layout)
    return options.to or ("peft" if wanted.is_given else None), wanted


def _target(source: str, to: str | None, output: Path | None) -> tuple[str, bool]:
    """Return the format to write, and whether keys stay as they are.

    A single file that is named as one keeps its format, unless another is asked for.

    Raises:
        OptionError: neither a format nor an output is given.
        UnknownFormatError: there is no such format, or the name fits none or several.
    """
    if to is not None:
        return get_format(to).name, False
    if output is None:
        raise OptionError("no output given", hint="Add `output=PATH`, or `to=FORMAT`")
    if get_format(source).naming is not None and output.name.lower().endswith(".safetensors"):
        return source, True
    return format_for_output(output).name, False


def _lossy(conversion: Conversion) -> LossyError:
    first, *others = conversion.losses
    more = f"; {len(others)} other{'s' * (len(others) > 1)} would be lost too" if others else ""
    leave = "`allow_lossy=True` to leave such things out"
    return LossyError(
        f"{first.name} {first.reason}{more}",
        path=conversion.source.source,
        hint=f"{first.remedy}, or pass {leave}" if first.remedy else f"Pass {leave}",
        result=_result(conversion, None),
    )


def _result(conversion: Conversion, check: ConversionCheck | None) -> ConvertResult:
    errors = {} if check is None else {m.name: m.relative_error for m in check.modules}
    return ConvertResult(
        adapter=conversion.adapter,
        findings=conversion.findings,
        from_=conversion.source.format,
        to=conversion.target.name,
        bytes_out=written_nbytes(conversion.adapter),
        losses=conversion.losses,
        relative_error=None if check is None else check.relative_error,
        other_error=None if check is None else check.other_error,
        modules=tuple(
            ConvertedModule(name, change.rank, errors.get(name))
            for name, change in conversion.adapter.modules.items()
        ),
        conversion=conversion,
    )


@public(writing=("overwrite",), options=("allow_lossy",))
def write(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the word that all functions have
    base: ModelPlace | None = None,
    options: ConvertOptions,
    writing: Writing,
) -> WriteResult:
    """Write an adapter, whole or not at all, and read it again.

    An adapter of another format is converted first; what that would lose is refused.

    >>> import tempfile
    >>> import loratools as lt
    >>> adapter = lt.squeeze("examples/tiny-llama/lora", rank=8).adapter
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lt.write(adapter, f"{folder}/small").relative_error
    0.0

    Args:
        adapter: what to write.
        path: the file or folder to make.
        format: by default found from the path's name; the adapter's own if that fits it.
        base: the base model, where another format needs its names or layout.

    Raises:
        LossyError: the format cannot hold all of the adapter; the error carries the result.
        OutputExistsError: the output exists and `overwrite` is false.
        OutputError: the output could not be written, or lacks a part.
        UnknownFormatError: the name fits no format, or several.
        UnsupportedError: a translation would be a guess.
    """
    place = Path(path)
    chosen = get_format(format).name if format is not None else _named_like(adapter.format, place)
    if chosen != adapter.format:
        done = convert(
            adapter,
            to=chosen,
            base=base,
            output=place,
            overwrite=writing.overwrite,
            allow_lossy=options.allow_lossy,
        )
        return WriteResult(
            path=place,
            format=chosen,
            losses=done.losses,
            relative_error=done.relative_error or 0.0,
            other_error=done.other_error or 0.0,
            findings=done.findings,
        )
    found: list[ConversionCheck] = []

    def check(written: Path) -> None:
        found.append(compared(adapter, written, chosen, adapter))

    write_adapter(adapter, place, chosen, overwrite=writing.overwrite, check=check)
    return WriteResult(
        path=place,
        format=chosen,
        losses=(),
        relative_error=found[0].relative_error,
        other_error=found[0].other_error,
        findings=(*adapter.notices, *about_output(adapter)),
    )


def _named_like(own: str, path: Path) -> str:
    """Return the format for a path: the adapter's own, if its files may have that name."""
    claimed = [
        entry.format
        for entry in registered_formats()
        if entry.format is not None and entry.format.fits(path.name)
    ]
    of_own = any(entry.name == own for entry in claimed)
    if of_own or (not claimed and get_format(own).is_folder):
        return own
    return format_for_output(path).name
