"""What serving programs accept, from a dated table: `targets.toml`."""

from __future__ import annotations

import difflib
import functools
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from loratools.work.typed import converted, hints
from loratools_formats.disk.errors import OptionError

Support = Literal["yes", "refused", "ignored", "unknown"]
"""What a program does with a part of an adapter: uses it, stops with an error, drops it without
one, or nobody has looked."""


@dataclass(frozen=True)
class Target:
    """A program that serves adapters.

    Attributes:
        name: what users type.
        title: what it is called.
        version: that the facts are about.
        checked: the day when they were read or run.
        source: where.
        formats: that it loads, the best first.
        kinds: of adapters that it applies.
        other_kinds: what it does with others.
        ranks: that it can be started for; empty if any will do.
        least_rank: that it takes.
        default_rank: the largest that it takes without a flag; None if there is no limit.
        rank_flag: the flag for larger ones.
        scales: whether each module has its own scale, or all have α/r of the configuration.
        mixed_ranks: what it does with modules of different ranks.
        rslora: what it does with rank-stabilised scales.
        replacements: what it does with whole tensors that replace the base's.
        token_rows: what it does with trained token rows.
        embeddings: what it does with factors of embeddings.
        experts: what it does with factors of stacked experts.
        convolutions: what it does with factors of convolutions.
        biases: what it does with trained biases.
        pickles: what it does with pickled weights.
        modules: last parts of module names that it adapts; empty if the model decides.
        retired: why nothing can be loaded any more; empty if that is not so.
    """

    name: str
    title: str
    version: str
    checked: str
    source: str
    formats: tuple[str, ...]
    kinds: tuple[str, ...] = ("lora",)
    other_kinds: Support = "refused"
    ranks: tuple[int, ...] = ()
    least_rank: int = 1
    default_rank: int | None = None
    rank_flag: str = ""
    scales: Literal["own", "one"] = "own"
    mixed_ranks: Support = "yes"
    rslora: Support = "yes"
    replacements: Support = "yes"
    token_rows: Support = "yes"  # noqa: S105 - rows of an embedding
    embeddings: Support = "yes"
    experts: Support = "yes"
    convolutions: Support = "yes"
    biases: Support = "yes"
    pickles: Support = "yes"
    modules: tuple[str, ...] = ()
    retired: str = ""

    @property
    def label(self) -> str:
        """Name, version and date, which every finding about it states."""
        return f"{self.title} {self.version} (as of {self.checked})"


@functools.cache
def known_targets() -> dict[str, Target]:
    """Return all targets by name."""
    text = files(__package__).joinpath("targets.toml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = tomllib.loads(text)
    declared = hints(Target)
    return {
        name: Target(
            name=name, **{key: converted(key, value, declared[key]) for key, value in facts.items()}
        )
        for name, facts in table.items()
    }


def target_named(text: str) -> Target:
    """Return the target that `NAME` or `NAME@VERSION` means.

    Raises:
        OptionError: there is none, or its facts are of another version.
    """
    name, _, version = text.strip().partition("@")
    known = known_targets()
    found = known.get(name.lower().replace(".", "").replace("_", "-"))
    if found is None:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        raise OptionError(
            "no such target",
            got=name,
            expected=" or ".join(known),
            hint=f"Did you mean {close[0]!r}?" if close else None,
        )
    if version and not f"{found.version}.".startswith(f"{version}."):
        raise OptionError(
            f"the facts about {found.title} are of another version",
            got=version,
            expected=found.version,
        )
    return found
