"""z-scores of an adapter's measures among those of known adapters, module by module.

Statistics, never a verdict: a score says how many standard deviations of the references a measure
is from their mean, and nothing about why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loratools.algebra.measures import SpectrumMeasures, measures
from loratools.folding.expert_sides import straight_beside
from loratools.folding.thin_modules import ThinModules
from loratools.operations.spectrum.result import MatrixReport
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.files import read_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, MissingFileError, UnknownFormatError

LEAST_REFERENCES = 3


def read_references(folder: Path, adapter: Adapter) -> tuple[list[Adapter], list[Finding]]:
    """Return the adapters in a folder, but not the one to score, and findings on what is none.

    Raises:
        MissingFileError: there is no such folder.
        AdapterError: there are fewer than three, or one is malformed.
    """
    if not folder.is_dir():
        raise MissingFileError("no folder of adapters", path=folder)
    own = None if adapter.source is None else os.path.realpath(adapter.source)
    found: list[Adapter] = []
    others: list[Finding] = []
    for child in sorted(folder.iterdir()):
        if child.name.startswith(".") or os.path.realpath(child) == own:
            continue
        try:
            found.append(read_adapter(child))
        except UnknownFormatError:
            message = (
                f"{child.name} in {folder} is not an adapter, and is left out of the comparison"
            )
            others.append(Finding("no-reference", "note", child.name, message))
    if len(found) < LEAST_REFERENCES:
        raise AdapterError(
            "too few adapters to compare with",
            path=folder,
            got=len(found),
            expected=f"at least {LEAST_REFERENCES}",
        )
    return found, others


def reference_scores(
    matrices: Sequence[MatrixReport], references: Sequence[Adapter], base: Checkpoint | None
) -> list[MatrixReport]:
    """Return the reports with z-scores: (x − mean)/s, s the references' sample deviation.

    The logarithms of norms, the share of energy in σ₁, and effective and stable rank are scored.
    Modules that fewer than three references have, and measures that do not vary, have no score.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for adapter in references:
        for label, values in _measured(adapter, base):
            found.setdefault(label, []).append(_scored(values))
    return [_with_scores(matrix, found.get(matrix.label, [])) for matrix in matrices]


def _measured(adapter: Adapter, base: Checkpoint | None) -> Iterator[tuple[str, SpectrumMeasures]]:
    opener = ThinModules(straight_beside(adapter, base), base, "spectrum")
    for name in opener.modules:
        module = opener.open(name)
        for index, thin in enumerate(module.matrices):
            label = f"{name}[{index}]" if module.layer.kind == "experts" else name
            yield label, measures(thin.singular_values, module.shape, thin.tail)


def _scored(values: SpectrumMeasures) -> dict[str, float]:
    if values.frobenius == 0.0:
        return {}
    return {
        "log_frobenius": float(np.log(values.frobenius)),
        "log_spectral": float(np.log(values.spectral)),
        "top_share": values.top_share,
        "effective_rank": values.effective_rank,
        "stable_rank": values.stable_rank,
    }


def _with_scores(matrix: MatrixReport, known: Sequence[dict[str, float]]) -> MatrixReport:
    if matrix.measures is None:
        return matrix
    scores = {}
    for measure, value in _scored(matrix.measures).items():
        sample = np.array([values[measure] for values in known if measure in values])
        if len(sample) >= LEAST_REFERENCES:
            spread = float(sample.std(ddof=1))
            if spread > 1e-12 * max(abs(float(sample.mean())), 1.0):
                scores[measure] = (value - float(sample.mean())) / spread
    return replace(matrix, reference_scores=scores)
