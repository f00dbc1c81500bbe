"""`loratools verify`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.completion import path_completions
from loratools.cli.exits import EXIT_FOUND, EXIT_UNCHECKED
from loratools.cli.output import note, number, percent, print_table, say
from loratools.cli.perform import report
from loratools.cli.progress import progress_bar
from loratools.cli.references import weighted_path
from loratools.face.verify import VerifyResult, verify
from loratools.hub.references import path_of
from loratools.operations.verify import Claim, TensorVerdict
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting
from loratools_formats.disk.errors import OptionError


@named_command("verify")
@click.argument("fused", type=shared.PATH)
@click.argument(
    "made_from", nargs=-1, metavar="BASE ADAPTER[:WEIGHT]...", shell_complete=path_completions
)
@shared.reads("base", "from_", "ignore_key")
@shared.takes(Claim, into="claim")
@shared.takes(Workers, into="threads")
@shared.reports("json", "quiet", "verbose")
def command(
    fused: Path,
    made_from: tuple[str, ...],
    reading: Reading,
    claim: Claim,
    threads: Workers,
    reporting: Reporting,
) -> int:
    """Check whether a checkpoint is a base with adapters fused in.

    Exits with 0 if it is, with 1 if it is not, and with 3 if the checkpoint does not show it: a
    tensor could not be checked, rounding erased a change, or the adapter changes nothing.

    \b
    loratools verify merged-model base-model my-adapter
    loratools verify merged-model --base base-model --adapter my-adapter
    """  # noqa: D301 - click reads the backspace
    base, adapters = _made_from(made_from, reading.base, claim.adapter)
    with progress_bar("verify", quiet=reporting.quiet, unit="tensor") as progress:
        result = verify(
            fused,
            base=base,
            adapters=[weighted_path(text) for text in adapters],
            threads=threads,
            reading=reading,
            progress=progress,
        )
    report(result, lambda found: _show(found, verbose=reporting.verbose), reporting)
    if result.contained is None and not reporting.quiet:
        told = "the rest is not known; see the reasons above"
        note(told if result.told else "nothing is known")
    return {True: 0, False: EXIT_FOUND, None: EXIT_UNCHECKED}[result.contained]


def _made_from(
    arguments: tuple[str, ...], base: Path | None, adapters: tuple[str, ...]
) -> tuple[Path, tuple[str, ...]]:
    """Return the base and the adapters; each may be an argument or an option."""
    if base is None and arguments:
        base, arguments = path_of(arguments[0]), arguments[1:]
    if base is None or not str(base):
        raise OptionError("no base given", expected="FUSED BASE ADAPTER")
    if not arguments and not adapters:
        raise OptionError("no adapter given", expected="FUSED BASE ADAPTER")
    return base, (*arguments, *adapters)


def _show(result: VerifyResult, *, verbose: bool) -> None:
    good = ("exact", "within rounding")
    shown = [t for t in result.tensors if verbose or t.verdict not in good]
    if shown:
        header = ["tensor", "verdict", "share of ΔW found", "error/‖ΔW‖", "reason"]
        print_table(header, "<<>><", [_row(tensor) for tensor in shown])
    counts = ", ".join(f"{count} {verdict}" for verdict, count in result.counts.items())
    say(f"tensors: {counts}")
    answer = {True: "contained", False: "not contained", None: "cannot tell"}[result.contained]
    told = f", {percent(result.told)} of ΔW can be judged" if result.contained is None else ""
    say(f"adapter: {answer}{told}")


def _row(tensor: TensorVerdict) -> list[str]:
    return [
        tensor.name,
        tensor.verdict,
        "–" if tensor.found is None else percent(tensor.found),
        "–" if tensor.error is None else number(tensor.error),
        tensor.reason or "",
    ]
