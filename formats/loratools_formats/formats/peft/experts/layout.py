"""What a layout of experts is, and the names that all of them use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools_formats.core.adapter import ExpertLayout
from loratools_formats.core.file_names import ADAPTER_CONFIG
from loratools_formats.core.peft_facts import PREFIX, owner
from loratools_formats.core.tensors import TensorRef
from loratools_formats.formats.peft.config import check_value
from loratools_formats.formats.peft.patterns import match_patterns

A, B = "lora_A", "lora_B"
JOINED = ("gate_up_proj", "down_proj")
"""Projections of an expert where gate and up are one layer."""
UP = "up_proj"
"""Where there is no gate."""


@dataclass(frozen=True)
class Plain:
    """A folder as PEFT would have it.

    Attributes:
        values: the configuration.
        tensors: by the names that PEFT saves.
        straight: modules of stacked parameters whose A is known to be on the inputs.
        layout: how it was stored; None if as PEFT has it.
        tied: output layers whose change is of the embedding, too, where the model ties them.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    straight: frozenset[str] = frozenset()
    layout: ExpertLayout | None = None
    tied: frozenset[str] = frozenset()

    def after(self, before: Plain) -> Plain:
        """Return it with what the layout that was read before it told."""
        return replace(self, layout=before.layout or self.layout, tied=before.tied | self.tied)


@dataclass(frozen=True)
class Layout:
    """A way to store the factors of experts.

    Attributes:
        name: what users call it.
        claims: whether tensors of a file are stored so, by names and shapes alone.
        read: returns the file as PEFT would have it.
    """

    name: str
    claims: Callable[[Mapping[str, TensorRef]], bool]
    read: Callable[[Plain, Path], Plain]


_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?P<part>lora_[AB])\.weight")
_EMBEDDING = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.lora_embedding_[AB]")


def factor(name: str) -> tuple[str, str] | None:
    """Return a tensor's module, and which factor it is; None if it is none.

    >>> factor("base_model.model.layers.0.mlp.experts.lora_A.weight")
    ('layers.0.mlp.experts', 'lora_A')
    """
    match = _FACTOR.fullmatch(name)
    return None if match is None else (match["path"], match["part"])


def named(path: str, part: str) -> str:
    """Return the name of a module's factor."""
    return f"{PREFIX}{path}.{part}.weight"


def flat(path: str, a: TensorRef, b: TensorRef) -> dict[str, TensorRef]:
    """Return PEFT's tensors of stacked experts: A (E·r, in), B (out, r·E), rank by rank.

    Args:
        path: of the module, with its nesting.
        a: (E, r, in).
        b: (E, out, r).
    """
    experts, rank, in_ = a.shape
    return {
        named(path, A): a.reshaped((experts * rank, in_)),
        named(path, B): b.transposed((1, 2, 0)).reshaped((b.shape[1], rank * experts)),
    }


def with_patterns(
    values: Mapping[str, Any], moved: Mapping[str, Sequence[str]], folder: Path
) -> dict[str, Any]:
    """Return a configuration whose ranks and alphas hold for modules that are renamed.

    Args:
        values: the configuration as it was.
        moved: the new paths of each module, by the path that it has in the file.
        folder: for messages.

    Raises:
        AdapterError: a pattern is malformed.
    """
    made = dict(values)
    for key in ("rank_pattern", "alpha_pattern"):
        check_value(values, key, folder / ADAPTER_CONFIG)
        patterns = values.get(key) or {}
        found = match_patterns(patterns, list(moved), folder / ADAPTER_CONFIG)
        own = {re.escape(new): value for old, value in found.items() for new in moved[old]}
        if own:
            made[key] = {**own, **patterns}
    return made


def with_targets(
    values: Mapping[str, Any], tensors: Mapping[str, TensorRef], stacks: Mapping[str, str]
) -> dict[str, Any]:
    """Return a configuration that names what the tensors adapt.

    Args:
        values: the configuration as it was.
        tensors: all of the file, under the names that PEFT saves.
        stacks: the parameter of each module that stands for one; empty if the configuration has it.
    """
    paths = {found[0] for name in tensors if (found := factor(name)) is not None}
    paths |= {match["path"] for name in tensors if (match := _EMBEDDING.fullmatch(name))}
    stated = [f".{each.rpartition('.')[0]}" for each in values.get("target_parameters") or ()]
    whole = {
        path for path in paths - stacks.keys() if not f".{owner(path)}".endswith(tuple(stated))
    }
    leaves = {path.rpartition(".")[2] for path in whole}
    kept = {key: value for key, value in values.items() if key != "target_parameters"}
    parameters = {*(values.get("target_parameters") or ()), *filter(None, stacks.values())}
    if parameters:
        kept["target_parameters"] = sorted(parameters)
    return {**kept, "target_modules": sorted(leaves)}
