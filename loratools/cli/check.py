"""`loratools check`."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.exits import EXIT_FOUND, EXIT_UNCHECKED
from loratools.cli.output import note, print_json, print_json_text, say
from loratools.cli.perform import require_adapters
from loratools.cli.progress import progress_bar
from loratools.face.check import CheckResult, check
from loratools.operations.check.baseline import baseline_text
from loratools.operations.check.options import CheckOptions, FixOptions
from loratools.operations.check.settings import Settings, settings_in
from loratools.work.collection import adapters_in, is_adapter
from loratools.work.declared import option
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting, Writing
from loratools_formats.disk.errors import OptionError
from loratools_formats.disk.publish import publish_file


@dataclass(frozen=True)
class Presenting:
    """How findings are printed.

    Attributes:
        output_format: how to print findings.
        write_baseline: list the findings in a new file, for --baseline in later runs.
        no_config: read no loratools.toml or pyproject.toml of the current folder.
    """

    output_format: Literal["text", "json", "github", "sarif", "junit"] = option(
        "text", heading="Report"
    )
    write_baseline: Path | None = option(None, heading="Report", metavar="FILE")
    no_config: bool = option(False, heading="Report")


@named_command("check")
@click.argument("adapters", nargs=-1, type=shared.PATH, metavar="ADAPTER...")
@shared.reads("base", "from_", "carry_unknown")
@shared.takes(CheckOptions, into="options")
@shared.takes(FixOptions, into="fixing")
@shared.takes(Writing, "output", "overwrite", into="writing")
@shared.takes(Workers, into="threads")
@shared.takes(Presenting, into="presenting")
@shared.reports()
def command(
    adapters: tuple[Path, ...],
    reading: Reading,
    options: CheckOptions,
    fixing: FixOptions,
    writing: Writing,
    threads: Workers,
    presenting: Presenting,
    reporting: Reporting,
) -> int:
    """Check adapters for parts that do nothing, that programs refuse, or that are missing.

    A folder that is no adapter stands for all adapters below it. Exits with 0 if nothing was found,
    with 1 if something was found, and with 3 if an adapter could not be checked.

    \b
    loratools check my-adapter --target vllm --base model
    loratools check adapters/ --output-format sarif > findings.sarif
    loratools check my-adapter --target llamacpp --base model --fix -o fixed.gguf
    """  # noqa: D301 - click reads the backspace
    require_adapters(adapters, "check")
    if writing.output is not None and not fixing.fix:
        form: str = presenting.output_format
        if form == "text":
            form = _REPORTS.get(writing.output.suffix.lower(), form)
        to = f"--output-format {form} > {shlex.quote(str(writing.output))}"
        given = " ".join(shlex.quote(str(path)) for path in adapters)
        raise OptionError(
            "findings go to stdout; `output` is where a fixed adapter is written",
            hint=f"Redirect them: loratools check {given} {to}. To mend the adapter, add `fix`",
        )
    settings = _settings(adapters, presenting)
    base = reading.base or settings.file("base")
    with progress_bar("check", quiet=reporting.quiet, unit="adapter") as progress:
        result = check(
            adapters_in(adapters),
            options=_with_settings(options, settings),
            base=base,
            fixing=fixing,
            reading=replace(reading, base=None),
            writing=writing,
            threads=threads,
            progress=progress,
        )
    if presenting.write_baseline is not None and result.complete:
        _write_baseline(presenting.write_baseline, result)
    _print(result, presenting, reporting)
    if any(step.taken for step in result.steps) and not reporting.quiet:
        note(f"wrote {writing.output}")
    if not result.complete:
        if presenting.write_baseline is not None:
            say("the baseline is not written, for not everything could be checked", err=True)
        return EXIT_UNCHECKED
    return 0 if result.passed else EXIT_FOUND


_REPORTS = {".json": "json", ".sarif": "sarif", ".xml": "junit"}
"""The format of findings that the name of a file asks for, by its ending."""


def _settings(adapters: tuple[Path, ...], presenting: Presenting) -> Settings:
    """Return the settings of the current folder, unless that is an adapter under check."""
    here = os.path.realpath(".")
    own = {os.path.realpath(path if path.is_dir() else path.parent) for path in adapters}
    if presenting.no_config or (here in own and is_adapter(Path(here))):
        return Settings(None, {})
    return settings_in(Path())


def _with_settings(options: CheckOptions, settings: Settings) -> CheckOptions:
    """Return the options, and the settings' where the command line has none."""
    return replace(
        options,
        select=options.select or settings.names("select"),
        ignore=options.ignore or settings.names("ignore"),
        target=options.target or settings.names("target"),
        headers_only=options.headers_only or bool(settings.values.get("headers-only")),
        baseline=options.baseline or settings.file("baseline"),
        fail_on=options.fail_on or settings.text("fail-on"),  # type: ignore[arg-type]
    )


def _write_baseline(path: Path, result: CheckResult) -> None:
    lines = {
        f.fingerprint: f"{f.code} {f.adapter} {f.where or ''}".strip() for f in result.findings
    }
    with publish_file(path) as temporary:
        temporary.write_text(baseline_text(lines), encoding="utf-8")


def _print(result: CheckResult, presenting: Presenting, reporting: Reporting) -> None:
    kind = "json" if reporting.json else presenting.output_format
    if kind == "json":
        print_json(result.to_dict())
    elif kind == "github":
        from loratools.cli.findings.github import github_of

        say(github_of(result), whole=True)
    elif kind == "sarif":
        from loratools.cli.findings.sarif import sarif_of

        print_json_text(sarif_of(result))
    elif kind == "junit":
        from loratools.cli.findings.junit import junit_of

        say(junit_of(result), whole=True)
    elif not reporting.quiet:
        from loratools.cli.findings.text import text_of

        say(text_of(result))
