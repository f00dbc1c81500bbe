"""What the place of a file in the Hugging Face cache says: its repository, commit and path there.

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache. Names alone are read; the
library is not needed for that.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_PLACE = re.compile(
    r"(?:^|.*/)(model|bucket)s--([^/]+)/snapshots/([0-9a-f]{40}|[0-9a-f]{64})(?:/(.*))?"
)


@dataclass(frozen=True)
class CachedPlace:
    """Where a cached file or folder comes from.

    Attributes:
        repo: name of the repository, or of the bucket.
        commit: the commit in full; None for a bucket, which has none.
        inside: path in the repository; empty for all of it.
    """

    repo: str
    commit: str | None
    inside: str

    @property
    def name(self) -> str:
        """What reports call it: the last part of its path, or of the repository's name."""
        return (self.inside or self.repo).rpartition("/")[2]

    @property
    def reference(self) -> str:
        """The reference that names these bytes for ever; a bucket's may change."""
        head = f"hf://{self.repo}@{self.commit}" if self.commit else f"hf://buckets/{self.repo}"
        return f"{head}/{self.inside}" if self.inside else head


def cached_place(path: str | os.PathLike[str]) -> CachedPlace | None:
    """Return where a path of the cache comes from; None for a path elsewhere.

    >>> place = cached_place("/home/me/hub/models--me--tiny/snapshots/" + 40 * "a" + "/lora")
    >>> place.repo, place.inside, place.name
    ('me/tiny', 'lora', 'lora')
    """
    found = _PLACE.fullmatch(os.path.abspath(path).replace(os.sep, "/"))
    if found is None:
        return None
    kind, folder, commit, inside = found.groups()
    repo = folder.replace("--", "/", 1)
    return CachedPlace(repo, commit if kind == "model" else None, inside or "")


def shown_name(path: str | os.PathLike[str]) -> str:
    """Return what reports call a file or folder: its name, or that of the repository it is from."""
    place = cached_place(path)
    if place is None:
        real = os.path.realpath(path)
        place = cached_place(real)
        return os.path.basename(real) if place is None else place.name
    return place.name


def shown_path(path: str | os.PathLike[str]) -> Path | str:
    """Return what reports say of where a file is: its path, or the reference it was fetched by."""
    place = cached_place(path)
    return Path(path) if place is None else place.reference
