"""`loratools verify`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.errors import EXIT_ERROR, EXIT_FOUND
from loratools.cli.output import named, note, number, percent, print_json, print_table, progress_bar
from loratools.operations.verify import TensorVerdict, VerifyResult, verify
from loratools_formats.checkpoints.checkpoint import read_checkpoint


@click.command("verify")
@click.argument("fused", type=shared.PATH)
@click.option("--base", type=shared.PATH, required=True, help="What it was made from.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    metavar="ADAPTER[:WEIGHT]",
    help="What it should contain. Repeatable.",
)
@click.option("-v", "--verbose", is_flag=True, help="List every tensor.")
@shared.workers_option
@shared.from_option
@shared.json_option
@shared.quiet_option
def command(
    fused: Path,
    base: Path,
    adapters: tuple[str, ...],
    verbose: bool,
    workers: int,
    format_name: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Check whether a checkpoint is a base with adapters fused in.

    Exits with 0 if it is, with 1 if not, and with 2 if a tensor could not be checked.

    \b
    loratools verify merged-model --base base-model --adapter my-adapter
    """  # noqa: D301 - click reads the backspace
    inputs = [shared.fuse_input(text, format_name) for text in adapters]
    with progress_bar("verify", quiet=quiet, unit="tensor") as progress:
        result = verify(
            read_checkpoint(fused),
            read_checkpoint(base),
            inputs,
            workers=workers,
            progress=progress,
        )
    if as_json:
        print_json(_as_json(result))
    elif not quiet:
        _print_report(result, verbose=verbose)
    if result.contained is None and not quiet:
        note("some tensors could not be checked")
    return {True: 0, False: EXIT_FOUND, None: EXIT_ERROR}[result.contained]


def _as_json(result: VerifyResult) -> dict[str, object]:
    return {
        "operation": "verify",
        "contained": result.contained,
        "counts": result.counts,
        "tensors": [named(tensor) for tensor in result.tensors],
    }


def _print_report(result: VerifyResult, *, verbose: bool) -> None:
    good = ("exact", "within rounding")
    shown = [t for t in result.tensors if verbose or t.verdict not in good]
    if shown:
        header = ["tensor", "verdict", "share of ΔW found", "error/‖ΔW‖", "reason"]
        print_table(header, "<<>><", [_row(tensor) for tensor in shown])
    counts = ", ".join(f"{count} {verdict}" for verdict, count in result.counts.items())
    click.echo(f"tensors: {counts}")
    answer = {True: "contained", False: "not contained", None: "not checked"}[result.contained]
    click.echo(f"adapter: {answer}")


def _row(tensor: TensorVerdict) -> list[str]:
    return [
        tensor.key,
        tensor.verdict,
        "–" if tensor.found is None else percent(tensor.found),
        "–" if tensor.error is None else number(tensor.error),
        tensor.reason or "",
    ]
