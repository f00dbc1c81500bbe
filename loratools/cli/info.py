"""`loratools info`."""

from __future__ import annotations

from pathlib import Path

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import human_bytes, print_table, quantity, say
from loratools.cli.perform import report
from loratools.cli.wording import worded
from loratools.face.info import InfoResult, info
from loratools.operations.info import AdapterInfo, counted
from loratools.work.requests import Reading, Reporting
from loratools_formats.disk.errors import printable


@named_command("info")
@shared.adapter_argument
@shared.reads("from_", "carry_unknown", "ignore_key")
@shared.reports("json", "quiet", "verbose")
def command(adapter: Path, reading: Reading, reporting: Reporting) -> None:
    """Show what an adapter is, from its headers alone.

    \b
    loratools info my-adapter
    """  # noqa: D301 - click reads the backspace
    report(info(adapter, reading=reading), lambda found: _show(found, reporting), reporting)


def _show(found: InfoResult, reporting: Reporting) -> None:
    _print(found)
    if reporting.verbose:
        say()
        _print_modules(found)


def _print(found: AdapterInfo) -> None:
    modules = found.modules
    plain = [m for m in modules if m.scale is not None]
    kinds = counted(f"{m.kind} on {m.layer}" for m in modules)
    lines = [
        ("format", found.format),
        *(("dialect", f"{d.name} ({quantity(d.keys, 'key')}): {d.why}") for d in found.dialects),
        ("base model", found.base_model or "not recorded"),
        ("modules", f"{len(modules)}: {kinds}" if modules else "none"),
        ("rank", counted(m.rank for m in plain)),
        ("alpha", counted("none" if m.alpha is None else f"{m.alpha:g}" for m in plain)),
        ("scale", counted(f"{m.scale:g}" for m in plain)),
        ("targets", ", ".join(sorted(_targets(found)))),
        ("parameters", f"{found.parameters:,}"),
        ("size", human_bytes(found.nbytes)),
        ("dtypes", ", ".join(f"{d} ({quantity(n, 'tensor')})" for d, n in found.dtypes.items())),
    ]
    experts = sorted({m.experts for m in modules if m.experts > 1})
    if experts:
        lines.append(("experts", ", ".join(map(str, experts))))
    for addition in found.additions:
        shape = "×".join(map(str, addition.shape))
        lines.append(("adds to", f"{addition.target} ({shape})"))
    for replacement in found.replacements:
        shape = "×".join(map(str, replacement.shape))
        lines.append(("replaces", f"{replacement.target} ({replacement.kind}, {shape})"))
    lines += [("carries", key) for key in found.carried]
    lines += [(key.removeprefix("loratools."), value) for key, value in found.provenance.items()]
    lines += [
        (each.severity, f"{each.code}: " + ". ".join(filter(None, (each.message, each.hint))))
        for each in found.findings
    ]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        if text:
            say(f"{label.ljust(width)}  {worded(printable(text, 2000))}")


def _targets(found: AdapterInfo) -> set[str]:
    """Return the last parts of the modules' paths; a flattened path of a single file has none.

    A number says nothing without what it numbers: `to_out.0`.
    """
    names = [module.name for module in found.modules]
    return {_target(name) for name in names if "." in name or not found.dialects}


def _target(name: str) -> str:
    *_, last = parts = name.split(".")
    return ".".join(parts[-2:]) if last.isdigit() else last


def _print_modules(found: AdapterInfo) -> None:
    print_table(
        ["module", "kind", "layer", "out × in", "rank", "alpha", "scale", "dtypes"],
        "<<<>>>><",
        [
            [
                m.name,
                m.kind,
                m.layer if m.experts == 1 else f"{m.experts} experts",
                " × ".join("?" if side is None else str(side) for side in m.shape),
                "" if m.rank is None else str(m.rank),
                "none" if m.alpha is None else f"{m.alpha:g}",
                "" if m.scale is None else f"{m.scale:g}",
                " ".join(m.dtypes),
            ]
            for m in found.modules
        ],
    )
