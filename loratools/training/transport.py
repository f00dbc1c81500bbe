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

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from loratools.training.layers import LiveLayer
from loratools_formats.disk.errors import OptionError

_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
_KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_NEGLIGIBLE = 1e-13  # of the largest eigenvalue of A'·A'ᵀ


def carry(
    layer: LiveLayer,
    old: tuple[torch.nn.Parameter, torch.nn.Parameter],
    ratio: float,
    fresh: torch.Tensor,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Carry over what is known of the gradients of a layer.

    Args:
        layer: the layer as it is now.
        old: the factors that it had, A and B.
        ratio: s'/s.
        fresh: (k,), which directions of the new factors are unlike any before: nothing is known of
            their gradients.
        optimizer: its state moves, or is dropped; `exchange` makes it train the new factors.
    """
    a, b, new_a, new_b = (_matrix(factor) for factor in (*old, *layer.factors))
    new_a = torch.where(fresh.to(new_a.device)[:, None], 0.0, new_a)
    # (s'/s) · Xᵀ and (s'/s) · Yᵀ: both scales cancel.
    left = _inverse(new_a @ new_a.T) @ (new_a @ a.T)
    right = (b.T @ new_b) @ _inverse(new_b.T @ new_b)
    _move(old[0], layer.factors[0], optimizer, lambda value, power: left**power @ value)
    _move(old[1], layer.factors[1], optimizer, lambda value, power: value @ right**power)
    if layer.bias is not None:
        _move(layer.bias, layer.bias, optimizer, lambda value, power: value * ratio**power)


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


def exchange(optimizer: torch.optim.Optimizer, new: Mapping[Any, torch.nn.Parameter]) -> None:
    """Let an optimizer train new parameters in the places of old ones."""
    for group in optimizer.param_groups:
        group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on its device if that has the type."""
    device = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device, torch.float64)


def _matrix(factor: torch.Tensor) -> torch.Tensor:
    return in_float64(factor).reshape(len(factor), -1)


def _inverse(gram: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=_NEGLIGIBLE)
    return found


def inner(optimizer: Any) -> torch.optim.Optimizer | None:
    """Return torch's optimizer inside what accelerate wraps around it.

    Raises:
        OptionError: there is another.
    """
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
    groups = [] if optimizer is None else optimizer.param_groups
    held = {parameter for group in groups for parameter in group["params"]}
    for each in layers:
        if optimizer and any(p.requires_grad and p not in held for p in each.factors):
            raise OptionError(f"the optimizer does not have the factors of {each.name}")
