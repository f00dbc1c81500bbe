"""What serving programs accept, from a dated table: `targets.toml`."""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from loratools.work.typed import converted, hints
from loratools_formats.disk.errors import OptionError

Support = Literal["yes", "refused", "ignored", "unknown"]
"""What a program does with a part of an adapter: uses it, stops with an error, drops it without
one, or nobody has looked."""


@dataclass(frozen=True)
class KohyaFacts:
    """What a program makes of single files with kohya's names.

    Attributes:
        commonest: patterns of modules that get the α that most modules of their component have,
            and not their own.
        ignored: tables of names of architectures whose files it loads nothing of.
        lost: (table, pattern) of the modules that it leaves out of files that it loads.
    """

    commonest: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    lost: tuple[tuple[str, str], ...] = ()


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
        dora: what it does with a DoRA, if its kinds do not include it.
        other_kinds: what it does with others.
        ranks: that it can be started for; empty if any will do.
        least_rank: that it takes.
        default_rank: the largest that it takes without a flag; None if there is no limit.
        rank_flag: the flag for larger ones.
        scales: `own` if each module has its own scale, `one` if all have α/r of the configuration,
            `alpha` if each has α of the configuration over its own rank, `first` if the rank of the
            first module is the α of all where the file states none.
        mixed_ranks: what it does with modules of different ranks.
        rslora: what it does with rank-stabilised scales.
        replacements: what it does with whole tensors that replace the base's.
        replaceable: last parts of module names whose tensors it replaces all the same.
        token_rows: what it does with trained token rows.
        embeddings: what it does with factors of embeddings.
        experts: what it does with factors of stacked experts.
        expert_layouts: layouts of experts that it reads, the best first; empty if nobody looked.
        stacked_experts: model types whose experts it reads in stacked parameters only.
        experts_complete: whether it needs all projections of an expert.
        experts_marked: whether it looks for a marker of the order of lora_B.
        convolutions: what it does with factors of convolutions.
        biases: what it does with trained biases.
        pickles: what it does with pickled weights.
        gaps: what it does with modules of one name that only some layers have.
        added_tokens: what it does with tokens of added_tokens.json that the base does not have.
        refused_settings: keys of the configuration that it refuses where they are set.
        ignored_settings: keys of the configuration that it ignores.
        inits: values of init_lora_weights that it takes, where it refuses others.
        modules: last parts of module names that it adapts; empty if the model decides.
        kohya: what it makes of files with kohya's names.
        retired: why nothing can be loaded any more; empty if that is not so.
    """

    name: str
    title: str
    version: str
    checked: str
    source: str
    formats: tuple[str, ...]
    kinds: tuple[str, ...] = ("lora",)
    dora: Support = "unknown"
    other_kinds: Support = "unknown"
    ranks: tuple[int, ...] = ()
    least_rank: int = 1
    default_rank: int | None = None
    rank_flag: str = ""
    scales: Literal["own", "one", "alpha", "first", "unknown"] = "unknown"
    mixed_ranks: Support = "unknown"
    rslora: Support = "unknown"
    replacements: Support = "unknown"
    replaceable: tuple[str, ...] = ()
    token_rows: Support = "unknown"  # noqa: S105 - rows of an embedding
    embeddings: Support = "unknown"
    experts: Support = "unknown"
    expert_layouts: tuple[str, ...] = ()
    stacked_experts: tuple[str, ...] = ()
    experts_complete: bool = False
    experts_marked: bool = False
    convolutions: Support = "unknown"
    biases: Support = "unknown"
    pickles: Support = "unknown"
    gaps: Support = "unknown"
    added_tokens: Support = "unknown"
    refused_settings: tuple[str, ...] = ()
    ignored_settings: tuple[str, ...] = ()
    inits: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    kohya: KohyaFacts = KohyaFacts()
    retired: str = ""

    @property
    def label(self) -> str:
        """Name, version and date, which every finding about it states."""
        return f"{self.title} {self.version} (as of {self.checked})"


@functools.cache
def all_targets() -> dict[str, tuple[Target, ...]]:
    """Return the targets by name, each in all versions that are known, the newest first."""
    text = files(__package__).joinpath("targets.toml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = tomllib.loads(text)
    return {name: tuple(_versions(name, facts)) for name, facts in table.items()}


def _versions(name: str, facts: dict[str, Any]) -> Iterator[Target]:
    declared = hints(Target)
    common = {key: value for key, value in facts.items() if key != "of"}
    for own in facts.get("of", [{}]):
        values = {k: converted(k, v, declared[k]) for k, v in (common | own).items()}
        yield Target(name=name, **values)


def known_targets() -> dict[str, Target]:
    """Return all targets by name, in the newest version that is known."""
    return {name: versions[0] for name, versions in all_targets().items()}


def target_named(text: str) -> Target:
    """Return the target that `NAME` or `NAME@VERSION` means.

    Raises:
        OptionError: there is none, or its facts are of other versions.
    """
    name, _, version = text.strip().partition("@")
    known = all_targets()
    found = known.get(name.lower().replace(".", "").replace("_", "-"))
    if found is None:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        raise OptionError(
            "no such target",
            got=name,
            expected=" or ".join(known),
            hint=f"Did you mean {close[0]!r}?" if close else None,
        )
    fitting = [each for each in found if f"{each.version}.".startswith(f"{version}.")]
    if version and not fitting:
        versions = " or ".join(f"{each.name}@{each.version}" for each in found)
        raise OptionError(
            f"the table of {found[0].title} has no facts about this version",
            got=version,
            expected=versions,
        )
    return fitting[0] if version else found[0]
