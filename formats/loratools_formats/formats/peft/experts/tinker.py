"""Adapters as Tinker saves them: experts in three stacks `w1`, `w2`, `w3`, and `unembed_tokens`.

w1 is gate, w3 is up and w2 is down; without a gate, w1 is up and w3 is empty. All experts share A
of w1 and w3 and B of w2, which have a first axis of 1, or none does. `unembed_tokens` is the output
layer, and the embedding, too, where the model ties them. Parts of projections (`in_proj_q`,
`x_proj`) keep their names: where they lie in the model's own projection is known only from the
base. Source: `tinker_cookbook/weights/_adapter.py` at 9dfcc3a2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from loratools_formats.core.adapter import ExpertLayout
from loratools_formats.core.expert_names import OF_MIXTRAL
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.formats.peft.experts.layout import (
    Layout,
    Plain,
    factor,
    named,
    with_patterns,
    with_targets,
)

_EXPERT = re.compile(r"(?P<owner>(?:.*\.)?experts)\.(?P<leaf>w[123])")
_HEAD = re.compile(r"(?:.*\.)?unembed_tokens|model\.lm_head")
"""`model.lm_head` is GLM-5.3's (pull 928)."""
_TELLING = re.compile(r"(?:.*\.)?(?:unembed_tokens|linear_attn\.in_proj_[qkv])")
_OF_NEMOTRON = re.compile(r"(?P<owner>(?:.*\.)?mixer)\.(?P<leaf>gate_proj|x_proj)")
"""Parts of Nemotron's projection. Mamba's mixer has an `x_proj` of its own, and no `gate_proj`."""
UNGATED = {"w1": "up_proj", "w2": "down_proj"}
_ATTENTION = re.compile(r"(?P<before>.*\.layers\.\d+)\.attn\.(?P<leaf>[qkvo]_proj)")


_PART = re.compile(r"(?:.*\.)?linear_attn\.in_proj_[qkv]")


def about_parts(modules: Iterable[str]) -> list[Finding]:
    """Return findings about modules that are parts of a projection; PEFT has no such modules."""
    names = list(modules)
    halves = _halves(names)
    parts = [name for name in names if _PART.fullmatch(name) or name in halves]
    if not parts:
        return []
    text = (
        f"{len(parts)} modules are parts of projections that the model has as one, such as "
        f"{parts[0]}; PEFT finds no such module"
    )
    hint = "`loratools convert ADAPTER --to peft --base BASE -o NEW` joins them, which is exact"
    return [Finding("projections-in-parts", "warning", parts[0], text, hint)]


def _halves(modules: Iterable[str]) -> set[str]:
    """Return the modules that are halves of Nemotron's projection, where both are there."""
    found: dict[str, set[str]] = {}
    for name in modules:
        match = _OF_NEMOTRON.fullmatch(name)
        if match is not None:
            found.setdefault(match["owner"], set()).add(name)
    return {name for both in found.values() if len(both) == 2 for name in both}


def _claims(tensors: Mapping[str, TensorRef]) -> bool:
    for name, tensor in tensors.items():
        path, _ = factor(name) or ("", "")
        if _TELLING.fullmatch(path) or (_EXPERT.fullmatch(path) and len(tensor.shape) != 2):
            return True
    return bool(_halves((factor(name) or ("", ""))[0] for name in tensors))


def _read(found: Plain, folder: Path) -> Plain:
    ungated = {
        match["owner"]
        for name, tensor in found.tensors.items()
        if (match := _EXPERT.fullmatch((factor(name) or ("", ""))[0])) is not None
        and match["leaf"] == "w3"
        and tensor.numel == 0
    }
    made: dict[str, TensorRef] = {}
    moved: dict[str, list[str]] = {}
    tied: set[str] = set()
    for name, tensor in found.tensors.items():
        path, part = factor(name) or ("", "")
        expert, attention = _EXPERT.fullmatch(path), _ATTENTION.fullmatch(path)
        if expert is not None and len(tensor.shape) != 2:
            leaves = UNGATED if expert["owner"] in ungated else OF_MIXTRAL
            if expert["leaf"] in leaves:
                moved[path] = [f"{expert['owner']}.{leaves[expert['leaf']]}"]
                made[named(moved[path][0], part)] = tensor
        elif _HEAD.fullmatch(path):
            moved[path] = ["lm_head"]
            tied |= {"lm_head"} if path.endswith("unembed_tokens") else set()
            made[named("lm_head", part)] = tensor
        elif attention is not None:
            moved[path] = [f"{attention['before']}.self_attn.{attention['leaf']}"]
            made[named(moved[path][0], part)] = tensor
        else:
            made[name] = tensor
    layout = ExpertLayout(LAYOUT.name, "as Tinker saves them (names tell)")
    values = with_patterns(found.values, moved, folder)
    config = with_targets(values, made, {})
    return Plain(config, made, found.straight, layout, frozenset(tied))


LAYOUT = Layout("tinker", _claims, _read)
