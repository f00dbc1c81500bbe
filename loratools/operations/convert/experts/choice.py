"""Which layout of experts a program reads for a model, from the table that `check` uses too."""

from __future__ import annotations

from typing import cast

from loratools.operations.check.targets import Target, target_named
from loratools.operations.convert.experts.groups import base_hint, types_of
from loratools.operations.convert.experts.layouts import ExpertLayoutName, Wanted
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.commands import FUSE_INSTEAD
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import OptionError, UnsupportedError


def wanted_by(program: str, adapter: Adapter, base: Checkpoint | None) -> Wanted:
    """Return what a program wants of experts.

    Args:
        program: a target of the table, such as `vllm` or `vllm@0.33`.
        adapter: what it shall read.
        base: the base model, if it is known.

    Raises:
        OptionError: there is no such target.
        UnsupportedError: the layout depends on the model, which is not known.
    """
    target = target_named(program)
    layout = layout_for(target, adapter, base)
    return Wanted(
        layout=layout,
        complete=target.experts_complete,
        uniform=target.scales == "one" and target.mixed_ranks == "refused",
        marked=target.experts_marked,
    )


def layout_for(
    target: Target, adapter: Adapter, base: Checkpoint | None
) -> ExpertLayoutName | None:
    """Return the layout that a target reads for a model; None if it reads none.

    Raises:
        UnsupportedError: it depends on the model, which is not known.
    """
    if not any(_is_of_experts(name) for name in adapter.modules):
        return None
    if not target.expert_layouts:
        if target.formats[0] != "peft":
            return None
        raise _none_known(target, adapter)
    if target.stacked_experts:
        types = types_of(adapter, base)
        if not types:
            raise UnsupportedError(
                f"{target.label} reads stacked experts of some models and single ones of others",
                path=adapter.source,
                got="a model that is not known",
                hint=base_hint(adapter),
            )
        if types & set(target.stacked_experts):
            return "stacked"
    return cast(ExpertLayoutName, target.expert_layouts[0])


def _none_known(target: Target, adapter: Adapter) -> UnsupportedError:
    if target.experts in ("refused", "ignored"):
        text = f"{target.label} reads no factors of experts"
        return UnsupportedError(text, path=adapter.source, hint=FUSE_INSTEAD)
    return UnsupportedError(
        f"which layout of experts {target.label} reads is not known here",
        path=adapter.source,
        hint="Choose a layout in place of the program, such as `experts=each`",
    )


def _is_of_experts(name: str) -> bool:
    return ".experts" in f".{name}" or "switch_mlp" in name or name.endswith("_exps")


def format_of(program: str) -> str:
    """Return the format that a program loads best.

    Raises:
        OptionError: there is no such target, or it loads no adapters any more.
    """
    target = target_named(program)
    if target.retired:
        raise OptionError(f"{target.label}: {target.retired}")
    return target.formats[0]
