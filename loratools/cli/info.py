"""`loratools info`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.exits import EXIT_FOUND
from loratools.cli.many import failed_with
from loratools.cli.output import human_bytes, print_json_line, print_table, quantity, say
from loratools.cli.perform import report, require_adapters
from loratools.cli.table import wrapped
from loratools.cli.wording import worded
from loratools.face.info import InfoResult, info
from loratools.operations.info import AdapterInfo, counted
from loratools.work.collection import adapters_in
from loratools.work.requests import Reading, Reporting
from loratools_formats.containers.gguf.container import is_gguf
from loratools_formats.containers.gguf.splits import read_model
from loratools_formats.contract.path_kinds import is_base
from loratools_formats.contract.registry import is_recognised
from loratools_formats.disk.errors import LoratoolsError, printable

if TYPE_CHECKING:
    from loratools.face.info_base import BaseInfoResult
    from loratools.operations.info_base import QuantisedInfo

_FEW = 4
_CARRIED = 4


@named_command("info")
@click.argument("adapters", nargs=-1, type=shared.PATH, metavar="ADAPTER...")
@shared.reads("from_", "carry_unknown", "ignore_key")
@shared.reports("json", "quiet", "verbose")
def command(adapters: tuple[Path, ...], reading: Reading, reporting: Reporting) -> int:
    """Show what an adapter or a base model is, from its headers alone.

    Several adapters give a table with a line for each. A folder that is no adapter stands for all
    adapters below it. For a base model it shows how the weights are quantised: the format, bits,
    groups, and what is left out.

    \b
    loratools info my-adapter
    loratools info adapters/
    loratools info my-quantised-model
    """  # noqa: D301 - click reads the backspace
    require_adapters(adapters, "info")
    alone = adapters[0] if len(adapters) == 1 and reading.from_ is None else None
    if alone is not None and (
        _is_gguf_model(alone) or (is_base(alone) and not is_recognised(alone))
    ):
        return _show_base(alone, reporting)
    found = adapters_in(adapters)
    if found == list(adapters) and len(found) == 1:
        result = info(adapters[0], reading=reading)
        report(result, lambda one: _show(one, reporting), reporting)
        return 0
    return _show_many(found, reading, reporting)


def _is_gguf_model(path: Path) -> bool:
    """Return whether a file is a GGUF model that has weights, and no adapter."""
    if not is_gguf(path):
        return False
    try:
        return bool(read_model(path).tensors)
    except LoratoolsError:  # `info` of an adapter says what is wrong
        return False


def _show_base(path: Path, reporting: Reporting) -> int:
    from loratools.face.info_base import info_base  # numpy, which an adapter's info does without

    report(info_base(path), _print_base, reporting)
    return 0


def _print_base(found: BaseInfoResult) -> None:
    lines = [
        ("model", found.model or "not recorded"),
        ("quantised", found.problem or ("" if found.quantised else "no")),
        *(("quantised", _quantised(each)) for each in found.quantised),
        ("left out", ", ".join(found.left_out)),
        ("parameters", "" if found.parameters is None else f"{found.parameters:,}"),
        ("size", f"{human_bytes(found.nbytes)} in {quantity(found.files, 'file')}"),
        ("others", ", ".join(f"{d} ({quantity(n, 'tensor')})" for d, n in found.dtypes.items())),
    ]
    for label, text in lines:
        if text:
            say(wrapped(f"{label:10}  {printable(text, 2000)}", " " * 12))


def _quantised(found: QuantisedInfo) -> str:
    group = "" if found.group is None else f", groups of {found.group}"
    size = f"{found.parameters:,} parameters in {human_bytes(found.nbytes)}"
    return f"{found.format}, {found.bits} bits{group}: {quantity(found.weights, 'weight')}, {size}"


def _show_many(adapters: Sequence[Path], reading: Reading, reporting: Reporting) -> int:
    """Print a line for each adapter; returns 1 if one could not be read."""
    rows, failed = [], False
    for path in adapters:
        try:
            found: InfoResult | None = info(path, reading=reading)
            line = found.to_dict() if found is not None and reporting.json else {}
            problem = None
        except LoratoolsError as error:
            how = failed_with(error, path)
            line, problem = how.found, how.text.removeprefix(f"{path}: ")
            found, failed = None, True
        if reporting.json:
            print_json_line(line)
        else:
            rows.append([printable(path), *_cells(found, problem)])
    if not (reporting.json or reporting.quiet):
        header = ["adapter", "kind", "rank", "scale", "targets", "base model", "size", "problem"]
        count = len(header) if any(row[-1] for row in rows) else len(header) - 1
        print_table(header[:count], "<<<<<<><"[:count], [row[:count] for row in rows])
    return EXIT_FOUND if failed else 0


def _cells(found: InfoResult | None, problem: str | None) -> list[str]:
    if found is None:
        return ["–"] * 6 + [printable(problem or "")]
    modules = found.modules
    targets = sorted(_targets(found)) or sorted(found.components)
    return [
        printable(text)
        for text in (
            " ".join(sorted({module.kind for module in modules})) or "–",
            _listed(module.rank for module in modules),
            _listed(f"{module.scale:.4g}" for module in modules if module.scale is not None),
            ", ".join(targets if len(targets) < _FEW else [*targets[:2], f"{len(targets)} in all"]),
            found.base_model or "–",
            human_bytes(found.nbytes),
            next((f.code for f in found.findings if f.severity == "error"), ""),
        )
    ]


def _listed(values: Iterable[object]) -> str:
    """Return up to three different values, or the first and the last of more."""
    known = list(dict.fromkeys(str(value) for value in values if value is not None))
    return ", ".join(known) if len(known) < _FEW else f"{known[0]} … {known[-1]}"


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
        ("components", ", ".join(f"{name} ({n})" for name, n in found.components.items())),
        ("targets", ", ".join(sorted(_targets(found)))),
        ("parameters", f"{found.parameters:,}"),
        ("size", human_bytes(found.nbytes)),
        ("dtypes", ", ".join(f"{d} ({quantity(n, 'tensor')})" for d, n in found.dtypes.items())),
    ]
    experts = sorted({m.experts for m in modules if m.experts > 1})
    if experts:
        lines.append(("experts", ", ".join(map(str, experts))))
    if found.expert_layout:
        lines.append(("layout", found.expert_layout))
    for addition in found.additions:
        shape = "×".join(map(str, addition.shape))
        lines.append(("adds to", f"{addition.target} ({shape})"))
    for replacement in found.replacements:
        shape = "×".join(map(str, replacement.shape))
        lines.append(("replaces", f"{replacement.target} ({replacement.kind}, {shape})"))
    lines += [("carries", key) for key in found.carried[:_CARRIED]]
    if len(found.carried) > _CARRIED:
        lines.append(("carries", f"and {len(found.carried) - _CARRIED} more; --json lists all"))
    lines += found.training.items()
    lines += _made_by(found.provenance, found.path)
    lines += [
        (each.severity, f"{each.code}: " + ". ".join(filter(None, (each.message, each.hint))))
        for each in found.findings
    ]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        if text:
            line = f"{label.ljust(width)}  {worded(printable(text, 2000))}"
            say(wrapped(line, " " * (width + 2)))


def _made_by(provenance: Mapping[str, str], path: str) -> list[tuple[str, str]]:
    """Return one line about the operation; all entries as they stand if none names it."""
    rest = {key.removeprefix("loratools."): value for key, value in provenance.items()}
    operation, version = rest.pop("operation", None), rest.pop("version", None)
    if operation is None:
        return list(rest.items())
    rest.pop("inputs", None)
    made = ["loratools", version or "", operation, _options(rest.pop("options", ""))]
    history = f"loratools provenance {shlex.quote(path)}"
    return [("made by", " ".join(filter(None, made))), ("history", history), *rest.items()]


def _options(recorded: str) -> str:
    """Return recorded options as `rank=2 device=cpu`; as they stand if they are no JSON object."""
    try:
        options = json.loads(recorded or "{}")
    except ValueError:
        return recorded
    return " ".join(_pairs(options)) if isinstance(options, dict) else recorded


def _pairs(options: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _pairs(value, "" if key == "rule" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}"


def _targets(found: AdapterInfo) -> set[str]:
    """Return the last parts of the modules' paths; a flattened path of a single file has none.

    A last part that is a number stands with the part before it: `to_out.0`.
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
