"""Which tensors of a checkpoint are the weights of linear layers that are quantised to four bits.

Only names, shapes and the configuration are known here, no model class. The default is that of
transformers: linear layers, except the output embedding, layers tied to the input embedding, a
head that is the last parameter, and layers that a model class keeps in float32. In doubt a weight
is not quantised: every two-dimensional weight that is left out is listed in the configuration, and
loaders do not touch listed modules, so the loaded weights are the written ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import (
    head_of,
    is_embedding,
    is_vocabulary,
    model_types,
    values_of,
)
from loratools_formats.core.dtypes import OF_MODELS
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError

_WEIGHT = ".weight"
_LAST = re.compile(r"score|classifier|qa_outputs|text_projection")
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")
_ROUTER = re.compile(r"(?:.*\.)?(?:gate|router|wg)(?:\.(?:classifier|layer))?")
# Source: `_keep_in_fp32_modules` of the model classes in transformers 5.23.
_KEPT_IN_F32 = {
    "wo": ("t5", "mt5", "umt5", "udop", "pop2piano"),
    "qformer": ("blip-2",),
    "indexer.weights_proj": ("deepseek_v32", "glm_moe_dsa", "axk2"),
}
# Layers of classes derived from `nn.Linear`, which transformers does not convert, by model type.
_OWN_CLASSES = {
    "falcon": frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "deepseek_v4": frozenset({"o_a_proj"}),
}


@dataclass(frozen=True)
class Kept:
    """A module whose two-dimensional weight is not quantised, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Linears:
    """What to quantise.

    Attributes:
        weights: weights by key, in the checkpoint's order.
        kept: other two-dimensional weights.
        stacks: keys of weights of stacked experts, which have no four-bit layout.
        heads: names of output embeddings, which may be tied and so absent.
    """

    weights: Mapping[str, TensorRef]
    kept: tuple[Kept, ...]
    stacks: tuple[str, ...]
    heads: frozenset[str]

    def listed(self) -> list[str]:
        """Return the modules for `llm_int8_skip_modules`, experts of one layer as one."""
        names = {_shortened(kept.name) for kept in self.kept}
        return sorted(names | self.heads)


def linear_weights(
    base: Checkpoint,
    taken: Mapping[str, Any],
    skip: Sequence[str] = (),
    *,
    experts: bool = False,
) -> Linears:
    """Return the weights of linear layers of a checkpoint.

    Args:
        base: the checkpoint.
        taken: keys that are something else, such as parts of weights already quantised.
        skip: regular expressions searched in module paths; modules that they find are not
            quantised.
        experts: also take the weights of experts stored one by one.

    Raises:
        UnsupportedError: a weight is of a type that is no plain float.
    """
    choice = _Choice(base, tuple(map(re.compile, skip)), experts)
    weights: dict[str, TensorRef] = {}
    kept: list[Kept] = []
    stacks = []
    for key, ref in base.tensors.items():
        if key in taken:
            continue
        if len(ref.shape) == 3 and "experts" in key:
            stacks.append(key)
        if len(ref.shape) != 2 or not key.endswith(_WEIGHT):
            continue
        module = key.removesuffix(_WEIGHT)
        reason = choice.reason_to_keep(module, ref)
        if reason is not None:
            kept.append(Kept(module, reason))
        else:
            _check_type(ref)
            weights[key] = ref
    _keep_what_is_listed(weights, kept, choice.heads)
    return Linears(weights, tuple(kept), tuple(stacks), choice.heads)


class _Choice:
    """Which weights of one checkpoint stay as they are."""

    def __init__(self, base: Checkpoint, skip: tuple[re.Pattern[str], ...], experts: bool) -> None:
        self._base = base
        self._skip = skip
        self._experts = experts
        self._models = model_types(base.config)
        self._vocabularies = set(values_of(base.config, "vocab_size"))
        self.heads = frozenset(head_of([m]) for m in self._models) or frozenset({head_of([])})

    def reason_to_keep(self, module: str, ref: TensorRef) -> str | None:
        """Return why a module's weight is not quantised; None if it is."""
        parent, _, last = module.rpartition(".")
        without_bias = f"{module}.bias" not in self._base.tensors
        reasons = {
            "skipped as asked": any(pattern.search(module) for pattern in self._skip),
            "output embedding": any(f".{module}".endswith(f".{head}") for head in self.heads),
            "last module": _LAST.fullmatch(module) is not None and without_bias,
            "embedding": is_embedding(module)
            or is_vocabulary(module)
            or (without_bias and ref.shape[0] in self._vocabularies),
            "kept in float32": any(
                module.endswith(name) or f".{name}." in f".{module}."
                for name, models in _KEPT_IN_F32.items()
                if not self._models.isdisjoint(models)
            ),
            "empty": ref.numel == 0,
            "expert": _EXPERT.fullmatch(module) is not None and not self._experts,
            "router": _ROUTER.fullmatch(module) is not None,
            "not a plain linear layer": f"{parent}.in_proj_weight" in self._base.tensors
            or any(last in _OWN_CLASSES.get(model, ()) for model in self._models),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)


def _check_type(ref: TensorRef) -> None:
    if ref.dtype.code not in OF_MODELS:
        raise UnsupportedError(
            "weight is of a type that cannot be quantised",
            tensor=ref.key,
            got=ref.dtype.code,
            expected=" or ".join(OF_MODELS),
            hint="Leave it out with `exclude`, or start from the original checkpoint",
        )


def _keep_what_is_listed(
    weights: dict[str, TensorRef], kept: list[Kept], heads: frozenset[str]
) -> None:
    """Also keep modules whose path starts or ends with a listed name: loaders skip them."""
    names = heads | {_shortened(k.name) for k in kept}
    while True:
        modules = {key: key.removesuffix(_WEIGHT) for key in weights}
        found = {key: module for key, module in modules.items() if is_listed(module, names)}
        if not found:
            return
        for key, module in found.items():
            kept.append(Kept(module, "named like one that is kept"))
            del weights[key]
        names |= set(found.values())


def is_listed(module: str, names: AbstractSet[str]) -> bool:
    """Return whether the loader leaves a module alone if `names` are listed.

    Source: `should_convert_module` of transformers 5, for names without regular expressions.
    """
    parts = module.split(".")
    below = any(".".join(parts[:count]) in names for count in range(1, len(parts) + 1))
    return below or any(module[start:] in names for start in range(len(module)))


def _shortened(module: str) -> str:
    """Return the name that stands for a module in a list: for an expert's, that of all of them."""
    found = _EXPERT.fullmatch(module)
    return module if found is None else found[1]
