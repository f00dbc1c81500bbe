"""Which component of a pipeline a checkpoint is whose tensors have no prefix that tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratools.naming.places import is_located
from loratools.naming.tables import bundled_tables

_ORIGINAL = "diffusion_model"
_TRIED = (_ORIGINAL, "unet", "transformer")
_TEXT_CLASSES = {
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}


def told_component(modules: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Return the component that a configuration or a table of names tells; None if none does.

    A checkpoint in the original naming of its architecture is a `diffusion_model`.

    Args:
        modules: paths of its modules.
        config: its `config.json`; empty if it has none.
    """
    name = config.get("_class_name")
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and classes[0] in _TEXT_CLASSES:
        return _TEXT_CLASSES[classes[0]]
    names = list(modules)
    counts = {
        component: max(
            sum(is_located(f"{component}.{module}", table) for module in names)
            for table in bundled_tables()
        )
        for component in _TRIED
    }
    if isinstance(name, str):
        # Original checkpoints have one, too: Wan's says `WanModel`.
        own = "unet" if "UNet" in name else "transformer"
        return own if counts[own] >= counts[_ORIGINAL] else _ORIGINAL
    best = max(counts, key=lambda component: counts[component])
    return best if counts[best] else None
