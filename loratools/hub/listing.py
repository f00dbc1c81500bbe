"""What a repository holds at a revision: asked of the Hub, or read in the cache when it is away."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratools.hub import client
from loratools.hub.references import Reference

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Listing:
    """The files of a commit.

    Attributes:
        reference: whose.
        commit: in full.
        files: their sizes by their paths, sorted.
        is_cached: whether only those in the cache are known.
        folder: where the cache has them, or will.
        digests: sha256 of the large files, by their paths, as far as the Hub tells.
    """

    reference: Reference
    commit: str
    files: Mapping[str, int]
    is_cached: bool
    folder: Path
    digests: Mapping[str, str] = field(default_factory=dict)

    def below(self, folder: str) -> list[str]:
        """Return the paths inside a folder, relative to it."""
        start = f"{folder}/" if folder else ""
        return [name[len(start) :] for name in self.files if name.startswith(start)]


def listing(reference: Reference) -> Listing:
    """Return what a repository holds at the reference's revision.

    Raises:
        MissingFileError: no such repository or revision.
        HubError: the Hub cannot be reached and the cache does not know it, or access was refused.
    """
    with client.talking(reference):
        try:
            info = client.api().model_info(
                reference.repo, revision=reference.revision, files_metadata=True
            )
        except Exception as error:
            is_away = client.is_unreachable(error) or (client.status_of(error) or 0) >= 500
            found = _cached(reference) if is_away else None
            if found is None:
                raise
            if type(error).__name__ != "OfflineModeIsEnabled":
                warnings.warn(
                    f"the Hub cannot be reached; {reference} is read from the cache, at commit "
                    f"{found.commit[:12]}",
                    stacklevel=2,
                )
            return found
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        if info.siblings is None:  # a server that lists no files there
            names = client.api().list_repo_files(reference.repo, revision=info.sha)
            sizes = dict.fromkeys(names, 0)
        files = {name: sizes[name] for name in sorted(sizes)}
        _remember(reference, info.sha)
        digests = {
            each.rfilename: each.lfs.sha256
            for each in info.siblings or ()
            if getattr(each.lfs, "sha256", None)
        }
        return Listing(reference, info.sha, files, False, _storage(reference, info.sha), digests)


def _storage(reference: Reference, commit: str) -> Path:
    return _repo_folder(reference) / "snapshots" / commit


def _repo_folder(reference: Reference) -> Path:
    hub = client.library(reference)
    name = f"models--{reference.repo.replace('/', '--')}"
    return Path(os.path.abspath(hub.constants.HF_HUB_CACHE)) / name


def _remember(reference: Reference, commit: str) -> None:
    """Note in the cache what a branch or tag points at, as the library does when it downloads."""
    revision = reference.revision or "main"
    if _COMMIT.fullmatch(revision):
        return
    place = _repo_folder(reference) / "refs" / revision
    with contextlib.suppress(OSError):  # a cache that cannot be written to serves to read
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_file() or place.read_text() != commit:
            place.write_text(commit)


def _cached(reference: Reference) -> Listing | None:
    revision = reference.revision or "main"
    commit = revision if _COMMIT.fullmatch(revision) else None
    if commit is None:
        with contextlib.suppress(OSError):
            commit = (_repo_folder(reference) / "refs" / revision).read_text().strip()
    if commit is None or not _COMMIT.fullmatch(commit):
        return None
    folder = _storage(reference, commit)
    here = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in here}
    return Listing(reference, commit, files, True, folder) if files else None
