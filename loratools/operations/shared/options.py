"""How adapters are brought into shared bases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from loratools.work.declared import option
from loratools.work.typed import check_options
from loratools_formats.disk.errors import OptionError

Cores = Literal["full", "diagonal", "principal"]
Weigh = Literal["adapter", "module", "norm"]

RANK_OPTIONS = (
    "rank",
    "energy",
    "sv_fro",
    "budget",
    "max_rank",
    "min_rank",
    "rank_pattern",
    "uniform",
    "serve_ranks",
)
"""The rules for ranks that say something of a basis; the others count singular values of one ΔW."""


def cluster_count(text: str) -> int | None:
    """Read `auto`, which is None, or a number.

    Raises:
        OptionError: neither.
    """
    if text.strip().lower() == "auto":
        return None
    if not text.strip().isascii() or not text.strip().isdigit():
        raise OptionError("not a number of groups", got=text, expected="auto or a whole number")
    return int(text)


@dataclass(frozen=True)
class ShareOptions:
    """How to share.

    Attributes:
        cores: full (JD-Full), diagonal (JD-Diag) or principal (full cores in the leading principal
            directions, without iterations).
        clusters: number of groups, each with its own bases; auto chooses the number that keeps most
            within the `budget`, or that keeps the `energy` (90% by default) in the fewest bytes.
        weigh: the error to minimise: the sum over each adapter's relative error (adapter), over
            that of each module (module), or the error itself (norm).
        force_base: share adapters that name different base models.
        allow_missing: share adapters that have few modules in common or none.

    Raises:
        OptionError: a number out of range.
    """

    cores: Cores = option("full", heading="Method")
    clusters: int | None = option(None, heading="Method", metavar="auto|K", parse=cluster_count)
    weigh: Weigh = option("adapter", heading="Method")
    force_base: bool = option(False, heading="Input")
    allow_missing: bool = option(False, heading="Input")

    def __post_init__(self) -> None:
        check_options(self)
        if self.clusters is not None and self.clusters < 1:
            raise OptionError("too few groups", got=self.clusters, expected="auto, or at least 1")

    def record(self) -> dict[str, Any]:
        """Return what determines the output's bytes, for its provenance."""
        return {"cores": self.cores, "clusters": self.clusters or "auto", "weigh": self.weigh}
