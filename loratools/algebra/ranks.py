"""How a module's rank is chosen: rules per module, overrides, and what limits them.

Everything here works on singular values already known; nothing is loaded or written. Ranks that
depend on several modules, budgets above all, are in `budget`.

Rules keep the smallest rank k ≥ 1 such that
  energy E        Σ_{i≤k} σᵢ² ≥ E · Σ σᵢ²
  sv_fro F        ‖ΔW_k‖_F ≥ F · ‖ΔW‖_F, which is energy F²
  sv_cumulative C Σ_{i≤k} σᵢ ≥ C · Σ σᵢ
  sv_ratio R      every σᵢ ≥ σ₁ / R is kept
  threshold       every σᵢ above the Gavish–Donoho threshold is kept (arXiv 1305.5870)
Stacked experts share one rank: the largest that any of them needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools.algebra.median import median
from loratools.algebra.once import once
from loratools.work.declared import option
from loratools.work.regexes import check_regex, is_found
from loratools.work.spellings import share, share_or_nbytes
from loratools.work.typed import check_options
from loratools_formats.disk.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

_PER_CENT = 100
_LIMITS = ("max_rank", "min_rank", "patterns", "uniform", "serve")
"""Fields of `RankRule` that are no rules, and may be set beside one."""
SERVE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM accepts as max_lora_rank (vllm/config/lora.py, 2026)."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one module's ΔW.

    Attributes:
        name: module path.
        shape: (out, in) of one matrix.
        singular_values: (E, r), descending along the last axis; E experts, or 1.
        rank: the module's present rank.
        bytes_per_rank: bytes that one more rank costs in the output.
        tail: (E,): energy of singular values that were not computed, beyond those given; None if
            all were.
        bytes_per_square: bytes that the rank's square costs in the output, where cores take them.
        module: module path, where several spectra of one module are told apart by their names.
    """

    name: str
    shape: tuple[int, int]
    singular_values: Values
    rank: int
    bytes_per_rank: int
    tail: Values | None = None
    bytes_per_square: int = 0
    module: str | None = None

    @property
    def path(self) -> str:
        """Module path, which rank patterns match."""
        return self.name if self.module is None else self.module

    def nbytes(self, rank: int) -> int:
        """Return the bytes that a rank costs in the output."""
        return rank * self.bytes_per_rank + rank * rank * self.bytes_per_square

    @once
    def energies(self) -> Values:
        """(r,): energy σᵢ² summed over experts."""
        total: Values = np.sum(self.singular_values**2, axis=0)
        return total


@dataclass(frozen=True)
class Budget:
    """A size for the output's weight file: a number of bytes, or a share of the input's."""

    nbytes: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `25%`, `12MB`, `800KiB` or a number of bytes.

        >>> Budget.parse("25%")
        Budget(nbytes=None, share=0.25)
        >>> Budget.parse("1.5MB").nbytes
        1500000

        Raises:
            OptionError: none of these, or a share without its `%`.
        """
        share, nbytes = share_or_nbytes(text)
        return cls(nbytes, share)

    def resolve(self, input_nbytes: int) -> int:
        """Return the budget in bytes."""
        if self.nbytes is not None:
            return self.nbytes
        return int((self.share or 0.0) * input_nbytes)


def pattern_rank(text: str) -> tuple[str, int]:
    """Read `REGEX=N`.

    Raises:
        OptionError: no rank after the last `=`, or not a regular expression.
    """
    pattern, separator, rank = text.rpartition("=")
    if not separator or not rank.isascii() or not rank.isdigit():
        raise OptionError("not a rank pattern", got=text, expected="REGEX=N")
    check_regex(pattern)
    return pattern, int(rank)


@dataclass(frozen=True)
class RankRule:
    """How ranks are chosen: by at most one rule, and what limits it.

    Attributes:
        rank: the same rank for every module.
        energy: keep this share of ‖ΔW‖²_F per module, such as 0.9 or 90%.
        sv_ratio: keep singular values down to σ₁/RATIO; at least 1.
        sv_fro: keep this share of ‖ΔW‖_F per module.
        sv_cumulative: keep this share of the sum of singular values per module.
        threshold: keep singular values above the Gavish–Donoho threshold.
        budget: choose ranks with the least error for a size of the whole weight file, such as 25%
            or 12MB.
        max_rank: no rank above this.
        min_rank: no rank below this, unless the module has less.
        patterns: rank of modules whose path matches; the first match decides.
        uniform: give all modules the largest rank chosen.
        serve: use only ranks that vLLM accepts: rounded up, or down where `budget` or `max_rank`
            requires it.

    Raises:
        OptionError: several rules at once, or a value out of range.
    """

    rank: int | None = option(None, heading="Rank", short="-r")
    energy: float | None = option(None, heading="Rank", metavar="SHARE", parse=share)
    sv_ratio: float | None = option(None, heading="Rank", metavar="RATIO")
    sv_fro: float | None = option(None, heading="Rank", metavar="SHARE", parse=share)
    sv_cumulative: float | None = option(None, heading="Rank", metavar="SHARE", parse=share)
    threshold: bool = option(False, heading="Rank", aliases=("--threshold-rank",))
    budget: Budget | None = option(None, heading="Rank", metavar="SIZE", parse=Budget.parse)
    max_rank: int | None = option(None, heading="Rank")
    min_rank: int | None = option(None, heading="Rank")
    patterns: tuple[tuple[str, int], ...] = option(
        (), heading="Rank", name="rank_pattern", metavar="REGEX=N", parse=pattern_rank
    )
    uniform: bool = option(False, heading="Rank")
    serve: bool = option(False, heading="Rank", name="serve_ranks")

    def __post_init__(self) -> None:
        check_options(self)
        chosen = self._rules()
        if len(chosen) > 1:
            raise OptionError("rank rules exclude each other", got=", ".join(chosen))
        for name in ("energy", "sv_fro", "sv_cumulative"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise OptionError(
                    f"{name} is a share",
                    got=value,
                    expected="above 0, at most 1",
                    hint=f"Did you mean {value:g}%?" if 1 < value <= _PER_CENT else None,
                )
        if self.sv_ratio is not None and not self.sv_ratio >= 1:
            raise OptionError("sv_ratio is σ₁/σ_k", got=self.sv_ratio, expected="at least 1")
        ranks = [("rank", self.rank), ("max_rank", self.max_rank), ("min_rank", self.min_rank)]
        ranks += [(f"rank pattern {pattern}", rank) for pattern, rank in self.patterns]
        for name, value in ranks:
            if value is not None and value < 1:
                raise OptionError(f"{name} is too small", got=value, expected="at least 1")
        if (
            self.max_rank is not None
            and self.min_rank is not None
            and self.min_rank > self.max_rank
        ):
            raise OptionError(
                "`min_rank` is above `max_rank`", got=f"{self.min_rank} and {self.max_rank}"
            )
        if self.uniform and self.budget is not None and self.patterns:
            raise OptionError("`uniform=True` with `budget` leaves no place for rank patterns")

    def _rules(self) -> list[str]:
        every = [field.name for field in fields(self) if field.name not in _LIMITS]
        return [name for name in every if getattr(self, name) not in (None, False)]

    @property
    def is_given(self) -> bool:
        """Whether anything decides a rank."""
        return bool(self._rules() or self.patterns or self.max_rank or self.serve)

    def require(self, what: str = "the ranks", hint: str | None = None) -> None:
        """Raise `OptionError` if nothing decides a rank."""
        if not self.is_given:
            expected = "rank, energy, budget or another rule"
            raise OptionError(f"no rule for {what}", expected=expected, hint=hint)

    def decides(self, name: str) -> bool:
        """Return whether it gives a rank to a module that has none of its own."""
        return bool(self._rules() or self.max_rank or self.override(name))

    @property
    def needs_every_value(self) -> bool:
        """Whether the leading singular values are not enough to tell a rank."""
        return self.sv_cumulative is not None or self.threshold

    @property
    def needs_all_spectra(self) -> bool:
        """Whether one module's rank depends on the others'."""
        return self.uniform or self.budget is not None

    def of_module(self, spectrum: Spectrum) -> int:
        """Return the rank of one module, ignoring the other modules."""
        fixed = self.override(spectrum.path)
        if fixed is not None:
            return self.served(min(fixed, spectrum.rank))
        sigma = spectrum.singular_values
        if self.rank is not None:
            wanted = self.rank
        elif self.energy is not None:
            wanted = self._for_energy(spectrum, self.energy)
        elif self.sv_fro is not None:
            wanted = self._for_energy(spectrum, self.sv_fro**2)
        elif self.needs_every_value and spectrum.tail is not None:
            raise OptionError(
                f"the rule needs every singular value of {spectrum.name}, and only the "
                f"{sigma.shape[1]} largest are known",
                hint="Choose ranks with `rank`, `energy` or another rule",
            )
        elif self.sv_cumulative is not None:
            wanted = _most(sigma, lambda s: _reaching(s, self.sv_cumulative or 1.0))
        elif self.sv_ratio is not None:
            wanted = self._for_ratio(spectrum, self.sv_ratio)
        elif self.threshold:
            wanted = _most(sigma, lambda s: int(np.sum(s > gavish_donoho(s, spectrum.shape))))
        else:
            wanted = spectrum.rank
        return self.served(self._clamped(wanted, spectrum))

    def _for_energy(self, spectrum: Spectrum, share: float) -> int:
        energies = spectrum.singular_values**2
        if spectrum.tail is None:
            return _most(energies, lambda row: _reaching(row, share))
        with_tail = np.concatenate([energies, spectrum.tail[:, None]], axis=1)
        wanted = _most(with_tail, lambda row: _reaching(row, share))
        reachable = float(
            np.min(1.0 - with_tail[:, -1] / np.maximum(with_tail.sum(axis=1), 1e-300))
        )
        if wanted > spectrum.rank and self.max_rank is None and reachable < share - 1e-9:
            raise OptionError(
                f"rank {spectrum.rank} keeps only {reachable:.4f} of the energy of {spectrum.name}",
                expected=share,
                hint="Allow higher ranks with `max_rank`, or ask for less",
            )
        return wanted

    def _for_ratio(self, spectrum: Spectrum, ratio: float) -> int:
        sigma, tail = spectrum.singular_values, spectrum.tail
        wanted = _most(sigma, lambda s: _above(s, s[0] / ratio))
        if wanted < sigma.shape[1] or tail is None or self.max_rank is not None:
            return wanted
        limits = sigma[:, 0] / ratio
        if np.any((sigma[:, -1] >= limits) & (np.sqrt(tail) >= limits)):
            raise OptionError(
                f"the {sigma.shape[1]} largest singular values of {spectrum.name} do not fall as "
                f"far as σ₁/{ratio:g}",
                hint="Allow higher ranks with `max_rank`, or ask for less",
            )
        return wanted

    def _clamped(self, wanted: int, spectrum: Spectrum) -> int:
        wanted = max(wanted, self.min_rank or 1)
        return min(wanted, self.max_rank or wanted, spectrum.rank)

    def override(self, name: str) -> int | None:
        """Return the rank that a pattern gives a module, None if none matches."""
        return next((rank for pattern, rank in self.patterns if is_found(pattern, name)), None)

    def served(self, wanted: int) -> int:
        """Return the rank that vLLM accepts for a wanted one, or that one if it does not matter.

        Raises:
            OptionError: it accepts none that large.
        """
        if not self.serve:
            return wanted
        if self.max_rank is None and wanted > SERVE_RANKS[-1]:
            raise OptionError(
                "vLLM accepts no rank that large", got=wanted, expected=f"at most {SERVE_RANKS[-1]}"
            )
        ceiling = SERVE_RANKS[-1] if self.max_rank is None else self.max_rank
        allowed = [rank for rank in SERVE_RANKS if rank <= ceiling]
        return next((rank for rank in allowed if rank >= wanted), allowed[-1])

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise `OptionError` if a pattern matches none of the modules."""
        paths = list(names)
        for pattern, _ in self.patterns:
            if not any(is_found(pattern, path) for path in paths):
                raise OptionError(
                    "rank pattern matches no module", got=pattern, expected=f"such as {paths[0]}"
                )


def _most(rows: Values, rule: Callable[[Values], int]) -> int:
    return max(1, *(rule(row) for row in rows))


def _above(sigma: Values, limit: float) -> int:
    """Return how many values are not zero and at least `limit`."""
    return int(np.sum((sigma >= limit) & (sigma > 0.0)))


def _reaching(parts: Values, share: float) -> int:
    """Return the least k whose first k parts reach the share of the sum; 1 if all are zero.

    >>> _reaching(np.array([3.0, 1.0, 0.0]), 0.75), _reaching(np.array([3.0, 1.0, 0.0]), 0.76)
    (1, 2)
    """
    sums = np.cumsum(parts)
    if share >= 1.0:
        return int(np.count_nonzero(parts)) or 1
    return int(np.searchsorted(sums, share * sums[-1])) + 1


def gavish_donoho(sigma: Values, shape: tuple[int, int]) -> float:
    """Return the optimal hard threshold ω(β)·median(σ) for unknown noise (arXiv 1305.5870, eq. 5).

    β is the aspect ratio of the matrix. The median is taken over the r values that a product of
    rank r can have: the others are zero by construction and say nothing about noise.
    """
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return omega * median(sigma)


def as_options(rule: RankRule) -> Mapping[str, Any]:
    """Return the rule's set fields, for the record of how an output was made."""
    values: dict[str, Any] = {}
    for field in fields(rule):
        value = getattr(rule, field.name)
        if value not in (None, False, ()):
            values[field.name] = value
    if rule.budget is not None:
        values["budget"] = rule.budget.nbytes or f"{(rule.budget.share or 0) * 100:g}%"
    if rule.patterns:
        values["patterns"] = [list(pattern) for pattern in rule.patterns]
    return values
