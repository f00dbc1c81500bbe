"""`loratools convert`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import click

from loratools.cli import options as shared
from loratools.cli.outcome import checked_target, conclude
from loratools.cli.output import (
    human_bytes,
    note,
    number,
    print_json,
    print_table,
    progress_bar,
)
from loratools.operations.convert.compare_written import ConversionCheck
from loratools.operations.convert.operation import Conversion, SingleFileOptions, prepare, write
from loratools_formats import Context, format_for_output, get_format, read_adapter
from loratools_formats.core.adapter import ModuleChange
from loratools_formats.disk.errors import OptionError, UnsupportedError


@click.command("convert")
@shared.adapter_argument
@click.argument("output", type=shared.PATH)
@click.option("--to", "target_name", help="Format to write; by default found from OUTPUT's name.")
@shared.from_option
@click.option(
    "--base",
    type=shared.PATH,
    help="Base model (folder or file), where a format needs its names or layout.",
)
@click.option(
    "--outtype", help="Type of the factors in the output: f32, f16 or bf16, or q8_0 in a GGUF file."
)
@click.option(
    "--metadata",
    multiple=True,
    metavar="KEY=VALUE",
    help="Text to add to the output's metadata. Repeatable.",
)
@click.option(
    "--names",
    metavar="TABLE",
    help="Names of an architecture in single files: sd1, sdxl, flux1, wan2, qwen_image, z_image, "
    "or a FILE.toml of yours.",
)
@click.option(
    "--names-from",
    type=shared.PATH,
    help="Adapter whose dotted names resolve flattened ones.",
)
@click.option(
    "--component",
    help="Part of a pipeline that names without one are of, or that is to be taken.",
)
@click.option("--keep-alpha", is_flag=True, help="Leave scales beside factors, as they are.")
@click.option("--fold-alpha", is_flag=True, help="Move scales into factors even if that rounds.")
@click.option(
    "--strip-training-metadata",
    is_flag=True,
    help="Leave out what the metadata of single files tells about the training data.",
)
@shared.carry_unknown_option
@click.option("--allow-lossy", is_flag=True, help="Leave out what the format cannot hold.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--dry-run", is_flag=True, help="Show what would be written, but write nothing.")
@shared.max_error_option
@click.option("-v", "--verbose", is_flag=True, help="List every module.")
@shared.json_option
@shared.quiet_option
def command(
    adapter: Path,
    output: Path,
    target_name: str | None,
    format_name: str | None,
    base: Path | None,
    outtype: str | None,
    metadata: tuple[str, ...],
    carry_unknown: bool,
    allow_lossy: bool,
    overwrite: bool,
    dry_run: bool,
    max_error: float | None,
    verbose: bool,
    as_json: bool,
    quiet: bool,
    **single: Any,
) -> int:
    """Convert an adapter to another format, and check what was written.

    The output is read again, and the error printed is that of its weight changes.

    \b
    loratools convert my-adapter my-adapter.gguf --base my-model
    loratools convert my-adapter.gguf my-adapter --base my-model
    """  # noqa: D301 - click reads the backspace
    source = read_adapter(adapter, format_name, carry_unknown=carry_unknown)
    as_it_is = target_name is None and _is_named_alike(source.format, output)
    target_name = source.format if as_it_is else target_name or format_for_output(output).name
    target = checked_target(output, [source], [base], overwrite=overwrite, dry_run=dry_run)
    conversion = prepare(
        source,
        target_name,
        Context(base, outtype),
        allow_lossy=allow_lossy or dry_run,
        metadata=_key_values(metadata),
        single=_single(as_it_is=as_it_is, **single),
    )
    check = None
    if target is not None:
        with progress_bar("check", quiet=quiet) as progress:
            check = write(
                conversion, target, overwrite=overwrite, max_error=max_error, progress=progress
            )
    if as_json:
        print_json(_as_json(source.format, conversion, check))
    elif not quiet:
        _print(source.format, conversion, check, verbose=verbose)
    if conversion.losses and not allow_lossy:
        raise UnsupportedError(
            f"{conversion.target.name} cannot hold all of the adapter",
            path=adapter,
            hint="Pass --allow-lossy to leave out what is listed above",
        )
    error = 0.0 if check is None else check.relative_error
    return conclude(error, max_error, target, quiet=quiet)


def _is_named_alike(source: str, output: Path) -> bool:
    """Return whether the output is named as a single file, and the input is one too."""
    return get_format(source).naming is not None and output.name.lower().endswith(".safetensors")


def _single(*, keep_alpha: bool, fold_alpha: bool, **options: Any) -> SingleFileOptions:
    if keep_alpha and fold_alpha:
        raise OptionError("--keep-alpha and --fold-alpha exclude each other")
    alpha: Literal["exact", "fold", "keep"] = "exact"
    if keep_alpha or fold_alpha:
        alpha = "keep" if keep_alpha else "fold"
    return SingleFileOptions(alpha=alpha, **options)


def _key_values(texts: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for key, sign, _ in pairs:
        if not key or not sign:
            raise OptionError("metadata is wrong", got=key, expected="KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _nbytes(conversion: Conversion) -> int:
    return conversion.target.weights_nbytes(conversion.adapter)


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
                "rank": delta.rank,
                "relative_error": errors.get(name),
            }
            for name, delta in conversion.adapter.modules.items()
        ],
    }


def _rank(delta: ModuleChange) -> str:
    return "–" if delta.rank is None else str(delta.rank)


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
