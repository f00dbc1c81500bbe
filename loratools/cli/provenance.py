"""`loratools provenance`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import note, say
from loratools.cli.perform import report
from loratools.face.provenance import ProvenanceResult, provenance
from loratools.operations.provenance import ChainInput, ChainStep
from loratools.work.declared import option
from loratools.work.digests_of import shown
from loratools.work.requests import Reporting
from loratools_formats.disk.errors import printable

_SHOWN = 12


@dataclass(frozen=True)
class Presenting:
    """How the way back is printed.

    Attributes:
        format: print a tree, or a CycloneDX bill of materials for machine learning.
    """

    format: Literal["tree", "cyclonedx"] = option("tree", heading="Report")


@named_command("provenance")
@click.argument("path", type=shared.PATH)
@shared.takes(Presenting, into="presenting")
@shared.reports("json", "verbose")
def command(path: Path, presenting: Presenting, reporting: Reporting) -> None:
    """Show how an output was made, back to the originals.

    It reads the statement beside an output and those of its inputs, or the metadata of the file if
    there is no statement. It computes nothing again: `loratools replay` does that.

    \b
    loratools provenance both
    loratools provenance both --format cyclonedx > both.cdx.json
    """  # noqa: D301 - click reads the backspace
    found = provenance(path)
    if presenting.format == "cyclonedx" and not reporting.json:
        say(found.cyclonedx(), nl=False)
    else:
        report(found, lambda result: _show(result, whole=reporting.verbose), reporting)
    for name in found.changed:
        note(f"{name} is not the file that the statement is about")


def _show(found: ProvenanceResult, *, whole: bool) -> None:
    steps = {step.number: step for step in found.steps}
    say(printable(found.path.name))
    _show_step(found.steps[-1], steps, "", set(), whole)


def _show_step(
    step: ChainStep, steps: dict[int, ChainStep], indent: str, seen: set[int], whole: bool
) -> None:
    again = step.number in seen
    seen.add(step.number)
    say(f"{indent}└─ {_told(step)}{', as above' if again else ''}")
    if again:
        return
    roles = _by_role(step)
    for left, (role, several) in zip(reversed(range(len(roles))), roles.items(), strict=True):
        say(f"{indent}   {'├' if left else '└'}─ {printable(role)}: {_files(several, whole)}")
        for number in dict.fromkeys(one.step for one in several if one.step is not None):
            below = f"{indent}   {'│' if left else ' '}  "
            _show_step(steps[number], steps, below, seen, whole)


def _told(step: ChainStep) -> str:
    options = ", ".join(
        f"{key} {_value(value)}" for key, value in step.options.items() if value not in (None, {})
    )
    by = ", told by the metadata alone" if step.told_by == "metadata" else ""
    made = f"{printable(step.operation)} (loratools {printable(step.version)}{by})"
    return f"{made}: {printable(options, 300)}" if options else made


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value)


def _by_role(step: ChainStep) -> dict[str, list[ChainInput]]:
    found: dict[str, list[ChainInput]] = {}
    for each in step.inputs:
        found.setdefault(each.role, []).append(each)
    return found


def _files(several: list[ChainInput], whole: bool) -> str:
    first, *others = several if whole else several[:1]
    texts = [_file(each, whole) for each in (first, *others)]
    more = len(several) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "")


def _file(each: ChainInput, whole: bool) -> str:
    # The step below tells of a file that was made; an original has nothing but its digest.
    is_told = each.step is not None and not whole
    kind, digest = ("", "") if is_told else shown(each.digest)
    digest = digest if whole else digest[:_SHOWN]
    where = f" from {each.reference}" if each.reference else ""
    name = f"{each.given}/{each.name}" if each.given not in (None, each.name) else each.name
    return printable(f"{name}{f' {kind}{digest}' if digest else ''}{where}", 400)
