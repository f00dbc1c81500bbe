"""What a merge does, apart from the adapters and their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loratools.algebra.ranks import RankRule, as_options
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge.module import Space
from loratools.work.declared import declared, option
from loratools.work.regexes import check_regex
from loratools.work.selection import Dropping
from loratools.work.spellings import key_value, share
from loratools_formats.disk.errors import OptionError


@dataclass(frozen=True)
class Override:
    """Other weights or parameters for the modules whose path a regular expression finds.

    Attributes:
        match: the regular expression.
        weights: one for all adapters or one each; None to leave them.
        parameters: of the method, over the general ones.

    Raises:
        OptionError: `match` is no regular expression.
    """

    match: str
    weights: tuple[float, ...] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_regex(self.match)

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        values: dict[str, Any] = {"match": self.match}
        if self.weights is not None:
            values["weights"] = list(self.weights)
        if self.parameters:
            values["parameters"] = dict(self.parameters)
        return values


def weight_override(option: str) -> Override:
    """Read `REGEX=W` or `REGEX=W,W,…`.

    Raises:
        OptionError: no numbers after the last `=`.
    """
    pattern, separator, numbers = option.rpartition("=")
    try:
        weights = tuple(float(number) for number in numbers.split(","))
    except ValueError:
        weights = ()
    if not separator or not weights or not all(map(math.isfinite, weights)):
        raise OptionError("not a weight pattern", got=option, expected="REGEX=W or REGEX=W,W,…")
    return Override(pattern, weights)


@dataclass(frozen=True)
class Parameters:
    """Parameters of merge methods; which of them a method has, `loratools methods` lists.

    Attributes:
        density: share of entries kept.
        lambda_: a factor by which the result is multiplied.
        majority_sign: how the sign of an entry is elected: by total or by frequency.
        flavor: the author or program whose definition of the method is used, where they differ.
        normalize: divide the result of `linear` by the sum of the weights.
        set_: any parameter of the method.
    """

    density: float | None = option(None, heading="Method", parse=share)
    lambda_: float | None = option(None, heading="Method")
    majority_sign: Literal["total", "frequency"] | None = option(None, heading="Method")
    flavor: Literal["peft", "paper", "mergekit"] | None = option(None, heading="Method")
    normalize: bool = option(False, heading="Method")
    set_: tuple[tuple[str, Any], ...] = option(
        (),
        heading="Method",
        aliases=("-p", "--param"),
        metavar="KEY=VALUE",
        parse=key_value,
    )

    def given(self) -> dict[str, Any]:
        """Return the parameters that are set, by the names that users type."""
        named = {
            made.name.rstrip("_"): getattr(self, made.field)
            for made in declared(type(self))
            if not made.multiple and getattr(self, made.field) not in (None, False)
        }
        return named | {key.replace("-", "_"): value for key, value in self.set_}


@dataclass(frozen=True)
class MergeOptions:
    """What to do, apart from the adapters and their weights.

    Attributes:
        method: name of the merge method; `loratools methods` lists them.
        parameters: of the method.
        rule: how ranks are chosen; without one, span methods keep the sum's rank, core methods
            theirs, and elementwise methods get the largest rank of the inputs.
        compute: how to compute and store.
        dropping: which modules leave the adapters.
        space: where elementwise methods work: on full weights (full), or in the space that the
            factors share (core), which is cheap, of low rank, and another method than on full
            weights.
        overrides: weights in modules whose path matches, one for all adapters or one each; the
            first match decides.
        replacements: which saved module to take where adapters differ: first, average or an
            adapter's name.
        linear_differences: add up full differences, and changes of biases and norms, by their
            weights, although the method is not a weighted sum.
        force_base: merge adapters that name different base models.
        allow_missing: merge adapters that share few modules or none; what one lacks counts as zero.
    """

    method: str = option("linear", heading="Method")
    parameters: dict[str, Any] = field(default_factory=dict)
    rule: RankRule = field(default_factory=RankRule)
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    dropping: Dropping = field(default_factory=Dropping)
    space: Space = option("full", heading="Method")
    overrides: tuple[Override, ...] = option(
        (),
        heading="Method",
        name="weight_pattern",
        metavar="REGEX=W[,W...]",
        parse=weight_override,
    )
    replacements: str | None = option(None, heading="Method", metavar="WHICH")
    linear_differences: bool = option(False, heading="Method")
    force_base: bool = option(False, heading="Input")
    allow_missing: bool = option(False, heading="Input")

    def record(self) -> dict[str, Any]:
        """Return what determines the output's bytes, for its provenance."""
        values: dict[str, Any] = {
            "method": self.method,
            "parameters": dict(self.parameters),
            "space": self.space,
            "rule": as_options(self.rule),
            "seed": self.compute.seed,
            "power_iterations": self.compute.power_iterations,
            "compute": self.compute.record(),
        }
        if self.overrides:
            values["overrides"] = [override.record() for override in self.overrides]
        if self.linear_differences:
            values["linear_differences"] = True
        if self.replacements is not None:
            values["replacements"] = self.replacements
        return values
