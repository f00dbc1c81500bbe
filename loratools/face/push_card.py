"""What the card of a published output says, from its statements and what is there already."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.hub import client, files, upload
from loratools.hub.facts import is_hub_name
from loratools.hub.front_matter import values_of
from loratools.hub.options import PushOptions
from loratools.hub.references import Reference, parse_target
from loratools.operations.provenance import changed
from loratools.work.history import tells_how
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.file_names import CARD
from loratools_formats.disk.errors import (
    LoratoolsError,
    OptionError,
)
from loratools_formats.disk.files import read_small_file
from loratools_formats.disk.provenance import (
    is_sound,
    read_statement,
    statement_place,
)

_MOST_CARD_BYTES = 1 << 20
_LICENCE_KEYS = ("license", "license_name", "license_link")


def card_there(target: upload.Target, there: upload.Remote) -> bytes | None:
    """Return the card that the repository has; None if it has none."""
    reference = target.reference
    name = f"{reference.inside}/{CARD}" if reference.inside else CARD
    if name not in there.marks or there.head is None:
        return None
    hub = client.library(reference)
    with client.talking(reference):
        place = hub.hf_hub_download(reference.repo, name, revision=there.head)
    return read_small_file(place, _MOST_CARD_BYTES)


def card_before(
    target: upload.Target, there: upload.Remote, found: files.Contents, options: PushOptions
) -> bytes | None:
    """Return the card to bring up to date: the repository's before the folder's."""
    if options.card is not None:
        return read_small_file(options.card, _MOST_CARD_BYTES)
    here = card_there(target, there)
    if here is not None or found.card is None:
        return here
    return read_small_file(found.card, _MOST_CARD_BYTES)


def base_model_of(
    adapter: Adapter | None,
    card: bytes | None,
    records: Sequence[Mapping[str, Any]],
    options: PushOptions,
) -> str | None:
    """Return the base model's name: as it was given, as the card has it, as the adapter has it."""
    said = options.base_model
    if said is not None:
        if not is_hub_name(said):
            raise OptionError("not the name of a model", got=said, expected="USER/NAME")
        return said
    named = values_of(card).get("base_model") if card is not None else None
    if isinstance(named, str) and named:
        return named
    if adapter is not None:
        return adapter.base_model
    call = records[-1].get("call", {}) if records else {}
    base = call.get("arguments", {}).get("base", {})
    reference = base.get("reference") if isinstance(base, dict) else None
    return parse_target(reference).repo if isinstance(reference, str) else None


def licence_of(base: str | None, card: bytes | None) -> dict[str, str]:
    """Return the base model's licence as its card on the Hub has it; empty if it is not known."""
    if base is None or not is_hub_name(base):
        return {}
    if card is not None and "license" in values_of(card) and b"loratools:begin" not in card:
        return {}
    with contextlib.suppress(Exception):
        with client.talking(Reference("model", base)):
            data = client.api().model_info(base).card_data
        values = {} if data is None else data.to_dict()
        found = {key: values.get(key) for key in _LICENCE_KEYS}
        return {key: value for key, value in found.items() if isinstance(value, str)}
    return {}


@dataclass(frozen=True)
class Records:
    """What the statement of an output tells.

    Attributes:
        found: the predicates that tell how it was made, the oldest first.
        stale: weights that the statement is not about, though it names them; it then tells nothing.
    """

    found: Sequence[Mapping[str, Any]]
    stale: tuple[str, ...] = ()


def records_of(path: Path) -> Records:
    """Return what the statement beside or inside an output tells, if it is about its weights."""
    statement = read_statement(statement_place(path))
    if statement is None:
        return Records(())
    stale = tuple(filter(tells_how, changed(statement, path)))
    return Records(() if stale else list(_unfolded(statement["predicate"])), stale)


def _unfolded(predicate: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    earlier = [each["predicate"] for each in predicate.get("history", []) if is_sound(each)]
    in_memory = [one for made in predicate.get("steps", {}).values() for one in _unfolded(made)]
    return [*earlier, *in_memory, predicate]


def picture_of(adapter: Adapter, name: str, folder: Path) -> Path | None:
    """Draw the spectrum of an adapter; None if it has none that shows, or nothing can draw.

    Its heading is the repository's name: the path of a folder here is nobody's business.
    """
    from loratools.face.spectrum import spectrum

    with contextlib.suppress(LoratoolsError):
        return replace(spectrum(adapter), source=name).plot(folder / files.PICTURE)
    return None
