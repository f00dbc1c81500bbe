"""Rules about factors of experts: layouts that a loader ignores, or reads as something else."""

from __future__ import annotations

from collections.abc import Iterator

from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.serving import each_target
from loratools.operations.check.subject import Subject
from loratools.operations.check.targets import Target
from loratools.operations.convert.experts.groups import types_of
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.peft_on_load import lost_on_load, parameters_of


def _types(subject: Subject, adapter: Adapter) -> frozenset[str]:
    return subject.base.types if subject.base is not None else types_of(adapter, None)


def _lost(subject: Subject) -> Iterator[Found]:
    """Yield what PEFT's own stacking of single experts leaves out on transformers 5."""
    adapter = subject.adapter
    if adapter is not None and adapter.format == "peft":
        for text, where in lost_on_load(adapter, _types(subject, adapter), subject.config):
            yield Found(text, where)


def _dropout(subject: Subject) -> Iterator[Found]:
    """Yield the first module that PEFT adapts as a parameter, which bears no dropout."""
    adapter = subject.adapter
    if adapter is None or adapter.format != "peft" or not subject.config.get("lora_dropout"):
        return
    for name in parameters_of(adapter)[:1]:
        text = "PEFT on transformers 5 does not load adapters of experts with lora_dropout"
        yield Found(text, name)


def _layout(subject: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    layout = adapter.expert_layout
    if adapter.format != "peft" or layout is None or not target.expert_layouts:
        return
    types = _types(subject, adapter)
    readable = target.expert_layouts
    if target.stacked_experts:
        if not types:
            return
        readable = ("stacked",) if types & set(target.stacked_experts) else readable
    swapped = [name for name, change in adapter.modules.items() if change.layer.swapped]
    if layout.name not in readable:
        text = f"{target.label} does not read experts stored so: {layout.described}"
    elif swapped and not types & {"llama4", "llama4_text"}:
        text = (
            f"{target.label} needs A of stacked experts on the inputs, and {swapped[0]} has it on "
            "the outputs"
        )
    else:
        return
    hint = f"loratools convert ADAPTER --base MODEL --for {target.name} -o NEW"
    yield Found(text, target=target.name, hint=hint)


RULES = (
    Rule(
        "LT114", "expert-order-doubtful", "warning",
        "A marker states an order of stacked experts that does not fit the values.",
        "If it is read in the wrong order, every expert gets parts of other experts' changes.",
        "Find out which program trained it. If the marker is wrong, write the adapter again: "
        "`loratools convert ADAPTER -o NEW --set lora_B_layout=ORDER`.",
        "columns of lora_B of trained adapters, measured",
        of_readers=("expert-order-doubtful",),
    ),
    Rule(
        "LT115", "projections-in-parts", "warning",
        "Modules are parts of a projection that is one module in the model, as Tinker adapts them.",
        "PEFT and programs that read its folders find no such module, and do not change it.",
        "Join the parts: `loratools convert ADAPTER --to peft --base MODEL -o NEW`.",
        "`tinker_cookbook/weights/_adapter.py` at 9dfcc3a2",
        of_readers=("projections-in-parts",),
    ),
    Rule(
        "LT411", "experts-lost", "warning",
        "When PEFT on transformers 5 stacks single experts, it drops parts of the adapter or "
        "changes their scale.",
        "The adapter loads without a warning, or with one that names other keys, and makes "
        "another change than it was trained for.",
        "Write the names of transformers 5: "
        "`loratools convert ADAPTER --base MODEL --experts stacked -o NEW`.",
        "`transformers_weight_conversion.py` of peft 0.21.2, run with transformers 5.23",
        _lost,
    ),
    Rule(
        "LT414", "experts-dropout", "warning",
        "An adapter of experts has a lora_dropout other than 0.",
        "PEFT stops when it loads the adapter: stacked parameters bear no dropout, and on "
        "transformers 5 it stacks single experts, too. Nothing but training uses the dropout.",
        "Write it again, which sets it to 0: `loratools convert ADAPTER --to peft -o NEW`.",
        "peft.tuners.lora.layer.ParamWrapper, 0.21.2, run with transformers 5.23",
        _dropout, key="lora_dropout",
    ),
    Rule(
        "LT517", "target-experts", "error",
        "The program does not read factors of experts in this layout, for this model.",
        "It stops, or does not change the experts.",
        "Write the layout that it reads: "
        "`loratools convert ADAPTER --base MODEL --for PROGRAM -o NEW`.",
        "targets.toml",
        each_target(_layout),
    ),
)  # fmt: skip
