"""Facts about a base checkpoint: whether its embedding is tied to its output layer.

What the configuration alone tells is in `loratools_formats.checkpoints.facts`; here the tensors
decide where it leaves a question open. Commands ask `find_tie` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools_formats.checkpoints.facts import (
    DEFAULT_HEAD,
    INPUT_EMBEDDINGS,
    SHARED_EMBEDDINGS,
    has_head,
    head_of,
    is_tied,
    says_tied,
)
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import AdapterError

if TYPE_CHECKING:
    from loratools.base.placement.names import Names

_OLD_TEXT_PREFIX = "language_model.model."


@dataclass(frozen=True)
class Tie:
    """A weight that two layers share.

    Attributes:
        embedding: key of the stored weight.
        head: key of the output layer's weight, which the checkpoint need not hold.
        is_head_stored: whether the checkpoint holds both.
    """

    embedding: str
    head: str
    is_head_stored: bool


def find_tie(
    names: Names, *, adapter: Adapter | None = None, guess_head: bool = False
) -> Tie | None:
    """Return the tied weight of a checkpoint, None if it has none.

    Args:
        names: the checkpoint.
        adapter: its configuration implies an output layer, by the task or by the model's class,
            if the base's configuration names no class.
        guess_head: what to take for true if neither tells.

    Raises:
        AdapterError: `tie_word_embeddings` in the configuration is neither true nor false.
    """
    if not _has_head(names, adapter, guess_head):
        return None
    spelled = {key: names.spelling(key).removesuffix(".weight") for key in names.tensors}
    found = [key for key, name in spelled.items() if name in INPUT_EMBEDDINGS]
    if not found:  # the class puts it below a part that its type does not name, as Camembert's
        found = [key for key, name in spelled.items() if _ends_as_embedding(name)]
    if len(found) != 1 or not found[0].endswith(".weight"):
        return None
    embedding = found[0]
    head = head_of(names.types_of(embedding)) + ".weight"
    stored = names.find(head) or names.find(DEFAULT_HEAD + ".weight")
    if not _is_tied(names, embedding, stored):
        return None
    if stored is not None:
        return Tie(embedding, stored, is_head_stored=True)
    prefix = "language_model." if embedding.startswith(_OLD_TEXT_PREFIX) else ""
    return Tie(embedding, prefix + head, is_head_stored=False)


def _ends_as_embedding(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[-count:]) in INPUT_EMBEDDINGS - {"w"} for count in (1, 2))


def shared_embeddings(names: Names) -> frozenset[str]:
    """Return the names of an embedding that an encoder and a decoder share, empty if none do.

    Of the weight that they share, `shared` is one name whether the output layer is tied or not.
    """
    if not names.base.config.get("is_encoder_decoder"):
        return frozenset()
    head = names.find(head_of(tuple(names.types)) + ".weight")
    tied = _is_tied(names, names.find("shared.weight"), head)
    return SHARED_EMBEDDINGS if tied else frozenset({"shared"})


def _has_head(names: Names, adapter: Adapter | None, guess_head: bool) -> bool:
    told = has_head(names.base.config)
    if told is None and adapter is not None:
        task, auto = adapter.config.get("task_type"), adapter.config.get("auto_mapping")
        if task is not None:
            return task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
        # PEFT records the model's class if it is told no task.
        model = auto.get("base_model_class") if isinstance(auto, dict) else None
        if isinstance(model, str) and says_tied(names.base.config) is not True:
            told = has_head({"architectures": [model]})
    return guess_head if told is None else told


def _is_tied(names: Names, embedding: str | None, head: str | None) -> bool:
    stored = [None if key is None else names.tensors[key] for key in (embedding, head)]
    try:
        return is_tied(names.base.config, *stored)
    except AdapterError as error:
        error.path = str(names.base.path)
        raise
