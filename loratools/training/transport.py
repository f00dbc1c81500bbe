"""Carrying gradients and an optimizer's state over a squeeze.

With B' = B·X and A' = Y·A for the new factors, and s'·B'·A' in place of s·B·A,
∂L/∂B' = (s'/s) · ∂L/∂B · Yᵀ and ∂L/∂A' = (s'/s) · Xᵀ · ∂L/∂A (chain rule). Whatever is linear in
gradients, such as momentum, moves by these matrices; second moments move by their entrywise
squares, which is an approximation, since covariances are not kept. Counts of steps stay. A bias of
the second factor is multiplied by s, so that its gradients move by s'/s.

X and Y come from the factors: ΔW' = ΔW·P for the projection P on the rows of A', so that
X = (s/s') · A·A'⁺, and ΔW' = P·ΔW for the one on the columns of B', so that Y = (s/s') · B'⁺·B.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loratools.training.layers import LiveLayer
from loratools_formats.disk.errors import OptionError

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")
_KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_NEGLIGIBLE = 1e-13  # of the largest eigenvalue of A'·A'ᵀ


@dataclass(frozen=True)
class Before:
    """A layer, and what it was before it got other factors.

    Attributes:
        layer: the layer.
        a: (r, in, …).
        b: (out, r, …).
        scale: s.
    """

    layer: LiveLayer
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float

    @classmethod
    def of(cls, layer: LiveLayer) -> Before:
        """Return a layer as it is now."""
        return cls(layer, layer.a, layer.b, layer.module.scaling[layer.adapter])

    def moves(self, fresh: torch.Tensor) -> Iterator[_Move]:
        """Yield how what is known of the gradients of each parameter moves.

        Args:
            fresh: (k,), which directions of the new factors are unlike any before: nothing is known
                of their gradients.
        """
        layer = self.layer
        a, b, new_a, new_b = (wide(factor) for factor in (self.a, self.b, layer.a, layer.b))
        new_a = torch.where(fresh.to(new_a.device)[:, None], 0.0, new_a)
        # (s'/s) · Xᵀ and (s'/s) · Yᵀ: both scales cancel.
        yield _Move(self.a, layer.a, _inverse(new_a @ new_a.T) @ (new_a @ a.T), from_left=True)
        yield _Move(self.b, layer.b, (b.T @ new_b) @ _inverse(new_b.T @ new_b))
        if layer.bias is not None:
            ratio = layer.module.scaling[layer.adapter] / self.scale
            yield _Move(layer.bias, layer.bias, torch.full_like(a[:1, :1], ratio))


@dataclass(frozen=True)
class _Move:
    """A parameter, the one in its place, and what gradients are multiplied by from one side."""

    old: torch.nn.Parameter
    new: torch.nn.Parameter
    by: torch.Tensor
    from_left: bool = False

    def carried(self, value: torch.Tensor, power: int = 1) -> torch.Tensor:
        """Return a tensor like the old parameter as it is for the new one."""
        matrix, by = wide(value), self.by**power
        product = by @ matrix if self.from_left else matrix @ by
        return product.reshape(self.new.shape).to(value.device, value.dtype)

    def state(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an optimizer is to know of the new parameter."""
        powers = dict.fromkeys(_FIRST, 1) | dict.fromkeys(_SECOND, 2)
        return {
            key: self.carried(value, powers[key]) if key in powers and value is not None else value
            for key, value in old.items()
        }


def carry(moved: Iterable[tuple[Before, torch.Tensor]], optimizer: Any) -> None:
    """Carry pending gradients over, and let an optimizer go on with the new parameters.

    Args:
        moved: layers with new factors, and which of their directions are fresh.
        optimizer: one of torch, or None.
    """
    moves = [move for before, fresh in moved for move in before.moves(fresh)]
    for each in moves:
        if each.old.grad is not None:
            each.new.grad = each.carried(each.old.grad)
    if optimizer is None:
        return
    new = {each.old: each.new for each in moves}
    for group in optimizer.param_groups:
        group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
    for each in moves:
        state = optimizer.state.pop(each.old, None)
        if state and carries(optimizer):
            optimizer.state[each.new] = each.state(state)


def wide(factor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a matrix in float64, on its device if that has the type."""
    device = "cpu" if factor.device.type == "mps" else factor.device
    return factor.detach().to(device, torch.float64).reshape(len(factor), -1)


def _inverse(gram: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=_NEGLIGIBLE)
    return found


def inner(optimizer: Any) -> torch.optim.Optimizer | None:
    """Return torch's optimizer inside what accelerate wraps around it."""
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = wrapped
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError("not an optimizer of torch", got=type(optimizer).__name__)
    return optimizer


def carries(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's state moves with the factors."""
    return type(optimizer) in _KNOWN


def check_held(optimizer: torch.optim.Optimizer | None, layers: Iterable[LiveLayer]) -> None:
    """Raise `OptionError` if there is an optimizer that lacks a factor which is trained."""
    if optimizer is None:
        return
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for each in layers:
        if any(p.requires_grad and p not in held for p in (each.a, each.b)):
            raise OptionError(f"the optimizer does not have the factors of {each.name}")
