"""Whether the columns of a stacked lora_B go rank by rank or expert by expert.

PEFT's order is rank by rank. Unsloth trained the other order until September 2026, and since then
writes markers; Megatron-Bridge exports the other order too. Files without markers are read as
Unsloth reads them, and as Megatron-Bridge writes them, with a finding that says so.

Sources: unsloth_zoo 2026.9.6 (`lora_B_layout`, `unsloth_fused_expert_lora`, the families);
Megatron-Bridge (`_pack_target_parameter_adapter_weights`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import (
    B_LAYOUT,
    EXPERT_MAJOR,
    FUSED_EXPERTS,
    RANK_MAJOR,
    family_of,
)
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError

MARKERS = (B_LAYOUT, FUSED_EXPERTS)
"""Keys of a configuration that say it."""

_FAMILIES = frozenset(
    {
        "deepseek_v3", "ernie4_5_moe", "ernie4_5_vl_moe", "gemma4", "glm4_moe", "glm4_moe_lite",
        "gpt_oss", "lfm2_moe", "mixtral", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe",
    }
)  # fmt: skip
_PARAMETERS = frozenset({"gate_up_proj", "down_proj"})
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
            f"If it is rank by rank, write it so: `set={B_LAYOUT}={RANK_MAJOR}` of convert, or add "
            f"{B_LAYOUT}: {RANK_MAJOR} to adapter_config.json",
        )


def grouped(path: str) -> Finding:
    """Return findings about factors that are packed expert by expert, as a marker states."""
    return Finding(
        "experts-grouped",
        "warning",
        path,
        f"lora_B of stacked experts is packed expert by expert, as {B_LAYOUT} says; PEFT and vLLM "
        "would read it rank by rank, without an error. What is written is rank by rank",
    )


def doubtful(path: str, b: TensorRef, experts: int, rank: int, order: str) -> list[Finding]:
    """Return what to tell if one stack's values speak against the order that a marker states."""
    ratios = evidence(b, experts, rank)
    if ratios is None:
        return []
    own, other = ratios if order == RANK_MAJOR else ratios[::-1]
    pairs = experts * rank * (rank - 1) / 2
    limit = max(_CLEAR, 1.0 + _SPREAD / math.sqrt(pairs))
    if other < limit * own or other < limit:
        return []
    against = EXPERT_MAJOR if order == RANK_MAJOR else RANK_MAJOR
    text = (
        f"a marker says that lora_B is {order}, and its values look {against}: columns of one "
        f"expert are {own:.2f} times as alike as any two as stated, and {other:.2f} times otherwise"
    )
    hint = f"If the marker is wrong: `set={B_LAYOUT}={against}` of convert overrules it"
    return [Finding("expert-order-doubtful", "warning", path, text, hint)]


_CLEAR = 1.4
"""How much more alike columns must be before values are held against a marker.

Of trained toy adapters the right order gives 0.9 to 5.2, and the wrong one up to 1.3."""

_SPREAD = 3.0
"""Four standard deviations of |cos| of one pair of random columns, whose mean is 1 here."""


def marked(
    values: Mapping[str, Any], leaf: str, experts: int | None = None, folder: Path | None = None
) -> str | None:
    """Return the order of a parameter's columns that markers state; None if none does.

    Args:
        values: the configuration.
        leaf: the parameter's name.
        experts: how many there are by the shapes, to be compared with a marker's number.
        folder: for messages.

    Raises:
        AdapterError: a marker states an order that is not known, or another number of experts.
    """
    auto = values.get("auto_mapping")
    nested = [
        values.get(FUSED_EXPERTS),
        auto.get(FUSED_EXPERTS) if isinstance(auto, Mapping) else None,
    ]
    stated: list[Any] = []
    for detail in nested:
        if isinstance(detail, Mapping):
            parameters = detail.get("parameters")
            own = parameters.get(leaf) if isinstance(parameters, Mapping) else None
            if isinstance(own, Mapping):
                _check_count(own.get("num_experts"), leaf, experts, folder)
                stated.append(own.get(B_LAYOUT))
            stated.append(detail.get(B_LAYOUT))
    stated.append(values.get(B_LAYOUT))
    order = next((each for each in stated if each is not None), None)
    if order not in (None, RANK_MAJOR, EXPERT_MAJOR):
        raise AdapterError(
            f"config value {B_LAYOUT} is wrong",
            got=order,
            expected=f"{RANK_MAJOR} or {EXPERT_MAJOR}",
        )
    return order


def _check_count(stated: Any, leaf: str, experts: int | None, folder: Path | None) -> None:
    if isinstance(stated, int) and experts is not None and stated != experts:
        raise AdapterError(
            "the marker and the shapes say different numbers of experts",
            path=folder,
            tensor=leaf,
            got=f"{experts} by shapes and r",
            expected=f"num_experts {stated}",
        )


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
        if family_of(values) in _FAMILIES and targets and leaf in _PARAMETERS:
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
