"""From a reference to a local path: what the operation needs is downloaded into the user's cache.

Weights of a base model stay on the Hub until they are read, and those of an adapter of which only
headers are wanted: `headers.py` announces them.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loratools.hub import client
from loratools.hub.buckets import bucket_listing, fetch_bucket
from loratools.hub.choice import Choice, choose, with_weights_later
from loratools.hub.headers import announce_weights
from loratools.hub.listing import Listing, listing
from loratools.hub.references import Beside, Reference, Resolved, Want, parse
from loratools_formats.disk.errors import HubError

_WORKERS = 8


def located(
    path: str | os.PathLike[str],
    want: Want,
    *,
    beside: Beside = "nothing",
    headers: bool = False,
) -> Path | None:
    """Return the local path that stands for a reference; None for a local path.

    Args:
        path: as it was given.
        want: what it is to be.
        beside: what is wanted beside it.
        headers: whether headers of weights will do.

    Raises:
        LoratoolsError: as `resolve`.
    """
    reference = parse(path, want)
    if reference is None:
        return None
    return resolve(reference, want, beside=beside, headers=headers).path


def resolve(
    reference: Reference, want: Want, *, beside: Beside = "nothing", headers: bool = False
) -> Resolved:
    """Bring here what an operation needs of a reference, and return where it is.

    Args:
        reference: to an adapter, a model, a file or a folder of adapters.
        want: which of them.
        beside: what is wanted beside it.
        headers: whether headers of weights will do: those of an adapter then come when they are
            read, as those of a model do.

    Raises:
        MissingDependencyError: `huggingface_hub` is not installed.
        MissingFileError: no such repository, revision, folder or file.
        HubError: it is something else than what is wanted, or gated, or the Hub cannot be reached.
    """
    if reference.kind not in ("model", "bucket"):
        raise HubError(
            f"is a {reference.kind}, not a model",
            path=str(reference),
            hint="loratools reads adapters and models",
        )
    client.library(reference)
    if reference.kind == "bucket":
        return fetch_bucket(reference, want, beside)
    found = listing(reference)
    chosen = choose(found, want, beside)
    if headers:
        chosen = with_weights_later(found, chosen)
    _download(found, chosen)
    announce_weights(found, chosen.later, by_parts=headers)
    place = found.folder / chosen.place if chosen.place else found.folder
    digests = {found.folder / name: digest for name, digest in found.digests.items()}
    return Resolved(place, reference, found.commit, digests)


def contents(reference: Reference) -> Listing:
    """Return what a repository or a bucket holds; nothing of it comes here.

    Raises:
        MissingDependencyError: `huggingface_hub` is not installed, or knows no buckets.
        MissingFileError: no such repository, revision or bucket.
        HubError: the Hub cannot be reached, or refused.
    """
    return bucket_listing(reference)[0] if reference.kind == "bucket" else listing(reference)


def _download(found: Listing, chosen: Choice) -> None:
    if found.is_cached or not chosen.now:
        return
    hub = client.library(found.reference)

    def fetch(name: str) -> None:
        hub.hf_hub_download(
            found.reference.repo,
            name,
            revision=found.commit,
            library_name="loratools",
        )

    with client.talking(found.reference), ThreadPoolExecutor(_WORKERS) as pool:
        list(pool.map(fetch, chosen.now))
