"""`loratools spectrum`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from loratools.base.decompositions import IntruderOptions
from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.measured import optional, print_csv, sparkline
from loratools.cli.output import human_bytes, number, print_table, say
from loratools.cli.pages import Pages
from loratools.cli.perform import report
from loratools.cli.progress import progress_bar
from loratools.face.spectrum import SpectrumResult, spectrum
from loratools.operations.spectrum.options import SpectrumOptions
from loratools.operations.spectrum.result import MatrixReport
from loratools.work.json_object import as_json
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting
from loratools.work.selection import Selection
from loratools_formats.disk.errors import printable

_SHOWN = 3


@named_command("spectrum")
@shared.adapter_argument
@shared.reads("base", "from_", "carry_unknown", "ignore_key")
@shared.takes(SpectrumOptions, into="options")
@shared.takes(IntruderOptions, into="intruders")
@shared.takes(Selection, into="selection")
@shared.takes(Workers, into="threads")
@shared.takes(Pages, into="pages")
@shared.reports()
def command(
    adapter: Path,
    reading: Reading,
    options: SpectrumOptions,
    intruders: IntruderOptions,
    selection: Selection,
    threads: Workers,
    pages: Pages,
    reporting: Reporting,
) -> None:
    """Measure what is in an adapter: spectra, ranks, strength, and what stands out.

    Without --base, only the factors are used. With --base, the report also has the size of the
    change beside the weight, intruder dimensions, and the true change of a DoRA.

    \b
    loratools spectrum my-adapter
    loratools spectrum my-adapter --base model --cache ~/.cache/loratools
    """  # noqa: D301 - click reads the backspace
    pages.check(reporting, [adapter, reading.base])
    with progress_bar("spectrum", quiet=reporting.quiet) as progress:
        result = spectrum(
            adapter,
            base=reading.base,
            options=options,
            judging=intruders,
            selection=selection,
            threads=threads,
            reading=reading,
            progress=progress,
        )
    pages.write(result)
    report(result, _csv if pages.csv else _print_report, reporting)
    pages.say(reporting)


def _csv(result: SpectrumResult) -> None:
    print_csv([as_json(matrix) for matrix in result.matrices])


def _print_report(result: SpectrumResult) -> None:
    with_base = any(matrix.base is not None for matrix in result.matrices)
    largest = max(
        (matrix.measures.spectral for matrix in result.matrices if matrix.measures), default=0.0
    )
    header = ["module", "rank", "‖ΔW‖", "σ₁", "stable", "effective", "90/95/99%", "knee"]
    header += ["‖ΔW‖/‖W‖", "intruders"] if with_base else []
    print_table(
        [*header, "spectrum"],
        "<" + ">" * (len(header) - 1) + "<",
        [[*_row(matrix, with_base), _bars(matrix, largest)] for matrix in result.matrices],
    )
    say(f"‖ΔW‖ of all: {number(result.frobenius)}")
    if len(result.layers) > 1:
        strongest = max(result.layers, key=lambda name: result.layers[name])
        values = " ".join(number(value) for value in result.layers.values())
        say(f"‖ΔW‖ by layer: {values} (most in layer {strongest or 'without number'})")
    if result.suggestions:
        say()
        _print_suggestions(result)
    _print_findings(result)


def _row(matrix: MatrixReport, with_base: bool) -> list[str]:
    values = matrix.measures
    rank = "–" if matrix.rank is None else str(matrix.rank)
    if values is None:
        cells = [printable(matrix.label), rank, "not finite", "–", "–", "–", "–", "–"]
    else:
        cells = [
            printable(matrix.label),
            rank,
            number(values.frobenius),
            number(values.spectral),
            f"{values.stable_rank:.1f}",
            f"{values.effective_rank:.1f}",
            "/".join(str(rank) for rank in values.energy_ranks),
            str(values.knee),
        ]
    if with_base:
        cells += [optional(matrix.base.relative_change) if matrix.base else "–", _intruders(matrix)]
    return cells


def _intruders(matrix: MatrixReport) -> str:
    if matrix.base is None or not matrix.base.leading:
        return "–"
    open_ = f" + {matrix.base.undetermined}?" if matrix.base.undetermined else ""
    return f"{matrix.base.intruders}{open_} of {matrix.base.leading}"


def _bars(matrix: MatrixReport, largest: float) -> str:
    return sparkline(matrix.singular_values, largest) if matrix.finite else ""


def _print_suggestions(result: SpectrumResult) -> None:
    rows = []
    for one in result.suggestions:
        ranks = sorted(one.ranks.values())
        spread = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}–{ranks[-1]}"
        rows.append([one.rule, spread, human_bytes(one.nbytes), number(one.relative_error)])
    print_table(["ranks by", "ranks", "size", "relative error"], "<>>>", rows)


def _print_findings(result: SpectrumResult) -> None:
    counts = Counter(finding.kind for finding in result.findings)
    for kind, count in counts.items():
        say()
        say(f"{kind}: {count} of {len(result.matrices)}")
        for finding in [f for f in result.findings if f.kind == kind][:_SHOWN]:
            say(f"  {printable(finding.name)}: {finding.text}")
        if count > _SHOWN:
            say(f"  and {count - _SHOWN} more; --json lists all")
