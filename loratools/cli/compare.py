"""`loratools compare`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.measured import optional, print_csv, print_csv_table
from loratools.cli.output import number, print_table, quantity, say
from loratools.cli.pages import Pages
from loratools.cli.perform import report
from loratools.cli.progress import progress_bar
from loratools.face.compare import BasesResult, CompareResult, compare, compare_bases
from loratools.operations.compare.operation import CompareOptions
from loratools.operations.compare.result import PairModule
from loratools.work.collection import adapters_in
from loratools.work.json_object import as_json
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting
from loratools.work.selection import Selection
from loratools_formats.contract.path_kinds import is_model
from loratools_formats.disk.errors import OptionError, printable

_SHOWN = 5
_HEADER = [
    "module",
    "cosine",
    "norms",
    "outputs (random)",
    "inputs (random)",
    "sign conflict",
    "expected",
    "moved",
    "linear loss",
    "TIES loss",
]


@named_command("compare")
@click.argument("adapters", type=shared.PATH, nargs=-1, required=True)
@click.option(
    "--bases",
    type=shared.PATH,
    nargs=2,
    metavar="W0 W1",
    help="Compare two base models where one adapter acts, instead of adapters.",
)
@shared.reads("base", "from_", "ignore_key")
@shared.takes(CompareOptions, into="options")
@shared.takes(Selection, into="selection")
@shared.takes(Workers, into="threads")
@shared.takes(Pages, into="pages")
@shared.reports()
def command(
    adapters: tuple[Path, ...],
    bases: tuple[Path, Path] | None,
    reading: Reading,
    options: CompareOptions,
    selection: Selection,
    threads: Workers,
    pages: Pages,
    reporting: Reporting,
) -> None:
    """Compare adapters: angles, shared spaces, signs, families; or two bases.

    Two adapters are compared module by module, and more adapters in a matrix. A folder that is no
    adapter stands for all adapters below it. With --bases, two base models are compared where one
    adapter acts.

    \b
    loratools compare one other
    loratools compare shelf/*
    loratools compare my-adapter --bases old-model new-model
    """  # noqa: D301 - click reads the backspace
    named = adapters if bases is not None else tuple(adapters_in(adapters))
    pages.check(reporting, [*named, reading.base, *(bases or ())])
    if bases is None:
        _check_several(named)
        with progress_bar("compare", quiet=reporting.quiet) as progress:
            result = compare(
                named,
                base=reading.base,
                options=options,
                selection=selection,
                threads=threads,
                reading=reading,
                progress=progress,
            )
        pages.write(result)
        report(result, _csv if pages.csv else _print_report, reporting)
    else:
        if len(adapters) != 1 or reading.base is not None:
            raise OptionError("`bases` takes one adapter, and no `base`")
        found = compare_bases(
            adapters[0], *bases, selection=selection, threads=threads, reading=reading
        )
        pages.write(found)
        report(found, _bases_csv if pages.csv else _print_bases, reporting)
    pages.say(reporting)


def _check_several(adapters: Sequence[Path]) -> None:
    """Refuse one adapter, or two models, with what to run instead.

    Raises:
        OptionError: it is one, or all are models.
    """
    quoted = [shlex.quote(str(path)) for path in adapters]
    if len(adapters) == 1 and not is_model(adapters[0]):
        raise OptionError(
            "a comparison needs at least two adapters",
            got=len(adapters),
            hint=f"Name another, or measure this one: loratools spectrum {quoted[0]}",
        )
    if len(adapters) == 2 and all(map(is_model, adapters)):
        raise OptionError(
            "both are models, and two models are compared where an adapter acts",
            hint=f"Name one: loratools compare ADAPTER --bases {quoted[0]} {quoted[1]}",
        )


def _csv(result: CompareResult) -> None:
    if result.modules:
        print_csv(as_json(result.modules))
        return
    header = ["adapter", "norm", "linear_loss", *result.names]
    print_csv_table(
        [*header, *(f"A of {name}" for name in result.names)],
        [
            [name, norm, loss, *cosines, *of_a]
            for name, norm, loss, cosines, of_a in zip(
                result.names,
                result.norms,
                result.linear_losses,
                result.cosines,
                result.a_cosines,
                strict=True,
            )
        ],
    )


def _bases_csv(result: BasesResult) -> None:
    print_csv(as_json(result.modules))


def _print_report(result: CompareResult) -> None:
    if result.modules:
        print_table(
            _HEADER,
            "<" + ">" * (len(_HEADER) - 1),
            [_row(module) for module in result.modules],
        )
    else:
        _print_matrix(result)
    _print_groups(result)
    _print_unmatched(result)


def _row(module: PairModule) -> list[str]:
    low, high = module.sign_conflict_interval
    within = "" if low == high else f" ± {(high - low) / 2:.3f}"
    return [
        printable(module.name),
        optional(module.cosine, ".3f"),
        " ".join(number(norm) for norm in module.norms),
        f"{module.output_overlap:.3f} ({module.output_overlap_random:.3f})",
        f"{module.input_overlap:.3f} ({module.input_overlap_random:.3f})",
        f"{module.sign_conflict:.3f}{within}",
        optional(module.sign_conflict_expected, ".3f"),
        optional(module.moved),
        " ".join(optional(loss, ".2f") for loss in module.linear_losses),
        " ".join(optional(loss, ".2f") for loss in module.ties_losses),
    ]


def _print_matrix(result: CompareResult) -> None:
    """Print the cosines in the order of the tree, numbered."""
    header = ["adapter", "‖ΔW‖", "linear loss"]
    header += [str(place + 1) for place in range(len(result.names))]
    rows = []
    for place, i in enumerate(result.order):
        name = f"{place + 1} {printable(result.names[i])}"
        loss = optional(result.linear_losses[i], ".2f")
        cosines = [optional(result.cosines[i][j], ".2f") for j in result.order]
        rows.append([name, number(result.norms[i]), loss, *cosines])
    print_table(header, "<" + ">" * (len(header) - 1), rows)


def _print_groups(result: CompareResult) -> None:
    cosine, a_cosine = result.cosines[0][1], result.a_cosines[0][1]
    if len(result.names) == 2:
        say(f"cosine of all modules in common: {optional(cosine)}")
        if a_cosine is not None:
            say(
                f"cosine of the A factors: {number(a_cosine)} "
                f"(independent starts: ±{optional(result.a_random)})"
            )
        overlap = result.a_overlaps[0][1]
        if overlap is not None:
            say(f"overlap of the spaces of A, above random: {number(overlap)}")
        losses = " ".join(optional(loss, ".2f") for loss in result.linear_losses)
        say(f"loss of each in an even linear merge: {losses}")
    for title, groups in (
        ("family (cosine above 0.5 on average)", result.families),
        ("near-duplicates (cosine at least 0.99)", result.duplicates),
        ("same start (cosine or overlap of A at least 0.5)", result.lineages),
    ):
        for group in groups:
            say(f"{title}: {', '.join(printable(name) for name in group)}")


def _print_unmatched(result: CompareResult) -> None:
    if result.unmatched:
        say(f"not compared: {quantity(len(result.unmatched), 'module')}")
    for one in result.unmatched[:_SHOWN]:
        where = ", ".join(printable(name) for name in one.adapters)
        say(f"  {printable(one.name)} ({where}): {one.reason}")
    if len(result.unmatched) > _SHOWN:
        say(f"  and {len(result.unmatched) - _SHOWN} more; --json lists all")


def _print_bases(result: BasesResult) -> None:
    print_table(
        ["module", "‖W₁−W₀‖/‖W₀‖", "where ΔW writes", "where ΔW reads", "both, over ‖ΔW‖"],
        "<>>>>",
        [
            [
                printable(module.name),
                optional(module.relative),
                optional(module.outputs),
                optional(module.inputs),
                optional(module.against_change),
            ]
            for module in result.modules
        ],
    )
