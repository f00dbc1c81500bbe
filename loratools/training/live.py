"""`squeeze_model`: the squeeze of `loratools squeeze` on a model that is being trained.

The layers are seen as a saved adapter, the operation on files decides ranks and factors, and the
new factors go back into the layers, with the optimizer's state and pending gradients carried over.
A direction that is numerically zero would stay zero for ever, since either factor's gradient is a
multiple of the other; it gets B = 0 and a row of A as PEFT begins one, so that it can learn.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from loratools.algebra.ranks import RankRule
from loratools.face.declare import public
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.schedule import as_values
from loratools.operations.squeeze import ModuleReport, squeeze
from loratools.training.layers import LiveLayer, live_layers, settle_all, unwrapped
from loratools.training.transport import Before, carries, carry, check_held, inner, wide
from loratools.work.selection import Selection
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank
from loratools_formats.core.factors import alpha_of
from loratools_formats.disk.errors import AdapterError, OptionError

AlphaPolicy = Literal["keep-scale", "sqrt"]
_ZERO = 8 * 2.0**-24  # of the largest singular value: what float32 factors cannot tell from zero
_SUMS = 8 * 2.0**-52  # rounding of sums of products, of the factors' squared norms
_SLACK = 1e-6  # of the change, besides the rounding of its type


@dataclass(frozen=True)
class SqueezedModel:
    """What a squeeze did to a live model.

    Attributes:
        modules: one report each, in path order.
        ranks: rank of each module now, by path.
        alphas: alpha of each module now, by path.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ over all modules together, of the rounded factors.
        parameters_before: numbers in all factors before.
        parameters: numbers in all factors now.
        revived: directions that were zero, and can learn again.
        optimizer: whether its state was carried over or reset; None if none was given.
        record: the options, as JSON values.
    """

    modules: tuple[ModuleReport, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    relative_error: float
    parameters_before: int
    parameters: int
    revived: int
    optimizer: Literal["carried", "reset"] | None
    record: Mapping[str, Any]

    def metrics(self) -> dict[str, float]:
        """Return the numbers that a trainer logs."""
        ranks = list(self.ranks.values())
        return {
            "squeeze/rank_min": min(ranks),
            "squeeze/rank_mean": sum(ranks) / len(ranks),
            "squeeze/rank_max": max(ranks),
            "squeeze/relative_error": self.relative_error,
            "squeeze/parameters": self.parameters,
            "squeeze/revived": self.revived,
        }


@public(compute=("svd", "oversample", "power_iterations", "seed", "device", "workers"))
def squeeze_model(
    model: Any,
    *,
    optimizer: Any = None,
    adapter: str | None = None,
    alpha: AlphaPolicy = "keep-scale",
    rule: RankRule,
    compute: ComputeOptions,
    selection: Selection,
) -> SqueezedModel:
    """Compress the ranks of a PEFT model in place, on its device and in its types.

    Factors become new parameters, as do their places in the optimizer. The state of torch's Adam,
    AdamW and SGD is carried over; that of any other optimizer starts anew for these factors. A
    budget counts the bytes of the layers' tensors: a model has no header as a file has.

    Args:
        model: what `get_peft_model` returned, or a wrapper around it within one process.
        optimizer: what trains it; None if nothing does.
        adapter: name of the adapter; by default the active one.
        alpha: `keep-scale` keeps alpha/r, which keeps the size of the steps; `sqrt` lets alpha be
            proportional to √r.

    Raises:
        OptionError: no rule for the ranks, no such adapter, or another optimizer's factors.
        UnsupportedError: a layer whose factors cannot be replaced, or parameters that are spread
            over processes.
        AdapterError: NaN or infinite values, or values beyond the type.
    """
    if not rule.is_given:
        raise OptionError("no rule for the ranks", expected="rank, energy, budget or another rule")
    found, trainer = unwrapped(model), inner(optimizer)
    layers = live_layers(found, adapter)
    check_held(trainer, layers)
    parameters_before = _parameters(layers)

    def scaling(like: LowRank | PlannedFactors, rank: int) -> float:
        if rank == like.rank:
            return like.scale
        return layers[0].scale(alpha_at(alpha, layers[0], like.alpha or 0.0, like.rank, rank), rank)

    given = Adapter("peft", None, {each.name: each.change() for each in layers})
    done = squeeze(given, rule, compute, selection, scaling=scaling, nbytes_of=_nbytes)
    reports = {report.name: report for report in done.modules}
    settings: dict[str, tuple[int, float]] = {}
    changed: list[tuple[Before, LowRank]] = []
    for each in layers:
        part = done.adapter.modules[each.name].require_factors()
        if part.rank != each.rank:
            changed.append((Before.of(each), part))
            new = alpha_at(alpha, each, each.alpha, each.rank, part.rank)
            settings[each.name] = part.rank, new
    fresh = [_put(before.layer, part, compute.seed) for before, part in changed]
    settle_all(found, layers, settings)
    for before, _ in changed:
        _check(reports[before.layer.name], before)
    carry(((each, mask) for (each, _), mask in zip(changed, fresh, strict=True)), trainer)
    return SqueezedModel(
        modules=done.modules,
        ranks={each.name: each.rank for each in layers},
        alphas={each.name: each.alpha for each in layers},
        relative_error=done.relative_error,
        parameters_before=parameters_before,
        parameters=_parameters(layers),
        revived=sum(int(mask.sum()) for mask in fresh),
        optimizer=None if trainer is None else "carried" if carries(trainer) else "reset",
        record={"rule": as_values(rule), "alpha": alpha, **compute.record(), **selection.record()},
    )


def alpha_at(policy: AlphaPolicy, layer: LiveLayer, alpha: float, rank: int, new: int) -> float:
    """Return the alpha at a new rank of what has this one at `rank`, a whole number if it is one.

    With scaling alpha/√r, alpha in proportion to √r also keeps the scale.
    """
    if policy == "keep-scale" and not layer.is_rslora:
        return alpha_of(new, alpha / rank)
    found = alpha * math.sqrt(new / rank)
    return int(found) if found.is_integer() else found


def _nbytes(adapter: Adapter) -> int:
    return sum(tensor.nbytes for tensor in adapter.tensors())


def _parameters(layers: list[LiveLayer]) -> int:
    return sum(factor.numel() for each in layers for factor in (each.a, each.b))


def _put(layer: LiveLayer, part: LowRank, seed: int) -> torch.Tensor:
    """Give a layer new factors, and return which of their directions are fresh: (k,)."""
    a, b = part.a.torch(), part.b.torch()
    sizes = a.double().norm(dim=1) * b.double().norm(dim=0)
    of_type = 64 * torch.finfo(torch.float64).eps if a.dtype == torch.float64 else _ZERO
    fresh: torch.Tensor = sizes <= of_type * sizes.max()
    generator = torch.Generator().manual_seed(zlib.crc32(layer.name.encode(), seed & 0xFFFFFFFF))
    rows = torch.rand(int(fresh.sum()), a.shape[1], generator=generator)
    a[fresh] = ((2 * rows - 1) / math.sqrt(a.shape[1])).to(a.dtype)
    b[:, fresh] = 0.0
    layer.put(a, b)
    if layer.bias is not None and part.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(part.bias.torch())
    return fresh


def _check(report: ModuleReport, before: Before) -> None:
    """Hold the change that a layer makes now against the truncation of the one it made before.

    Its error is to be that of the factors which the squeeze made, and that one the least there is
    (Eckart–Young), both up to the rounding of their type.

    Raises:
        AdapterError: it is not.
    """
    layer, least = before.layer, math.sqrt(max(0.0, 1.0 - report.energy))
    a, b, new_a, new_b = (wide(factor) for factor in (before.a, before.b, layer.a, layer.b))
    scale, new_scale = before.scale, layer.module.scaling[layer.adapter]
    lefts, rights = torch.cat([scale * b, -new_scale * new_b], 1), torch.cat([a, new_a])
    gram_b, gram_a = lefts.T @ lefts, rights @ rights.T
    squared = max(0.0, float((gram_b * gram_a).sum()))
    whole = scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
    noise = _SUMS * float(gram_b.trace() * gram_a.trace())  # of both, as factors may cancel
    slack = 2 * torch.finfo(layer.a.dtype).eps + _SLACK
    if whole > noise:
        error = math.sqrt(squared / whole)
        is_same = abs(error - report.relative_error) <= slack + math.sqrt(noise / whole)
    else:  # factors that cancel: what is left of the change is rounding
        error, is_same = math.sqrt(squared), squared <= noise
    if not (is_same and report.relative_error <= least + slack):
        raise AdapterError(
            "the squeezed layer does not make the truncated change",
            tensor=layer.name,
            got=f"relative error {error:.3g}",
            expected=f"{report.relative_error:.3g}, of which truncation alone makes {least:.3g}",
        )
