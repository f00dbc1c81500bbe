"""Publishing files in one commit: either the repository has the new commit, or the old one.

The commit names its parent, so that nobody's work is overwritten. What can be repeated is repeated;
where a reply was lost, the branch is looked at first, since the commit may be there. At the end the
hashes of all files are compared with those that the Hub holds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loratools.hub import client
from loratools.hub.content import Content
from loratools.hub.references import Reference
from loratools_formats.disk.errors import (
    AdapterError,
    HubError,
    LoratoolsError,
    MissingFileError,
    OptionError,
)

Change = Literal["new", "changed", "same"]

_ATTEMPTS = 4
_LONGEST_WAIT_SECONDS = 60.0
_REPEATABLE = (408, 429, 500, 502, 503, 504)
FIRST_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Target:
    """Where to publish.

    Attributes:
        reference: the repository, its branch, and the folder in it.
        create: make the repository if there is none: public, private, or not at all.
        create_pr: propose the commit instead of making it.
    """

    reference: Reference
    create: Literal["public", "private"] | None = None
    create_pr: bool = False

    @property
    def branch(self) -> str:
        """Name of the branch."""
        return self.reference.revision or "main"


@dataclass(frozen=True)
class Remote:
    """What a branch holds.

    Attributes:
        head: its commit; None if the repository does not exist yet.
        marks: sha256 of large files, git's name of small ones, by path.
        is_branch: whether the branch exists.
    """

    head: str | None
    marks: Mapping[str, str]
    is_branch: bool = True


@dataclass(frozen=True)
class Published:
    """What became of a repository.

    Attributes:
        commit: the commit that holds the files; None if nothing was done.
        url: its address.
        pull_request: address of the pull request; None if none was made.
        is_new: whether a commit was made.
    """

    commit: str | None
    url: str | None
    pull_request: str | None
    is_new: bool


def remote(target: Target) -> Remote:
    """Return what the branch holds now.

    Raises:
        MissingFileError: there is no such repository, and `create` is false.
        HubError: the Hub refused, failed, or cannot be reached.
    """
    try:
        return _at(target.reference, target.branch)
    except MissingFileError as error:
        if "no such revision" in error.message:
            main = _at(target.reference, "main")
            return Remote(main.head, main.marks, is_branch=False)
        if target.create is not None and "is a " not in error.message:
            return Remote(None, {}, is_branch=target.branch == "main")
        if "is a " not in error.message:
            error.hint = "Make it with `create=True`, or `private=True`. " + (error.hint or "")
        raise


def _at(reference: Reference, revision: str) -> Remote:
    with client.talking(
        Reference("model", reference.repo, None if revision == "main" else revision)
    ):
        info = client.api().model_info(reference.repo, revision=revision, files_metadata=True)
        marks = {each.rfilename: _mark(each) for each in info.siblings or ()}
        if info.siblings is None or None in marks.values():  # a server that lists no hashes there
            tree = client.api().list_repo_tree(reference.repo, recursive=True, revision=info.sha)
            marks = {each.path: _mark(each) for each in tree if hasattr(each, "blob_id")}
    return Remote(info.sha, {name: mark for name, mark in marks.items() if mark is not None})


def _mark(file: Any) -> str | None:
    """Return what a listing says of a file: sha256 of a large one, git's name of a small one."""
    lfs = getattr(file, "lfs", None)
    mark = file.blob_id if lfs is None else lfs.sha256
    return None if mark is None else str(mark)


def may_publish(target: Target) -> Remote:
    """Refuse before any work what could not be published, and return what the branch holds.

    Raises:
        OptionError: it is no repository of models.
        LoratoolsError: no login, no such repository, or the Hub cannot be reached.
    """
    reference = target.reference
    if reference.kind != "model" or "/" not in reference.repo:
        raise OptionError(
            "results are published to a repository of models",
            got=str(reference),
            expected="hf://USER/NAME",
        )
    if client.library(reference).constants.HF_HUB_OFFLINE:
        raise HubError(
            "offline mode is on, and publishing needs the Hub",
            path=str(reference),
            hint="Unset HF_HUB_OFFLINE",
        )
    with client.talking(reference):
        token = client.library(reference).get_token()
    if token is None:
        raise HubError(
            "publishing needs a login",
            path=str(reference),
            hint="Log in: hf auth login, or set HF_TOKEN",
        )
    return remote(target)


def changes(here: Mapping[str, Content], there: Remote) -> dict[str, Change]:
    """Return what publishing files would do to each."""
    found: dict[str, Change] = {}
    for name, content in here.items():
        if name not in there.marks:
            found[name] = "new"
        else:
            found[name] = "same" if content.is_at(there.marks[name]) else "changed"
    return found


def publish(target: Target, files: Mapping[str, Content], there: Remote, title: str) -> Published:
    """Put files into the repository in one commit; files that are there already are left out.

    Args:
        target: where.
        files: what, by their paths in the repository. Others that are there stay.
        there: what the branch held when the files were made.
        title: of the commit.

    Raises:
        HubError: somebody else has committed since, the Hub refused, or holds other bytes.
    """
    wanted = {n: files[n] for n, change in changes(files, there).items() if change != "same"}
    if not wanted and there.head is not None and there.is_branch:
        return Published(there.head, _url(target.reference, there.head), None, False)
    head = _made_ready(target, there, wanted)
    there = Remote(head, there.marks)
    made = _committed(target, wanted, there, title) if wanted else None
    if made is None:
        return Published(head, _url(target.reference, head), None, False)
    _verify(target.reference, made.commit or "", files)
    return made


def _made_ready(target: Target, there: Remote, wanted: Mapping[str, Content]) -> str:
    """Make the repository and the branch if they are missing, and return the branch's commit.

    Raises:
        HubError: somebody has made the repository meanwhile, and put such files into it.
    """
    api, repo, reference = client.api(), target.reference.repo, target.reference
    with client.talking(reference):
        if there.head is None:
            api.create_repo(repo, private=target.create == "private", exist_ok=True)
    now = Remote(there.head, {}) if there.head is not None else _at(reference, "main")
    head = now.head or ""
    if set(now.marks) & set(wanted):
        raise HubError(
            "somebody has made the repository meanwhile, and nothing was overwritten",
            path=str(reference),
            hint="Look at it, then run the command again",
        )
    if target.branch == "main" or (there.is_branch and there.head is not None):
        return head
    with client.talking(reference):
        api.create_branch(repo, branch=target.branch, revision=head, exist_ok=True)
    return _at(reference, target.branch).head or ""


def _committed(
    target: Target, wanted: Mapping[str, Content], there: Remote, title: str
) -> Published:
    wait = FIRST_WAIT_SECONDS
    before = _pull_requests(target) if target.create_pr else {}
    for attempt in range(_ATTEMPTS):
        try:
            return _commit_once(target, wanted, there, title)
        except Exception as error:
            made = _after_failure(target, wanted, there, before, error)
            if made is not None:
                return made
            if attempt == _ATTEMPTS - 1 or not _may_repeat(error):
                raise
            time.sleep(min(_retry_after(error) or wait, _LONGEST_WAIT_SECONDS))
            wait *= 2
    raise AssertionError("unreachable")


def _commit_once(
    target: Target, wanted: Mapping[str, Content], there: Remote, title: str
) -> Published:
    # Each attempt gets operations of its own, which the library marks as it goes.
    operations = [_operation(target, name, content) for name, content in wanted.items()]
    with client.talking(target.reference):
        info = client.api().create_commit(
            target.reference.repo,
            operations,
            commit_message=title,
            revision=None if target.create_pr else target.branch,
            parent_commit=there.head or None,
            create_pr=target.create_pr,
        )
    # The library makes no commit where the Hub holds all of it.
    return Published(info.oid, info.commit_url, info.pr_url, info.oid != there.head)


def _operation(target: Target, name: str, content: Content) -> Any:
    """Return what puts a file into a commit, by the digest that the file has to have.

    Raises:
        AdapterError: it has another one by now.
    """
    hub, data = client.library(target.reference), content.data
    if not isinstance(data, Path):
        return hub.CommitOperationAdd(name, data)
    try:
        made = hub.CommitOperationAdd(name, str(data))
        now = made.upload_info.sha256.hex()
    except (OSError, ValueError) as error:
        raise AdapterError(f"file cannot be read any more: {error}", path=data) from error
    if now != content.sha256:
        raise AdapterError("file changed while it was being published", path=data)
    return made


def _after_failure(
    target: Target,
    wanted: Mapping[str, Content],
    there: Remote,
    before: Mapping[str, str],
    error: Exception,
) -> Published | None:
    """Return the commit if it was made though the answer says or is nothing; None if it was not.

    Raises:
        HubError: somebody else has committed since.
    """
    reference = target.reference
    if target.create_pr:
        for name, commit in _pull_requests(target).items():
            if before.get(name) != commit and _holds(_at(reference, commit), wanted):
                number = name.rpartition("/")[2]
                page = f"{_page(reference)}/discussions/{number}"
                return Published(commit, _url(reference, commit), page, True)
        return None
    try:
        now = _at(reference, target.branch)
    except LoratoolsError:
        return None
    if now.head == there.head:
        return None
    if _holds(now, wanted) and _parent_of(reference, now.head or "") == there.head:
        return Published(now.head, _url(reference, now.head), None, True)
    raise HubError(
        "somebody else has committed since, and nothing was overwritten",
        path=str(reference),
        got=f"commit {now.head}",
        expected=f"commit {there.head}",
        hint="Look at that commit, then run the command again",
    ) from error


def _parent_of(reference: Reference, commit: str) -> str | None:
    """Return the commit before another; None if it is not known."""
    with contextlib.suppress(Exception):
        found = client.api().list_repo_commits(reference.repo, revision=commit)
        return str(found[1].commit_id)
    return None


def _pull_requests(target: Target) -> dict[str, str]:
    """Return the commits of pull requests by their refs; empty if they cannot be listed."""
    with contextlib.suppress(Exception):
        refs = client.api().list_repo_refs(target.reference.repo, include_pull_requests=True)
        return {each.ref: each.target_commit for each in refs.pull_requests or ()}
    return {}


def _may_repeat(error: Exception) -> bool:
    status = client.status_of(error)
    return client.is_unreachable(error) if status is None else status in _REPEATABLE


def _retry_after(error: BaseException | None) -> float | None:
    """Return how many seconds the Hub asks to wait; None if it does not say."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        text = "" if response is None else str(response.headers.get("Retry-After", ""))
        if text.isdigit():
            return float(text)
        error = error.__cause__ or error.__context__
    return None


def _holds(there: Remote, wanted: Mapping[str, Content]) -> bool:
    return all(content.is_at(there.marks.get(name)) for name, content in wanted.items())


def _verify(reference: Reference, commit: str, files: Mapping[str, Content]) -> None:
    """Compare the hashes of all files with those that the Hub holds at a commit.

    Raises:
        HubError: one is another, or missing.
    """
    there = _at(reference, commit)
    for name, content in files.items():
        if not content.is_at(there.marks.get(name)):
            raise HubError(
                "the commit was made, and the Hub holds other bytes than were sent",
                path=str(Reference("model", reference.repo, commit, name)),
                hint="Run the command again",
            )


def _page(reference: Reference) -> str:
    endpoint: str = client.library(reference).constants.ENDPOINT
    return f"{endpoint}/{reference.repo}"


def _url(reference: Reference, commit: str | None) -> str:
    return f"{_page(reference)}/commit/{commit}"
