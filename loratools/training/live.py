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
from peft import PeftModel

from loratools.algebra.ranks import RankRule
from loratools.face.declare import public
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.schedule import as_values
from loratools.operations.squeeze import ModuleReport, squeeze
from loratools.training.layers import LiveLayer, live_adapter, live_layers, settle_all, unwrapped
from loratools.training.transport import carries, carry, check_held, inner, moves, wide
from loratools.work.selection import Selection
from loratools_formats.core.adapter import Adapter, LowRank
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
    AdamW and SGD is carried over; that of any other optimizer starts anew for these factors.

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
    found = unwrapped(model)
    layers = live_layers(found, adapter or found.active_adapters[0])
    trainer = inner(optimizer)
    if trainer is not None:
        check_held(trainer, layers)
    before, rslora = _parameters(layers), layers[0].is_rslora

    def scaling(like: LowRank | PlannedFactors, rank: int) -> float:
        if rank == like.rank:
            return like.scale
        new = alpha_at(alpha, like.alpha or 0.0, like.rank, rank, rslora=rslora)
        return layers[0].scale(new, rank)

    done = squeeze(
        live_adapter(found, layers), rule, compute, selection, scaling=scaling, nbytes_of=_nbytes
    )
    parts = {each.name: done.adapter.modules[each.name].require_factors() for each in layers}
    changed = [each for each in layers if parts[each.name].rank != each.rank]
    reports = {report.name: report for report in done.modules}
    for each in changed:
        _check(reports[each.name], each.a.dtype)
    settings = {each.name: (each.rank, each.alpha) for each in layers}
    for each in changed:
        rank = parts[each.name].rank
        settings[each.name] = rank, alpha_at(alpha, each.alpha, each.rank, rank, rslora=rslora)
    old = {each.name: (each.a, each.b, each.scale(each.alpha, each.rank)) for each in changed}
    fresh = {each.name: _put(each, parts[each.name], compute.seed) for each in changed}
    settle_all(found, layers, settings)
    for each in changed:
        _check_live(reports[each.name], each, old[each.name])
    pairs = ((old[each.name][:2], (each.a, each.b), fresh[each.name]) for each in changed)
    carry([moved for pair in pairs for moved in moves(*pair)], trainer)
    return SqueezedModel(
        done.modules,
        {each.name: each.rank for each in layers},
        {each.name: each.alpha for each in layers},
        done.relative_error,
        before,
        _parameters(layers),
        sum(int(mask.sum()) for mask in fresh.values()),
        None if trainer is None else "carried" if carries(trainer) else "reset",
        {"rule": as_values(rule), "alpha": alpha, **compute.record(), **selection.record()},
    )


def reshape(
    model: PeftModel, layers: list[LiveLayer], settings: Mapping[str, tuple[int, float]]
) -> None:
    """Give layers other ranks and alphas; factors of other ranks are zeros that wait to be loaded.

    Args:
        model: the model.
        layers: all of an adapter's.
        settings: (rank, alpha) by module path.
    """
    for each in layers:
        rank = settings[each.name][0]
        if rank != each.rank:
            a, b = each.a.detach(), each.b.detach()
            each.put(a.new_zeros(rank, a[0].numel()), b.new_zeros(len(b), rank), None)
    settle_all(model, layers, settings)


def alpha_at(policy: AlphaPolicy, alpha: float, rank: int, new: int, *, rslora: bool) -> float:
    """Return the alpha at a new rank of what has this one at `rank`.

    >>> alpha_at("keep-scale", 128, 64, 8, rslora=False)
    16.0
    >>> alpha_at("sqrt", 128, 64, 16, rslora=False)
    64.0
    """
    if policy == "sqrt" or rslora:  # with scaling alpha/√r, the same alpha also keeps the scale
        return alpha * math.sqrt(new / rank)
    return float(alpha_of(new, alpha / rank))


def _nbytes(adapter: Adapter) -> int:
    """Return what a model holds of an adapter: its tensors, without the header of a file."""
    return sum(tensor.nbytes for tensor in adapter.tensors())


def _parameters(layers: list[LiveLayer]) -> int:
    return sum(factor.numel() for each in layers for factor in (each.a, each.b))


def _check(report: ModuleReport, dtype: torch.dtype) -> None:
    """Hold the error against the one that truncation alone makes (Eckart–Young)."""
    least = math.sqrt(max(0.0, 1.0 - report.energy))
    if not report.relative_error <= least + _slack(dtype):
        raise AdapterError(
            "the new factors are not the truncated change",
            tensor=report.name,
            got=f"relative error {report.relative_error:.3g}",
            expected=f"{least:.3g}",
        )


def _slack(dtype: torch.dtype) -> float:
    return 2 * torch.finfo(dtype).eps + _SLACK


def _put(layer: LiveLayer, part: LowRank, seed: int) -> torch.Tensor:
    """Give a layer new factors, and return which of their directions are fresh: (k,)."""
    a, b = part.a.torch(), part.b.torch()
    sizes = a.double().norm(dim=1) * b.double().norm(dim=0)
    of_type = 64 * torch.finfo(torch.float64).eps if a.dtype == torch.float64 else _ZERO
    fresh: torch.Tensor = sizes <= of_type * sizes.max()
    if fresh.any():
        generator = torch.Generator().manual_seed(
            zlib.crc32(layer.name.encode(), seed & 0xFFFFFFFF)
        )
        rows = torch.rand(int(fresh.sum()), a.shape[1], generator=generator)
        a[fresh] = ((2 * rows - 1) / math.sqrt(a.shape[1])).to(a.dtype)
        b[:, fresh] = 0.0
    layer.put(a, b, None if part.bias is None else part.bias.torch())
    return fresh


def _check_live(
    report: ModuleReport, layer: LiveLayer, old: tuple[torch.Tensor, torch.Tensor, float]
) -> None:
    """Hold the change that the layer makes now against the one it made before."""
    *pair, scale = old
    a, b, new_a, new_b = (wide(factor) for factor in (*pair, layer.a, layer.b))
    new_scale = layer.module.scaling[layer.adapter]
    lefts, rights = torch.cat([scale * b, -new_scale * new_b], 1), torch.cat([a, new_a])
    gram_b, gram_a = lefts.T @ lefts, rights @ rights.T
    squared = float((gram_b * gram_a).sum())
    whole = scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
    noise = _SUMS * float(gram_b.trace() * gram_a.trace())  # of both, as factors may cancel
    if whole > noise:
        error = math.sqrt(max(squared, 0.0) / whole)
        slack = _slack(layer.a.dtype) + math.sqrt(noise / whole)
        is_same = abs(error - report.relative_error) <= slack
    else:  # factors that cancel: what is left of the change is rounding
        error, is_same = math.sqrt(max(squared, 0.0)), squared <= noise
    if not is_same:
        raise AdapterError(
            "the squeezed layer does not make the truncated change",
            tensor=layer.name,
            got=f"relative error {error:.3g}",
            expected=f"{report.relative_error:.3g}",
        )
