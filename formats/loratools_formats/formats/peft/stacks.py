"""How the factors of stacked experts lie in a PEFT folder: which way round, and in which order.

A flat pair is A (E·r, X) and B (Y, r·E). A always holds one expert after the other. X is the
inputs, or the outputs: PEFT's releases and model classes differ, files lie about the release that
wrote them, and the shapes of the two parameters of one module tell. Both have H, the width of the
model, on one side, and `gate_up` has twice the other side of `down`. B's columns are rank by rank
in PEFT and most others, or expert by expert: in Unsloth's of before September 2026, marked or not,
and in Megatron-Bridge's export.

Sources: `ParamWrapper` of peft 0.17 to 0.21; unsloth_zoo's `lora_B_layout` and
`unsloth_fused_expert_lora`; `_pack_target_parameter_adapter_weights` of Megatron-Bridge.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loratools_formats.core.adapter import ExpertLayout
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import B_LAYOUT, EXPERT_MAJOR, RANK_MAJOR
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError
from loratools_formats.formats.peft.config import PeftConfig
from loratools_formats.formats.peft.packing import (
    MARKERS,
    doubtful,
    grouped,
    marked,
    unmarked,
)
from loratools_formats.formats.peft.parameters import Setting
from loratools_formats.formats.peft.sides import (
    BEFORE_0_19,
    BY_RELEASE,
    RELEASE_0_19_0,
    Sides,
    of_open_class,
    release,
    sides_told,
    width_of,
)

_AXES_TELL = "its axes tell"


class Pair(NamedTuple):
    """The factors of a module as they are stored."""

    a: TensorRef
    b: TensorRef


class Stack(NamedTuple):
    """How one stack lies.

    Attributes:
        swapped: whether A is on the outputs; None if nothing in the file tells.
        order: of B's columns, `rank_major` or `grouped_by_expert`.
        told_by: what tells the side of A.
        ordered_by: what tells the order.
    """

    swapped: bool | None
    order: str
    told_by: str = ""
    ordered_by: str = ""

    @property
    def described(self) -> str:
        """How it lies and what tells that, for people."""
        side = {True: "A on the outputs", False: "A on the inputs", None: "A on either side"}
        lying = f"{side[self.swapped]} ({self.told_by})"
        columns = "expert by expert" if self.order == EXPERT_MAJOR else "rank by rank"
        return f"stacked parameters, {lying}, lora_B {columns} ({self.ordered_by})"


def stacks(
    config: PeftConfig,
    pairs: Mapping[str, Pair],
    settings: Mapping[str, Setting],
    straight: Collection[str],
    folder: Path,
) -> tuple[dict[str, Stack], list[Finding]]:
    """Return how each stack of experts lies, and what to tell about it.

    Args:
        config: of the folder.
        pairs: every module's factors.
        settings: of every module; a stack is one that names parameters and has several experts, or
            the one expert of a parameter that is always a stack.
        straight: modules whose A is known to be on the inputs, and whose B is rank by rank.
        folder: for messages.

    Raises:
        AdapterError: one parameter of a module lies one way round, and the other one the other.
    """
    found = {
        path: pairs[path]
        for path, setting in settings.items()
        if setting.names
        if _experts(pairs[path], setting) > 1 or all(map(_OF_STACK.search, setting.names))
    }
    inputs = {path: pair.a.shape[-1] for path, pair in pairs.items() if len(pair.a.shape) == 2}
    sides = {path: Sides(pair.a.shape[-1], pair.b.shape[0]) for path, pair in found.items()}
    turned = sides_told(config, sides, settings, width_of(inputs, settings), folder)
    turned |= {path: (False, _AXES_TELL) for path in straight if path in found}
    findings: list[Finding] = []
    result: dict[str, Stack] = {}
    doubted = 0
    for path, pair in found.items():
        leaf = settings[path].names[0].rpartition(".")[2]
        experts, rank = _experts(pair, settings[path]), settings[path].rank
        swapped, why = turned[path]
        if path in straight:
            result[path] = Stack(swapped, RANK_MAJOR, why, why)
            continue
        told = marked(config.values, leaf, experts, folder)
        if told is not None:
            result[path] = Stack(swapped, told, why, "a marker in the configuration says so")
            doubted += 1
            if told == EXPERT_MAJOR and not any(f.code == "experts-grouped" for f in findings):
                findings.append(grouped(path))
            if doubted <= _DOUBTED:
                findings += doubtful(path, pair.b, experts, rank, told)
            continue
        guessed = unmarked(config.values, leaf, swapped=swapped)
        if guessed is None:
            result[path] = Stack(swapped, RANK_MAJOR, why, "as PEFT has it")
            continue
        result[path] = Stack(swapped, guessed.order, why, f"guessed: {guessed.why}")
        if not any(f.code == "expert-order-guessed" for f in findings):
            findings.append(guessed.finding(path, pair.b, experts, rank))
    return result, [*findings, *_about_sides(config, sides, result, folder)]


def _about_sides(
    config: PeftConfig, sides: Mapping[str, Sides], lying: Mapping[str, Stack], folder: Path
) -> list[Finding]:
    """Return what to tell of squares whose side only the release that wrote them tells.

    A release of transformers 4's time is taken at its word, and a file that names none is taken to
    be of today's; both may be wrong, since programs keep the number that they read.
    """
    squares = [
        path
        for path, stack in lying.items()
        if sides[path].x == sides[path].y
        if stack.swapped is None or stack.told_by == BY_RELEASE
    ]
    version = config.values.get("peft_version")
    if not squares or (version is not None and release(config) is None):
        return []
    stated = "the configuration names no release of PEFT" if version is None else f"PEFT {version}"
    taken = "as PEFT has it since 0.19.1" if version is None else "as that release has it"
    text = (
        f"{squares[0]} is square, and nothing in the file but the release that wrote it tells on "
        f"which side A is: {stated}, and it is read {taken}"
    )
    command = "loratools convert {} --peft-layout 0.19.1 --base BASE -o converted"
    hint = (
        "PEFT 0.19.1 and later do not look at the release; write it as they read it: "
        + command.format(shlex.quote(str(folder)))
    )
    return [Finding("expert-side-assumed", "warning", squares[0], text, hint)]


def layout_of(
    modules: Mapping[str, ModuleChange], lying: Mapping[str, Stack]
) -> ExpertLayout | None:
    """Return how a file stores experts; None if it has none."""
    if lying:
        told = "; ".join(dict.fromkeys(stack.described for stack in lying.values()))
        return ExpertLayout("stacked", told)
    single = next((path for path in modules if _ONE.search(path)), None)
    return None if single is None else ExpertLayout("each", "experts one by one (names tell)")


_ONE = re.compile(r"\bexperts\.(?:\d+\.|(?:gate_up|down)_projs\.\d)")
_OF_STACK = re.compile(r"(?:^|\.)experts\.(?:gate_up|up|down)_proj$")
"""Parameters that have an axis for the experts in every model, however many there are."""
_DOUBTED = 4
"""Most stacks whose values are compared with a marker."""


def unstacked(
    config: PeftConfig, pair: Pair, setting: Setting, stack: Stack | None, folder: Path
) -> LowRank:
    """Return the factors of a parameter, one pair for each expert.

    Raises:
        AdapterError: the factors do not fit together, or the config's rank does not fit them.
    """
    (a, b), (names, alpha, rank) = pair, setting
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            "expert factors do not fit together",
            path=folder,
            tensor=a.key,
            got=f"{list(a.shape)} and {list(b.shape)}",
        )
    if a.shape[0] % rank:
        raise AdapterError(
            "rank in the file and rank in the config differ",
            path=folder,
            tensor=a.key,
            got=f"{a.shape[0]} rows",
            expected=f"a multiple of {rank}",
        )
    count, scale = a.shape[0] // rank, config.scale(alpha, rank)
    if stack is None:
        return LowRank(a, b, scale, Layer("linear", parameters=names), alpha=alpha)
    out, in_ = b.shape[0], a.shape[1]
    layer = Layer(
        "experts",
        parameters=names,
        transposed_if_square=_turn(config, stack, names[0]),
        swapped=stack.swapped,
        grouped=stack.order == EXPERT_MAJOR,
    )
    if stack.order == EXPERT_MAJOR:
        of_experts = b.reshaped((out, count, rank)).transposed((1, 0, 2))
    else:
        of_experts = b.reshaped((out, rank, count)).transposed((2, 0, 1))
    return LowRank(a.reshaped((count, rank, in_)), of_experts, scale, layer, alpha=alpha)


def _turn(config: PeftConfig, stack: Stack, parameter: str) -> bool | None:
    """Return how a square stack lies in its parameter if the release that wrote it tells.

    What has an axis for the experts is not of PEFT's own making, whatever release is named. Nor
    does a release before 0.19 tell of a stack that has A on the inputs: PEFT keeps that number when
    a later release loads and saves a file. (Of Llama 4, a later one has A on the outputs.)
    """
    wrote = release(config)
    is_open = of_open_class(parameter.rpartition(".")[0])
    if wrote == BEFORE_0_19 and stack.told_by != _AXES_TELL:
        return True if stack.swapped is None or (stack.swapped and not is_open) else None
    return True if stack.swapped is None and is_open and wrote == RELEASE_0_19_0 else None


def without_marks(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration for factors that are written rank by rank, whatever they were."""
    kept = {key: value for key, value in values.items() if key not in MARKERS}
    auto = values.get("auto_mapping")
    if isinstance(auto, Mapping):
        kept["auto_mapping"] = {key: value for key, value in auto.items() if key not in MARKERS}
    return {**kept, B_LAYOUT: RANK_MAJOR}


def _experts(pair: Pair, setting: Setting) -> int:
    rows = pair.a.shape[0] if pair.a.shape else 0
    return rows // setting.rank
