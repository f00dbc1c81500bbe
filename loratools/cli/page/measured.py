"""The pages of `spectrum` and `compare`."""

from __future__ import annotations

from loratools.algebra.outliers import family_of, layer_of
from loratools.cli.page.parts import (
    Cell,
    Line,
    chart,
    dendrogram,
    findings,
    heatmap,
    numbers,
    section,
    table,
)
from loratools.operations.compare.result import CompareResult
from loratools.operations.spectrum.result import MatrixReport, SpectrumResult

_HEADER = ["module", "rank", "‖ΔW‖", "σ₁", "stable rank", "effective rank", "90 %", "95 %", "99 %"]
_HEADER += ["knee", "‖ΔW‖/‖W‖", "intruders", "undetermined", "family z"]


def spectrum_sections(result: SpectrumResult) -> list[str]:
    """Return what `spectrum` found, findings first."""
    overview = [
        ("modules", str(len(result.matrices))),
        ("‖ΔW‖", f"{result.frobenius:.4g}"),
        ("weight file", f"{result.bytes_in:,} bytes"),
        ("findings", str(len(result.findings))),
    ]
    parts = [
        section("Overview", numbers(overview)),
        section("What stands out", findings([(f.kind, f.name, f.text) for f in result.findings])),
        section("Strength", _strength(result)),
        section("Spectra", _spectra(result)),
    ]
    if result.choices:
        rows: list[list[Cell]] = [
            [str(c.rank), c.nbytes, c.energy, c.relative_error] for c in result.choices
        ]
        curve = Line("all modules", [(c.rank, c.relative_error) for c in result.choices])
        parts.append(
            section(
                "Rank and error",
                chart("Relative error of each rank, in the table below", "rank", "error", [curve]),
                table("Rank, size and error", ["rank", "bytes", "energy", "error"], rows),
            )
        )
    modules = table("All modules", _HEADER, [_row(m) for m in result.matrices], filtered=True)
    return [*parts, section("Modules", modules)]


def _row(matrix: MatrixReport) -> list[Cell]:
    values, base = matrix.measures, matrix.base
    if values is None:
        return [matrix.label, matrix.rank, *[None] * (len(_HEADER) - 2)]
    return [
        matrix.label,
        matrix.rank,
        values.frobenius,
        values.spectral,
        values.stable_rank,
        values.effective_rank,
        *values.energy_ranks,
        values.knee,
        None if base is None else base.relative_change,
        None if base is None else base.intruders,
        None if base is None else base.undetermined,
        matrix.family_score,
    ]


def _strength(result: SpectrumResult) -> str:
    """Return ‖ΔW‖ by layer and kind of module."""
    layers, kinds = list(result.layers), list(result.families)
    squares: dict[tuple[str, str], float] = {}
    for matrix in result.matrices:
        if matrix.measures is not None:
            key = layer_of(matrix.name), family_of(matrix.name)
            squares[key] = squares.get(key, 0.0) + matrix.measures.frobenius**2
    largest = max(squares.values(), default=0.0) ** 0.5
    cells = [
        [squares[layer, kind] ** 0.5 if (layer, kind) in squares else None for layer in layers]
        for kind in kinds
    ]
    return heatmap("‖ΔW‖ by kind of module and layer", kinds, layers, cells, largest)


def _spectra(result: SpectrumResult) -> str:
    lines = [
        Line(matrix.label, list(enumerate(matrix.singular_values, 1)))
        for matrix in result.matrices
        if matrix.finite
    ]
    caption = "Singular values of all modules on one scale; --json lists them"
    return chart(caption, "index", "σ", lines, log_y=True)


def compare_sections(result: CompareResult) -> list[str]:
    """Return what `compare` found."""
    names = [result.names[i] for i in result.order]
    cosines = [[result.cosines[i][j] for j in result.order] for i in result.order]
    groups = [("near-duplicates", *pair) for pair in result.duplicates]
    found = [
        (kind, one, f"and {other} have a cosine of at least 0.99") for kind, one, other in groups
    ]
    for kind, sets in (("family", result.families), ("same start", result.lineages)):
        found += [(kind, members[0], ", ".join(members[1:])) for members in sets]
    parts = [
        section("What stands out", findings(found)),
        section(
            "Similarity",
            heatmap("Cosines of ΔW, in the order of the tree", names, names, cosines, 1.0),
            dendrogram(
                "Average linkage of 1 − cosine, from 0 at the names to the largest distance",
                result.names,
                result.order,
                result.merges,
            ),
        ),
    ]
    if result.modules:
        header = ["module", "cosine", "output overlap", "input overlap", "sign conflict", "moved"]
        rows: list[list[Cell]] = [
            [m.name, m.cosine, m.output_overlap, m.input_overlap, m.sign_conflict, m.moved]
            for m in result.modules
        ]
        parts.append(section("Modules", table("All modules", header, rows, filtered=True)))
    if result.unmatched:
        left: list[list[Cell]] = [
            [u.name, ", ".join(u.adapters), u.reason] for u in result.unmatched
        ]
        parts.append(
            section("Not compared", table("Not compared", ["module", "adapters", "why"], left))
        )
    return parts
