"""What a file's metadata says of its training, for people: title, trigger words, base, steps.

Nothing else of loratools believes it; ΔW comes from the tensors. Sources: the metadata keys of
sd-scripts (`ss_*`) and the Stability AI Model Metadata Standard 1.0 (`modelspec.*`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping

_KEYS = {
    "title": ("modelspec.title", "ss_output_name"),
    "author": ("modelspec.author",),
    "description": ("modelspec.description",),
    "trigger words": ("modelspec.trigger_phrase",),
    "architecture": ("modelspec.architecture",),
    "trained on": ("ss_sd_model_name", "ss_base_model_version"),
    "network": ("ss_network_module",),
    "images": ("ss_num_train_images",),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "learning rate": ("ss_learning_rate",),
    "date": ("modelspec.date",),
    "licence": ("modelspec.license",),
    "usage": ("modelspec.usage_hint",),
}
_NONE = frozenset({"", "None", "null"})
_MOST_TAGS = 5
_MOST_TEXT = 1 << 24
_COMPONENT = re.compile(
    r"lora_(unet|te\d?|prior_unet)_"
    r"|(unet|transformer(?:_2)?|text_encoders?(?:_\d)?|diffusion_model|prior|decoder|controlnet)\."
)


def training_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what the metadata tells, by a word for each; of several keys the first that is set."""
    facts = {}
    for label, keys in _KEYS.items():
        values = (metadata.get(key, "").strip() for key in keys)
        value = next((value for value in values if value not in _NONE), None)
        if value is not None:
            facts[label] = value
    tags = _tags(metadata.get("ss_tag_frequency", ""))
    if tags:
        facts["commonest tags"] = ", ".join(tags)
    return facts


def _tags(text: str) -> list[str]:
    """Return the commonest tags of the training images; none if the text is no table of them."""
    if not 0 < len(text) <= _MOST_TEXT:
        return []
    try:
        folders = json.loads(text)
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int) and not isinstance(count, bool):
                counts[tag.strip()] += count
    return [tag for tag, _ in counts.most_common(_MOST_TAGS)]


def components(names: Iterable[str]) -> dict[str, int]:
    """Return how many modules each component of a pipeline has, by the beginnings of names.

    >>> components(["lora_unet_mid_block_q", "lora_te1_layers_0_fc1", "lora_te1_layers_1_fc1"])
    {'unet': 1, 'te1': 2}
    """
    matches = (_COMPONENT.match(name) for name in names)
    return dict(Counter(found[1] or found[2] for found in matches if found is not None))
