"""The errors both packages raise, and nothing else.

Each error is also an error of the standard library, so callers can catch either, and carries its
parts as fields: what is wrong, in which file and tensor, what was found, what was expected and
what to do next. Its text is one line, safe to print on a terminal whatever a hostile file put
into a name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any


def printable(text: object, limit: int = 200) -> str:
    r"""Return `text` on one line with control, bidi and undecodable characters escaped.

    >>> printable("a\nb\x1b[31m")
    'a\\nb\\x1b[31m'
    """
    value = _text(text)
    if len(value) > limit:
        value = f"{value[: limit - 1]}…"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in value
    )


def and_more(names: Sequence[str], most: int = 1) -> str:
    """Return the first of some names, and how many more there are.

    >>> and_more(["q", "k", "v"]), and_more(["q", "k", "v"], 2), and_more(["q"])
    ('q and 2 more', 'q, k and 1 more', 'q')
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _text(value: object) -> str:
    """Return any value as text; Python refuses to write integers of thousands of digits."""
    try:
        return str(value)
    except ValueError:
        return f"a {type(value).__name__} too long to show"


class LoratoolsError(Exception):
    """Base of every error that a user can cause or meet.

    Args:
        message: what is wrong, without a full stop.
        path: the file or folder concerned.
        tensor: the tensor or module concerned.
        got: what was found.
        expected: what would have been right.
        hint: the next step.

    Attributes:
        ran: what the public function that failed was asked for; None if none was running.
    """

    ran: Any = None

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.got = got
        self.expected = expected
        self.hint = hint

    @property
    def brief(self) -> str:
        """What is wrong, found and expected, without the place and the next step."""
        parts = [self.message]
        parts += [f"got {self.got}"] if self.got is not None else []
        parts += [f"expected {self.expected}"] if self.expected is not None else []
        return "; ".join(parts)

    def __str__(self) -> str:
        parts = [printable(self.message, 1000)]
        if self.tensor is not None:
            parts.append(f"tensor {printable(self.tensor)}")
        if self.got is not None:
            parts.append(f"got {printable(self.got)}")
        if self.expected is not None:
            parts.append(f"expected {printable(self.expected)}")
        text = "; ".join(parts)
        if self.path is not None:
            text = f"{printable(self.path, 400)}: {text}"
        if self.hint is not None:
            text = f"{text}. {printable(self.hint, 1000)}"
        return text


@contextlib.contextmanager
def naming(path: str | os.PathLike[str] | None = None, tensor: str | None = None) -> Iterator[None]:
    """Name a file and a tensor in the errors of a block that name none."""
    try:
        yield
    except LoratoolsError as error:
        error.path = error.path or (None if path is None else os.fspath(path))
        error.tensor = error.tensor or tensor
        raise


class AdapterError(LoratoolsError, ValueError):
    """A file is malformed, or its parts contradict each other."""


class UnsupportedError(LoratoolsError, NotImplementedError):
    """A file is understood well enough to know that the operation would be wrong on it."""


class UnknownFormatError(LoratoolsError, ValueError):
    """No registered format, or more than one, claims a path."""


class MissingFileError(LoratoolsError, FileNotFoundError):
    """A file that must exist does not."""


class UncheckedError(MissingFileError, UnsupportedError):
    """Something cannot be checked, because what it takes is not there or does not tell enough."""


class OutputExistsError(LoratoolsError, FileExistsError):
    """The output exists and overwriting it was not asked for."""


class OutputError(LoratoolsError, OSError):
    """The output could not be written; what stood there before is intact."""


class OptionError(LoratoolsError, ValueError):
    """Options that contradict each other or are out of range."""


class HubError(LoratoolsError, OSError):
    """The Hub did not give or take what was asked for."""


class StoreError(LoratoolsError, OSError):
    """An object store did not give what was asked for."""


class ClusterError(LoratoolsError, OSError):
    """Processes that should share the work cannot be reached or started."""


class UnfitError(LoratoolsError, ValueError):
    """A check found what keeps an adapter from being published.

    Attributes:
        result: what it found.
    """

    def __init__(self, message: str, *, result: object, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.result = result


class MissingDependencyError(LoratoolsError, ImportError):
    """An optional package is needed and not installed."""


class PluginWarning(UserWarning):
    """A plugin raised an error where its contract allows none, and was ignored."""


class ResultError(LoratoolsError):
    """An operation did its work, and what it found keeps its output from being written.

    Attributes:
        result: what it found.
    """

    def __init__(self, message: str, *, result: object, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.result = result


class InexactError(ResultError, ArithmeticError):
    """The error of a result is above the limit that was set."""


class LossyError(ResultError, UnsupportedError):
    """A format cannot hold all of an adapter, and leaving things out was not asked for."""
