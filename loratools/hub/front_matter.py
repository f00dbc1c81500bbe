"""The YAML at the start of a model card, changed by single keys; every other byte stays.

No YAML writer is used: it would set the author's quotes, comments and order anew. Lines are put in
or replaced, and what comes out is parsed and compared with what was meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from loratools_formats.disk import strict_yaml
from loratools_formats.disk.errors import AdapterError

Value = str | Sequence[str]

_BLOCK = re.compile(
    rb"(\s*---[ \t]*(?:\r\n|\r|\n))(.*?)((?:^|(?:\r\n|\r|\n))---[ \t]*(?:\r\n|\n|$))", re.DOTALL
)
_KEY = re.compile(r"(?P<quote>[\"']?)(?P<key>[\w.-]+)(?P=quote)[ \t]*:(?=\s|$)")
_ITEM = re.compile(r"(?P<start>[ \t]*-[ \t]+)\S")
_PLAIN = re.compile(r"[A-Za-z][\w./-]*(?:[:+][\w./-]+)*")
_FLOW = re.compile(r"(?P<start>[^\[]*\[)(?P<items>.*?)(?P<end>\s*\][ \t]*(?:#[^\n]*)?)", re.DOTALL)
_ONE_VALUE = re.compile(r"(?P<key>[^:]+:)[ \t]+(?P<value>[^\s|>&*!{\[].*)")
_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})


def split(card: bytes) -> tuple[bytes, bytes, bytes]:
    r"""Return a card's opening line, its YAML and the rest, which starts with the closing line.

    >>> split(b"---\nlicense: mit\n---\n# Title\n")
    (b'---\n', b'license: mit', b'\n---\n# Title\n')
    >>> split(b"# Title\n")
    (b'', b'', b'# Title\n')
    """
    found = _BLOCK.match(card)
    if found is None:
        return b"", b"", card
    return found[1], found[2], card[found.end(2) :]


def values_of(card: bytes) -> dict[str, Any]:
    """Return what a card's YAML says.

    Raises:
        AdapterError: it is no YAML, no mapping, or does not end.
    """
    opening, text, _ = split(card)
    if not opening:
        if card.lstrip().startswith(b"---\n"):
            raise AdapterError("the front matter of README.md does not end", expected="a line ---")
        return {}
    return _parsed(text)


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        values = strict_yaml.loads(text)
    except strict_yaml.StrictYamlError as error:
        raise AdapterError(f"the front matter of README.md is no YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise AdapterError("the front matter of README.md is no mapping")
    return values


def changed(
    card: bytes, wanted: Mapping[str, Value], ours: Mapping[str, Value], removed: Sequence[str]
) -> bytes:
    """Return a card with keys set where its author has not set them.

    A key is the author's if its value is neither missing nor the one that was written before.
    Lists that the author has get what they lack.

    Args:
        card: as it is.
        wanted: what to say.
        ours: what an earlier call wrote; what is no more wanted of it goes.
        removed: keys of `ours` that are not wanted any more.

    Raises:
        AdapterError: the YAML is unsound, or cannot be changed without a guess.
    """
    before = values_of(card)
    opening, text, rest = split(card)
    newline = b"\r\n" if b"\r\n" in (opening or card) else b"\n"
    if not opening:
        opening, rest = b"---" + newline, b"---" + newline + (newline if card else b"") + card
    lines = text.decode("utf-8").replace("\r\n", "\n").split("\n") if text else []
    expected = dict(before)
    for key in removed:
        if key in before and before[key] == _plain(ours[key]):
            lines = _without(lines, key)
            del expected[key]
    for key, value in wanted.items():
        found = _key_lines(lines, key, before.get(key), value, ours.get(key, ""))
        if found is not None:
            expected[key], new_lines = found
            lines = _put(lines, key, new_lines)
    made = newline.decode().join(lines).encode("utf-8")
    if made and not rest.startswith((b"\n", b"\r")):
        made += newline
    if not _says(made, expected):
        raise AdapterError(
            "the front matter of README.md cannot be changed without a guess",
            expected=", ".join(f"{key}: {value}" for key, value in wanted.items()),
            hint="Write these keys into it, or leave the card alone with `no_card=True`",
        )
    return opening + made + rest


def _says(text: bytes, expected: Mapping[str, Any]) -> bool:
    try:
        return _parsed(text) == expected
    except AdapterError:
        return False


def _key_lines(
    lines: list[str], key: str, here: Any, wanted: Value, ours: Value
) -> tuple[Any, list[str]] | None:
    """Return a key's new value and its lines; None if they stay as they are."""
    new: Any = _plain(wanted)
    if here is None or here == _plain(ours):
        return None if here == new else (new, _lines(key, wanted))
    if not isinstance(new, list) or isinstance(here, Mapping):
        return None
    new = _joined(here if isinstance(here, list) else [here], new, ours)
    return None if new == here else (new, _extended(lines, key, here, new))


def _plain(value: Value) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _joined(here: list[Any], new: list[str], ours: Value) -> list[Any]:
    """Return a list with what it lacks, and without what was ours and is not wanted any more."""
    old = [] if isinstance(ours, str) else list(ours)
    kept = [item for item in here if item in new or item not in old]
    return [*kept, *(item for item in new if item not in kept)]


def _lines(key: str, value: Value) -> list[str]:
    if isinstance(value, str):
        return [f"{key}: {_scalar(value)}"]
    return [f"{key}:", *(f"- {_scalar(item)}" for item in value)]


def _scalar(text: str) -> str:
    is_plain = _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _span(lines: Sequence[str], key: str) -> tuple[int, int] | None:
    """Return where a key's lines begin and end; comments and blanks after them are not its own."""
    starts = [at for at, line in enumerate(lines) if _KEY.match(line)]
    for at, begin in enumerate(starts):
        found = _KEY.match(lines[begin])
        if found is not None and found["key"] == key:
            end = starts[at + 1] if at + 1 < len(starts) else len(lines)
            while end > begin + 1 and (
                not lines[end - 1].strip() or lines[end - 1].startswith("#")
            ):
                end -= 1
            return begin, end
    return None


def _without(lines: list[str], key: str) -> list[str]:
    span = _span(lines, key)
    return lines if span is None else lines[: span[0]] + lines[span[1] :]


def _put(lines: list[str], key: str, new: list[str]) -> list[str]:
    span = _span(lines, key)
    if span is None:
        trailing = len(lines)
        while trailing and not lines[trailing - 1].strip():
            trailing -= 1
        return lines[:trailing] + new + lines[trailing:]
    return lines[: span[0]] + new + lines[span[1] :]


def _extended(lines: list[str], key: str, here: Any, new: list[Any]) -> list[str]:
    """Return the lines of a list with some items more or fewer, those that stay as they are."""
    span = _span(lines, key)
    own = [] if span is None else lines[span[0] : span[1]]
    if not isinstance(here, list):
        return _listed(own, key, here, new)
    added = [item for item in new if item not in here]
    gone = [item for item in here if item not in new]
    items = [at for at, line in enumerate(own) if _ITEM.match(line)]
    if not items:
        flow = _FLOW.fullmatch("\n".join(own))
        if flow is None or gone or "#" in flow["items"].rpartition("\n")[2]:
            return _lines(key, [str(item) for item in new])
        texts = [flow["items"].removesuffix(",")] if flow["items"].strip() else []
        made = ", ".join([*texts, *map(_scalar, added)])
        return f"{flow['start']}{made}{flow['end']}".split("\n")
    dropped = {at for at in items if strict_yaml.loads(own[at].strip().encode())[0] in gone}
    last = items[-1]
    start = _ITEM.match(own[last])
    indent = "- " if start is None else start["start"]
    end = next((at for at in range(last + 1, len(own)) if own[at].strip()), last + 1)
    kept = [line for at, line in enumerate(own) if at < end and at not in dropped]
    return [*kept, *(f"{indent}{_scalar(str(item))}" for item in added), *own[end:]]


def _listed(own: list[str], key: str, here: Any, new: list[Any]) -> list[str]:
    """Return the lines of a list that begins with the one value which its author wrote.

    The value keeps its spelling and its comment.
    """
    found = _ONE_VALUE.fullmatch(own[0]) if len(own) == 1 else None
    if found is None or here not in new:
        return _lines(key, [str(item) for item in new])
    added = [f"- {_scalar(str(item))}" for item in new if item != here]
    return [found["key"], f"- {found['value']}", *added]
