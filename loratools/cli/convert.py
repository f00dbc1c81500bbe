"""`loratools convert`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.outcome import checked_target, conclude
from loratools.cli.output import (
    human_bytes,
    note,
    number,
    print_json,
    print_table,
    progress_bar,
)
from loratools.operations.convert.compare_written import ConversionCheck, rank_of
from loratools.operations.convert.operation import (
    Conversion,
    ConvertOptions,
    SingleFileOptions,
    prepare,
    write,
)
from loratools.work.requests import Reading, Reporting, Writing
from loratools_formats import Context, format_for_output, get_format, read_adapter
from loratools_formats.core.adapter import Delta
from loratools_formats.disk.errors import OptionError, UnsupportedError
from loratools_formats.formats.singlefile import NAMES as SINGLE_FILES


@named_command("convert")
@shared.adapter_argument
@shared.writes("in_place", "max_error")
@shared.takes(ConvertOptions, into="options")
@shared.takes(
    SingleFileOptions,
    "names",
    "names_from",
    "component",
    "strip_training_metadata",
    into="single",
)
@shared.reads("base", "from_", "carry_unknown")
@shared.reports("json", "quiet", "verbose")
def command(
    adapter: Path,
    writing: Writing,
    options: ConvertOptions,
    single: SingleFileOptions,
    reading: Reading,
    reporting: Reporting,
) -> int:
    """Convert an adapter to another format, and check what was written.

    The output is read again, and the error printed is that of its weight changes.

    \b
    loratools convert my-adapter -o my-adapter.gguf --base my-model
    loratools convert my-adapter.gguf -o my-adapter --base my-model
    """  # noqa: D301 - click reads the backspace
    source = read_adapter(adapter, reading.from_, carry_unknown=reading.carry_unknown)
    target_name, as_it_is = _target_format(source.format, options.to, writing.output)
    target = checked_target(writing, [adapter, reading.base, single.names_from])
    conversion = prepare(
        source,
        target_name,
        Context(reading.base, options.dtype),
        allow_lossy=options.allow_lossy or writing.dry_run,
        metadata=dict(options.set_),
        single=dataclasses.replace(single, alpha=options.alpha, as_it_is=as_it_is),
    )
    check = None
    if target is not None:
        with progress_bar("check", quiet=reporting.quiet) as progress:
            check = write(
                conversion,
                target,
                overwrite=writing.overwrite,
                max_error=writing.max_error,
                progress=progress,
            )
    if reporting.json:
        print_json(_as_json(source.format, conversion, check))
    elif not reporting.quiet:
        _print(source.format, conversion, check, verbose=reporting.verbose)
    if conversion.losses and not options.allow_lossy:
        raise UnsupportedError(
            f"{conversion.target.name} cannot hold all of the adapter",
            path=adapter,
            hint="Pass `allow_lossy=True` to leave out what is listed above",
        )
    error = 0.0 if check is None else check.relative_error
    return conclude(error, writing, target, reporting)


def _target_format(source: str, to: str | None, output: Path | None) -> tuple[str, bool]:
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
    if source in SINGLE_FILES and output.name.lower().endswith(".safetensors"):
        return source, True
    return format_for_output(output).name, False


def _nbytes(conversion: Conversion) -> int:
    planned = conversion.target.weights_nbytes
    return 0 if planned is None else planned(conversion.adapter)


def _as_json(
    source_format: str, conversion: Conversion, check: ConversionCheck | None
) -> dict[str, object]:
    errors = {} if check is None else {m.name: m.relative_error for m in check.modules}
    return {
        "operation": "convert",
        "from": source_format,
        "to": conversion.target.name,
        "bytes_out": _nbytes(conversion),
        "losses": [dataclasses.asdict(loss) for loss in conversion.losses],
        "relative_error": None if check is None else check.relative_error,
        "other_error": None if check is None else check.other_error,
        "modules": [
            {
                "name": name,
                "rank": rank_of(delta),
                "relative_error": errors.get(name),
            }
            for name, delta in conversion.adapter.modules.items()
        ],
    }


def _rank(delta: Delta) -> str:
    rank = rank_of(delta)
    return "–" if rank is None else str(rank)


def _print(
    source_format: str, conversion: Conversion, check: ConversionCheck | None, *, verbose: bool
) -> None:
    for text in conversion.notes:
        note(text)
    for loss in conversion.losses:
        note(f"left out: {loss.name} {loss.reason}")
    for remedy in dict.fromkeys(loss.remedy for loss in conversion.losses if loss.remedy):
        note(remedy)
    if verbose:
        errors = {} if check is None else {m.name: number(m.relative_error) for m in check.modules}
        print_table(
            ["module", "rank", "relative error"],
            "<>>",
            [
                [name, _rank(delta), errors.get(name, "–")]
                for name, delta in conversion.adapter.modules.items()
            ],
        )
    click.echo(f"format: {source_format} → {conversion.target.name}")
    click.echo(f"modules: {len(conversion.adapter.modules)}")
    click.echo(f"size: {human_bytes(_nbytes(conversion))}")
    if check is not None:
        click.echo(f"relative error of the written file: {number(check.relative_error)}")
        if check.other_error:
            click.echo(f"largest error of its other tensors: {number(check.other_error)}")
