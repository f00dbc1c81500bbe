"""Factors that are yet to be made: names, types and shapes, and no values."""

from __future__ import annotations

from dataclasses import dataclass

from loratools_formats.core.change import Layer, LowRank
from loratools_formats.core.dtypes import DTYPES, DType
from loratools_formats.core.tensors import TensorRef, unmade


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is yet to be made.

    Attributes:
        key: its name.
        dtype: type of its elements.
        shape: dimensions, row-major.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlannedFactors:
    """The factors that a module will have.

    Attributes:
        a: (r, in) or (E, r, in).
        b: (out, r) or (E, out, r).
        scale: the number that will multiply their product.
        layer: what is adapted.
        bias: (out,), which exists already; None if there is none.
        alpha: the number that the file states now; None if it states none.
        alpha_tensor: the tensor that states it, in formats which keep it in one.
    """

    a: PlannedTensor
    b: PlannedTensor
    scale: float = 1.0
    layer: Layer = Layer("linear")
    bias: TensorRef | None = None
    alpha: float | None = None
    alpha_tensor: TensorRef | None = None

    @classmethod
    def like(cls, factors: LowRank) -> PlannedFactors:
        """Return the plan of factors that take the place of others."""
        a, b = (PlannedTensor(t.key, t.dtype, t.shape) for t in (factors.a, factors.b))
        others = factors.layer, factors.bias, factors.alpha, factors.alpha_tensor
        return cls(a, b, factors.scale, *others)

    @classmethod
    def new(
        cls,
        name: str,
        layer: Layer,
        shape: tuple[int, int],
        *,
        rank: int = 1,
        experts: int = 1,
        bias: TensorRef | None = None,
    ) -> PlannedFactors:
        """Return the plan of float32 factors of a module that has none.

        Args:
            name: the module.
            layer: what is adapted.
            shape: (out, in) of one matrix.
            rank: of the factors.
            experts: number of stacked matrices.
            bias: (out,), added to the layer's bias.
        """
        out, in_ = shape
        stack = (experts,) if layer.kind == "experts" else ()
        a = PlannedTensor(f"{name}.a", DTYPES["F32"], (*stack, rank, in_))
        b = PlannedTensor(f"{name}.b", DTYPES["F32"], (*stack, out, rank))
        return cls(a, b, 1.0, layer, bias)

    @property
    def rank(self) -> int:
        """Rank r, per expert."""
        return self.a.shape[-2]

    @property
    def experts(self) -> int:
        """Number of stacked matrices, 1 for an ordinary weight."""
        return self.a.shape[0] if len(self.a.shape) == 3 else 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one matrix."""
        return self.b.shape[-2], self.a.shape[-1]

    def resized(self, rank: int, a: DType, b: DType, scale: float) -> PlannedFactors:
        """Return the plan with another rank, types and scale."""
        a_shape = (*self.a.shape[:-2], rank, self.a.shape[-1])
        b_shape = (*self.b.shape[:-1], rank)
        planned_a = PlannedTensor(self.a.key, a, a_shape)
        planned_b = PlannedTensor(self.b.key, b, b_shape)
        others = self.layer, self.bias, self.alpha, self.alpha_tensor
        return PlannedFactors(planned_a, planned_b, scale, *others)

    def made(self, a: TensorRef, b: TensorRef, scale: float, bias: TensorRef | None) -> LowRank:
        """Return the factors, now that their tensors exist."""
        return LowRank(a, b, scale, self.layer, bias, self.alpha, self.alpha_tensor)


def for_size(planned: PlannedFactors) -> LowRank:
    """Return factors by which a format counts the bytes of a file; reading one is an error."""
    a, b = (unmade(t.key, t.dtype, t.shape) for t in (planned.a, planned.b))
    return planned.made(a, b, planned.scale, planned.bias)
