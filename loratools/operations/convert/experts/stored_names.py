"""Single experts under the names that checkpoints have for them, which all loaders of singles know.

Classes of transformers 5 stack experts under one name for all models. Those of version 4, vLLM and
SGLang call single ones as the model's files do: Mixtral's `block_sparse_moe.experts.0.w1` is gate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.base.dequantised import dequantised
from loratools.base.placement import rules
from loratools.base.placement.names import Names
from loratools.base.placement.sites import stored_single
from loratools.operations.convert.experts.groups import types_of
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.expert_names import TO_MIXTRAL

_SINGLE = re.compile(
    r"(?P<owner>.*\b(?:mlp|block_sparse_moe))\.(?P<expert>experts\.\d+)\.(?P<leaf>[a-z_]+_proj)"
)
_LAYER = re.compile(r"(?P<head>(?:.*?\.)?\d+)\.(?P<tail>.+)")


def in_stored_names(
    adapter: Adapter, modules: Mapping[str, ModuleChange], base: Checkpoint | None
) -> dict[str, ModuleChange]:
    """Return modules with single experts called, within their layer, as the model's files do.

    Args:
        adapter: whose configuration may tell the model's type.
        modules: its modules, experts one by one.
        base: the base model, if it is known.
    """
    names = None if base is None else Names(dequantised(base).checkpoint)
    is_mixtral = bool(types_of(adapter, base) & rules.MIXTRAL)
    return {_called(names, module, is_mixtral): change for module, change in modules.items()}


def _called(names: Names | None, module: str, is_mixtral: bool) -> str:
    stored = None if names is None else stored_single(names, module)
    own, other = _LAYER.fullmatch(module), _LAYER.fullmatch(stored or "")
    if own is not None and other is not None:
        return f"{own['head']}.{other['tail']}"
    single = _SINGLE.fullmatch(module)
    if single is None or single["leaf"] not in TO_MIXTRAL:
        return module
    block = single["owner"].rpartition(".")[2]
    if block == "mlp" and not is_mixtral:
        return module
    owner = single["owner"].removesuffix(block) + "block_sparse_moe"
    return f"{owner}.{single['expert']}.{TO_MIXTRAL[single['leaf']]}"
