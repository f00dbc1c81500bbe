"""References to the Hub: what they look like, and what they name. Nothing here uses a network.

`user/repo`, `user/repo@revision`, `hf://user/repo@revision/folder/or/file`, the web address of a
repository, a folder or a file in one, and `hf://buckets/user/bucket/path`. A path that exists wins;
so does a folder here of the user's name, since a misspelt path is more likely then.

Source: https://huggingface.co/docs/huggingface_hub/package_reference/hf_uris
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

from loratools_formats.core.file_names import WEIGHT_ENDINGS
from loratools_formats.disk.errors import OptionError

if sys.platform == "win32":
    from pathlib import WindowsPath as _Native
else:
    from pathlib import PosixPath as _Native

Kind = Literal["model", "dataset", "space", "kernel", "bucket"]
REVISION_HELP = "Branch, tag or commit of the input, if it is a reference to the Hub without one."

Want = Literal["adapter", "model", "file", "shelf"]
"""What a reference is to be: an adapter, a base model, one file, or a folder of adapters."""

Beside = Literal["nothing", "card", "small", "all"]
"""What is wanted beside it: its card, all small files, or what an output keeps of it."""


@dataclass(frozen=True)
class Wanted:
    """Marks a parameter that takes references: `Annotated[str, Wanted("adapter")]`.

    Attributes:
        want: what they are to be.
        text: what a text alone is to be, where several adapters are taken otherwise.
        beside: what is wanted beside it.
        late: whether the function itself turns references into paths.
        headers: whether only headers of weights are read, so that large ones stay where they are.
    """

    want: Want
    text: Want | None = None
    beside: Beside = "nothing"
    late: bool = False
    headers: bool = False


_KINDS: dict[str, Kind] = {
    "models": "model",
    "datasets": "dataset",
    "spaces": "space",
    "kernels": "kernel",
    "buckets": "bucket",
}
_PAGES = ("tree", "blob", "resolve", "raw", "blame")
_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[\w-])?"
_NAME = re.compile(_PART, re.ASCII)
_PLAIN = re.compile(rf"{_PART}/{_PART}(?:@[^/]+)?(?:/[^/]+)*/?", re.ASCII)
_SPECIAL_REVISION = re.compile(r"refs/(?:pr/\d+|convert/[\w.-]+)(?=/|$)")
_URL = re.compile(r"https?:/{1,2}", re.IGNORECASE)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_OF_FILES = (
    *WEIGHT_ENDINGS, ".json", ".yaml", ".yml", ".toml", ".md", ".txt", ".html", ".png", ".zip",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """Something on the Hub.

    Attributes:
        kind: what holds it.
        repo: `user/name`; a name alone for old models such as gpt2.
        revision: a branch, a tag, a commit or a pull request; None for the default branch.
        inside: the path of a folder or a file in it; empty for all of it.
        is_plain: whether it was written as a path may be.
    """

    kind: Kind
    repo: str
    revision: str | None = None
    inside: str = ""
    is_plain: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        place = {"model": "", "kernel": "kernels/"}.get(self.kind, f"{self.kind}s/")
        text = f"hf://{place}{self.repo}"
        if self.revision is not None:
            special = _SPECIAL_REVISION.fullmatch(self.revision)
            text += f"@{self.revision if special else quote(self.revision, safe='')}"
        return f"{text}/{self.inside}" if self.inside else text

    def at(self, inside: str) -> Reference:
        """Return the reference to a path of the same repository and revision."""
        return replace(self, inside=inside)


@dataclass(frozen=True)
class Resolved:
    """What a reference became.

    Attributes:
        path: where it is now; a model's weights may come later, as they are read.
        reference: what was asked for.
        commit: the commit in full; None for a bucket, which has none.
        digests: sha256 of large files, by where they are or will be, as far as the Hub tells.
    """

    path: Path
    reference: Reference
    commit: str | None
    digests: Mapping[Path, str] = field(default_factory=dict)


class _Local(_Native):
    """A path that was written with `./`, which `Path` drops: it names nothing on the Hub."""

    def __fspath__(self) -> str:
        return os.path.join(os.curdir, str(self))


def path_of(text: str | os.PathLike[str]) -> Path:
    """Return the path that a text gives; that of `./x/y` stays one of this machine.

    >>> parse(path_of("x/y"), "adapter") is None, parse(path_of("./x/y"), "adapter") is None
    (False, True)
    """
    given = os.fspath(text)
    is_marked = given.startswith((f".{os.sep}", f".{os.altsep or os.sep}"))
    return _Local(given) if is_marked else Path(given)


def parse(text: str | os.PathLike[str], want: Want) -> Reference | None:
    """Return what a text refers to on the Hub; None if it is a local path.

    >>> str(parse("https://huggingface.co/me/tiny/tree/v1/lora", "adapter"))
    'hf://me/tiny@v1/lora'
    >>> parse("me/tiny@v1", "adapter"), parse("gpt2", "model").repo, parse("gpt2", "adapter")
    (Reference(kind='model', repo='me/tiny', revision='v1', inside=''), 'gpt2', None)

    Args:
        text: as it was given; slashes that a `Path` has taken out of `hf://` may be missing.
        want: what it is to be. A name alone is a reference where a model is wanted.

    Raises:
        OptionError: it is meant as a reference, and is none.
    """
    given = os.fspath(text)
    if os.path.lexists(given):
        return None
    if given.lower().startswith("hf:/"):
        return _of_parts(given[len("hf:/") :].strip("/"), given)
    address = _address(given)
    if address is not None:
        return _of_address(address, given)
    if _is_plain(given) or (want == "model" and _is_bare(given)):
        return replace(_of_parts(given, given), is_plain=True)
    return None


def parse_target(text: str | os.PathLike[str]) -> Reference:
    """Return the repository to publish to, whatever is here under that name.

    Raises:
        OptionError: it is not the name of a repository.
    """
    given = os.fspath(text)
    address = _address(given)
    if address is not None:
        return _of_address(address, given)
    if given.lower().startswith("hf:/"):
        return _of_parts(given[len("hf:/") :].strip("/"), given)
    found = _of_parts(given, given)
    if "/" not in found.repo:
        raise OptionError("not the name of a repository", got=given, expected="USER/NAME")
    return found


def is_explicit(text: str | os.PathLike[str]) -> bool:
    """Return whether a text can only be a reference: it starts as one does, or is an address."""
    given = os.fspath(text)
    return given.lower().startswith("hf:/") or _address(given) is not None


def is_local(text: str | os.PathLike[str]) -> bool:
    """Return whether a text can only be a path: it starts with a folder's mark."""
    given = os.fspath(text)
    return os.path.isabs(given) or re.match(r"(?:\.{1,2}|~)[/\\]", given) is not None


def _is_plain(text: str) -> bool:
    """Return whether a path where nothing is may be `user/repo[@revision][/path]`."""
    if _PLAIN.fullmatch(text) is None or os.path.isdir(text.partition("/")[0]):
        return False
    is_short = text.count("/") == 1 and "@" not in text
    return not (is_short and text.lower().endswith(_OF_FILES))


def _is_bare(text: str) -> bool:
    name = text.partition("@")[0]
    return bool(_NAME.fullmatch(name)) and "/" not in name and not text.endswith(_OF_FILES)


def _address(text: str) -> str | None:
    """Return the path of a web address of the Hub; None if it is none."""
    found = _URL.match(text)
    try:
        parts = urlsplit(f"//{text[found.end() :] if found else text}")
    except ValueError:  # brackets that hold no address of IPv6, as names of files have them
        return None
    own = urlsplit(os.environ.get("HF_ENDPOINT", ""))
    hosts = (*_HOSTS, own.netloc) if found else _HOSTS
    if not parts.netloc or parts.netloc.lower() not in hosts:
        return None
    return parts.path.strip("/")


def _of_address(path: str, given: str) -> Reference:
    kind, parts = _kind_of(path.split("/"))
    count = 1 if len(parts) == 1 or parts[1] in _PAGES else 2
    repo, rest = "/".join(parts[:count]), parts[count:]
    if rest and (rest[0] not in _PAGES or len(rest) == 1):
        raise OptionError(
            "not the address of a repository, or of a file or folder in one",
            got=given,
            hint=f"Name what you mean: {Reference(kind, repo)}",
        )
    revision, inside = None, "/".join(rest[1:])
    if rest and kind != "bucket":
        special = _SPECIAL_REVISION.match(inside)
        revision = special[0] if special else rest[1]
        inside = inside[len(revision) :].strip("/")
    return _checked(kind, repo, revision and unquote(revision), unquote(inside), given)


def _of_parts(body: str, given: str) -> Reference:
    """Read `[kind/]user/name[@revision][/path]`, or a name alone."""
    kind, parts = _kind_of(body.split("/"))
    head = "/".join(parts[:2])
    if "@" in parts[0]:
        head = parts[0]
    rest = "/".join(parts)[len(head) :]
    repo, at, revision = head.partition("@")
    if not at:
        return _checked(kind, repo, None, rest.strip("/"), given)
    special = _SPECIAL_REVISION.match(revision + rest)
    inside = rest
    if special:
        inside, revision = (revision + rest)[special.end() :], special[0]
    return _checked(kind, repo, unquote(revision), inside.strip("/"), given)


def _kind_of(parts: list[str]) -> tuple[Kind, list[str]]:
    parts = [part for part in parts if part] or [""]
    return (_KINDS[parts[0]], parts[1:] or [""]) if parts[0] in _KINDS else ("model", parts)


def _checked(kind: Kind, repo: str, revision: str | None, inside: str, given: str) -> Reference:
    names = repo.split("/")
    fits = len(names) <= 2 and all(_NAME.fullmatch(name) for name in names)
    if not fits or "--" in repo or ".." in repo or (len(names) == 1 and kind == "bucket"):
        raise OptionError(
            "not the name of a repository", got=given, expected="hf://USER/NAME[@REVISION][/PATH]"
        )
    if revision == "" or (revision is not None and kind == "bucket"):
        raise OptionError(
            "the revision is empty" if revision == "" else "a bucket has no revisions", got=given
        )
    if any(part in ("", ".", "..") for part in inside.split("/")) and inside:
        raise OptionError("not a path in a repository", got=given)
    return Reference(kind, repo, revision, inside)


def with_revision(values: Any, revision: str, want: Want) -> Any:
    """Return what was given with the revision put to its reference.

    Args:
        values: a text, or a sequence or mapping of them, as functions take them.
        revision: a branch, a tag, a commit or a pull request.
        want: as for `parse`.

    Raises:
        OptionError: no reference lacks a revision, or several do.
    """
    bare = {str(one): one for text in texts(values) if (one := parse(text, want)) is not None}
    bare = {name: one for name, one in bare.items() if one.revision is None}
    if len(bare) != 1:
        raise OptionError(
            "`revision` is that of one reference, and "
            + ("none is given that lacks one" if not bare else "several lack one"),
            got=", ".join(bare) or None,
            hint="Write hf://USER/NAME@REVISION" if bare else None,
        )
    chosen = str(replace(next(iter(bare.values())), revision=revision))
    return mapped(values, lambda text: chosen if _is(text, bare, want) else text)


def _is(text: str | os.PathLike[str], known: Mapping[str, Reference], want: Want) -> bool:
    found = parse(text, want)
    return found is not None and str(found) in known


def texts(values: Any) -> list[str | os.PathLike[str]]:
    """Return the paths and references among what functions take."""
    found: list[str | os.PathLike[str]] = []

    def note(text: str | os.PathLike[str]) -> str | os.PathLike[str]:
        found.append(text)
        return text

    mapped(values, note)
    return found


def mapped(values: Any, change: Any) -> Any:
    """Return what functions take with each path or reference changed.

    Args:
        values: a text; a sequence of texts, or of pairs of a text and its weight; a mapping of
            texts to weights, or of names to texts. Anything else stays.
        change: called with each text.
    """
    if isinstance(values, str | os.PathLike):
        return change(values)
    if isinstance(values, Mapping):
        if all(isinstance(value, int | float) for value in values.values()):
            return {_keyed(key, change): value for key, value in values.items()}
        return {key: mapped(value, change) for key, value in values.items()}
    if isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], int | float):
        return (mapped(values[0], change), values[1])
    if isinstance(values, list | tuple):
        return type(values)([mapped(value, change) for value in values])
    return values


def _keyed(key: Any, change: Any) -> Any:
    return change(key) if isinstance(key, str | os.PathLike) else key
