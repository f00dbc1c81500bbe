"""`loratools to-lora`."""

from __future__ import annotations

import shlex
from pathlib import Path

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.by_type import Column, print_modules
from loratools.cli.command import command as named_command
from loratools.cli.many import one_or_many
from loratools.cli.output import human_bytes, note, number, percent, say
from loratools.cli.pages import Pages
from loratools.cli.perform import perform, show_choices, target_of
from loratools.face.to_lora import ToLoraChoices, ToLoraResult, to_lora, to_lora_choices
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.to_lora import ToLoraOptions
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Dropping


@named_command("to-lora")
@shared.takes(Dropping, into="dropping")
@shared.reads("base", "initial", "from_", "carry_unknown", "ignore_key")
@shared.takes(ToLoraOptions, into="folding")
@shared.takes(RankRule, into="rule")
@shared.takes(ComputeOptions, into="compute")
@shared.takes(Pages, "html", "plot", into="pages")
@shared.reports("json", "quiet", "verbose")
@one_or_many("in_place", "max_error")
def command(
    adapter: Path,
    writing: Writing,
    dropping: Dropping,
    reading: Reading,
    folding: ToLoraOptions,
    rule: RankRule,
    compute: ComputeOptions,
    pages: Pages,
    reporting: Reporting,
) -> int:
    """Turn an adapter of any kind into a plain LoRA.

    Kinds whose change is a product of two factors are converted exactly. Others (DoRA, OFT,
    FourierFT ...) get the best factors of the rank that you choose, and the error is reported.
    Without a rule for the ranks, it prints the table rank → size → error and writes nothing.

    \b
    loratools to-lora my-loha -o plain
    loratools to-lora my-dora --base model -o plain --rank 64
    """  # noqa: D301 - click reads the backspace
    inputs = [adapter, reading.base, reading.initial, writing.output]
    pages.check(reporting, inputs, overwrite=writing.overwrite)
    given = {
        "base": reading.base,
        "initial": reading.initial,
        "folding": folding,
        "compute": compute,
        "dropping": dropping,
        "reading": reading,
    }
    if not rule.is_given and not folding.exact:
        choices = to_lora_choices(adapter, **given)
        if choices is not None:
            model, this = (shlex.quote(str(one)) for one in (reading.base or "MODEL", adapter))
            more = f" Or without loss, into the model: loratools fuse {model} {this} -o fused"
            return show_choices(choices, writing, reporting, more, _energies(choices), pages)
    target = target_of(writing)
    return perform(
        "to-lora",
        lambda progress: to_lora(adapter, rule=rule, writing=target, progress=progress, **given),
        lambda result: _show(result, verbose=reporting.verbose),
        target,
        reporting,
        pages=pages,
    )


def _show(result: ToLoraResult, *, verbose: bool) -> None:
    modules = result.modules
    errors = [module.relative_error for module in modules]
    columns = [
        Column("kind", [module.kind for module in modules], str, side="<"),
        Column("rank", [module.rank for module in modules], str, "whole", summed=True),
        Column("energy kept", [module.energy for module in modules], percent),
        Column("relative error", errors, summed=True),
    ]
    if any(module.low_rank_energy is not None for module in modules):
        columns += [
            Column("factors", [module.low_rank_energy for module in modules], percent, ""),
            Column("rescaling", [module.rescaling_energy for module in modules], percent, ""),
        ]
    names = [module.name for module in modules]
    print_modules("module", names, columns, errors, verbose=verbose)
    say(f"relative error: {number(result.relative_error)}")
    say(f"size: {human_bytes(result.bytes_in)} → {human_bytes(result.bytes_out)}")
    for text in result.cautions:
        note(text)


def _energies(found: ToLoraChoices) -> str | None:
    if found.low_rank_energy is None or found.rescaling_energy is None:
        return None
    return (
        f"energy of the DoRA's rescaled factors: {percent(found.low_rank_energy)}, of its "
        f"rescaling of the base: {percent(found.rescaling_energy)} (they overlap)"
    )
