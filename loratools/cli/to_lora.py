"""`loratools to-lora`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.errors import EXIT_ERROR
from loratools.cli.outcome import (
    checked_target,
    conclude,
    exceeds,
    planned_nbytes,
    read_source,
    scratch_folder,
)
from loratools.cli.output import (
    choices_as_json,
    human_bytes,
    note,
    number,
    percent,
    print_choices,
    print_json,
    print_table,
    progress_bar,
)
from loratools.factors.resize import ComputeOptions
from loratools.operations.to_lora import FoldChoices, FoldResult, fold_choices, to_lora
from loratools_formats import get_format, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import OptionError, UnsupportedError


@click.command("to-lora")
@shared.adapter_argument
@shared.output_options
@shared.base_option
@shared.initial_option
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="What the change depends on and neither the file nor the base's config.json tells. "
    "Repeatable.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Keep what is not of low rank whole, as full differences, where the format has them.",
)
@shared.rank_options
@shared.compute_options("--method")
@shared.max_error_option
@shared.from_option
@shared.carry_unknown_option
@shared.json_option
@shared.quiet_option
def command(
    adapter: Path,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    base: Path | None,
    initial: Path | None,
    settings: tuple[str, ...],
    exact: bool,
    rule: RankRule,
    compute: ComputeOptions,
    max_error: float | None,
    format_name: str | None,
    carry_unknown: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Turn an adapter of any kind into a plain LoRA.

    Kinds that are low rank in disguise fold exactly. Others (DoRA, OFT, FourierFT ...) are
    approximated by the best factors of the rank asked for, and the error is stated; without a rule
    for the ranks, prints the table rank → size → error and writes nothing.

    \b
    loratools to-lora my-loha -o plain
    loratools to-lora my-dora --base model -o plain --rank 64
    """  # noqa: D301 - click reads the backspace
    source, sources = read_source(
        adapter, initial, format_name, carry_unknown=carry_unknown, quiet=quiet
    )
    checkpoint = None if base is None else read_checkpoint(base)
    given = dict(_setting(text) for text in settings)
    if exact and rule.is_given:
        raise OptionError("--exact keeps changes whole, and leaves no rank to choose")
    if not rule.is_given and not exact:
        choices = fold_choices(source, compute, base=checkpoint, given=given)
        if choices is not None:
            _print_choices(source, choices, as_json=as_json)
            click.echo(
                "Choose with --rank, --energy, --budget or another rule; see --help. "
                "`loratools fuse` puts the change into the model without loss.",
                err=True,
            )
            return EXIT_ERROR
    target = checked_target(output, sources, [base], overwrite=overwrite, dry_run=dry_run)
    with progress_bar("to-lora", quiet=quiet) as progress:
        result = to_lora(
            source,
            rule,
            compute,
            base=checkpoint,
            given=given,
            whole=exact,
            scratch_folder=scratch_folder(target),
            progress=progress,
        )
    _check_format(result, result.adapter.format)
    if target is not None and not exceeds(result.relative_error, max_error):
        write_adapter(result.adapter, target, result.adapter.format, overwrite=overwrite)
    if as_json:
        print_json(_as_json(source, result))
    elif not quiet:
        _print_report(source, result)
    if not quiet:
        for text in result.cautions:
            note(text)
    return conclude(result.relative_error, max_error, target, quiet=quiet)


def _check_format(result: FoldResult, name: str) -> None:
    """Refuse full differences in a format that has none, on a dry run too."""
    found = get_format(name).losses(result.adapter)
    if found:
        raise UnsupportedError(
            f"format {name} cannot hold it: {found[0].reason}",
            tensor=found[0].name,
            hint="Choose a rank instead of --exact, or put the change into the model with "
            "loratools fuse",
        )


def _setting(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise OptionError("not a setting", got=text, expected="NAME=VALUE")
    return name, value


def _sizes(source: Adapter, result: FoldResult) -> tuple[int, int]:
    return source.weights_nbytes, planned_nbytes(result.adapter)


def _as_json(source: Adapter, result: FoldResult) -> dict[str, object]:
    bytes_in, bytes_out = _sizes(source, result)
    return {
        "operation": "to-lora",
        "relative_error": result.relative_error,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "cautions": list(result.cautions),
        "modules": [
            {
                "name": module.name,
                "kind": module.kind,
                "rank": module.rank,
                "energy": module.energy,
                "relative_error": module.relative_error,
                "low_rank_energy": module.low_rank_energy,
                "rescaling_energy": module.rescaling_energy,
            }
            for module in result.modules
        ],
    }


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _print_report(source: Adapter, result: FoldResult) -> None:
    header = ["module", "kind", "rank", "energy kept", "relative error"]
    rows = [
        [
            module.name,
            module.kind,
            "whole" if module.rank is None else str(module.rank),
            percent(module.energy),
            number(module.relative_error),
        ]
        for module in result.modules
    ]
    if any(module.low_rank_energy is not None for module in result.modules):
        header += ["factors", "rescaling"]
        rows = [
            [*row, _share(module.low_rank_energy), _share(module.rescaling_energy)]
            for row, module in zip(rows, result.modules, strict=True)
        ]
    print_table(header, "<<" + ">" * (len(header) - 2), rows)
    bytes_in, bytes_out = _sizes(source, result)
    click.echo(f"relative error: {number(result.relative_error)}")
    click.echo(f"size: {human_bytes(bytes_in)} → {human_bytes(bytes_out)}")


def _print_choices(source: Adapter, found: FoldChoices, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "operation": "to-lora",
                "bytes_in": source.weights_nbytes,
                "low_rank_energy": found.low_rank_energy,
                "rescaling_energy": found.rescaling_energy,
                "choices": choices_as_json(found.choices),
            }
        )
        return
    print_choices(source.weights_nbytes, found.choices)
    if found.low_rank_energy is not None and found.rescaling_energy is not None:
        click.echo(
            f"energy of the DoRA's rescaled factors: {percent(found.low_rank_energy)}, of its "
            f"rescaling of the base: {percent(found.rescaling_energy)} (they overlap)"
        )
