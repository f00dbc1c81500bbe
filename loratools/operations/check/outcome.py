"""One adapter, checked: its findings, or why nothing can be said about it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratools.base.placement.names import Names
from loratools.operations.check.baseline import fingerprint
from loratools.operations.check.lines import line_of
from loratools.operations.check.options import CheckOptions
from loratools.operations.check.remedy import Remedy
from loratools.operations.check.rule import Found, Group, Rule
from loratools.operations.check.rules import OF_READERS, RULES, UNREADABLE
from loratools.operations.check.subject import Subject, subject_of
from loratools.work.json_object import hidden
from loratools_formats.contract.path_kinds import missing
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.file_names import ADAPTER_CONFIG
from loratools_formats.core.findings import Finding, Severity
from loratools_formats.disk.distant import is_there
from loratools_formats.disk.errors import AdapterError, LoratoolsError
from loratools_formats.disk.files import system_troubles

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_WORTH: tuple[Group, ...] = (
    "no-ops", "files", "structure", "configuration", "numbers", "targets", "publication",
)  # fmt: skip


@dataclass(frozen=True)
class CheckFinding:
    """What a rule found in an adapter.

    Attributes:
        code: of the rule.
        rule: its name.
        severity: `error`, `warning` or `note`.
        adapter: the reference, as it was given.
        file: the file of the adapter that it stands in; None for the weights.
        line: the line of that file, from 1; None if the file has no lines, or it is about all.
        where: the module, tensor, key or file concerned; None for the whole adapter.
        target: the serving program that it is about; None if it is about none.
        message: what was found.
        hint: what to do.
        command: the command that fixes it; None if there is none.
        statistical: whether it compares with what is usual.
        fingerprint: the same in every run for one finding.
        remedy: the step of a fix that deals with it.
    """

    code: str
    rule: str
    severity: Severity
    adapter: str
    file: str | None
    line: int | None
    where: str | None
    target: str | None
    message: str
    hint: str
    command: str | None
    statistical: bool
    fingerprint: str
    remedy: Remedy | None = hidden(default=None)


@dataclass(frozen=True)
class CheckedAdapter:
    """One adapter that was checked.

    Attributes:
        adapter: the reference, as it was given.
        format: as which it was read; None if it could not be.
        modules: how many it has.
        accepted: findings that the baseline lists.
    """

    adapter: str
    format: str | None
    modules: int
    accepted: int


@dataclass(frozen=True)
class Unchecked:
    """A reference that nothing could be said about.

    Attributes:
        adapter: the reference.
        reason: why.
    """

    adapter: str
    reason: str


Outcome = tuple[CheckedAdapter, tuple[CheckFinding, ...]] | Unchecked


@dataclass(frozen=True)
class Asked:
    """What to check every adapter for.

    Attributes:
        options: which rules, and for which programs.
        base: the names of the base model; None if none was given.
        format_name: read paths as this format.
        carry_unknown: keep tensors that the format does not know.
        accepted: fingerprints of findings to leave out.
        named: what to call paths that stand for references.
    """

    options: CheckOptions
    base: Names | None = None
    format_name: str | None = None
    carry_unknown: bool = False
    accepted: frozenset[str] = frozenset()
    named: Mapping[Path, str] = field(default_factory=dict)

    def outcome(self, source: Path | Adapter) -> Outcome:
        """Check one adapter, by path or as it was read."""
        with system_troubles() as troubles:
            outcome = self._outcome(source)
        return Unchecked(self._name(source), troubles[0]) if troubles else outcome

    def _name(self, source: Path | Adapter) -> str:
        path = source.source if isinstance(source, Adapter) else source
        return "an adapter in memory" if path is None else self.named.get(path, str(path))

    def _outcome(self, source: Path | Adapter) -> Outcome:
        targets = self.options.targets()
        if isinstance(source, Adapter):
            doubts = tuple(get_format(source.format).loading_findings(source))
            subject = Subject(source.source, source, None, self.base, targets, doubts)
        elif not os.path.lexists(source) and not is_there(source):
            return Unchecked(str(source), str(missing(source)).removeprefix(f"{source}: "))
        else:
            subject = subject_of(
                source,
                self.format_name,
                carry_unknown=self.carry_unknown,
                base=self.base,
                targets=targets,
            )
            subject = replace(subject, name=self.named.get(source))
        found = checked(subject, self.options.codes())
        changed = _changed(subject.adapter, in_place=not isinstance(source, Adapter))
        if changed is not None:  # rules that could not look at it say nothing of what is there
            return Unchecked(self._name(source), changed)
        new = tuple(finding for finding in found if not self._is_accepted(finding))
        adapter = subject.adapter
        about = CheckedAdapter(
            _reference(subject),
            None if adapter is None else adapter.format,
            0 if adapter is None else len(adapter.modules),
            len(found) - len(new),
        )
        return about, new

    def _is_accepted(self, finding: CheckFinding) -> bool:
        return finding.code != UNREADABLE.code and finding.fingerprint in self.accepted


def _changed(adapter: Adapter | None, *, in_place: bool) -> str | None:
    """Return how a file of an adapter changed since it was read; None if none did.

    Args:
        adapter: what was read; None if it could not be.
        in_place: whether another file in the place of one counts, too.
    """
    for file in () if adapter is None else adapter.inputs:
        try:
            if file.is_here:
                file.check_in_place() if in_place else file.check_unchanged()
        except AdapterError as error:
            return str(error)
    return None


def _reference(subject: Subject) -> str:
    if subject.name is not None:
        return subject.name
    return "adapter" if subject.path is None else os.fspath(subject.path)


def _stable(subject: Subject) -> str:
    """Return a path as every run from one folder has it, however it was spelled."""
    reference = _reference(subject)
    if subject.name is not None or subject.path is None:
        return reference
    path, here = os.path.abspath(reference), os.getcwd()
    inner = os.path.commonpath([path, here]) == here
    return Path(os.path.relpath(path) if inner else path).as_posix()


def checked(subject: Subject, codes: frozenset[str]) -> tuple[CheckFinding, ...]:
    """Return what rules find in one adapter, the gravest first.

    An adapter that cannot be read is reported whatever `codes` says, since it was not checked.
    """
    found = [(rule, each) for rule in RULES if rule.code in codes for each in _run(subject, rule)]
    found += [(UNREADABLE, each) for each in _unreadable(subject)]
    findings = [_finding(subject, rule, each) for rule, each in found]
    unique = {(f.fingerprint, f.message): f for f in findings}
    return tuple(sorted(unique.values(), key=_order))


def _order(finding: CheckFinding) -> tuple[int, int, str]:
    rule = next(rule for rule in RULES if rule.code == finding.code)
    return SEVERITIES.index(finding.severity), _WORTH.index(rule.group), finding.code


def _unreadable(subject: Subject) -> Iterator[Found]:
    error = subject.refusal
    if error is not None:
        file = None
        if error.path is not None and subject.folder is not None:
            name = os.path.basename(error.path)
            file = name if (subject.folder / name).is_file() else None
        yield Found(error.brief, error.tensor, file, error.hint or "")


def _run(subject: Subject, rule: Rule) -> Iterator[Found]:
    own: list[Found] = []
    if rule.check is not None:
        try:
            own = list(rule.check(subject))
        except LoratoolsError as error:
            text = f"{rule.code} could not check it: {error.brief}"
            own = [replace(Found(text, error.tensor), hint=error.hint or "")]
    yield from own
    if not own and rule.of_readers:
        known = () if subject.adapter is None else subject.adapter.findings
        of_readers = [f for f in (*known, *subject.doubts) if OF_READERS.get(f.code) is rule]
        yield from map(_of_reader, of_readers)


def _of_reader(finding: Finding) -> Found:
    file = finding.where if finding.where is not None and "." in finding.where else None
    is_file = file is not None and file.endswith((".json", ".bin", ".safetensors"))
    return Found(finding.message, finding.where, file if is_file else None, finding.hint)


def _finding(subject: Subject, rule: Rule, found: Found) -> CheckFinding:
    reference = _reference(subject)
    command = None if found.remedy is None else found.remedy.command(subject.adapter)
    file, line = _place(subject, rule, found)
    return CheckFinding(
        code=rule.code,
        rule=rule.slug,
        severity=found.severity or rule.severity,
        adapter=reference,
        file=file,
        line=line,
        where=found.where,
        target=found.target,
        message=found.message,
        hint=found.hint or rule.fix,
        command=command,
        statistical=rule.statistical,
        fingerprint=fingerprint(rule.code, _stable(subject), found.where, found.target),
        remedy=found.remedy,
    )


def _place(subject: Subject, rule: Rule, found: Found) -> tuple[str | None, int | None]:
    """Return the file and the line that a finding stands in."""
    file = found.file
    keys = [key for key in (rule.key, found.where) if key]
    if file is None and subject.is_peft and any(key in subject.config for key in keys):
        file = ADAPTER_CONFIG
    if file is None or subject.folder is None:
        return file, None
    return file, line_of(subject.folder, file, keys, found.message)
