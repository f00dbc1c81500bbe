"""Buckets: folders on the Hub without commits; a copy is kept in the cache for each state.

Source: https://huggingface.co/docs/huggingface_hub/guides/buckets
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import quote

from loratools.hub import client
from loratools.hub.choice import Choice, choose
from loratools.hub.listing import Listing
from loratools.hub.references import Beside, Reference, Resolved, Want
from loratools_formats.disk.errors import HubError, MissingDependencyError

_CHUNK_BYTES = 8 << 20


def fetch_bucket(reference: Reference, want: Want, beside: Beside) -> Resolved:
    """Bring here what an operation needs of a bucket.

    The copy lies in the Hub's cache, in a folder named by the digests of all that was chosen: a
    bucket that changes gets another folder.

    Raises:
        MissingDependencyError: the installed `huggingface_hub` knows no buckets.
        MissingFileError: no such bucket, folder or file.
        HubError: it is something else than what is wanted, or the Hub cannot be reached.
    """
    found, marks = bucket_listing(reference)
    chosen = choose(found, want, beside)
    names = sorted({*chosen.now, *chosen.later})
    hub = client.library(reference)
    state = hashlib.sha256(repr([(name, marks[name]) for name in names]).encode()).hexdigest()
    cache = Path(os.path.abspath(hub.constants.HF_HUB_CACHE))
    folder = cache / f"buckets--{reference.repo.replace('/', '--')}" / "snapshots" / state
    for name in names:
        if not (folder / name).is_file():
            _fetch(reference, name, found.files[name], folder / name)
    return Resolved(_place(folder, chosen), reference, None)


def bucket_listing(reference: Reference) -> tuple[Listing, dict[str, str]]:
    """Return what a bucket holds, and the Hub's marks of the files' contents, by their paths.

    Raises:
        MissingDependencyError: the installed `huggingface_hub` knows no buckets.
        MissingFileError: no such bucket.
        HubError: the Hub cannot be reached.
    """
    hub = client.library(reference)
    if not hasattr(hub.HfApi, "list_bucket_tree"):
        raise MissingDependencyError(
            "the installed huggingface_hub knows no buckets",
            hint="pip install 'huggingface_hub>=2'",
        )
    with client.talking(reference):
        tree = client.api().list_bucket_tree(reference.repo, recursive=True)
        files = {each.path: each for each in tree if hasattr(each, "xet_hash")}
    sizes = {name: files[name].size for name in sorted(files)}
    marks = {name: each.xet_hash for name, each in files.items()}
    return Listing(reference, "", sizes, False, Path()), marks


def _place(folder: Path, chosen: Choice) -> Path:
    return folder / chosen.place if chosen.place else folder


def _fetch(reference: Reference, name: str, nbytes: int, target: Path) -> None:
    """Download a file whole or not at all, by its address, which needs no other storage client."""
    hub = client.library(reference)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.incomplete")
    address = f"{hub.constants.ENDPOINT}/buckets/{reference.repo}/resolve/{quote(name, safe='')}"
    headers = hub.utils.build_hf_headers(library_name="loratools")
    try:
        with client.talking(reference), temporary.open("wb") as writer:
            session = hub.utils.get_session()
            with session.stream("GET", address, headers=headers, follow_redirects=True) as answer:
                if answer.status_code >= 400:
                    answer.read()
                hub.utils.hf_raise_for_status(answer)
                for chunk in answer.iter_bytes(_CHUNK_BYTES):
                    writer.write(chunk)
        if temporary.stat().st_size != nbytes:
            raise HubError(
                "the download ended early",
                path=str(reference.at(name)),
                got=f"{temporary.stat().st_size} bytes",
                expected=nbytes,
                hint="Try again",
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
