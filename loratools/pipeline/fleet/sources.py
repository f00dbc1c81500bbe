"""The adapters of a fleet, given as paths, wildcards, lists, organisations or shelves of the Hub.

The order is that of names, and each name is one output: every process with the same arguments finds
the same list.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loratools.hub.references import Reference, Want, is_explicit, parse, parse_target
from loratools.pipeline.fleet.addresses import address, canonical, listed, without_scheme
from loratools.work.collection import adapters_in, is_named_as_adapter, outputs_below
from loratools_formats.contract.path_kinds import missing
from loratools_formats.core.file_names import ADAPTER_CONFIG
from loratools_formats.disk.errors import AdapterError, OptionError

_LISTS = (".txt", ".list", ".lst")
_MOST_LINES = 10_000_000


@dataclass(frozen=True)
class Member:
    """One of a fleet.

    Attributes:
        name: its own among them, which its output gets; it may have slashes.
        source: an absolute path, or a reference to the Hub.
    """

    name: str
    source: str


def members(texts: Sequence[str], want: Want, output: str | None = None) -> list[Member]:
    """Return the members of a fleet, in the order of their names.

    What lies in the folder of outputs is no member, or a run that is resumed would find, and name,
    others than the first did.

    Args:
        texts: a path, a path with wildcards, a folder that holds some, a file with one of these on
            each line (its name ends in .txt, .list or .lst; `-` is the standard input),
            `hf://organisation/*`, `hf://user/repo/*`, or any of these as an address such as
            s3://bucket/adapters/*.
        want: whether they are adapters or models.
        output: the folder of outputs: an absolute path, or an address.

    Raises:
        AdapterError: wildcards match nothing.
        MissingFileError: nothing is there.
        OptionError: nothing is given, a member that is given itself lies in the folder of outputs,
            or two members have the same name.
        HubError: the Hub cannot be asked.
    """
    given = _given(texts, want, output)
    here = list(given.paths)
    names = {path: str(leaf) for path, leaf in outputs_below(Path(), here, None).items()}
    found = [Member(Path(names[path]).as_posix(), str(path)) for path in here]
    found += [Member(name, source) for source, name in given.references.items()]
    found += _distant(list(given.distant))
    if not found:
        expected = None if output is None else f"some that are not in {output}"
        raise OptionError("no adapters are given", expected=expected)
    most, count = Counter(member.name for member in found).most_common(1)[0]
    if count > 1:
        alike = ", ".join(member.source for member in found if member.name == most)
        raise OptionError(f"{count} of the fleet have the same name", got=alike)
    return sorted(found, key=lambda member: member.name)


def sources(texts: Sequence[str]) -> list[str]:
    """Return adapters that an operation takes together: paths in their order, then references.

    Args:
        texts: as for `members`, but for addresses.

    Raises:
        AdapterError: wildcards match nothing.
        MissingFileError: nothing is there.
        OptionError: nothing is given, or an address.
        HubError: the Hub cannot be asked.
    """
    given = _given(texts, "adapter", None)
    if given.distant:
        raise OptionError(
            "adapters in an object store cannot be read together",
            got=next(iter(given.distant)),
            hint="Copy them to a folder here first",
        )
    found = [*map(str, given.paths), *given.references]
    if not found:
        raise OptionError("no adapters are given")
    return found


@dataclass(frozen=True)
class _Given:
    """What texts mean: paths here, references with their names, and addresses; each once."""

    paths: dict[Path, None] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    distant: dict[str, None] = field(default_factory=dict)


def _given(texts: Sequence[str], want: Want, output: str | None) -> _Given:
    found = _Given()
    folder = None if output is None else _place(output)
    for text in map(without_scheme, _lines(texts)):
        url = None if is_explicit(text) else address(text)
        if url is not None:
            there = _outside(folder, text, listed(url, folder))
            found.distant.update(dict.fromkeys(there))
            continue
        reference = None if os.path.lexists(text) else _reference(text, want)
        if reference is None:
            here = [os.path.abspath(path) for path in _local(text, want)]
            found.paths.update(dict.fromkeys(map(Path, _outside(folder, text, here))))
        elif glob.has_magic(str(reference)):
            matched = _on_the_hub(reference, want)
            left = _outside(folder, text, list(matched))
            found.references.update({one: matched[one] for one in left})
        else:
            _outside(folder, text, [str(reference)])
            found.references[str(reference)] = _named(reference)
    return found


def _distant(urls: Sequence[str]) -> list[Member]:
    """Return members of object stores, named as files are."""
    paths = {Path("/", url.partition("://")[2]): url for url in urls}
    names = outputs_below(Path(), list(paths), None)
    return [Member(names[path].as_posix(), url) for path, url in paths.items()]


def _lines(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        if text == "-":
            yield from _of_list(sys.stdin.read().split("\n"))
        elif text.endswith(_LISTS) and os.path.isfile(text):
            # Names of files are bytes, of any encoding.
            lines = Path(text).read_text(encoding="utf-8-sig", errors="surrogateescape")
            yield from _of_list(lines.split("\n"))
        else:
            yield text


def _of_list(lines: Sequence[str]) -> Iterable[str]:
    if len(lines) > _MOST_LINES:
        raise OptionError("the list is too long", got=f"{len(lines)} lines", expected=_MOST_LINES)
    stripped = (line.strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


def _local(text: str, want: Want) -> list[Path]:
    if want == "adapter":
        found = adapters_in([Path(text)])
    elif glob.has_magic(text) and not os.path.lexists(text):
        found = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        if not found:
            raise AdapterError("nothing matches", path=text)
    else:
        found = [Path(text)]
    for path in found:
        if not os.path.lexists(path):
            raise missing(path)
    return found


def _outside(folder: str | None, text: str, found: list[str]) -> list[str]:
    """Return what does not lie in the folder of outputs.

    The folder itself may be given: a shell's wildcards match it once it is there.

    Args:
        folder: as `_place` has it.
        text: what was given.
        found: absolute paths, addresses or references that it means.

    Raises:
        OptionError: what is given lies in it.
    """
    if folder is None:
        return found
    inside = os.path.join(folder, "")
    left = [one for one in found if not _place(one).startswith(inside)]
    is_pattern = is_explicit(text) and glob.has_magic(text)
    if found and not left and (is_pattern or _place(text) != folder):
        raise OptionError(
            "an input lies in the folder of outputs",
            got=f"{text} in {folder}",
            hint="Give another `output`",
        )
    return left


def _place(text: str) -> str:
    """Return the one spelling of a place: a path without links, an address or a reference."""
    if is_explicit(text) and not os.path.lexists(text):
        return str(parse_target(text))
    url = address(text)
    return os.path.realpath(text) if url is None else canonical(url)


def _reference(text: str, want: Want) -> Reference | None:
    if not (glob.has_magic(text) and is_explicit(text)):
        return parse(text, want)
    head, star, tail = text.partition("*")
    if not star or glob.has_magic(head):
        raise OptionError("only `*` and what follows it may be a wildcard on the Hub", got=text)
    parts = head.removeprefix("hf:").strip("/").split("/")
    if len(parts) == 1 or (len(parts) == 2 and not head.endswith("/")):
        organisation, start = parts[0], "".join(parts[1:])
        return Reference("model", f"{organisation}/{start}*{tail}")
    found = parse("hf://" + "/".join(parts[: 2 + (parts[0] == "buckets")]), want)
    if found is None:
        raise OptionError("not a reference to the Hub", got=text)
    taken = str(found).removeprefix("hf://")
    return found.at(
        f"{head.removeprefix('hf:').strip('/')[len(taken) :].strip('/')}/*{tail}".lstrip("/")
    )


def _on_the_hub(reference: Reference, want: Want) -> dict[str, str]:
    """Return what a reference with wildcards matches, with the members' names."""
    from loratools.hub import client
    from loratools.hub.resolve import contents

    organisation, _, pattern = reference.repo.partition("/")
    if not glob.has_magic(pattern):
        inside = reference.inside
        files = contents(reference.at("")).files
        folders = {name.rpartition("/")[0] for name in files if name.endswith(f"/{ADAPTER_CONFIG}")}
        places = folders | {name for name in files if is_named_as_adapter(name)}
        places = {n for n in places if not any(p.startswith(".") for p in n.split("/"))}
        places -= {n for n in places if n.rpartition("/")[0] in folders}
        found = {
            str(reference.at(place)): place for place in places if fnmatch.fnmatch(place, inside)
        }
    else:
        with client.talking(reference):
            infos = list(client.api().list_models(author=organisation, full=True))
        found = {
            f"hf://{info.id}": info.id.partition("/")[2]
            for info in infos
            if fnmatch.fnmatch(info.id, reference.repo)
            and (want == "model" or _holds_adapter(info))
        }
    if not found:
        raise AdapterError("nothing on the Hub matches", path=str(reference))
    return found


def _holds_adapter(info: object) -> bool:
    """Return whether a repository of the Hub says that it holds an adapter."""
    names = {each.rfilename for each in getattr(info, "siblings", None) or ()}
    tags = {str(tag).lower() for tag in getattr(info, "tags", None) or ()}
    return ADAPTER_CONFIG in names or "lora" in tags or "peft" in tags


def _named(reference: Reference) -> str:
    leaf = reference.inside.rpartition("/")[2] or reference.repo.rpartition("/")[2]
    return leaf if reference.revision is None else f"{leaf}@{reference.revision.replace('/', '-')}"
