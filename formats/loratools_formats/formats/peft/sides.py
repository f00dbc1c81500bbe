"""On which side of stacked experts A is, as the shapes and the configuration of a PEFT folder tell.

The reader asks for what a file holds, and the writer for what a reader would make of what it is
about to write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from loratools_formats.core.peft_facts import owner
from loratools_formats.disk.errors import AdapterError
from loratools_formats.formats.peft.config import PeftConfig
from loratools_formats.formats.peft.parameters import Setting

_SIBLINGS = {
    "gate_up_proj": "down_proj",
    "up_proj": "down_proj",
    "input_linear": "output_linear",
    "fc1": "fc2",
}
"""The parameter, or the module with one, that maps into the experts, and the one that maps out."""

_GATED = frozenset({"gate_up_proj", "input_linear", "fc1"})
_ATTENTION = re.compile(r"(?:.*\.)?(?:self_attn|attention|attn|mixer)\.[qkv]_proj")


BY_RELEASE = "PEFT 0.19.0 wrote it"
"""What tells a side where no shape does."""


class Sides(NamedTuple):
    """The columns of a stack's A and the rows of its B, as they are stored."""

    x: int
    y: int


def width_of(inputs: Mapping[str, int], settings: Mapping[str, Setting]) -> int | None:
    """Return H as the attention layers' inputs show it; None if they are of several widths.

    Args:
        inputs: the last axis of A of each module whose A is a matrix.
        settings: of every module.
    """
    widths = {
        width
        for path, width in inputs.items()
        if not settings[path].names and _ATTENTION.fullmatch(path)
    }
    return widths.pop() if len(widths) == 1 else None


def sides_told(
    config: PeftConfig,
    found: Mapping[str, Sides],
    settings: Mapping[str, Setting],
    width: int | None,
    folder: Path | None,
) -> dict[str, tuple[bool | None, str]]:
    """Return whether A of each stack is on the outputs, and what tells; None if nothing does.

    Args:
        config: of the folder.
        found: every stack.
        settings: of every stack.
        width: of the model, if attention layers show it.
        folder: for messages.

    Raises:
        AdapterError: one parameter of a module lies one way round, and the other one the other.
    """
    turned: dict[str, tuple[bool, str]] = {}
    roles = {_role(path, settings[path]): path for path in found}
    for (parent, leaf), path in roles.items():
        other = roles.get((parent, _SIBLINGS.get(leaf, "")))
        if other is not None:
            swapped = _by_siblings(found[path], found[other], leaf, path, folder)
            if swapped is not None:
                turned[path] = turned[other] = swapped, "the shapes of both parameters tell"
    for (_, leaf), path in roles.items():
        if path not in turned and width is not None:
            by_width = _by_width(found[path], leaf, width)
            if by_width is not None:
                turned[path] = by_width, "the width of attention layers tells"
    known = {swapped for swapped, _ in turned.values()}
    of_all: tuple[bool | None, str] = None, "only the base tells"
    if len(known) == 1:
        of_all = known.pop(), "the other layers tell"
    elif not known and release(config) == RELEASE_0_19_0:
        # It read the axes the wrong way round of every class but Llama 4's.
        told = True, BY_RELEASE
        return {path: of_all if of_open_class(path) else told for path in found}
    return {path: turned.get(path, of_all) for path in found}


def of_open_class(path: str) -> bool:
    """Return whether experts may be of Llama 4, of which PEFT has A on another side than of others.

    >>> of_open_class("model.layers.0.feed_forward.experts.base_layer")
    True
    """
    return f".{owner(path)}".endswith(".feed_forward.experts")


def _role(path: str, setting: Setting) -> tuple[str, str]:
    """Return a module and the name of one of its parameters, which stands for a module in some."""
    module, leaf = owner(path), ""
    if len(setting.names) == 1:
        leaf = setting.names[0].rpartition(".")[2]
    if leaf == "weight":
        module, _, leaf = module.rpartition(".")
    return module, leaf or path


def _by_siblings(
    inner: Sides, outer: Sides, leaf: str, path: str, folder: Path | None
) -> bool | None:
    """Return whether A is on the outputs, from the shapes of the two parameters of a module."""
    (x1, y1), (x2, y2) = inner, outer
    times = 2 if leaf in _GATED else 1
    straight, swapped = (x1, y1) == (y2, times * x2), (y1, x1) == (x2, times * y2)
    if straight != swapped:
        return swapped
    if straight:  # without a gate both fit
        return None
    if leaf in _GATED and ((x1, y1) == (x2, times * y2) or (y1, x1) == (y2, times * x2)):
        raise AdapterError(
            "one parameter of a module has its inputs where the other has its outputs",
            path=folder,
            tensor=path,
            got=f"{x1} → {y1} and {x2} → {y2}",
            expected="H → 2·I and I → H, or both the other way round",
        )
    return None


def _by_width(sides: Sides, leaf: str, width: int) -> bool | None:
    x, y = sides
    if x == y or width not in (x, y):
        return None
    if leaf in _SIBLINGS:
        return x != width
    return y != width if leaf in _SIBLINGS.values() else None


BEFORE_0_19 = (0, 18)
RELEASE_0_19_0 = (0, 19, 0)


def release(config: PeftConfig) -> tuple[int, ...] | None:
    """Return what decides how PEFT took a parameter's axes: its release before 0.19, or 0.19.0.

    Releases before 0.19 read all expert parameters as (E, in, out); now it depends on the model.
    Development versions on the way to 0.19 may have done either.
    """
    text = str(config.values.get("peft_version") or "")
    version = text.split(".")
    released = len(version) >= 2 and all(part.isdecimal() for part in version[:2])
    if not released or len(text) > 20 or "dev" in text:
        return None
    numbers = int(version[0]), int(version[1])
    if numbers < (0, 19):
        return BEFORE_0_19
    return RELEASE_0_19_0 if version == ["0", "19", "0"] else None
