"""What an adapter does to one module, whatever file it came from.

A change is a direction ΔW, in the tensors that store it, and a magnitude if it is a DoRA. Nothing
here reads bytes or computes.

Symbols: `a: (r, in)`, `b: (out, r)`, `ΔW = scale * b @ a: (out, in)`. Stacked experts put their
number in front of both: `a: (E, r, in)`, `b: (E, out, r)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from loratools_formats.core.kind_shapes import check_shapes
from loratools_formats.core.summary import change_line
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

Axis = Literal["output", "input"]
"""What each magnitude of a DoRA belongs to."""


@dataclass(frozen=True)
class Layer:
    """The kind of layer a delta belongs to, and how its matrix maps to the stored weight.

    Attributes:
        kind: `linear` weights are (out, in), or (in, out) in the Conv1D layout of GPT-2; `conv`
            weights are (out, in, *kernel), flattened to (out, in·kernel); `embedding` weights are
            (in, out), in being the vocabulary; `experts` weights are 3-D, expert first.
        kernel: spatial kernel of a convolution.
        parameters: for experts, the names the adapted parameter may have.
        transposed_if_square: what a square weight's orientation must be taken from, since its
            shape does not show it: False for (out, in), True for (in, out), None if unknown.
        swapped: for experts, whether the factors are those of the transposed change, a being on
            the outputs: PEFT's layers may take a parameter's axes so. None if the file does not
            tell.
        grouped: for experts, whether the file has b's columns expert by expert, not rank by rank.
        tied: for an output layer, whether the change is of the weight that it shares with the
            embedding, where the model ties them: Tinker's is, and PEFT's is of the layer alone.
    """

    kind: Literal["linear", "conv", "embedding", "experts"]
    kernel: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    transposed_if_square: bool | None = False
    swapped: bool | None = None
    grouped: bool = False
    tied: bool = False


@dataclass(frozen=True, repr=False)
class LowRank:
    """ΔW = scale · b @ a, for one weight or a stack of experts.

    Attributes:
        a: (r, in) or (E, r, in).
        b: (out, r) or (E, out, r).
        scale: the number that multiplies the product.
        layer: what is adapted.
        bias: (out,); scale · bias is added to the layer's bias (PEFT's `lora_bias`).
        alpha: the number the file states, from which the reader derived the scale; None if none.
        alpha_tensor: the tensor that states it, in formats which keep it in one.
    """

    a: TensorRef
    b: TensorRef
    scale: float
    layer: Layer = Layer("linear")
    bias: TensorRef | None = None
    alpha: float | None = None
    alpha_tensor: TensorRef | None = None

    def __post_init__(self) -> None:
        if not (
            len(self.a.shape) == len(self.b.shape) in (2, 3)
            and self.a.shape[:-2] == self.b.shape[:-2]
            and self.a.shape[-2] == self.b.shape[-1]
        ):
            raise AdapterError(
                "factors do not fit together",
                tensor=self.a.key,
                got=f"a {list(self.a.shape)} and b {list(self.b.shape)}",
                expected="a (r, in) and b (out, r)",
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({change_line(self)})"

    @property
    def rank(self) -> int:
        """Rank r of the factors, per expert."""
        return self.a.shape[-2]

    @property
    def experts(self) -> int:
        """Number of stacked matrices, 1 for an ordinary weight."""
        return self.a.shape[0] if len(self.a.shape) == 3 else 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one matrix."""
        return self.b.shape[-2], self.a.shape[-1]

    def tensors(self) -> Iterator[TensorRef]:
        """Yield every tensor it is made of."""
        yield self.a
        yield self.b
        yield from (t for t in (self.bias, self.alpha_tensor) if t is not None)


@dataclass(frozen=True)
class Missing:
    """A setting that ΔW depends on and the file does not hold.

    Attributes:
        expected: what it may be, for people.
        choices: the words it may be; empty if it is no word.
        pattern: regular expression that it must match whole; empty if it is a number.
        whole: whether it is a whole number above 0.
        in_base: entries of the base model's `config.json` that state it; the first present counts.
        meaning: what the words in that entry mean; empty if it holds the setting itself.
        of_weight: reads the setting from the shape of the module's base weight; returns None if
            that shape does not determine it. The field is None if no shape can. It takes
            precedence over the value that the user gives for all modules.
    """

    expected: str
    choices: tuple[str, ...] = ()
    pattern: str = ""
    whole: bool = False
    in_base: tuple[str, ...] = ()
    meaning: Mapping[str, str] = field(default_factory=dict)
    of_weight: Callable[[tuple[int, ...]], str | None] | None = None

    @property
    def is_in_base(self) -> bool:
        """Whether the base model may determine it."""
        return bool(self.in_base) or self.of_weight is not None


@dataclass(frozen=True, repr=False)
class KindDelta:
    """A weight change of a kind declared in `loratools.kinds`, such as LoHa, VeRA or a difference.

    Readers say which kind it is and hand over its tensors and numbers. Only the declaration says
    what ΔW is.

    Attributes:
        kind: name of the declaration, such as `loha`.
        parts: the module's own tensors, by the names that the declaration gives them; each keeps
            the key it has in the file.
        settings: numbers that ΔW depends on, resolved by the reader: scale, block sizes, seeds; a
            `Missing` for one that the user must give.
        layer: what is adapted.
        shape: (out, in) of the weight as a matrix; None for a side that the file does not
            determine.
        shared: tensors that it has in common with other modules, by the declaration's names; they
            are in `Adapter.shared` too, and counted there.
        bias: (out,), added to the layer's bias without the scale.
        alpha_tensor: the tensor that states alpha, in formats which keep it in one.
    """

    kind: str
    parts: Mapping[str, TensorRef]
    settings: Mapping[str, Any] = field(default_factory=dict)
    layer: Layer = Layer("linear")
    shape: tuple[int | None, int | None] = (None, None)
    shared: Mapping[str, TensorRef] = field(default_factory=dict)
    bias: TensorRef | None = None
    alpha_tensor: TensorRef | None = None

    def __post_init__(self) -> None:
        if self.layer.kind != "experts":
            check_shapes(self.kind, {**self.shared, **self.parts}, self.shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({change_line(self)})"

    @property
    def experts(self) -> int:
        """Number of stacked matrices, 1 for an ordinary weight."""
        is_stack = self.layer.kind == "experts"
        return next(iter(self.parts.values())).shape[0] if is_stack else 1

    def planes(self) -> Iterator[KindDelta]:
        """Yield the delta of each matrix of a stack; only itself if it is no stack."""
        if self.layer.kind != "experts":
            yield self
            return
        for index in range(self.experts):
            parts = {
                name: tensor.row_range(index, index + 1).reshaped(tensor.shape[1:])
                for name, tensor in self.parts.items()
            }
            yield replace(self, parts=parts, layer=replace(self.layer, kind="linear"))

    def tensors(self) -> Iterator[TensorRef]:
        """Yield every tensor that is its own."""
        yield from self.parts.values()
        yield from (t for t in (self.bias, self.alpha_tensor) if t is not None)


@dataclass(frozen=True, repr=False)
class ModuleChange:
    """The change of one module: W' = W + ΔW, or a DoRA if there is a magnitude.

    A DoRA is W' = magnitude / ‖W + ΔW‖ · (W + ΔW), norms per output (arXiv 2402.09353).

    Attributes:
        direction: ΔW, as factors or as the tensors of a declared kind.
        magnitude: one number per output (or input), in the shape and order it was stored in; None
            if the module is no DoRA. It may be one of the direction's shared tensors.
        axis: whether a norm and a magnitude belong to each output, as the paper's code and PEFT
            have it, or to each input, as LyCORIS before version 3 has.
    """

    direction: LowRank | KindDelta
    magnitude: TensorRef | None = None
    axis: Axis = "output"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({change_line(self)})"

    @property
    def factors(self) -> LowRank | None:
        """The factors of ΔW; None if it is of a declared kind."""
        return self.direction if isinstance(self.direction, LowRank) else None

    @property
    def kind_delta(self) -> KindDelta | None:
        """ΔW if it is of a declared kind; None if it is given by factors."""
        return self.direction if isinstance(self.direction, KindDelta) else None

    @property
    def is_dora(self) -> bool:
        """Whether a magnitude makes ΔW the direction of a DoRA."""
        return self.magnitude is not None

    @property
    def kind(self) -> str:
        """Name of the kind: `lora`, `dora`, or that of the declared kind, DoRA or not."""
        if isinstance(self.direction, KindDelta):
            return self.direction.kind
        return "dora" if self.is_dora else "lora"

    @property
    def layer(self) -> Layer:
        """The layer that is adapted."""
        return self.direction.layer

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out, in) of one matrix; None for a side that the file does not determine."""
        return self.direction.shape

    @property
    def rank(self) -> int | None:
        """Rank r of the factors; None if there are none."""
        return self.direction.rank if isinstance(self.direction, LowRank) else None

    def require_factors(self) -> LowRank:
        """Return the factors of ΔW.

        Raises:
            UnsupportedError: it has none before it is folded.
        """
        if isinstance(self.direction, LowRank):
            return self.direction
        raise UnsupportedError(
            f"a weight change of kind {self.direction.kind} has no factors before it is folded",
            tensor=next((tensor.key for tensor in self.tensors()), None),
            hint="Make it a plain LoRA first: "
            "loratools to-lora ADAPTER --base MODEL --rank 16 -o plain",
        )

    def with_direction(self, direction: LowRank | KindDelta) -> ModuleChange:
        """Return the change with another ΔW and the same magnitude."""
        return ModuleChange(direction, self.magnitude, self.axis)

    def tensors(self) -> Iterator[TensorRef]:
        """Yield every tensor that is its own."""
        yield from self.direction.tensors()
        shared = self.direction.shared if isinstance(self.direction, KindDelta) else {}
        keys = {tensor.key for tensor in shared.values()}
        if self.magnitude is not None and self.magnitude.key not in keys:
            yield self.magnitude
