"""`check` and `rule`: what is wrong with adapters, and what each finding means."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from loratools.face.declare import public
from loratools.face.ran import Asked
from loratools.face.result import Result
from loratools.face.source import CardedModel, Model, destination, model_or_pipeline
from loratools.hub.references import Wanted, parse, path_of
from loratools.operations.check import runner
from loratools.operations.check.baseline import read_baseline
from loratools.operations.check.options import CheckOptions, FixOptions
from loratools.operations.check.outcome import (
    SEVERITIES,
    CheckedAdapter,
    CheckFinding,
    Unchecked,
)
from loratools.operations.check.remedy import Remedy, in_order
from loratools.operations.check.rule import GROUPS
from loratools.operations.check.rules import rule_named
from loratools.work.parallel import Workers
from loratools.work.requests import Progress, Reading, Writing
from loratools_formats.contract.files import read_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Severity
from loratools_formats.disk.errors import (
    AdapterError,
    LoratoolsError,
    OptionError,
    ResultError,
    UnsupportedError,
)

Sources = Annotated[
    str | os.PathLike[str] | Adapter | Sequence[str | os.PathLike[str] | Adapter],
    Wanted("adapter", late=True),
]
"""One adapter, or several."""


@dataclass(frozen=True)
class Mended:
    """A step of a fix that was taken, or was not.

    Attributes:
        command: that does it.
        taken: whether it was taken.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of the step; None if it was not taken, or is stated by
            none.
        reason: why it was not taken; None if it was.
    """

    command: str
    taken: bool
    relative_error: float | None
    reason: str | None


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckResult(Result):
    """What was found in adapters.

    Attributes:
        passed: whether there is no finding of the severity that was asked for, or a worse one, and
            everything could be checked.
        complete: whether every reference could be checked.
        counts: findings by severity.
        adapters: what was checked.
        unchecked: references that nothing can be said about.
        findings: what was found, for each adapter the gravest first.
        steps: what a fix did. The findings are then those of its result.
        targets: the serving programs, with the version that the facts are about.
        rules: codes of the rules that ran.
    """

    operation: ClassVar[str] = "check"

    passed: bool
    complete: bool
    counts: Mapping[str, int]
    adapters: tuple[CheckedAdapter, ...]
    unchecked: tuple[Unchecked, ...]
    findings: tuple[CheckFinding, ...]
    steps: tuple[Mended, ...]
    targets: tuple[str, ...]
    rules: tuple[str, ...]

    def destination(self, asked: Asked) -> tuple[str | None, bool]:
        """Return where the fixed adapter was to go, and whether there was something to fix."""
        return asked.output, any(step.taken for step in self.steps)


@dataclass(frozen=True, kw_only=True, repr=False)
class RuleResult(Result):
    """A rule of `check`.

    Attributes:
        code: its code.
        rule: its name.
        group: which rules it belongs to.
        severity: of its findings.
        summary: what it finds.
        why: why that matters.
        fix: what to do.
        source: where the claim comes from.
        statistical: whether it compares with what is usual.
    """

    operation: ClassVar[str] = "rule"

    code: str
    rule: str
    group: str
    severity: Literal["error", "warning", "note"]
    summary: str
    why: str
    fix: str
    source: str
    statistical: bool


@public(reading=("from_", "carry_unknown"), writing=("output", "overwrite"))
def check(
    sources: Sources,
    *,
    options: CheckOptions,
    base: CardedModel | None = None,
    fixing: FixOptions,
    reading: Reading,
    writing: Writing,
    threads: Workers,
    progress: Progress | None = None,
) -> CheckResult:
    """Check adapters against rules, for the programs that will serve them.

    A result without findings says only that the rules that ran found nothing.

    >>> import loratools as lt
    >>> lt.check("examples/tiny-llama/lora", target=["vllm"]).counts["error"]
    0

    Args:
        sources: an adapter, or several; paths that do not exist are listed in `unchecked`.
        base: the base model, for the rules that compare names and shapes.
        progress: called with (adapters done, adapters in all).

    Raises:
        OptionError: no such rule or target, or a fix without an output or of several adapters.
        MissingFileError: the base or the baseline is not there.
        AdapterError: the base or the baseline is malformed.
        OutputExistsError: the output of a fix exists and `overwrite` is false.
    """
    given, named, unresolved = _resolved(_listed(sources), headers=options.headers_only)
    checkpoint = None if base is None else model_or_pipeline(base)
    accepted = frozenset[str]() if options.baseline is None else read_baseline(options.baseline)

    def run(of: Sequence[Path | Adapter], reading: Reading) -> runner.CheckRun:
        done = runner.check(
            of,
            options,
            base=checkpoint,
            format_name=reading.from_,
            carry_unknown=reading.carry_unknown,
            accepted=accepted,
            named=named,
            workers=threads.workers,
            progress=progress,
        )
        return replace(done, unchecked=(*unresolved, *done.unchecked))

    if not fixing.fix:
        if writing.output is not None:
            raise OptionError("an output is given without `fix`", hint="Add `fix`")
        return _result(run(given, reading), options, ())
    if len(given) + len(unresolved) != 1 or writing.output is None:
        raise OptionError("`fix` needs one adapter and an output", hint="Add `output=PATH`")
    first = run(given, reading)
    if first.unchecked or not any(finding.remedy for finding in first.findings):
        return _result(first, options, ())
    adapter = _read(given[0], reading)
    place = destination(writing, adapter, [adapter, checkpoint])
    steps = _mended(adapter, first.findings, fixing, base, place)
    if not any(step.taken for step in steps):
        return _result(first, options, steps)
    return _result(run([Path(str(place.output))], Reading()), options, steps)


def _read(source: Path | Adapter, reading: Reading) -> Adapter:
    if isinstance(source, Adapter):
        return source
    return read_adapter(source, reading.from_, carry_unknown=reading.carry_unknown)


def _listed(sources: Any) -> list[Path | Adapter]:
    several = [sources] if isinstance(sources, str | os.PathLike | Adapter) else list(sources)
    for one in several:
        if not isinstance(one, str | os.PathLike | Adapter) or one == "":
            raise OptionError("not an adapter", got=repr(one), expected="a path, or one read")
    if not several:
        raise OptionError("no adapters given")
    return [one if isinstance(one, Adapter) else path_of(one) for one in several]


def _resolved(
    given: list[Path | Adapter], *, headers: bool
) -> tuple[list[Path | Adapter], dict[Path, str], tuple[Unchecked, ...]]:
    """Return the adapters with local paths for references, their names, and those not found."""
    found: list[Path | Adapter] = []
    named: dict[Path, str] = {}
    missing: list[Unchecked] = []
    for one in given:
        try:
            reference = None if isinstance(one, Adapter) else parse(one, "adapter")
            if reference is None:
                found.append(one)
                continue
            from loratools.hub.resolve import resolve

            place = resolve(reference, "adapter", beside="small", headers=headers).path
        except LoratoolsError as error:
            missing.append(Unchecked(os.fspath(str(one)), str(error)))
            continue
        named[place] = str(reference)
        found.append(place)
    return found, named, tuple(missing)


def _result(run: runner.CheckRun, options: CheckOptions, steps: tuple[Mended, ...]) -> CheckResult:
    counts: dict[str, int] = {
        severity: sum(finding.severity == severity for finding in run.findings)
        for severity in SEVERITIES
    }
    limit = options.fail_on or "warning"
    bad: tuple[Severity, ...] = ()
    if limit != "never":
        bad = SEVERITIES[: SEVERITIES.index(limit) + 1]
    return CheckResult.of(
        run,
        passed=not run.unchecked and not any(counts[severity] for severity in bad),
        complete=not run.unchecked,
        counts=counts,
        steps=steps,
        targets=tuple(target.label for target in options.targets()),
    )


def _mended(
    adapter: Adapter,
    findings: tuple[CheckFinding, ...],
    fixing: FixOptions,
    base: Model | None,
    place: Writing,
) -> tuple[Mended, ...]:
    """Run the fixes that the findings ask for, and write the last result."""
    from loratools.face.convert import write

    taken: list[Mended] = []
    current, to = adapter, adapter.format
    for remedy in in_order({f.remedy for f in findings if f.remedy is not None}):
        command = remedy.command(adapter)
        if remedy.is_lossy and not fixing.allow_lossy:
            reason = "it changes ΔW by more than rounding; allow that with `allow_lossy=True`"
            taken.append(Mended(command, False, None, reason))
            continue
        try:
            if remedy.kind in ("format", "rewrite"):
                to, error = str(remedy.value), None
            else:
                current, error = _step(current, remedy, base)
        except LoratoolsError as failure:
            taken.append(Mended(command, False, None, str(failure)))
            continue
        taken.append(Mended(command, True, error, None))
    if not any(step.taken for step in taken) or place.output is None:
        return tuple(taken)
    try:
        written = write(
            current,
            place.output,
            format=to,
            base=base if isinstance(base, str | os.PathLike) else None,
            overwrite=place.overwrite,
            allow_lossy=fixing.allow_lossy,
        )
    except (AdapterError, OptionError, ResultError, UnsupportedError) as failure:
        return tuple(replace(step, taken=False, reason=str(failure)) for step in taken)
    return tuple(
        replace(step, relative_error=written.relative_error)
        if step.taken and step.relative_error is None
        else step
        for step in taken
    )


def _step(adapter: Adapter, remedy: Remedy, base: Model | None) -> tuple[Adapter, float | None]:
    """Return the adapter after one step, and the step's error."""
    from loratools.face.squeeze import squeeze
    from loratools.face.to_lora import to_lora

    if remedy.kind == "plain":
        made = to_lora(adapter, base=base, energy=1.0)
        return made.adapter, made.relative_error
    if remedy.kind == "rank":
        cut = squeeze(adapter, max_rank=remedy.value, energy=1.0)
        return cut.adapter, cut.relative_error
    if remedy.kind == "uniform":
        even = squeeze(adapter, rank=remedy.value, uniform=True)
        return even.adapter, even.relative_error
    if remedy.kind == "tidy":
        tidy = squeeze(adapter, energy=1.0)
        return tidy.adapter, tidy.relative_error
    return _repaired(adapter, remedy)


def _repaired(adapter: Adapter, remedy: Remedy) -> tuple[Adapter, float | None]:
    from loratools.face.repair import repair

    made = repair(
        adapter,
        keep_intruders=True,
        drop_dead=remedy.kind == "drop-dead",
        rebalance=remedy.kind == "rebalance",
    )
    return made.adapter, made.relative_error


@public()
def rule(name: str) -> RuleResult:
    """Return what a rule of `check` means.

    >>> import loratools as lt
    >>> lt.rule("LT101").rule
    'missing-pair'

    Args:
        name: the code or the name of the rule.

    Raises:
        OptionError: there is none.
    """
    found = rule_named(name)
    return RuleResult.of(found, rule=found.slug, group=GROUPS[found.group])
