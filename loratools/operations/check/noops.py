"""Rules about silent no-ops: what loads without an error and does nothing, or another thing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from loratools.base.placement.class_view import class_view
from loratools.base.placement.names import Names
from loratools.base.placement.place import has_place, place
from loratools.base.placement.sites import sites
from loratools.base.tied import find_tie
from loratools.naming.for_base import named_for_base
from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.subject import Subject
from loratools.operations.in_class_names import renamed_to_class
from loratools_formats.checkpoints.facts import is_vocabulary
from loratools_formats.contract.format import Context
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.file_names import ADAPTER_CONFIG
from loratools_formats.core.peft_facts import PREFIX, refused_modules
from loratools_formats.core.wrapped_names import WRAPPERS
from loratools_formats.disk.errors import AdapterError, LoratoolsError, and_more

_WRAPPERS = (*sorted(WRAPPERS), "_flat_param")
_OWN_NAME = re.compile(
    r".+\.lora_(?:[AB]\.(?P<linear>[^.]+)\.weight|embedding_[AB]\.(?P<embedding>[^.]+)"
    r"|magnitude_vector\.(?!weight$)(?P<magnitude>[^.]+)(?:\.weight)?)"
)
_AS_SAVED = (".lora_A.weight", ".lora_B.weight")
_FACTOR = re.compile(r".+\.lora_(?:[AB]\.weight|embedding_[AB])")
_EXPERT_AXES = (0, 19)
_LISTED = 5


def _wrappers(subject: Subject) -> Iterator[Found]:
    for wrapper in _WRAPPERS:
        holding = [name for name in subject.tensors if wrapper in name]
        names = [name for name in holding if wrapper in name.split(".")]
        if names:
            text = f"the names of {and_more(names)} hold {wrapper}, a training wrapper"
            yield Found(text, names[0])


def _adapter_name(subject: Subject) -> Iterator[Found]:
    if not subject.is_peft:
        return
    unusual = [name for name in subject.tensors if not name.endswith(_AS_SAVED)]
    names = [name for name in unusual if _OWN_NAME.fullmatch(name)]
    if names:
        match = _OWN_NAME.fullmatch(names[0])
        own = next(filter(None, match.groups())) if match is not None else ""
        yield Found(f"{and_more(names)} hold the adapter's own name {own!r}", names[0])


def _prefix(subject: Subject) -> Iterator[Found]:
    if not subject.is_peft:
        return
    names = [n for n in subject.tensors if not n.startswith(PREFIX) and _FACTOR.fullmatch(n)]
    if names:
        yield Found(f"{and_more(names)} do not begin with {PREFIX}", names[0])


def _expert_axes(subject: Subject) -> Iterator[Found]:
    adapter = subject.adapter
    if adapter is None or not subject.is_peft:
        return
    layout = adapter.expert_layout
    if layout is None or layout.name != "stacked":  # others have axes that no release exchanged
        return
    if any(finding.code == "expert-side-assumed" for finding in adapter.findings):
        return  # its reader tells more
    stacks = [n for n, change in adapter.modules.items() if change.layer.kind == "experts"]
    version = subject.config.get("peft_version")
    if not stacks or not isinstance(version, str):
        if stacks:
            text = f"{and_more(stacks)}: no PEFT version is recorded, and 0.19.1 exchanged the axes"
            yield Found(text, stacks[0], ADAPTER_CONFIG)
        return
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < _EXPERT_AXES or version == "0.19.0":
        text = f"{and_more(stacks)}: made with PEFT {version}, and 0.19.1 exchanged the axes"
        yield Found(text, stacks[0], ADAPTER_CONFIG)


def _in_base(subject: Subject) -> tuple[Adapter | None, list[Found]]:
    """Return the adapter in the base's names, or the error that prevents it."""
    adapter, base = subject.adapter, subject.base
    if adapter is None or base is None:
        return None, []
    try:
        context = Context(base=base.base.path)
        adapter = get_format(adapter.format).to_model(adapter, context)
        return named_for_base(adapter, base.base), []
    except LoratoolsError as error:
        return None, [Found(error.message, error.tensor)]


def _not_in_base(subject: Subject) -> Iterator[Found]:
    if subject.base is None:
        return
    adapter, hindered = _in_base(subject)
    yield from hindered
    if adapter is None:
        return
    names = subject.base
    homeless = {n: c for n, c in adapter.modules.items() if not has_place(names, n, c)}
    if homeless and names.has_class:
        of_class = Names(class_view(names.base).checkpoint)
        homeless = {n: c for n, c in homeless.items() if not has_place(of_class, n, c)}
    for name in homeless:
        near = ", ".join(names.nearest(f"{name}.weight")) or "none"
        yield Found(f"{name} meets no module of the base; nearest: {near}", name)
    for replacement in adapter.replacements.values():
        module, _, leaf = replacement.target.rpartition(".")
        if not _replaces(names, module, leaf) and replacement.kind not in ("module", "parameter"):
            text = f"{replacement.target} meets no tensor of the base"
            yield Found(text, replacement.target)


def _called_otherwise(subject: Subject) -> Iterator[Found]:
    """Find modules that the base has, and to which its class gives other names."""
    if subject.base is None or subject.adapter is None or not subject.is_peft:
        return
    try:
        adapter = renamed_to_class(subject.adapter, subject.base.base)
    except LoratoolsError:
        return  # `not-in-base` and `wrong-shape` tell
    pairs = zip(subject.adapter.modules.values(), subject.adapter.modules, strict=True)
    called = {id(change.direction): name for name, change in adapter.modules.items()}
    moved = [(name, called.get(id(change.direction), name)) for change, name in pairs]
    moved = [(name, own) for name, own in moved if name != own]
    if moved:
        (name, own), count = moved[0], len(moved)
        more = f", and {count - 1} more are called otherwise" if count > 1 else ""
        yield Found(f"{name} is {own} in the base's class, where PEFT looks for it{more}", name)


def _refused_by_peft(subject: Subject) -> Iterator[Found]:
    """Find modules that PEFT makes no layer for in a model of the base's type."""
    if subject.base is None or subject.adapter is None or not subject.is_peft:
        return
    layers = [n for n, c in subject.adapter.modules.items() if not c.layer.parameters]
    kind = subject.base.base.config.get("model_type")
    names = refused_modules(kind, layers, subject.config.get("peft_type"))
    if names:
        yield Found(f"PEFT refuses to adapt {and_more(names)} in a model of type {kind}", names[0])


def _replaces(names: Names, module: str, leaf: str) -> bool:
    try:
        return bool(sites(names, module, leaf)) or _tie(names) is not None
    except AdapterError:
        return True


def _tie(names: Names) -> tuple[str, str] | None:
    tie = find_tie(names, guess_head=True)
    return None if tie is None else (tie.embedding, tie.head)


def _wrong_shape(subject: Subject) -> Iterator[Found]:
    if subject.base is None:
        return
    adapter, _ = _in_base(subject)
    if adapter is None:
        return
    names = subject.base
    kept = {n: c for n, c in adapter.modules.items() if has_place(names, n, c)}
    with_factors = {n: c for n, c in kept.items() if c.factors is not None}
    try:
        place(replace(adapter, modules=with_factors, replacements={}), names.base)
    except LoratoolsError as error:
        yield from _one_by_one(replace(adapter, replacements={}), with_factors, names, error)
    try:
        place(replace(adapter, modules={}), names.base)
    except LoratoolsError as error:
        if "no base tensor fits" not in error.message:
            yield Found(str(error), error.tensor)
    for target, own, its in _whole_matrices(adapter, names):
        if own[1:] != its[1:]:
            yield Found(f"{target} has shape {list(own)}, and the base's {list(its)}", target)


def _whole_matrices(
    adapter: Adapter, names: Names
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield tensors that replace a matrix of the base whole: name, own shape, the base's."""
    for replacement in adapter.replacements.values():
        key = None if replacement.rows else names.find(replacement.target)
        shape = replacement.tensor.shape
        if key is not None and len(shape) == len(names.tensors[key].shape) == 2:
            yield replacement.target, shape, names.tensors[key].shape


def _vocabulary(subject: Subject) -> Iterator[Found]:
    if subject.base is None:
        return
    adapter, _ = _in_base(subject)
    if adapter is None:
        return
    for target, own, its in _whole_matrices(adapter, subject.base):
        if own[0] != its[0] and is_vocabulary(target.removesuffix(".weight")):
            yield Found(f"{target} has {own[0]} rows, and the base's {its[0]}", target)


def _one_by_one(
    adapter: Adapter, modules: dict[str, ModuleChange], names: Names, first: LoratoolsError
) -> Iterator[Found]:
    """Yield the modules that do not fit, at most a few of them."""
    count = 0
    for name, change in modules.items():
        try:
            place(replace(adapter, modules={name: change}), names.base)
        except LoratoolsError as error:
            count += 1
            yield Found(f"{name}: {error.brief}", name)
        if count == _LISTED:
            return
    if not count:
        yield Found(first.brief, first.tensor)


def _tied(subject: Subject) -> Iterator[Found]:
    if subject.base is None or subject.adapter is None:
        return
    names = subject.base
    tie = _tie(names)
    if tie is None:
        return
    ends = {names.spelling(key).removesuffix(".weight") for key in tie}
    hit = [n for n in subject.adapter.modules if names.spelling(n) in ends]
    hit += [
        r.target
        for r in subject.adapter.replacements.values()
        if names.spelling(r.target).removesuffix(".weight") in ends
    ]
    of_both = {n for n, change in subject.adapter.modules.items() if change.layer.tied}
    if len(hit) == 1 and hit[0] not in of_both:
        text = f"{hit[0]} is tied to another layer in the base, and the adapter changes one of them"
        yield Found(text, hit[0])


RULES = (
    Rule(
        "LT401", "not-targeted", "error",
        "PEFT makes no layer for a module that the file holds.",
        "Layers are made from target_modules before tensors are loaded; tensors without a layer "
        "are dropped with a warning.",
        "Name the module in target_modules of adapter_config.json.",
        "`check_target_module_exists` and `set_peft_model_state_dict` in peft 0.21.2, run",
        of_readers=("not-targeted",), key="target_modules",
    ),
    Rule(
        "LT402", "training-wrapper", "error",
        "Names hold the wrapper of a training tool, such as torch.compile's _orig_mod, or a prefix "
        "too many.",
        "No module of the plain model has that name. Loaders drop the tensors with a warning, "
        "and the model behaves like its base.",
        "Write it again: `loratools convert ADAPTER -o NEW --to peft`, or with the naming that a "
        "single file has. Next time, save from the unwrapped model.",
        "`torch.compile`, FSDP and activation checkpointing wrap modules under these names",
        _wrappers, of_readers=("wrapped-names",),
    ),
    Rule(
        "LT403", "adapter-name-in-keys", "error",
        "Names hold the adapter's own name, such as lora_A.default.weight.",
        "PEFT loads them only if the adapter has the same name there, and otherwise drops "
        "them without an error; vLLM refuses the file.",
        "Write it under PEFT's names: `loratools convert ADAPTER -o NEW --to peft`. Next "
        "time, save with `save_pretrained`.",
        "`set_peft_model_state_dict` in peft 0.21.2, run; `parse_fine_tuned_lora_name` in vLLM",
        _adapter_name,
    ),
    Rule(
        "LT404", "prefix-missing", "error",
        "Names in a PEFT folder do not begin with base_model.model.",
        "PEFT drops the tensors with a warning.",
        "Write it again: `loratools convert ADAPTER -o NEW --to peft`. vLLM reads both.",
        "`set_peft_model_state_dict` in peft 0.21.2 and `parse_fine_tuned_lora_name` in "
        "vLLM 0.33.0, run",
        _prefix,
    ),
    Rule(
        "LT405", "expert-axes", "warning",
        "Factors of stacked experts come from a version of PEFT that exchanged their axes.",
        "PEFT 0.19.1 and later exchange the inputs and outputs of such parameters. If both "
        "have the same size, no error shows it.",
        "Write it as PEFT reads it now: "
        "`loratools convert ADAPTER --peft-layout 0.19.1 --base MODEL -o NEW`.",
        "peft.tuners.lora.layer.ParamWrapper, 0.18, 0.19.0 and 0.19.1",
        _expert_axes, of_readers=("expert-side-assumed",), key="peft_version",
    ),
    Rule(
        "LT406", "not-in-base", "error",
        "A module is not in the base model (with `base`).",
        "Loaders drop it, most of them with a line in a log, and the model behaves like its base.",
        "Use the base that the adapter was trained on, or rename the modules: "
        "`loratools convert ADAPTER -o NEW --names FILE.toml`.",
        "vLLM issues 34186, 48019, 34591, 41754 and 55193",
        _not_in_base,
    ),
    Rule(
        "LT412", "called-otherwise", "warning",
        "The base's class calls a module otherwise than the adapter does (with `base`).",
        "PEFT looks for modules by the names that the class has in memory, and drops others with a "
        "warning; transformers renames those of some classes that it has renamed itself.",
        "Rename them: `loratools convert ADAPTER -o NEW --to peft --base BASE`.",
        "`set_peft_model_state_dict` in peft 0.21.2, run",
        _called_otherwise,
    ),
    Rule(
        "LT413", "refused-by-peft", "error",
        "PEFT refuses to adapt a module in a model of the base's type (with `base`).",
        "Kernels of Mamba's kind take the weights of these layers without an adapter; PEFT stops "
        "with an error.",
        "Fuse it, if it was trained so that they had an effect: "
        "`loratools fuse MODEL ADAPTER -o FUSED`. Or leave them out: "
        '`loratools convert ADAPTER -o NEW --to peft --drop "(out_proj|conv1d)$"`.',
        "`_check_lora_target_modules_mamba` in peft 0.21.2, run",
        _refused_by_peft,
    ),
    Rule(
        "LT407", "wrong-shape", "error",
        "A module does not have the shape of the base model's weight (with `base`).",
        "It cannot be added.",
        "Use the base that the adapter was trained on.",
        "The placement by which adapters are fused",
        _wrong_shape,
    ),
    Rule(
        "LT408", "tied-embedding", "warning",
        "The adapter changes one of two tied weights, the embedding or the output layer "
        "(with `base`).",
        "PEFT leaves the other one as it was; programs that keep one tensor for both change both.",
        "Compare with PEFT, or fuse it: `loratools fuse BASE ADAPTER -o FUSED` unties the two.",
        "tie_word_embeddings in transformers",
        _tied,
    ),
    Rule(
        "LT409", "experts-grouped", "error",
        "Factors of stacked experts are packed expert by expert, which PEFT does not read.",
        "PEFT reads the ranks of one expert as those of all experts, without an error.",
        "Write it again as PEFT has it: `loratools convert ADAPTER -o NEW --to peft`.",
        "peft.tuners.lora.layer.ParamWrapper, 0.21.2",
        of_readers=("experts-grouped",),
    ),
    Rule(
        "LT410", "other-vocabulary", "warning",
        "A trained embedding or output layer has another number of rows than in the base "
        "(with `base`).",
        "PEFT stops with an error, unless the model was resized by resize_token_embeddings first.",
        "Fuse it, which writes the larger vocabulary: `loratools fuse BASE ADAPTER -o FUSED`.",
        "`set_peft_model_state_dict` in peft 0.21.2, run",
        _vocabulary,
    ),
)  # fmt: skip
