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

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from loratools.training.layers import LiveAdapter, LiveLayer
from loratools_formats.disk.errors import OptionError

Optimizer = torch.optim.Optimizer
Move = Callable[[torch.Tensor, int], torch.Tensor]
_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
_KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_NEGLIGIBLE = 1e-13  # of the largest eigenvalue of A'·A'ᵀ
_INVERSE = partial(torch.linalg.pinv, hermitian=True, rtol=_NEGLIGIBLE)


def carry(old: LiveLayer, now: LiveLayer, fresh: torch.Tensor, optimizer: Optimizer | None) -> None:
    """Carry over what is known of a layer's gradients, and let an optimizer train its new factors.

    Args:
        old: the layer as it was.
        now: the layer as it is.
        fresh: (k,), which of its directions are unlike any before: nothing is known of their
            gradients.
        optimizer: what trains it.
    """
    a, b, new_a, new_b = (_matrix(factor) for factor in (old.a, old.b, now.a, now.b))
    new_a = torch.where(fresh.to(new_a.device)[:, None], 0.0, new_a)
    # (s'/s) · Xᵀ and (s'/s) · Yᵀ: both scales cancel.
    left = _INVERSE(new_a @ new_a.T) @ (new_a @ a.T)
    right = (b.T @ new_b) @ _INVERSE(new_b.T @ new_b)
    ratio = now.scale(now.rank, now.alpha) / old.scale(old.rank, old.alpha)
    moves: list[tuple[torch.nn.Parameter, torch.nn.Parameter, Move]] = [
        (old.a, now.a, lambda value, power: left**power @ value),
        (old.b, now.b, lambda value, power: value @ right**power),
    ]
    if old.bias is not None and now.bias is not None:
        moves.append((old.bias, now.bias, lambda value, power: value * ratio**power))
    states = {} if optimizer is None else optimizer.state
    for was, new, move in moves:
        if was.grad is not None:
            new.grad = _moved(was.grad, move, 1, new)
        state = states.pop(was, {})
        if state and carries(optimizer):
            moving = {key: power for key, power in _POWERS.items() if state.get(key) is not None}
            made = {key: _moved(state[key], move, power, new) for key, power in moving.items()}
            states[new] = {**state, **made}
    factors = {old.a: now.a, old.b: now.b}
    for group in () if optimizer is None else optimizer.param_groups:
        group["params"] = [factors.get(parameter, parameter) for parameter in group["params"]]


def _moved(value: torch.Tensor, move: Move, power: int, like: torch.nn.Parameter) -> torch.Tensor:
    """Return a sum of gradients' powers for the new factor, on its device and of its own type."""
    return move(_matrix(value), power).reshape(like.shape).to(value.device, value.dtype)


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on its device if that has the type."""
    device = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device, torch.float64)


def _matrix(factor: torch.Tensor) -> torch.Tensor:
    return in_float64(factor).reshape(len(factor), -1)


def carries(optimizer: Optimizer | None) -> bool:
    """Return whether an optimizer's state moves with the factors."""
    return type(optimizer) in _KNOWN


def trainer_of(live: LiveAdapter, optimizer: Any) -> Optimizer | None:
    """Return torch's optimizer inside what accelerate wraps around it; None if there is none.

    Raises:
        OptionError: it is another, or lacks a factor that is trained.
    """
    if optimizer is None:
        return None
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = wrapped
    if not isinstance(optimizer, Optimizer):
        raise OptionError("not an optimizer of torch", got=type(optimizer).__name__)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for each in live.layers.values():
        if any(p.requires_grad and p not in held for p in (each.a, each.b)):
            raise OptionError(f"the optimizer does not have the factors of {each.name}")
    return optimizer
