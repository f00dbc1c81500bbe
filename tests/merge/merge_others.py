"""Other implementations of merging, run on dense ΔW: mergekit's and PEFT's own functions.

Random masks are given, so that results can be compared: both draw them by `torch.bernoulli`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from loratools_formats.core.dtypes import Array


@contextmanager
def masks_given(masks: Sequence[Array]) -> Iterator[list[Array]]:
    """Let `torch.bernoulli` return these masks in turn; yields the chances it was asked for."""
    import torch

    waiting, asked = list(masks), []

    def bernoulli(chances: Any) -> Any:
        asked.append(chances.double().numpy())
        return torch.from_numpy(waiting.pop(0)).to(chances.dtype)

    with patch("torch.bernoulli", bernoulli):
        yield asked
    assert not waiting


def mergekit(name: str, deltas: Array, weights: Sequence[float] = (), **parameters: Any) -> Array:
    """Run a method of mergekit on a base of zeros and (T, m, n) deltas in float64.

    Args:
        name: the method's name there.
        deltas: one per adapter.
        weights: one per adapter, where the method takes them.
        parameters: shared ones; `density`, `gamma` and `epsilon` go to each adapter.
    """
    import torch
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import PerInputValues, TensorGroup

    ids = [f"task {index}" for index in range(len(deltas))]
    tensors = [torch.from_numpy(np.array(delta, np.float64)) for delta in deltas]
    method = registry.get(name)
    needs_base = method.spec.contract.base.value == "required"
    group = TensorGroup.from_tensors(
        [torch.zeros_like(tensors[0]), *tensors] if needs_base else tensors,
        ids=["base", *ids] if needs_base else ids,
        base_index=0 if needs_base else None,
    )
    values: dict[str, Any] = {}
    for spec in method.spec.parameters:
        if spec.name == "weight":
            values["weight"] = PerInputValues(list(zip(ids, map(float, weights), strict=True)))
        elif spec.name in ("density", "gamma", "epsilon"):
            given = parameters.pop(spec.name, spec.default)
            values[spec.name] = PerInputValues([(each, given) for each in ids])
        else:
            values[spec.name] = parameters.pop(spec.name, spec.default)
    assert not parameters, f"mergekit's {name} does not take {list(parameters)}"
    result: Array = method.merge_group(group, **values).numpy()
    return result


def peft(name: str, deltas: Array, weights: Sequence[float], *args: Any) -> Array:
    """Run a function of PEFT's `merge_utils` on (T, m, n) deltas in float32."""
    import torch
    from peft.utils import merge_utils

    tensors = [torch.from_numpy(delta.astype(np.float32)) for delta in deltas]
    merged = getattr(merge_utils, name)(tensors, torch.tensor(weights, dtype=torch.float32), *args)
    result: Array = merged.double().numpy()
    return result
