"""What an adapter is, whatever file it came from.

An adapter is a set of weight changes ΔW, one per adapted weight, plus tensors that replace base
tensors. Readers resolve scale and layout once and hand out these classes; operations see only
them; writers encode them again. Nothing here reads bytes or computes.

Symbols: `a: (r, in)`, `b: (out, r)`, `ΔW = scale * b @ a: (out, in)`. Stacked experts put their
number in front of both: `a: (E, r, in)`, `b: (E, out, r)`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from loratools_formats.core.findings import Finding
from loratools_formats.core.kind_shapes import check_shapes
from loratools_formats.core.summary import adapter_line, adapter_table, change_line
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.disk.files import RegularFile

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
    """

    kind: Literal["linear", "conv", "embedding", "experts"]
    kernel: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    transposed_if_square: bool | None = False
    swapped: bool | None = None
    grouped: bool = False


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


@dataclass(frozen=True)
class Replacement:
    """A tensor that takes the place of a base tensor, or of some of its rows.

    Attributes:
        kind: `bias`, `module` (PEFT's modules_to_save), `embedding` (a whole, perhaps resized
            matrix), `token_rows` (the rows listed), or `other` (a base tensor found in the file
            though its config does not mention it; loaders copy it over all the same).
        target: name of the base tensor.
        tensor: the new values.
        rows: for `token_rows`, the rows they go to.
    """

    kind: Literal["bias", "module", "embedding", "token_rows", "other"]
    target: str
    tensor: TensorRef
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Addition:
    """A tensor that is added to a bias or a norm's weight, times the adapter's strength.

    Attributes:
        target: name of the base tensor.
        tensor: what is added.
    """

    target: str
    tensor: TensorRef


@dataclass(frozen=True)
class Dialect:
    """One way of spelling single-file adapters, met in a file.

    Attributes:
        name: what it is called.
        why: what it is recognised by.
        example: a key of the file in that spelling.
        keys: how many are.
    """

    name: str
    why: str
    example: str
    keys: int


@dataclass(frozen=True)
class ExpertLayout:
    """How a file stores the factors of experts.

    Attributes:
        name: `stacked`, `each`, `3d`, `flat-3d`, `shared-outer` or `tinker`.
        described: how they lie and what tells that, for people.
    """

    name: str
    described: str


@dataclass(frozen=True, repr=False)
class Adapter:
    """An adapter read from somewhere, or made by an operation.

    Each tensor of a file is in exactly one of `modules`, `shared`, `additions`, `replacements` and
    `carried`.

    Attributes:
        format: name of the format it was read as.
        source: the path it was read from.
        modules: weight changes by module path, as the base model names it where the format knows.
        shared: tensors that the deltas of several modules are made of, by their key in the file.
        additions: tensors that are added to biases and norms, by their key in the file.
        replacements: tensors that replace base tensors, by their key in the file.
        carried: tensors that are none of these, preserved unchanged, by key.
        config: the format's own configuration, untouched.
        metadata: the weight file's string metadata.
        base_model: the base model's name, if recorded.
        findings: what its reader, and the operations that made it, found worth telling.
        dialects: of a single file, how its keys are spelled.
        attachments: other files to keep beside the output, such as the tokenizer's, by name: a
            path to copy, or the content itself.
        inputs: the files it was read from, the weights first, for digests and the check that
            they did not change.
        other_inputs: files that took part in making it, by their role.
        provenance: how it was made, if an operation made it.
        expert_layout: how its file stores the factors of experts; None if it has none.
        write_as: the layout of experts to write, where a format has several; empty for its usual.
    """

    format: str
    source: Path | None
    modules: Mapping[str, ModuleChange]
    shared: Mapping[str, TensorRef] = field(default_factory=dict)
    additions: Mapping[str, Addition] = field(default_factory=dict)
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    carried: Mapping[str, TensorRef] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    findings: tuple[Finding, ...] = ()
    dialects: tuple[Dialect, ...] = ()
    attachments: Mapping[str, Path | bytes] = field(default_factory=dict)
    inputs: tuple[RegularFile, ...] = field(default=(), compare=False)
    other_inputs: Mapping[str, tuple[RegularFile, ...]] = field(default_factory=dict, compare=False)
    provenance: Mapping[str, Any] | None = None
    expert_layout: ExpertLayout | None = None
    write_as: str = ""

    def __repr__(self) -> str:
        return adapter_line(self)

    def _repr_html_(self) -> str:
        return adapter_table(self)

    @property
    def weights_nbytes(self) -> int:
        """Size of the weight file it was read from; of its tensors if from none."""
        return self.inputs[0].nbytes if self.inputs else sum(t.nbytes for t in self.tensors())

    def tensors(self) -> Iterator[TensorRef]:
        """Yield every tensor of the adapter."""
        for delta in self.modules.values():
            yield from delta.tensors()
        yield from self.shared.values()
        for addition in self.additions.values():
            yield addition.tensor
        for replacement in self.replacements.values():
            yield replacement.tensor
        yield from self.carried.values()

    @property
    def caveats(self) -> tuple[Finding, ...]:
        """The findings of severity `error`: reasons why operations on ΔW refuse the adapter."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def notices(self) -> tuple[Finding, ...]:
        """All other findings."""
        return tuple(finding for finding in self.findings if finding.severity != "error")

    @property
    def remarks(self) -> tuple[str, ...]:
        """The messages of `notices`."""
        return tuple(notice.message for notice in self.notices)

    def require_true_delta(self, operation: str, kept: Collection[str] = ()) -> None:
        """Refuse an adapter whose tensors do not tell its ΔW.

        Args:
            operation: what needs ΔW, for the message.
            kept: codes of findings that do not hinder the operation.

        Raises:
            UnsupportedError: a finding hinders it.
        """
        for caveat in self.caveats:
            if caveat.code not in kept:
                raise UnsupportedError(
                    f"{operation} needs the true weight change: {caveat.message}",
                    path=self.source,
                    hint=caveat.hint or None,
                )

    def check_unchanged(self) -> None:
        """Raise `AdapterError` if an input file was written to since it was opened."""
        for files in (self.inputs, *self.other_inputs.values()):
            for file in files:
                file.check_unchanged()
