"""Rules about publication: what a reader of the Hub page misses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.subject import Card, Subject, card_of
from loratools_formats.checkpoints.facts import is_embedding
from loratools_formats.core.file_names import ADAPTER_CONFIG, CARD
from loratools_formats.disk.errors import LoratoolsError
from loratools_formats.disk.files import inside, read_small_file

_NOT_COMMERCIAL = ("-nc", "noncommercial", "non-commercial", "research")
_MAX_CARD_BYTES = 1 << 20


def _card(subject: Subject) -> Card | None:
    """Return the card of a PEFT folder that has a sound one."""
    card = subject.card if subject.is_peft else None
    return None if card is None or card.fault else card


def _listed(value: Any) -> list[str]:
    found = value if isinstance(value, list) else [value]
    return [each for each in found if isinstance(each, str)]


def _no_card(subject: Subject) -> Iterator[Found]:
    if subject.is_peft and subject.folder is not None and subject.card is None:
        yield Found("there is no README.md", CARD)


def _broken_card(subject: Subject) -> Iterator[Found]:
    if subject.card is not None and subject.card.fault:
        yield Found(f"README.md cannot be read: {subject.card.fault}", CARD)


def _no_licence(subject: Subject) -> Iterator[Found]:
    card = _card(subject)
    if card is not None and not card.values.get("license"):
        yield Found("README.md names no licence", "license", CARD)


def _licence_conflict(subject: Subject) -> Iterator[Found]:
    card = _card(subject)
    if card is None or subject.base is None or not subject.base.base.is_folder:
        return
    path = subject.base.base.path
    if not (path / CARD).is_file():
        return
    try:
        base = card_of(read_small_file(inside(path, CARD), _MAX_CARD_BYTES))
    except LoratoolsError as error:
        yield Found(f"the base's README.md was not read: {error.message}", severity="note")
        return
    own, its = (str(each.values.get("license") or "").lower() for each in (card, base))
    if own and its and _is_restricted(its) and not _is_restricted(own):
        text = f"the adapter is under {own}, and its base under {its}, which forbids some uses"
        yield Found(text, "license", CARD)


def _is_restricted(licence: str) -> bool:
    return any(word in licence for word in _NOT_COMMERCIAL)


def _base_differs(subject: Subject) -> Iterator[Found]:
    card = _card(subject)
    recorded = subject.config.get("base_model_name_or_path")
    named = _listed(card.values.get("base_model")) if card is not None else []
    if isinstance(recorded, str) and recorded and named and recorded not in named:
        text = f"README.md names the base {named[0]}, and {ADAPTER_CONFIG} {recorded}"
        yield Found(text, "base_model", CARD)


def _missing_keys(subject: Subject) -> Iterator[Found]:
    card = _card(subject)
    if card is None:
        return
    values = card.values
    wanted = {
        "base_model": bool(_listed(values.get("base_model"))),
        "library_name": isinstance(values.get("library_name"), str),
        "pipeline_tag": isinstance(values.get("pipeline_tag"), str),
        "the tag lora": "lora" in [tag.lower() for tag in _listed(values.get("tags"))],
    }
    missing = [key for key, there in wanted.items() if not there]
    if missing:
        yield Found(f"README.md lacks {', '.join(missing)}", missing[0], CARD)


def _relation(subject: Subject) -> Iterator[Found]:
    card = _card(subject)
    relation = None if card is None else card.values.get("base_model_relation")
    if relation not in (None, "adapter"):
        text = f"base_model_relation is {relation}, and the folder holds an adapter"
        yield Found(text, "base_model_relation", CARD)


def _no_tokenizer(subject: Subject) -> Iterator[Found]:
    if subject.adapter is None or not subject.is_peft or subject.folder is None:
        return
    names = {entry.name for entry in subject.entries}
    changed = [
        replacement.target
        for replacement in subject.adapter.replacements.values()
        if replacement.kind in ("embedding", "token_rows")
        or is_embedding(replacement.target.removesuffix(".weight"))
    ]
    if changed and not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
        yield Found(f"{changed[0]} is trained, and no tokenizer lies beside it", changed[0])


RULES = (
    Rule(
        "LT701", "no-card", "note",
        "There is no README.md.",
        "The adapter's page on the Hub is empty, and it is not listed under its base.",
        "Write one with base_model, license and tags in its front matter.",
        "Hugging Face Hub, model cards",
        _no_card,
    ),
    Rule(
        "LT702", "broken-card", "warning",
        "The front matter of README.md cannot be read.",
        "The Hub refuses or ignores it.",
        "Correct the YAML.",
        "Hugging Face Hub, POST /api/validate-yaml",
        _broken_card,
    ),
    Rule(
        "LT703", "no-licence", "note",
        "README.md names no licence.",
        "Strictly speaking, nobody may use the adapter.",
        "Add `license:` to the front matter.",
        "Hugging Face Hub, model cards",
        _no_licence,
    ),
    Rule(
        "LT704", "licence-conflict", "warning",
        "The base forbids uses that the adapter's licence allows (with `base`).",
        "An adapter is made from its base. Whether it is a derived work is a question for lawyers.",
        "Name the base's licence.",
        "The front matter of both; words are compared, and nothing else",
        _licence_conflict,
    ),
    Rule(
        "LT705", "base-differs", "warning",
        "README.md and adapter_config.json name different bases.",
        "The Hub lists it under one base, and PEFT loads the other.",
        "Correct one of the two.",
        "huggingface_hub 2.4.0, `ModelCardData`",
        _base_differs,
    ),
    Rule(
        "LT706", "wrong-relation", "warning",
        "base_model_relation is not `adapter`.",
        "The Hub lists it as a fine-tune, a merge or a quantisation.",
        "Write `base_model_relation: adapter`, or leave it out.",
        "Hugging Face Hub, model cards",
        _relation,
    ),
    Rule(
        "LT707", "card-incomplete", "note",
        "README.md lacks keys by which the Hub lists adapters.",
        "It is not listed under its base, its task or its library.",
        "Add them to the front matter.",
        "`create_or_update_model_card` in peft 0.21.2",
        _missing_keys,
    ),
    Rule(
        "LT708", "no-tokenizer", "warning",
        "Embeddings are trained, and there is no tokenizer in the folder.",
        "It is not known which tokens the new rows belong to.",
        "Save the tokenizer into the folder.",
        "SGLang reads added_tokens.json beside adapters",
        _no_tokenizer,
    ),
)  # fmt: skip
