"""What `compare` returns."""

from __future__ import annotations

from dataclasses import dataclass

from loratools_formats.core.findings import Finding


@dataclass(frozen=True)
class PairModule:
    """One module of two adapters.

    Attributes:
        name: module path.
        cosine: of the two changes; None if one is zero, as all that needs an angle.
        norms: ‖ΔW₁‖_F and ‖ΔW₂‖_F.
        norm_ratio: ‖ΔW₂‖_F/‖ΔW₁‖_F; None if the first is zero.
        moved: ‖ΔW₂ − ΔW₁‖/‖ΔW₁‖.
        moved_direction: share of ‖ΔW₂ − ΔW₁‖² that is of direction, 2‖ΔW₁‖‖ΔW₂‖(1 − cos); the rest,
            (‖ΔW₂‖ − ‖ΔW₁‖)², is of magnitude. None if nothing moved.
        a_change: ‖A₂ − A₁‖/‖A₁‖ of the factors as stored, over the leading rows that both have;
            None where there are no factors.
        output_overlap: of the column spaces, in [0, 1].
        output_overlap_random: its mean for random spaces of these dimensions.
        input_overlap: of the row spaces.
        input_overlap_random: its mean for random spaces.
        output_angles: principal angles of the column spaces in degrees, smallest, median, largest.
        input_angles: of the row spaces.
        sign_conflict: share of entries of opposite sign.
        sign_conflict_interval: 95 % interval; both ends equal it where every entry was seen.
        sign_conflict_expected: arccos(cos)/π, which Gaussian entries of this cosine would have.
        linear_losses: ‖(ΔW₁ + ΔW₂)/2 − ΔWᵢ‖/‖ΔWᵢ‖ of each.
        ties_losses: the loss of each in a merge by TIES at density 0.2, from the entries seen.
    """

    name: str
    cosine: float | None
    norms: tuple[float, float]
    norm_ratio: float | None
    moved: float | None
    moved_direction: float | None
    a_change: float | None
    output_overlap: float
    output_overlap_random: float
    input_overlap: float
    input_overlap_random: float
    output_angles: tuple[float, float, float]
    input_angles: tuple[float, float, float]
    sign_conflict: float
    sign_conflict_interval: tuple[float, float]
    sign_conflict_expected: float | None
    linear_losses: tuple[float | None, float | None]
    ties_losses: tuple[float | None, float | None]


@dataclass(frozen=True)
class Unmatched:
    """A module that was not compared.

    Attributes:
        name: module path.
        adapters: names of the adapters that have it.
        reason: why.
    """

    name: str
    adapters: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class CompareResult:
    """Everything `loratools compare` shows of N adapters.

    Attributes:
        names: of the adapters, in the order given.
        sources: where they were read from.
        norms: ‖ΔW‖_F of each, over the modules compared.
        cosines: N×N over the modules that both have; None where one is zero or they share none.
        whole_cosines: N×N over everything, a module that one lacks counting as zero.
        a_cosines: N×N cosine of the stored A factors over the leading rows that both have; None
            where there are none.
        a_overlaps: N×N share of the smaller space of A's rows that lies within the larger, less
            what random spaces share, averaged over modules; None where these share over half.
        a_random: typical size of `a_cosines` of independent initialisations: 1/√(numbers in the
            rows that all have).
        shared: N×N number of modules both have.
        merges: average-linkage merges on 1 − cosine, as rows (cluster, cluster, distance, size).
        order: adapters in the order of the tree.
        families: groups closer than cosine 0.5 on average, by names.
        duplicates: pairs of cosine at least 0.99.
        lineages: groups joined by cosines or overlaps of A of at least 0.5.
        modules: of two adapters, each module both have; empty for more.
        unmatched: what was not compared.
        linear_losses: ‖mean − ΔWᵢ‖/‖ΔWᵢ‖ of each adapter in an even linear merge of all.
        findings: what a user should know.
    """

    names: tuple[str, ...]
    sources: tuple[str | None, ...]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    whole_cosines: tuple[tuple[float | None, ...], ...]
    a_cosines: tuple[tuple[float | None, ...], ...]
    a_overlaps: tuple[tuple[float | None, ...], ...]
    a_random: float | None
    shared: tuple[tuple[int, ...], ...]
    merges: tuple[tuple[float, ...], ...]
    order: tuple[int, ...]
    families: tuple[tuple[str, ...], ...]
    duplicates: tuple[tuple[str, str], ...]
    lineages: tuple[tuple[str, ...], ...]
    modules: tuple[PairModule, ...]
    unmatched: tuple[Unmatched, ...]
    linear_losses: tuple[float | None, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class BasesModule:
    """How far two bases differ at one module.

    Attributes:
        name: module path, with the expert's number in brackets.
        relative: ‖W₁ − W₀‖/‖W₀‖.
        outputs: ‖UUᵀ(W₁ − W₀)‖/‖UUᵀW₀‖, U the space of outputs that ΔW writes to.
        inputs: ‖(W₁ − W₀)VVᵀ‖/‖W₀VVᵀ‖, V the space of inputs that ΔW reads from.
        projected: ‖UUᵀ(W₁ − W₀)‖.
        against_change: ‖UUᵀ(W₁ − W₀)VVᵀ‖/‖ΔW‖, where ΔW acts, against its own size.
    """

    name: str
    relative: float | None
    outputs: float | None
    inputs: float | None
    projected: float
    against_change: float | None


@dataclass(frozen=True)
class BasesResult:
    """How far two bases differ where an adapter acts.

    Attributes:
        source: where the adapter was read from.
        modules: each that both bases have.
        findings: modules left out, and why.
    """

    source: str | None
    modules: tuple[BasesModule, ...]
    findings: tuple[Finding, ...]
