"""Reading a PEFT folder: which tensor is what, and with which scale.

The tensors are the truth about which modules are adapted and with which rank; the configuration
gives scale and kind. Every tensor ends up as part of a module's delta, as a replacement, or
carried; one that could change ΔW and is not understood is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools_formats.containers.pickles import read_bin
from loratools_formats.containers.safetensors_read import SafetensorsFile, read_safetensors
from loratools_formats.containers.sniffing import is_beside_peft_config
from loratools_formats.core.adapter import Adapter, ExpertLayout, Replacement
from loratools_formats.core.attachments import ATTACHMENTS
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.file_names import (
    ADAPTER_CONFIG,
    PEFT_WEIGHTS,
    PICKLED_PEFT_WEIGHTS,
    WEIGHTS_OF_PEFT,
)
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.distant import is_there
from loratools_formats.disk.errors import (
    MissingFileError,
    UnsupportedError,
    naming,
)
from loratools_formats.disk.files import RegularFile, inside
from loratools_formats.disk.provenance import PROVENANCE_FILE, RECIPE_FILE
from loratools_formats.formats.peft import keys
from loratools_formats.formats.peft.beside import attachments, standing
from loratools_formats.formats.peft.config import (
    NOT_A_PRODUCT,
    PeftConfig,
    check_of_all_kinds,
    is_set,
    read_values,
)
from loratools_formats.formats.peft.experts import plain
from loratools_formats.formats.peft.experts.layout import Plain
from loratools_formats.formats.peft.experts.tinker import about_parts
from loratools_formats.formats.peft.kinds.read import (
    caveats_of,
    left_to_loader,
    read_modules,
    reason_against,
)
from loratools_formats.formats.peft.kinds.table import PEFT_KINDS
from loratools_formats.formats.peft.lora import caveats_of_lora, read_lora
from loratools_formats.formats.peft.packing import MARKERS
from loratools_formats.formats.peft.replacements import about_unknown, classify
from loratools_formats.formats.peft.stacks import without_marks
from loratools_formats.formats.peft.trainer_names import as_saved
from loratools_formats.formats.peft.variants import lost_middle


def read(path: Path) -> Adapter:
    """Read a PEFT folder, or one named by its weight file.

    Raises:
        MissingFileError: the config or the weights are missing.
        AdapterError: malformed or contradictory.
        UnsupportedError: another adapter kind, or a variant whose layout is not known.
    """
    is_named = path.name in WEIGHTS_OF_PEFT
    renamed = None if is_named or path.is_dir() or not path.is_file() else path
    folder = path.parent if is_named or renamed is not None else path
    with naming(renamed or folder):
        return _read(folder, renamed)


def _read(folder: Path, renamed: Path | None) -> Adapter:
    config = RegularFile(inside(folder, ADAPTER_CONFIG))
    values = read_values(config)
    check_of_all_kinds(values, config.path)
    weights, original, about_weights = _open_weights(folder, renamed)
    tensors, about_names = as_saved(weights.tensors, folder)
    stored = Plain(values, tensors)
    if values["peft_type"] == "LORA" and not _is_no_product(values):
        stored = plain(values, tensors, folder)
    values = dict(stored.values)
    found = _contents(values, stored.tensors, stored.straight, folder)
    modules = _with_ties(found.modules, stored.tied)
    replacements: dict[str, Replacement] = {}
    carried = found.rest
    if found.modules or (values["peft_type"] == "LORA" and not _is_no_product(values)):
        replacements, carried = classify(values, found.rest, found.modules, folder)
    layout = stored.layout or found.experts
    is_tinkers = layout is not None and layout.name == "tinker"
    return Adapter(
        format="peft",
        source=renamed or folder,
        modules=modules,
        shared=found.shared,
        replacements=replacements,
        carried=carried,
        config=_canonical(values, found.findings),
        metadata=weights.metadata,
        base_model=values.get("base_model_name_or_path"),
        findings=(
            *found.findings,
            *about_weights,
            *about_names,
            *_about_folder(folder, original.path.name),
            *_about_training(carried),
            *(() if _is_no_product(values) else about_unknown(values, replacements, carried)),
            *(about_parts(found.modules) if is_tinkers else ()),
            *_about_loader(values["peft_type"], found.modules),
        ),
        attachments=attachments(folder),
        expert_layout=layout,
        inputs=(original, config),
    )


def _with_ties(
    modules: Mapping[str, ModuleChange], tied: frozenset[str]
) -> Mapping[str, ModuleChange]:
    made = dict(modules)
    for name in tied & made.keys():
        part = made[name].require_factors()
        made[name] = made[name].with_direction(replace(part, layer=replace(part.layer, tied=True)))
    return made


def _canonical(values: Mapping[str, Any], findings: Iterable[Finding]) -> Mapping[str, Any]:
    """Return a configuration that does not speak of an order that the factors had in the file."""
    auto = values.get("auto_mapping")
    nested = isinstance(auto, Mapping) and any(key in auto for key in MARKERS)
    guessed = any(finding.code == "expert-order-guessed" for finding in findings)
    marked = nested or guessed or any(key in values for key in MARKERS)
    return without_marks(values) if marked else values


def _is_no_product(values: Mapping[str, Any]) -> bool:
    return any(is_set(values.get(key)) for key in NOT_A_PRODUCT)


@dataclass(frozen=True)
class _Contents:
    modules: Mapping[str, ModuleChange]
    shared: Mapping[str, TensorRef]
    rest: dict[str, TensorRef]
    findings: tuple[Finding, ...]
    experts: ExpertLayout | None = None


def _contents(
    values: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
    straight: frozenset[str],
    folder: Path,
) -> _Contents:
    peft_type = values["peft_type"]
    if peft_type == "LORA":
        config = PeftConfig(values, folder / ADAPTER_CONFIG)
        if _is_no_product(values):
            return _Contents({}, {}, dict(tensors), config.caveats())
        modules, rest, about_stacks, layout = read_lora(config, tensors, straight, folder)
        has_middle = any(delta.kind == "middle" for delta in modules.values())
        caveats = (
            *config.caveats(),
            *caveats_of_lora(modules),
            *lost_middle(folder, has_middle),
            *about_stacks,
        )
        return _Contents(modules, {}, rest, caveats, layout)
    reason = reason_against(peft_type)
    if reason is not None:
        return _Contents({}, {}, dict(tensors), (reason,))
    if peft_type not in PEFT_KINDS:
        raise UnsupportedError(
            "adapter kind is not known",
            got=f"peft_type {peft_type}",
            expected=", ".join(["LORA", *PEFT_KINDS]),
        )
    others, shared, rest = read_modules(values, tensors, folder)
    modules = {path: ModuleChange(other) for path, other in others.items()}
    return _Contents(modules, shared, rest, tuple(caveats_of(values)))


def _open_weights(
    folder: Path, renamed: Path | None
) -> tuple[SafetensorsFile, RegularFile, list[Finding]]:
    if renamed is not None:
        return _open_renamed(folder, renamed.name)
    safe, legacy = folder / PEFT_WEIGHTS, folder / PICKLED_PEFT_WEIGHTS
    if is_there(safe) or safe.is_symlink():
        weights = read_safetensors(inside(folder, PEFT_WEIGHTS))
        text = f"{PICKLED_PEFT_WEIGHTS} lies beside {PEFT_WEIGHTS} and is ignored, as PEFT does"
        twice = Finding("weights-twice", "warning", PICKLED_PEFT_WEIGHTS, text)
        return weights, weights.file, [twice] if legacy.exists() else []
    if legacy.exists() or legacy.is_symlink():
        weights = read_bin(inside(folder, PICKLED_PEFT_WEIGHTS))
        text = f"weights are pickled ({PICKLED_PEFT_WEIGHTS})"
        pickled = Finding("pickled-weights", "warning", PICKLED_PEFT_WEIGHTS, text)
        return weights, weights.file, [pickled]
    others = sorted(child.name for child in folder.iterdir() if is_beside_peft_config(child))
    if len(others) == 1:
        return _open_renamed(folder, others[0])
    raise MissingFileError(
        "several weight files share the configuration" if others else "no weights in the folder",
        path=folder,
        got=", ".join(others) or None,
        expected=f"{PEFT_WEIGHTS} or {PICKLED_PEFT_WEIGHTS}",
        hint="Name one of the files"
        if others
        else f"Fetch {PEFT_WEIGHTS} from where the adapter came from",
    )


def _open_renamed(folder: Path, name: str) -> tuple[SafetensorsFile, RegularFile, list[Finding]]:
    text = f"the weights are in {name}; their scale is that of the {ADAPTER_CONFIG} beside it"
    found = [Finding("weights-renamed", "note", name, text)]
    if name.endswith(".safetensors"):
        weights = read_safetensors(inside(folder, name))
        return weights, weights.file, found
    weights = read_bin(inside(folder, name))
    pickled = Finding("pickled-weights", "warning", name, f"weights are pickled ({name})")
    return weights, weights.file, [*found, pickled]


def _about_loader(peft_type: str, modules: Mapping[str, ModuleChange]) -> list[Finding]:
    missing = left_to_loader(peft_type, modules)
    text = f"{missing} are not in the file; to-lora computes them from `base`"
    return [Finding("left-to-loader", "warning", None, text)] if missing else []


def _about_training(carried: Mapping[str, TensorRef]) -> list[Finding]:
    found = []
    sampler = next((name for name in carried if keys.SAMPLER in name), None)
    if sampler is not None:
        text = "MonteCLoRA's sampler acts in training only; it is left out when ranks change"
        found.append(Finding("training-only", "note", sampler, text))
    spread = next((name for name in carried if name.endswith(keys.SPREAD)), None)
    if spread is not None:
        text = (
            "it is a Bayesian LoRA (BLoB, TFB): the weight change is that of the mean, and the "
            "spread of the posterior is left out of every output"
        )
        found.append(Finding("posterior-spread", "warning", spread, text))
    return found


def _what_it_is(path: Path) -> str:
    if path.is_symlink():
        return "a link to nothing" if not path.exists() else "a link to no file"
    return "a folder" if path.is_dir() else "a pipe, socket or device"


def _about_folder(folder: Path, weights_name: str) -> list[Finding]:
    own = {
        ADAPTER_CONFIG,
        weights_name,
        *WEIGHTS_OF_PEFT,
        PROVENANCE_FILE,
        RECIPE_FILE,
        ".gitattributes",  # every repository of the Hub has one
    }
    foreign = sorted(
        child.name
        for child in folder.iterdir()
        if child.is_file() and child.name not in own and child.name not in ATTACHMENTS
    )
    found = [
        Finding(
            "unreadable-attachment",
            "warning",
            name,
            f"{name} is no regular file, and is left out: {_what_it_is(folder / name)}",
        )
        for name in standing(folder)
        if not (folder / name).is_file()
    ]
    if foreign:
        text = f"files beside the adapter, not part of it: {', '.join(foreign)}"
        found.append(Finding("foreign-files", "note", foreign[0], text))
    others = sorted(
        child.name
        for child in folder.iterdir()
        if child.is_dir() and (child / ADAPTER_CONFIG).is_file()
    )
    if others:
        text = f"sub-folders hold further adapters: {', '.join(others)}"
        found.append(Finding("nested-adapters", "note", others[0], text))
    return found
