"""`push`: an adapter or a model, published on the Hub with its card."""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from loratools.face.declare import public
from loratools.face.push_card import (
    base_model_of,
    card_before,
    card_there,
    licence_of,
    picture_of,
    records_of,
)
from loratools.face.ran import Asked
from loratools.face.result import Reported
from loratools.hub import files, upload
from loratools.hub.card import updated
from loratools.hub.content import Content, Watched
from loratools.hub.facts import Subject, card_facts
from loratools.hub.options import PushOptions
from loratools.hub.references import Reference, Wanted, parse_target
from loratools.operations.check.options import CheckOptions
from loratools.work.json_object import named
from loratools.work.parallel import Workers
from loratools.work.requests import Progress, Writing
from loratools_formats.contract.files import read_adapter, write_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.file_names import CARD
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import (
    LoratoolsError,
    OptionError,
    UnfitError,
    UnknownFormatError,
    and_more,
)
from loratools_formats.disk.provenance import PROVENANCE_FILE
from loratools_formats.disk.temporaries import temporary_folder

_Published = Annotated[str | os.PathLike[str] | Adapter, Wanted("adapter", beside="all")]


@dataclass(frozen=True, kw_only=True)
class PushedFile:
    """A file that is published.

    Attributes:
        path: in the repository.
        nbytes: its size.
        change: what the repository has of it: `new`, `changed` or `same`.
    """

    path: str
    nbytes: int = named("bytes")
    change: upload.Change


@dataclass(frozen=True, kw_only=True, repr=False)
class PushResult(Reported):
    """What was published, or would be.

    Attributes:
        repo: the repository.
        branch: that was, or would be, committed to.
        dry_run: whether nothing was done.
        created: whether the repository was made.
        commit: the commit that holds the files; None on a dry run of what is not there yet.
        url: address of the commit; None if there is none.
        pull_request: address of the pull request; None if none was made.
        changed: whether there is something to commit.
        files: what is published.
        left_out: files of the folder that are not.
        card_diff: what changes in the card, as a unified diff.
    """

    operation: ClassVar[str] = "push"

    repo: str
    branch: str
    dry_run: bool
    created: bool
    commit: str | None
    url: str | None
    pull_request: str | None
    changed: bool
    files: tuple[PushedFile, ...]
    left_out: tuple[str, ...]
    card_diff: str

    def destination(self, asked: Asked) -> tuple[str | None, bool]:
        """Return the repository, and whether it got a commit."""
        return self.repo, self.changed and not asked.dry_run


@public(checking=("target",), writing=("dry_run",))
def push(
    source: _Published,
    repo: str,
    *,
    options: PushOptions,
    checking: CheckOptions,
    writing: Writing,
    threads: Workers,
    progress: Progress | None = None,
) -> PushResult:
    """Publish an adapter or a model on the Hub, checked, with a card, in one commit.

    Files that loratools does not know are not published. The text and the keys that the card's
    author wrote are kept; loratools writes about the adapter between two marks. If the repository
    has everything already, no commit is made.

    >>> import loratools as lt
    >>> lt.push("examples/tiny-llama/lora", "hf://datasets/me/tiny")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    loratools_formats.disk.errors.OptionError: results are published to a repository of models; ...

    Args:
        source: an adapter, or the path of a model.
        repo: `USER/NAME`, or `hf://USER/NAME/FOLDER`.
        progress: called with (adapters checked, adapters in all).

    Raises:
        UnfitError: `check` found something of the severity `fail_on` or worse.
        MissingFileError: there is no such repository, and `create` is false.
        HubError: somebody else has committed since, or the Hub refused or failed.
        AdapterError: a file cannot be read, or changed meanwhile.
        OptionError: not the name of a repository, or options that contradict each other.
        MissingDependencyError: `huggingface_hub` is not installed.
    """
    target = target_of(parse_target(repo), options)
    there = upload.may_publish(target)
    with _on_disk(source, target.reference) as path:
        watched = Watched(path)
        found = _read(path)
        asked = replace(checking, fail_on=options.fail_on or "error")
        checked = _check(path, found, asked, threads, progress, skip=options.no_check)
        with temporary_folder("loratools-push") as folder:
            made = _prepared(path, found, watched, target, there, options, folder)
            return _published(made, target, there, options, writing, checked)


def target_of(reference: Reference, options: PushOptions) -> upload.Target:
    """Return where to publish.

    Raises:
        OptionError: two branches are named.
    """
    if options.branch is not None and reference.revision not in (None, options.branch):
        raise OptionError("two branches are named", got=f"{reference.revision}, {options.branch}")
    create: Any = "private" if options.private else "public" if options.create else None
    branch = options.branch or reference.revision
    return upload.Target(replace(reference, revision=branch), create, options.create_pr)


@contextlib.contextmanager
def _on_disk(source: Any, reference: Reference) -> Any:
    """Give the path of a source; an adapter in memory is written to a temporary folder."""
    if not isinstance(source, Adapter):
        yield Path(source)
    elif source.source is not None and source.provenance is None:
        for file in source.inputs:
            if file.is_here:
                file.check_in_place()
        yield source.source
    else:
        with temporary_folder("loratools-push") as folder:
            place = folder / reference.repo.rpartition("/")[2]
            write_adapter(source, place, source.format)
            yield place


def _read(path: Path) -> Adapter | None:
    """Return the adapter at a path; None if a model is there.

    Raises:
        LoratoolsError: it is neither.
    """
    try:
        return read_adapter(path)
    except UnknownFormatError:
        with contextlib.suppress(LoratoolsError):
            files.contents_of_model(path)
            return None
        raise


def _check(
    path: Path,
    adapter: Adapter | None,
    options: CheckOptions,
    threads: Workers,
    progress: Progress | None,
    *,
    skip: bool,
) -> tuple[Finding, ...]:
    """Check an adapter, and return what was found as notes.

    Raises:
        UnfitError: something as grave as `fail_on`.
    """
    if skip or adapter is None:
        return ()
    from loratools.face.check import check

    result = check(path, options=options, threads=threads, progress=progress)
    if not result.passed:
        grave = [f"{each.code} {each.rule}: {each.message}" for each in result.findings]
        reasons = [*grave, *(each.reason for each in result.unchecked)]
        raise UnfitError(
            "nothing was published, since the check found something",
            path=path,
            got=and_more(reasons),
            hint="Pass `no_check=True`, or see all of it: "
            f"loratools check {shlex.quote(str(path))}",
            result=result,
        )
    return tuple(
        Finding(
            "rule-broken", each.severity, each.where, f"{each.code} {each.rule}: {each.message}"
        )
        for each in result.findings
        if each.severity != "note"
    )


@dataclass(frozen=True)
class _Prepared:
    """What is to be published: contents by path in the repository, and what is said of them."""

    contents: Mapping[str, Content]
    left_out: tuple[str, ...]
    card_diff: str
    title: str
    stale: tuple[str, ...]


def _prepared(
    path: Path,
    adapter: Adapter | None,
    watched: Watched,
    target: upload.Target,
    there: upload.Remote,
    options: PushOptions,
    folder: Path,
) -> _Prepared:
    found = (
        files.contents_of_model(path)
        if adapter is None
        else files.contents_of_adapter(path, adapter)
    )
    inside = target.reference.inside
    made: dict[str, bytes] = {}
    diff = ""
    told = records_of(path)
    records = told.found
    if told.stale:
        kept = {n: p for n, p in found.files.items() if not n.endswith(PROVENANCE_FILE)}
        found = replace(found, files=kept)
    if not options.no_card:
        picture = None if adapter is None else picture_of(adapter, target.reference.repo, folder)
        if picture is not None:
            made[files.PICTURE] = picture.read_bytes()
        before = card_before(target, there, found, options)
        subject = Subject(
            repo=target.reference.repo,
            inside=inside,
            files=list(found.files),
            adapter=adapter,
            nbytes=sum(place.stat().st_size for place in found.files.values()),
            base_model=base_model_of(adapter, before, records, options),
            licence={},
            records=records,
            picture=None if picture is None else files.PICTURE,
        )
        subject = replace(subject, licence=licence_of(subject.base_model, before))
        after = updated(before, card_facts(subject))
        made[CARD] = after
        shown = card_there(target, there) or b""
        diff = "".join(
            difflib.unified_diff(
                shown.decode("utf-8", "replace").splitlines(keepends=True),
                after.decode("utf-8", "replace").splitlines(keepends=True),
                "README.md",
                "README.md",
            )
        )
    # The card and the notes are made from what was read; the files must still hold that.
    contents = {name: watched.content(place) for name, place in found.files.items()}
    contents |= {name: Content.of_bytes(data) for name, data in made.items()}
    placed = {f"{inside}/{name}" if inside else name: each for name, each in contents.items()}
    operation = records[-1].get("operation") if records else None
    title = options.message or (f"Publish the result of {operation}" if operation else "Publish")
    return _Prepared(placed, found.left_out, diff, f"{title} with loratools", told.stale)


def _published(
    made: _Prepared,
    target: upload.Target,
    there: upload.Remote,
    options: PushOptions,
    writing: Writing,
    checked: tuple[Finding, ...],
) -> PushResult:
    changes = upload.changes(made.contents, there)
    findings = list(checked)
    if made.left_out:
        text = f"not published, since loratools does not know them: {', '.join(made.left_out)}"
        findings.append(Finding("foreign-files", "note", made.left_out[0], text))
    for name in made.stale:
        text = f"{name} is not the file that its statement is about, which is not published"
        findings.append(Finding("stale-statement", "warning", name, text))
    done = upload.Published(there.head, None, None, False)
    if not writing.dry_run:
        done = upload.publish(target, made.contents, there, options.message or made.title)
    return PushResult(
        findings=tuple(findings),
        repo=target.reference.repo,
        branch=target.branch,
        dry_run=writing.dry_run,
        created=there.head is None and not writing.dry_run,
        commit=done.commit,
        url=done.url,
        pull_request=done.pull_request,
        changed=done.is_new or (writing.dry_run and set(changes.values()) != {"same"}),
        files=tuple(
            PushedFile(path=name, nbytes=content.nbytes, change=changes[name])
            for name, content in sorted(made.contents.items())
        ),
        left_out=made.left_out,
        card_diff=made.card_diff,
    )
