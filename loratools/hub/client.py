"""`huggingface_hub` as this package uses it: quiet, with errors of one line and a next step.

Tokens are the library's business alone. No message of the library or the server is passed on
before what looks like a token is taken out of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from loratools import __version__
from loratools.hub.references import Reference
from loratools_formats.contract.path_kinds import nearly_as_typed
from loratools_formats.disk.errors import (
    HubError,
    LoratoolsError,
    MissingDependencyError,
    MissingFileError,
    printable,
)

SHOW_PROGRESS: ContextVar[bool] = ContextVar("SHOW_PROGRESS", default=False)
"""Whether the library may draw progress bars; only a command line asks for that."""

_TOKEN = re.compile(
    r"(?:hf|api)_[A-Za-z0-9]{8,}|hf_(?:jwt|oauth)_[\w.-]+|eyJ[\w-]+\.[\w-]+(?:\.[\w-]*)?"
    r"|(?<=Bearer )\S+"
)
_STATUS = {
    429: "the Hub asks for fewer requests",
    409: "something else is being done to the repository",
    412: "somebody else has committed since",
    413: "the content is too large for the Hub",
}
_lock = threading.Lock()


def library(reason: object) -> Any:
    """Return the package `huggingface_hub`.

    Args:
        reason: what needs it, for the message.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils.logging
    except ImportError as error:
        raise MissingDependencyError(
            "no such file or folder here; the Hugging Face Hub needs the package huggingface_hub",
            path=_named(reason) if isinstance(reason, Reference) else None,
            hint="pip install 'loratools[hub]'",
        ) from error
    return huggingface_hub


def api() -> Any:
    """Return a client that names this program and its version."""
    return library("a reference").HfApi(library_name="loratools", library_version=__version__)


@contextlib.contextmanager
def talking(reference: Reference) -> Iterator[None]:
    """Let the library talk about a reference: no bars unless asked for, and errors of our own.

    Raises:
        MissingFileError: no such repository, revision or file.
        HubError: the Hub refused, failed, or cannot be reached.
    """
    with _quiet(library(reference)):
        try:
            yield
        except LoratoolsError:
            raise
        except Exception as error:
            raise described(error, reference) from error


@contextlib.contextmanager
def _quiet(hub: Any) -> Iterator[None]:
    """Keep bars and remarks of the library from a terminal that did not ask for them."""
    logging, utils = hub.utils.logging, hub.utils
    with _lock:
        had_bars, level = not utils.are_progress_bars_disabled(), logging.get_verbosity()
        if not SHOW_PROGRESS.get() and had_bars:
            utils.disable_progress_bars()
        if "HF_HUB_VERBOSITY" not in os.environ:
            logging.set_verbosity_error()
    try:
        yield
    finally:
        with _lock:
            if not SHOW_PROGRESS.get() and had_bars:
                utils.enable_progress_bars()
            logging.set_verbosity(level)


def is_unreachable(error: BaseException) -> bool:
    """Return whether the Hub gave no answer at all: offline mode, or no connection."""
    return any(
        kind.__name__
        in ("OfflineModeIsEnabled", "TransportError", "ConnectionError", "TimeoutException")
        for each in _chain(error)
        for kind in type(each).__mro__
    )


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error comes from; None if there was no answer."""
    for each in _chain(error):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def described(error: BaseException, reference: Reference) -> LoratoolsError:
    """Return the error of ours for one of the library."""
    errors = library(reference).errors
    repo = f"hf://{reference.repo}"
    if _among(error, errors, "GatedRepoError"):
        return HubError(
            "the repository is gated, and the Hub lets only those in who were granted access",
            path=str(reference),
            hint=f"Ask for access at {_endpoint(reference)}/{reference.repo}, then log in: "
            "hf auth login",
        )
    if _among(error, errors, "RevisionNotFoundError"):
        return MissingFileError(
            "no such revision in the repository",
            path=str(reference),
            got=reference.revision,
            hint=f"See its branches and tags: {_endpoint(reference)}/{reference.repo}/tree/main",
        )
    if _among(error, errors, "RepositoryNotFoundError", "BucketNotFoundError"):
        return _not_found(reference)
    if _among(error, errors, "RemoteEntryNotFoundError", "EntryNotFoundError") and not (
        _among(error, errors, "LocalEntryNotFoundError")
    ):
        return MissingFileError("no such file in the repository", path=str(reference))
    if any(type(each).__name__ == "OfflineModeIsEnabled" for each in _chain(error)):
        return HubError(
            f"{_here(reference)}offline mode is on, and the cache does not hold all of it",
            path=_named(reference),
            hint=f"{_check(reference)}Fetch it while online: hf download {reference.repo}, or "
            "unset HF_HUB_OFFLINE",
        )
    status = status_of(error)
    if status is not None:
        return _refused(error, status, reference)
    if is_unreachable(error) or _among(error, errors, "LocalEntryNotFoundError"):
        return HubError(
            f"{_here(reference)}the Hub cannot be reached",
            path=_named(reference),
            got=f"{type(_chain(error)[-1]).__name__} at {_endpoint(reference)}",
            hint=f"{_check(reference)}Check the connection and try again; what is in the cache "
            "also works offline",
        )
    return HubError(f"the Hub could not be used: {scrubbed(error)}", path=repo)


def _refused(error: BaseException, status: int, reference: Reference) -> HubError:
    messages = [getattr(each, "server_message", None) for each in _chain(error)]
    said = next(filter(None, messages), None)
    hints = {
        401: "Log in: hf auth login, or set HF_TOKEN",
        403: "Use a token that may do this: hf auth login",
        409: "Try again in a moment",
        412: "Look at what was committed, then run the command again",
        429: "Wait some minutes and try again",
    }
    text, hint = _STATUS.get(status, "the Hub refused"), hints.get(status)
    if status >= 500:
        text, hint = "the Hub has a fault", "Try again later: https://status.huggingface.co"
    elif status in (401, 403):
        text = "the Hub does not allow that to this login"
    return HubError(
        text,
        path=str(reference),
        got=f"status {status}" + (f": {scrubbed(said, 200).rstrip('.')}" if said else ""),
        hint=hint,
    )


def _not_found(reference: Reference) -> MissingFileError:
    """Return the error for a repository that is missing or private, or of another kind."""
    hub = library(reference)
    what = "bucket" if reference.kind == "bucket" else "model"
    found = None
    with contextlib.suppress(Exception):
        for kind in () if what == "bucket" else ("dataset", "space"):
            if api().repo_exists(reference.repo, repo_type=kind):
                found = kind
                break
    if found is not None:
        return MissingFileError(
            f"is a {found} on the Hub, not a model",
            path=str(reference),
            hint="loratools reads adapters and models",
        )
    has_token = False
    with contextlib.suppress(Exception):
        has_token = hub.get_token() is not None
    login = "with a token that may read it" if has_token else "first"
    return MissingFileError(
        f"{_here(reference)}no such {what} on the Hub, or it is private",
        path=_named(reference),
        hint=f"Check the name; if it is private, log in {login}: hf auth login",
    )


def _named(reference: Reference) -> str:
    """Return what errors call a reference: as it was given, where that may be a path."""
    return str(reference).removeprefix("hf://") if reference.is_plain else str(reference)


def _here(reference: Reference) -> str:
    return (
        "no such file or folder here; taken for a name on the Hub, " if reference.is_plain else ""
    )


def _check(reference: Reference) -> str:
    if not reference.is_plain:
        return ""
    near = nearly_as_typed(str(reference).removeprefix("hf://"))
    return (
        f"If a path is meant, did you mean {near}? " if near else "If a path is meant, correct it. "
    )


def scrubbed(text: object, limit: int = 300) -> str:
    """Return a message on one line, without what looks like a token.

    >>> scrubbed("Bearer hf_abcdefghij was refused")
    'Bearer *** was refused'
    """
    shown = _TOKEN.sub("***", str(text))
    with contextlib.suppress(Exception):
        import huggingface_hub

        token = huggingface_hub.get_token()
        shown = shown.replace(token, "***") if token else shown
    return printable(" ".join(shown.split()), limit)


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and those that it was raised from."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def _among(error: BaseException, errors: Any, *names: str) -> bool:
    kinds = tuple(kind for name in names if isinstance(kind := getattr(errors, name, None), type))
    return any(isinstance(each, kinds) for each in _chain(error))


def _endpoint(reference: Reference) -> str:
    endpoint: str = library(reference).constants.ENDPOINT
    return endpoint
