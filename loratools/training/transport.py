"""Carrying gradients and an optimizer's state over a squeeze.

With B' = B·X and A' = Y·A for the new factors, and s'·B'·A' in place of s·B·A,
∂L/∂B' = (s'/s) · ∂L/∂B · Yᵀ and ∂L/∂A' = (s'/s) · Xᵀ · ∂L/∂A (chain rule). Whatever is linear in
gradients, such as momentum, moves by these matrices; second moments move by their entrywise
squares, which is an approximation, since covariances are not kept. Counts of steps stay.

X and Y come from the factors: ΔW' = ΔW·P for the projection P on the rows of A', so that
X = (s/s') · A·A'⁺, and ΔW' = P·ΔW for the one on the columns of B', so that Y = (s/s') · B'⁺·B.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
class Moved:
    """One parameter that takes the place of another.

    Attributes:
        old: the factor before.
        new: the factor after.
        of_gradients: what gradients are multiplied by, from the left for A, from the right for B.
        is_a: whether it is A.
    """

    old: torch.nn.Parameter
    new: torch.nn.Parameter
    of_gradients: torch.Tensor
    is_a: bool

    def carried(self, value: torch.Tensor, *, squares: bool = False) -> torch.Tensor:
        """Return a tensor like the old parameter as it is for the new one."""
        by = self.of_gradients**2 if squares else self.of_gradients
        matrix = value.detach().to(by.device, by.dtype).reshape(len(value), -1)
        product = by @ matrix if self.is_a else matrix @ by
        return product.reshape(self.new.shape).to(value.device, value.dtype)


Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]


def moves(old: Pair, new: Pair, fresh: torch.Tensor) -> tuple[Moved, Moved]:
    """Return what becomes of both factors of a layer.

    Args:
        old: A (r, in, …) and B (out, r, …) before.
        new: those after.
        fresh: (k,), which directions of the new factors are unlike any before: nothing is known
            of their gradients.
    """
    a, b, new_a, new_b = (wide(factor) for factor in (*old, *new))
    new_a = torch.where(fresh.to(new_a.device)[:, None], 0.0, new_a)
    # (s'/s) · Xᵀ and (s'/s) · Yᵀ: both scales cancel.
    return (
        Moved(old[0], new[0], _inverse(new_a @ new_a.T) @ (new_a @ a.T), is_a=True),
        Moved(old[1], new[1], (b.T @ new_b) @ _inverse(new_b.T @ new_b), is_a=False),
    )


def wide(factor: torch.Tensor) -> torch.Tensor:
    """Return a factor as a matrix in float64, on its device if that has the type."""
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


def check_held(optimizer: torch.optim.Optimizer, layers: Iterable[LiveLayer]) -> None:
    """Raise `OptionError` unless the optimizer has every factor that is trained."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for each in layers:
        if any(p.requires_grad and id(p) not in held for p in (each.a, each.b)):
            raise OptionError(f"the optimizer does not have the factors of {each.name}")


def carry(moved: Sequence[Moved], optimizer: torch.optim.Optimizer | None) -> None:
    """Carry pending gradients over, and let an optimizer go on with the new parameters."""
    for each in moved:
        if each.old.grad is not None:
            each.new.grad = each.carried(each.old.grad)
    if optimizer is None:
        return
    new = {id(each.old): each.new for each in moved}
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(p), p) for p in group["params"]]
    for each in moved:
        state = optimizer.state.pop(each.old, None)
        if state and carries(optimizer):
            optimizer.state[each.new] = {k: _state(each, k, v) for k, v in state.items()}


def _state(moved: Moved, key: str, value: Any) -> Any:
    if value is None or key not in (*_FIRST, *_SECOND):
        return value
    return moved.carried(value, squares=key in _SECOND)
