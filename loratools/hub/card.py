"""A model card: what is published and how it was made, between two marks; the rest is the author's.

Source: https://huggingface.co/docs/hub/model-cards. The first mark keeps which keys of the front
matter were written, so that a later call changes those alone, and never what an author wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratools.hub.front_matter import Value, changed, values_of
from loratools_formats.disk.errors import AdapterError

BEGIN, END = b"<!-- loratools:begin", b"<!-- loratools:end -->"
_SECTION = re.compile(rb"<!-- loratools:begin (\{.*?\}) -->(.*?)<!-- loratools:end -->", re.DOTALL)


@dataclass(frozen=True)
class CardFacts:
    """What a card is to say.

    Attributes:
        title: its heading, where there is no card yet.
        keys: of the front matter.
        parts: Markdown of the section: headings, tables, code.
    """

    title: str
    keys: Mapping[str, Value]
    parts: Sequence[str] = field(default=())


def updated(card: bytes | None, facts: CardFacts) -> bytes:
    """Return a card with the section and keys of some facts; all else stays byte for byte.

    Args:
        card: as it is; None if there is none.
        facts: what it is to say.

    Raises:
        AdapterError: the marks or the front matter are damaged.
    """
    text = f"# {facts.title}\n".encode() if card is None else card
    ours = _written(text)
    keys = {key: value for key, value in facts.keys.items() if value}
    before = values_of(text)
    text = changed(text, keys, ours, [key for key in ours if key not in keys])
    newline = b"\r\n" if b"\r\n" in text else b"\n"
    after = values_of(text)
    own = {key: _own(key, value, before, after, ours) for key, value in keys.items()}
    own = {key: value for key, value in own.items() if value}
    section = _section(own, facts.parts).replace(b"\n", newline)
    found = _SECTION.search(text)
    if found is not None:
        return text[: found.start()] + section + text[found.end() :]
    gap = b"" if not text or text.endswith(b"\n") else newline
    return text + gap + newline + section + newline


def _own(
    key: str,
    wanted: Value,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    ours: Mapping[str, Value],
) -> Value:
    """Return what of a key's value was written here, now or earlier; empty if its author wrote it.

    Of a list, those are the items which the author does not have.
    """
    here, old = before.get(key), ours.get(key, ())
    if isinstance(wanted, str):
        is_authors = here is not None and here != old
        return "" if is_authors or after.get(key) != wanted else wanted
    theirs = [here] if isinstance(here, str) else here if isinstance(here, list) else []
    return [item for item in wanted if item in old or item not in theirs]


def _section(keys: Mapping[str, Value], parts: Sequence[str]) -> bytes:
    mark = json.dumps({"keys": keys}, ensure_ascii=True, sort_keys=True).replace("--", "-\\u002d")
    body = "\n\n".join(part.strip("\n") for part in parts)
    return BEGIN + f" {mark} -->\n".encode() + body.encode() + b"\n" + END


def _written(text: bytes) -> dict[str, Value]:
    """Return the keys that an earlier call wrote.

    Raises:
        AdapterError: the marks are damaged.
    """
    begins, ends = text.count(BEGIN), text.count(END)
    found = _SECTION.search(text)
    if begins == ends == 0:
        return {}
    if begins != 1 or ends != 1 or found is None:
        raise AdapterError(
            "the marks of loratools in README.md are damaged",
            got=f"{begins} beginnings and {ends} ends",
            hint="Take the lines with loratools:begin and loratools:end out",
        )
    try:
        keys = json.loads(found[1])["keys"]
        return {str(k): v if isinstance(v, str) else [str(i) for i in v] for k, v in keys.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError("the mark loratools:begin in README.md is damaged") from error


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Return a table in Markdown.

    >>> print(table(["a", "b"], [["1", "x|y"]]))
    | a | b |
    | --- | --- |
    | 1 | x\|y |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
