"""The configuration of a base that becomes a classifier: its class, and its number of labels.

PEFT's adapters of classifiers bring a head of their own. A model loads it only as the class that
has one, and only with as many labels; otherwise transformers makes a new head at random.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.base.task_class import ENDING_OF_TASK
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding

_NAMES = r"(?:(?:score|classifier|classification_head)(?:\.out_proj)?|logits_proj|"
_NAMES += r"sequence_summary\.summary)"
_HEADS = re.compile(rf"{_NAMES}\.weight")
_ANY_HEAD = re.compile(rf"(?:^|\.){_NAMES}\.(?:weight|bias)$")
_SUMMARY = "sequence_summary."
"""What XLM and Flaubert have for a head; XLNet has a layer of that name in front of its own."""
_TASK = re.compile(r"(?:For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|Model)$")


@dataclass(frozen=True)
class Classifier:
    """What a base's configuration says once an adapter has made a classifier of it.

    Attributes:
        config: the entries that change.
        finding: what a user should know of it.
    """

    config: Mapping[str, Any]
    finding: Finding


def classifier_of(
    adapters: Sequence[Adapter], base: Checkpoint, keys: Collection[str]
) -> Classifier | None:
    """Return what changes in a base's configuration; None if it becomes no classifier.

    Args:
        adapters: those that are fused; PEFT's say by `task_type` what they were trained for.
        base: the base, whose configuration may be empty.
        keys: names of the tensors of the fused model.
    """
    found = _head(adapters, keys)
    if found is None or not base.config:
        return None
    suffix, key, labels = found
    before = base.config.get("architectures")
    names = before if isinstance(before, list) and before else [""]
    family = _TASK.sub("", str(names[0]))
    config: dict[str, Any] = {}
    if family and names[0] != family + suffix:
        config["architectures"] = [family + suffix]
    known = base.config.get("id2label")
    count = len(known) if isinstance(known, dict) else base.config.get("num_labels", 2)
    if count != labels or config:
        has_names = isinstance(known, dict) and len(known) == labels
        config |= {} if has_names else _labels(labels)
    if not config:
        return None
    name = config.get("architectures", names)[0] or "no class"
    message = (
        f"{key} has {labels} labels: config.json names {name} and as many labels, whose own names "
        "no adapter holds"
    )
    return Classifier(config, Finding("classifier", "note", key, message))


def is_own_head(key: str, adapters: Sequence[Adapter]) -> bool:
    """Return whether a tensor is of a classifier's head that adapters bring, of any size."""
    tasks = {str(adapter.config.get("task_type")) for adapter in adapters}
    named = _ANY_HEAD.search(key) is not None
    return named and not tasks.isdisjoint(ENDING_OF_TASK)


def _head(adapters: Sequence[Adapter], keys: Collection[str]) -> tuple[str, str, int] | None:
    """Return the class' ending, the name of the head's weight, and its number of labels."""
    for adapter in adapters:
        suffix = ENDING_OF_TASK.get(str(adapter.config.get("task_type")))
        heads = sorted(
            adapter.replacements.values(), key=lambda each: each.target.startswith(_SUMMARY)
        )
        for replacement in heads if suffix is not None else ():
            shape = replacement.tensor.shape
            if _HEADS.fullmatch(replacement.target) and len(shape) == 2:
                key = next((key for key in keys if key.endswith(replacement.target)), None)
                if key is not None:
                    return str(suffix), key, shape[0]
    return None


def _labels(count: int) -> dict[str, Any]:
    names = {str(number): f"LABEL_{number}" for number in range(count)}
    return {
        "num_labels": count,
        "id2label": names,
        "label2id": {name: int(number) for number, name in names.items()},
    }
