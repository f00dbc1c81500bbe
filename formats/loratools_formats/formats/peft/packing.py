"""Whether the columns of a stacked lora_B go rank by rank or expert by expert.

PEFT's order is rank by rank. Unsloth trained the other order until September 2026, and since then
writes markers; Megatron-Bridge exports the other order too. Files without markers are read as
Unsloth reads them, and as Megatron-Bridge writes them, with a finding that says so.

Sources: unsloth_zoo 2026.9.6 (`lora_B_layout`, `unsloth_fused_expert_lora`, the families);
Megatron-Bridge (`_pack_target_parameter_adapter_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError

RANK_MAJOR = "rank_major"
EXPERT_MAJOR = "grouped_by_expert"
_FLAT = "lora_B_layout"
_NESTED = "unsloth_fused_expert_lora"
MARKERS = (_FLAT, _NESTED)
"""Keys of a configuration that say it."""

_FAMILIES = frozenset(
    {
        "deepseek_v3", "ernie4_5_moe", "ernie4_5_vl_moe", "gemma4", "glm4_moe", "glm4_moe_lite",
        "gpt_oss", "lfm2_moe", "mixtral", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe",
    }
)  # fmt: skip
_PARAMETERS = frozenset({"gate_up_proj", "down_proj"})
_LIBRARY = re.compile(r"transformers\.models\.(\w+)\.modeling_\w+")
_MANY_COLUMNS = 2048


@dataclass(frozen=True)
class Guess:
    """An order that no marker states.

    Attributes:
        order: which.
        why: what tells it.
    """

    order: str
    why: str

    def finding(self, path: str, b: TensorRef, experts: int, rank: int) -> Finding:
        """Return what to tell, with what one stack's values say of it."""
        ratios = evidence(b, experts, rank)
        told = (
            ""
            if ratios is None
            else (
                f"; columns of one expert are {ratios[1]:.2f} times as alike as any two in this "
                f"order, and {ratios[0]:.2f} times in the order of PEFT"
            )
        )
        return Finding(
            "expert-order-guessed",
            "warning",
            path,
            f"lora_B of stacked experts is read expert by expert, as {self.why}{told}",
            f"If it is rank by rank, add {_FLAT}: {RANK_MAJOR} to adapter_config.json",
        )


def marked(values: Mapping[str, Any], leaf: str) -> str | None:
    """Return the order of a parameter's columns that markers state; None if none does.

    Args:
        values: the configuration.
        leaf: the parameter's name.

    Raises:
        AdapterError: a marker states an order that is not known.
    """
    auto = values.get("auto_mapping")
    nested = [values.get(_NESTED), auto.get(_NESTED) if isinstance(auto, Mapping) else None]
    stated: list[Any] = []
    for detail in nested:
        if isinstance(detail, Mapping):
            parameters = detail.get("parameters")
            own = parameters.get(leaf) if isinstance(parameters, Mapping) else None
            stated.append(own.get(_FLAT) if isinstance(own, Mapping) else None)
            stated.append(detail.get(_FLAT))
    stated.append(values.get(_FLAT))
    order = next((each for each in stated if each is not None), None)
    if order not in (None, RANK_MAJOR, EXPERT_MAJOR):
        raise AdapterError(
            f"config value {_FLAT} is wrong", got=order, expected=f"{RANK_MAJOR} or {EXPERT_MAJOR}"
        )
    return order


def unmarked(values: Mapping[str, Any], leaf: str, *, swapped: bool | None) -> Guess | None:
    """Return the order that an unmarked file has if it is not PEFT's; None if it is PEFT's.

    Args:
        values: the configuration.
        leaf: the parameter's name.
        swapped: whether A is on the outputs.
    """
    auto = values.get("auto_mapping")
    targets = values.get("target_parameters") or []
    if isinstance(auto, Mapping) and auto.get("unsloth_fixed"):
        library = _LIBRARY.fullmatch(str(auto.get("parent_library")))
        if library is not None and library[1] in _FAMILIES and targets and leaf in _PARAMETERS:
            return Guess(EXPERT_MAJOR, "Unsloth trained this family before it marked the order")
        return None
    bridge = (
        swapped is True
        and "peft_version" not in values
        and "auto_mapping" in values
        and values["auto_mapping"] is None
        and values.get("inference_mode") is True
        and all(re.search(r"\.\d+\.", target) for target in targets)
        and targets == sorted(targets)
    )
    return Guess(EXPERT_MAJOR, "Megatron-Bridge exports it") if bridge else None


def evidence(b: TensorRef, experts: int, rank: int) -> tuple[float, float] | None:
    """Return how much more alike columns of one expert are than any two, in either order.

    Args:
        b: (out, r·E) as stored.
        experts: E.
        rank: r.

    Returns:
        The mean of |cos| between columns of one expert over that of all pairs, rank by rank and
        expert by expert; None where it tells nothing, as for factors of zeros or of rank 1.
    """
    if rank < 2 or experts < 2:
        return None
    # Of many experts, a few: rank by rank the columns of expert e are j·E + e.
    chosen = min(experts, max(2, _MANY_COLUMNS // rank))
    import numpy as np

    values = b.load(np.float32)
    found = []
    for rank_major in (True, False):
        of_expert = [
            [j * experts + e if rank_major else e * rank + j for j in range(rank)]
            for e in range(chosen)
        ]
        columns = values[:, np.array(of_expert).reshape(-1)]
        norms = np.linalg.norm(columns, axis=0)
        if not np.all(norms > 0) or not np.all(np.isfinite(norms)):
            return None
        alike = np.abs((columns / norms).T @ (columns / norms))
        np.fill_diagonal(alike, 0.0)
        group = np.repeat(np.arange(chosen), rank)
        same = group[:, None] == group[None, :]
        count = len(group)
        within = alike[same].sum() / (chosen * rank * (rank - 1))
        found.append(float(within / (alike.sum() / (count * (count - 1)))))
    return found[0], found[1]
