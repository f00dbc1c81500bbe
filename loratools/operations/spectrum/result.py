"""What `spectrum` returns."""

from __future__ import annotations

from dataclasses import dataclass

from loratools.algebra.budget import RankChoice
from loratools.algebra.measures import SpectrumMeasures
from loratools.work.json_object import named, spread
from loratools_formats.core.findings import Finding


@dataclass(frozen=True)
class BaseMeasures:
    """One matrix beside its base weight W.

    Attributes:
        relative_change: ‖ΔW‖_F/‖W‖_F; None if W is zero.
        relative_spectral: σ₁(ΔW)/σ₁(W); None if W is zero.
        amplification: ‖ΔW‖_F/‖UᵀWV‖_F, U and V the singular bases of ΔW; None if W is zero there.
        leading: singular vectors of W + ΔW that were examined.
        intruders: those that are intruder dimensions.
        undetermined: those that the bounds leave open.
        cosines: of each, the largest |cos| with a left singular vector of W (with a known one,
            where `exact` is false).
        exact: whether the cosines are exact, by W's whole SVD.
        magnitude_change: Σ|‖W'ᵢ‖ − ‖Wᵢ‖|/k over the k outputs i (ΔM of arXiv 2402.09353).
        direction_change: Σ(1 − cos(W'ᵢ, Wᵢ))/k over outputs (ΔD).
    """

    relative_change: float | None
    relative_spectral: float | None
    amplification: float | None
    leading: int
    intruders: int
    undetermined: int
    cosines: tuple[float, ...]
    exact: bool
    magnitude_change: float
    direction_change: float


@dataclass(frozen=True)
class MatrixReport:
    """One matrix of the adapter: a module, or one expert of a stack.

    Attributes:
        name: module path.
        expert: which of stacked experts; None of a module that has one matrix.
        kind: `lora`, `dora`, or another kind's name.
        layer: `linear`, `conv`, `embedding` or `experts`.
        shape: (out, in).
        rank: of the factors in the file; None of a kind that has none.
        alpha: as the file states it.
        scale: that multiplies the factors.
        finite: False if the factors hold NaN or infinite values, and nothing else is known.
        singular_values: descending, of ΔW with its scale; the leading 256 where ΔW is of full rank.
        measures: what they tell; None if not finite.
        tail: share of ‖ΔW‖²_F in singular values that were not computed.
        balance: ‖b‖_F/‖a‖_F of the stored factors; None if a is zero or there are none.
        dead_ranks: components of the factors that are exactly zero.
        row_concentration: of the energy of outputs, over that of random singular vectors.
        column_concentration: of the energy of inputs.
        kurtosis: of all entries; None unless asked for.
        random_kurtosis: its mean for random singular vectors.
        family_score: robust z of log ‖ΔW‖ against the family's trend over depth; None in families
            of fewer than five.
        base: beside the base weight; None without a base.
        reference_scores: z-scores against known adapters, by measure; None unless asked for.
    """

    name: str
    expert: int | None
    kind: str
    layer: str
    shape: tuple[int, int]
    rank: int | None
    alpha: float | None
    scale: float | None
    finite: bool
    singular_values: tuple[float, ...] = ()
    measures: SpectrumMeasures | None = spread(default=None)
    tail: float = 0.0
    balance: float | None = None
    dead_ranks: int = 0
    row_concentration: float | None = None
    column_concentration: float | None = None
    kurtosis: float | None = None
    random_kurtosis: float | None = None
    family_score: float | None = None
    base: BaseMeasures | None = None
    reference_scores: dict[str, float] | None = None

    @property
    def label(self) -> str:
        """The module's path, with the expert's number in brackets."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Ranks that a rule would choose, and what they would cost and lose.

    Attributes:
        rule: in the words of the command line.
        ranks: by module.
        nbytes: size of the weight file.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ before rounding.
    """

    rule: str
    ranks: dict[str, int]
    nbytes: int = named("bytes")
    relative_error: float


@dataclass(frozen=True)
class Observation:
    """Something that stands out in an adapter: a statistic, and no verdict.

    Attributes:
        kind: what, in one word.
        name: the module, with the expert's number in brackets.
        text: a sentence with the numbers.
    """

    kind: str
    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class SpectrumResult:
    """Everything `loratools spectrum` shows.

    Attributes:
        source: where the adapter was read from.
        matrices: one report each, in path order.
        findings: what stands out, the gravest kinds first.
        choices: rank → size → error, as `squeeze` shows it; empty if the ranks cannot be chosen.
        suggestions: what rules for ranks would give.
        layers: ‖ΔW‖_F of each layer, by the first part of its modules' paths that is a number;
            "" for modules of none.
        families: ‖ΔW‖_F of each type of module, numbers in its path replaced by `*`.
        frobenius: ‖ΔW‖_F over everything.
        bytes_in: size of the weight file.
        directional: whether DoRA modules are given by their directions, since there is no base.
        notices: what a user should know besides.
    """

    source: str | None
    matrices: tuple[MatrixReport, ...] = named("modules")
    findings: tuple[Observation, ...]
    choices: tuple[RankChoice, ...]
    suggestions: tuple[Suggestion, ...]
    layers: dict[str, float]
    families: dict[str, float]
    frobenius: float
    bytes_in: int
    directional: bool
    notices: tuple[Finding, ...]
