"""`squeeze_model`: the squeeze of `loratools squeeze` on a model that is being trained.

The layers are seen as a saved adapter, the operation on files decides ranks and factors, and the
new factors go back into the layers, with the optimizer's state and pending gradients carried over.
A direction that is numerically zero would stay zero for ever, since either factor's gradient is a
multiple of the other; it gets B = 0 and a row of A as PEFT begins one, so that it can learn.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from loratools.algebra.ranks import RankRule, as_options
from loratools.face.declare import public
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.squeeze import ModuleReport, squeeze
from loratools.training.layers import AlphaPolicy, LiveAdapter, LiveLayer
from loratools.training.transport import carries, carry, trainer_of
from loratools.work.selection import Selection
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank
from loratools_formats.disk.errors import AdapterError

_ZERO = 8 * 2.0**-24  # of the largest singular value: what float32 factors cannot tell from zero
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
        model: what `get_peft_model` returned, alone, compiled, or in DataParallel or
            DistributedDataParallel; several processes all call this after the same step.
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
    rule.require()
    before = LiveAdapter.of(model, adapter).check()
    layers, trainer = before.layers, trainer_of(before, optimizer)

    def scaling(like: LowRank | PlannedFactors, rank: int) -> float:
        layer = layers[like.a.key.removesuffix(".a")]
        return layer.scale(rank, layer.alpha_at(rank, alpha))

    given = Adapter("peft", None, {name: each.change() for name, each in layers.items()})
    done = squeeze(given, rule, compute, selection, scaling=scaling, nbytes_of=_nbytes)
    parts = {name: change.require_factors() for name, change in done.adapter.modules.items()}
    for report in done.modules:
        _check(report, layers[report.name])
    copies, alphas, fresh = before.copies, dict[str, float](), dict[str, torch.Tensor]()
    for name, layer in layers.items():
        # Other machines may round otherwise, and copies that train are to stay alike.
        a, b, *bias = _of_first(parts[name], copies)
        if len(a) != layer.rank:
            fresh[name] = _revive(name, a, b, compute.seed)
            layer.put(a, b)
            alphas[name] = layer.alpha_at(len(a), alpha)
            if layer.bias is not None:
                layer.bias.data.copy_(*bias)
    after = before.settle(alphas)
    for name, is_fresh in fresh.items():
        carry(layers[name], after.layers[name], is_fresh, trainer)
    return SqueezedModel(
        modules=done.modules,
        ranks={name: each.rank for name, each in after.layers.items()},
        alphas={name: each.alpha for name, each in after.layers.items()},
        relative_error=done.relative_error,
        parameters_before=_parameters(before),
        parameters=_parameters(after),
        revived=sum(int(mask.sum()) for mask in fresh.values()),
        optimizer=None if trainer is None else "carried" if carries(trainer) else "reset",
        record={"rule": as_options(rule), "alpha": alpha, **compute.record(), **selection.record()},
    )


def _nbytes(adapter: Adapter) -> int:
    return sum(tensor.nbytes for tensor in adapter.tensors())


def _parameters(live: LiveAdapter) -> int:
    return sum(each.a.numel() + each.b.numel() for each in live.layers.values())


def _of_first(part: LowRank, copies: Sequence[object]) -> list[Any]:
    """Return factors and bias, in processes that train copies of a model those of the first."""
    held = [[tensor.torch() for tensor in part.tensors()]]
    if copies:
        torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def _revive(name: str, a: torch.Tensor, b: torch.Tensor, seed: int) -> torch.Tensor:
    """Give the directions of a layer that are zero others, and return which they are: (k,)."""
    sizes = a.double().norm(dim=1) * b.double().norm(dim=0)
    of_type = 64 * torch.finfo(torch.float64).eps if a.dtype == torch.float64 else _ZERO
    fresh: torch.Tensor = sizes <= of_type * sizes.max()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed & 0xFFFFFFFF))
    rows = torch.rand(int(fresh.sum()), a.shape[1], generator=generator)
    a[fresh] = ((2 * rows - 1) / math.sqrt(a.shape[1])).to(a.dtype)
    b[:, fresh] = 0.0
    return fresh


def _check(report: ModuleReport, layer: LiveLayer) -> None:
    """Hold the factors that a squeeze made against the truncation of the change.

    Their error, measured after rounding, is to be the least there is (Eckart–Young), up to the
    rounding of their type.

    Raises:
        AdapterError: it is not.
    """
    least = math.sqrt(max(0.0, 1.0 - report.energy))
    if report.relative_error > least + 2 * torch.finfo(layer.a.dtype).eps + _SLACK:
        raise AdapterError(
            "the squeezed layer does not make the truncated change",
            tensor=layer.name,
            got=f"relative error {report.relative_error:.3g}",
            expected=f"{least:.3g}, which truncation alone makes",
        )
