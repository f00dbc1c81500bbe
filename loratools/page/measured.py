"""The pages of `spectrum` and `compare`."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.algebra.outliers import family_of, layer_of
from loratools.operations.compare.result import BasesResult, CompareResult
from loratools.operations.spectrum.result import MatrixReport, SpectrumResult
from loratools.page.generic import by_layers, error_curve
from loratools.page.parts import (
    Cell,
    Chart,
    Findings,
    Heatmap,
    Line,
    Numbers,
    Part,
    Section,
    Table,
    Tree,
)
from loratools_formats.core.findings import Finding

_HEADER = ["module", "rank", "‖ΔW‖", "σ₁", "stable rank", "effective rank", "90 %", "95 %", "99 %"]
_HEADER += ["knee", "Gavish–Donoho", "family z"]
_BASE_HEADER = ["‖ΔW‖/‖W‖", "amplification", "intruders", "undetermined", "ΔM", "ΔD"]
_PAIR_HEADER = ["module", "cosine", "‖ΔW₁‖", "‖ΔW₂‖", "output overlap", "at random"]
_PAIR_HEADER += ["input overlap", "at random", "sign conflict", "of this cosine", "moved"]
_PAIR_HEADER += ["moved in direction", "linear loss 1", "linear loss 2"]
_PAIR_HEADER += ["TIES loss 1", "TIES loss 2"]


def spectrum_sections(result: SpectrumResult) -> list[Section]:
    """Return what `spectrum` found, findings first."""
    overview = [
        ("modules", str(len(result.matrices))),
        ("‖ΔW‖", f"{result.frobenius:.4g}"),
        ("weight file", f"{result.bytes_in:,} bytes"),
        ("findings", str(len(result.findings))),
    ]
    found = [(finding.kind, finding.name, finding.text) for finding in result.findings]
    parts = [
        Section("Overview", [Numbers(overview)]),
        Section("What stands out", [Findings(found)]),
        *_notes(result.notices),
        Section("Strength", [_strength(result)]),
        Section("Spectra", [_spectra(result)]),
    ]
    if result.choices:
        parts.append(Section("Rank and error", _ranks(result)))
    with_base = any(matrix.base is not None for matrix in result.matrices)
    header = [*_HEADER, *(_BASE_HEADER if with_base else [])]
    rows = [_row(matrix, with_base) for matrix in result.matrices]
    return [*parts, Section("Modules", [Table("All modules", header, rows, filtered=True)])]


def _notes(notices: Sequence[Finding]) -> list[Section]:
    items = [(each.code, "", each.message) for each in notices]
    return [Section("Notes", [Findings(items)])] if items else []


def _ranks(result: SpectrumResult) -> list[Part]:
    rows: list[list[Cell]] = [
        [str(c.rank), c.nbytes, c.energy, c.relative_error] for c in result.choices
    ]
    curve = error_curve([(choice.rank, choice.relative_error) for choice in result.choices])
    parts: list[Part] = [
        curve,
        Table("Rank, size and error", ["rank", "bytes", "energy", "error"], rows),
    ]
    if result.suggestions:
        rules: list[list[Cell]] = [
            [s.rule, min(s.ranks.values()), max(s.ranks.values()), s.nbytes, s.relative_error]
            for s in result.suggestions
        ]
        header = ["ranks by", "least rank", "largest rank", "bytes", "error"]
        parts.append(Table("Ranks that rules would choose", header, rules))
    return parts


def _row(matrix: MatrixReport, with_base: bool) -> list[Cell]:
    values, base = matrix.measures, matrix.base
    width = len(_HEADER) + (len(_BASE_HEADER) if with_base else 0)
    if values is None:
        return [matrix.label, matrix.rank, *[None] * (width - 2)]
    cells: list[Cell] = [
        matrix.label,
        matrix.rank,
        values.frobenius,
        values.spectral,
        values.stable_rank,
        values.effective_rank,
        *values.energy_ranks,
        values.knee,
        values.threshold_rank,
        matrix.family_score,
    ]
    if base is not None:
        cells += [base.relative_change, base.amplification, base.intruders, base.undetermined]
        cells += [base.magnitude_change, base.direction_change]
    return [*cells, *[None] * (width - len(cells))]


def _strength(result: SpectrumResult) -> Heatmap:
    """Return ‖ΔW‖ by layer and kind of module."""
    squares: dict[tuple[str, str], float] = {}
    for matrix in result.matrices:
        if matrix.measures is not None:
            key = family_of(matrix.name), layer_of(matrix.name)
            squares[key] = squares.get(key, 0.0) + matrix.measures.frobenius**2
    norms = {key: value**0.5 for key, value in squares.items()}
    return by_layers("‖ΔW‖ by kind of module and layer", norms)


def _spectra(result: SpectrumResult) -> Chart:
    lines = [
        Line(
            matrix.label,
            [(float(index), value) for index, value in enumerate(matrix.singular_values, 1)],
            family_of(matrix.name),
        )
        for matrix in result.matrices
        if matrix.finite
    ]
    caption = "Singular values of all modules on one scale, coloured by kind of module"
    return Chart(caption, "index", "σ", lines, log_y=True)


def compare_sections(result: CompareResult) -> list[Section]:
    """Return what `compare` found, findings first."""
    overview = [
        ("adapters", str(len(result.names))),
        ("modules not compared", str(len(result.unmatched))),
        ("families", str(len(result.families))),
        ("near-duplicates", str(len(result.duplicates))),
        ("same start", str(len(result.lineages))),
    ]
    if len(result.names) == 2:
        overview += [
            ("cosine of ΔW", _shown(result.cosines[0][1])),
            ("cosine of A", _shown(result.a_cosines[0][1])),
        ]
    found = [
        ("near-duplicates", one, f"and {other} have a cosine of at least 0.99")
        for one, other in result.duplicates
    ]
    for kind, sets in (("family", result.families), ("same start", result.lineages)):
        found += [(kind, members[0], ", ".join(members[1:])) for members in sets]
    parts = [
        Section("Overview", [Numbers(overview)]),
        Section("What stands out", [Findings(found)]),
        *_notes(result.findings),
        Section("Similarity", _similarity(result)),
    ]
    if result.modules:
        rows = [
            [
                m.name, m.cosine, *m.norms, m.output_overlap, m.output_overlap_random,
                m.input_overlap, m.input_overlap_random, m.sign_conflict, m.sign_conflict_expected,
                m.moved, m.moved_direction, *m.linear_losses, *m.ties_losses,
            ]
            for m in result.modules
        ]  # fmt: skip
        table = Table("All modules", _PAIR_HEADER, rows, filtered=True)
        parts.append(Section("Modules", [table]))
    if result.unmatched:
        left = [[one.name, ", ".join(one.adapters), one.reason] for one in result.unmatched]
        table = Table("Not compared", ["module", "adapters", "why"], left, filtered=len(left) > 5)
        parts.append(Section("Not compared", [table]))
    return parts


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _similarity(result: CompareResult) -> list[Part]:
    names = [result.names[i] for i in result.order]
    cosines = [[result.cosines[i][j] for j in result.order] for i in result.order]
    parts: list[Part] = [
        Heatmap("Cosines of ΔW, in the order of the tree", names, names, cosines, 1.0, places=2),
    ]
    if len(names) > 2:
        caption = "Average linkage of 1 − cosine, from 0 at the names to the largest distance"
        parts.append(Tree(caption, result.names, result.order, result.merges))
    for caption, values in (
        ("Cosines of the A factors as stored", result.a_cosines),
        ("Overlaps of the spaces of A, above those of random spaces", result.a_overlaps),
    ):
        if any(value is not None for row in values for value in row):
            cells = [[values[i][j] for j in result.order] for i in result.order]
            parts.append(Heatmap(caption, names, names, cells, 1.0, places=2))
    rows: list[list[Cell]] = [
        [result.names[i], result.norms[i], result.linear_losses[i]] for i in result.order
    ]
    return [*parts, Table("Adapters", ["adapter", "‖ΔW‖", "loss in an even merge"], rows)]


def bases_sections(result: BasesResult) -> list[Section]:
    """Return how far two bases differ where an adapter acts."""
    header = ["module", "‖W₁−W₀‖/‖W₀‖", "where ΔW writes", "where ΔW reads"]
    header += ["‖P(W₁−W₀)‖ where ΔW writes", "both, over ‖ΔW‖"]
    rows: list[list[Cell]] = [
        [m.name, m.relative, m.outputs, m.inputs, m.projected, m.against_change]
        for m in result.modules
    ]
    writes: dict[tuple[str, str], float] = {}
    for module in result.modules:
        key = family_of(module.name), layer_of(module.name)
        writes[key] = max(writes.get(key, 0.0), module.outputs or 0.0)
    return [
        *_notes(result.findings),
        Section("Where ΔW writes", [by_layers("Difference of the bases there", writes)]),
        Section("Modules", [Table("All modules", header, rows, filtered=True)]),
    ]
