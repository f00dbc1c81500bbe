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

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from loratools.training.layers import LiveAdapter, LiveLayer
from loratools_formats.disk.errors import OptionError

_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
_KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_NEGLIGIBLE = 1e-13  # of the largest eigenvalue of A'·A'ᵀ
_INVERSE = partial(torch.linalg.pinv, hermitian=True, rtol=_NEGLIGIBLE)


def carry(
    before: LiveAdapter,
    after: LiveAdapter,
    fresh: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Carry over what is known of gradients, and let an optimizer train the new factors.

    Args:
        before: the adapter as it was.
        after: the adapter as it is.
        fresh: (k,) for each layer with new factors, which of their directions are unlike any
            before: nothing is known of their gradients.
        optimizer: what trains it.
    """
    new: dict[torch.Tensor, torch.nn.Parameter] = {}
    for name, is_fresh in fresh.items():
        old, now = before.layers[name], after.layers[name]
        _carry(old, now, is_fresh, optimizer)
        new |= {old.a: now.a, old.b: now.b}
    for group in () if optimizer is None else optimizer.param_groups:
        group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]


def _carry(
    old: LiveLayer, now: LiveLayer, fresh: torch.Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    a, b, new_a, new_b = (_matrix(factor) for factor in (old.a, old.b, now.a, now.b))
    new_a = torch.where(fresh.to(new_a.device)[:, None], 0.0, new_a)
    # (s'/s) · Xᵀ and (s'/s) · Yᵀ: both scales cancel.
    left = _INVERSE(new_a @ new_a.T) @ (new_a @ a.T)
    right = (b.T @ new_b) @ _INVERSE(new_b.T @ new_b)
    ratio = now.scaling / old.scaling
    _move(old.a, now.a, optimizer, lambda value, power: left**power @ value)
    _move(old.b, now.b, optimizer, lambda value, power: value @ right**power)
    if old.bias is not None and now.bias is not None:
        _move(old.bias, now.bias, optimizer, lambda value, power: value * ratio**power)


def _move(
    old: torch.nn.Parameter,
    new: torch.nn.Parameter,
    optimizer: torch.optim.Optimizer | None,
    moved: Callable[[torch.Tensor, int], torch.Tensor],
) -> None:
    """Carry one parameter's gradient and state over, by what moves sums of gradients' powers."""

    def carried(value: torch.Tensor, power: int) -> torch.Tensor:
        return moved(_matrix(value), power).reshape(new.shape).to(value.device, value.dtype)

    if old.grad is not None:
        new.grad = carried(old.grad, 1)
    state = {} if optimizer is None else optimizer.state.pop(old, {})
    if optimizer is not None and state and carries(optimizer):
        moving = {key: state[key] for key in _POWERS if state.get(key) is not None}
        made = {key: carried(value, _POWERS[key]) for key, value in moving.items()}
        optimizer.state[new] = {**state, **made}


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on its device if that has the type."""
    device = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device, torch.float64)


def _matrix(factor: torch.Tensor) -> torch.Tensor:
    return in_float64(factor).reshape(len(factor), -1)


def carries(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's state moves with the factors."""
    return type(optimizer) in _KNOWN


def trainer_of(live: LiveAdapter, optimizer: Any) -> torch.optim.Optimizer | None:
    """Return torch's optimizer inside what accelerate wraps around it; None if there is none.

    Raises:
        OptionError: it is another, or lacks a factor that is trained.
    """
    if optimizer is None:
        return None
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = wrapped
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError("not an optimizer of torch", got=type(optimizer).__name__)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for each in live.layers.values():
        if any(p.requires_grad and p not in held for p in (each.a, each.b)):
            raise OptionError(f"the optimizer does not have the factors of {each.name}")
    return optimizer
