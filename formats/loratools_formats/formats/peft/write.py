"""Writing a PEFT folder: tensor names, and a configuration that gives every module its scale.

The adapter's own configuration is kept as long as it still gives each module its rank and scale;
else r, lora_alpha and the two patterns are rewritten. Scales are always written as α/r.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loratools_formats.containers.safetensors_write import safetensors_nbytes, write_safetensors
from loratools_formats.contract.commands import command_on
from loratools_formats.contract.format import Loss
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.factors import alpha_of, kept_whole
from loratools_formats.core.file_names import ADAPTER_CONFIG, PEFT_WEIGHTS
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import family_of, stacked_on_loading
from loratools_formats.core.peft_on_load import about_load, parameters_of
from loratools_formats.core.peft_patterns import settings_of
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.disk.files import copy_whole
from loratools_formats.formats.peft import keys
from loratools_formats.formats.peft.beside_parameters import (
    about_dropout,
    refuse_biases,
    without_dropout,
)
from loratools_formats.formats.peft.config import PeftConfig
from loratools_formats.formats.peft.experts.packed import (
    PACKED,
    is_packed,
    packed_config,
    packed_tensors,
)
from loratools_formats.formats.peft.parameters import Setting, settings
from loratools_formats.formats.peft.written_sides import sayable


def losses(adapter: Adapter) -> list[Loss]:
    """Return what PEFT cannot hold of an adapter read from another format."""
    if adapter.format == "peft":
        return [Loss(name, "PEFT has no full differences") for name in kept_whole(adapter)]
    return [
        Loss(name, "has no place in a PEFT file") for name in [*adapter.additions, *adapter.carried]
    ]


def write(adapter: Adapter, path: Path) -> None:
    """Write config, weights and attachments into the existing, empty folder `path`.

    Raises:
        UnsupportedError: a module's rank and scale cannot be expressed, or PEFT does not bear its
            biases beside what else is adapted.
    """
    refuse_biases(adapter)
    adapter = sayable(adapter)
    config = strict_json.dumps(config_for(adapter), indent=2)
    (path / ADAPTER_CONFIG).write_text(config + "\n", encoding="utf-8")
    write_safetensors(path / PEFT_WEIGHTS, stored_tensors(adapter), metadata_for(adapter))
    for name, source in adapter.attachments.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            (path / name).write_bytes(source)
        else:
            copy_whole(source, path / name)


def weights_nbytes(adapter: Adapter) -> int:
    """Return the size of the weight file that `write` would make.

    Raises:
        UnsupportedError: it could not be written.
    """
    adapter = sayable(adapter)
    config_for(adapter)
    return safetensors_nbytes(stored_tensors(adapter), metadata_for(adapter))


def metadata_for(adapter: Adapter) -> dict[str, str]:
    """Return the weight file's metadata: the adapter's own, and `format`, which PEFT expects."""
    return {"format": "pt", **adapter.metadata}


def stored_tensors(adapter: Adapter) -> Iterator[TensorRef]:
    """Yield every tensor under its name and in its layout in a PEFT file."""
    yield from packed_tensors(adapter)
    for path, delta in adapter.modules.items():
        if is_packed(adapter, path):
            continue
        if delta.factors is None:
            yield from delta.tensors()
            continue
        yield from _factors(path, delta.factors)
        if delta.magnitude is not None:
            yield delta.magnitude.renamed(keys.compose(path, "magnitude"))
    yield from adapter.shared.values()
    for name, replacement in adapter.replacements.items():
        yield replacement.tensor.renamed(name)
    # The sampler of MonteCLoRA acts in training only, and its shapes hold the rank.
    sampled = bool(adapter.config.get("monteclora_config")) and not _keeps_config(adapter)
    for name, tensor in adapter.carried.items():
        # What an operation makes is made of means, to which the spread of others does not belong.
        of_others = name.endswith(keys.SPREAD) and adapter.provenance is not None
        if not (sampled and keys.SAMPLER in name) and not of_others:
            yield tensor.renamed(name)


def _factors(path: str, delta: LowRank) -> Iterator[TensorRef]:
    a, b = delta.a, delta.b
    out, in_ = delta.shape
    kind = delta.layer.kind
    if kind == "conv":
        kernel = delta.layer.kernel
        a = a.reshaped((delta.rank, in_ // math.prod(kernel), *kernel))
        b = b.reshaped((out, delta.rank, *(1 for _ in kernel)))
    elif kind == "experts":
        total = delta.experts * delta.rank
        a = a.reshaped((total, in_))
        b = b.transposed((1, 2, 0)).reshaped((out, total))
    if kind == "embedding":
        yield a.renamed(keys.compose(path, "embedding_a"))
        yield b.renamed(keys.compose(path, "embedding_b"))
    else:
        yield a.renamed(keys.compose(path, "a"))
        yield b.renamed(keys.compose(path, "b"))
    if delta.bias is not None:
        yield delta.bias.renamed(keys.compose(path, "b_bias"))


def about_experts(adapter: Adapter) -> list[Finding]:
    """Return findings about what PEFT loses of experts, as they will be written.

    Raises:
        UnsupportedError: they cannot be.
    """
    if adapter.format != "peft":
        return []
    refuse_biases(adapter)
    if not parameters_of(adapter):
        return []
    adapter = sayable(adapter)
    if adapter.write_as in PACKED:
        return []
    family = family_of(adapter.config)
    types = () if family is None else (family,)
    return [*about_dropout(adapter), *about_load(adapter, types, config_for(adapter))]


def config_for(adapter: Adapter) -> dict[str, Any]:
    """Return the configuration to write.

    Raises:
        UnsupportedError: the adapter comes from another format and has no PEFT configuration.
    """
    if adapter.format != "peft":
        raise UnsupportedError(
            f"an adapter of format {adapter.format} has no PEFT configuration",
            hint="Make one: " + command_on(adapter, "convert", "--to", "peft", output="converted"),
        )
    for name in kept_whole(adapter):
        raise UnsupportedError("PEFT has no full differences", tensor=name)
    is_other = adapter.config.get("peft_type", "LORA") != "LORA"
    if is_other or any(delta.factors is None for delta in adapter.modules.values()):
        return dict(adapter.config)
    values = _with_kinds(adapter)
    values = values if _keeps_config(adapter) else _rewritten(values, adapter)
    return without_dropout(packed_config(adapter, values), adapter)


def _with_kinds(adapter: Adapter) -> dict[str, Any]:
    """Return the adapter's configuration, saying which kinds of tensors its modules have now."""
    values = dict(adapter.config)
    is_dora = any(delta.is_dora for delta in adapter.modules.values())
    if bool(values.get("use_dora")) != is_dora:
        values["use_dora"] = is_dora
    if any(delta.require_factors().bias is not None for delta in adapter.modules.values()):
        values["lora_bias"] = True
    return values


def _keeps_config(adapter: Adapter) -> bool:
    """Return whether the adapter's own configuration still gives each module its scale."""
    values = _with_kinds(adapter)
    caveats = {found for found in PeftConfig(values).caveats() if found.severity == "error"}
    resolved = caveats - set(adapter.caveats)
    return not resolved and _gives_same(values, adapter.modules)


def _pattern_names(modules: Mapping[str, ModuleChange]) -> dict[str, tuple[str, ...]]:
    """Return the paths PEFT matches patterns against, for each module."""
    return {
        path: delta.require_factors().layer.parameters or (keys.setting_name(path),)
        for path, delta in modules.items()
    }


def _gives_same(values: Mapping[str, Any], modules: Mapping[str, ModuleChange]) -> bool:
    config = PeftConfig(values)
    found = _settings(config, modules)
    return found is not None and all(
        (found[path].rank, config.scale(found[path].alpha, found[path].rank))
        == (part.rank, part.scale)
        and set(part.layer.parameters) <= set(found[path].names)
        for path, part in _parts(modules).items()
    )


def _settings(config: PeftConfig, modules: Mapping[str, ModuleChange]) -> dict[str, Setting] | None:
    """Return what a reader finds in a configuration; None if it cannot tell."""
    rows = {path: part.experts * part.rank for path, part in _parts(modules).items()}
    try:
        return settings(config, rows, None)
    except (AdapterError, UnsupportedError):
        return None


def _parts(modules: Mapping[str, ModuleChange]) -> dict[str, LowRank]:
    return {path: delta.require_factors() for path, delta in modules.items()}


def _rewritten(values: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    wanted: dict[str, tuple[int, float]] = {}
    for path, group in _pattern_names(adapter.modules).items():
        part = adapter.modules[path].require_factors()
        for name in group:
            setting = (part.rank, alpha_of(part.rank, part.scale))
            if wanted.setdefault(name, setting) != setting:
                raise _indistinct(path)
    # What PEFT stacks when it loads takes r and lora_alpha themselves, not the patterns.
    stacked = [wanted[name] for name in stacked_on_loading(list(wanted))]
    values |= settings_of(wanted, stacked[0] if stacked else None)
    if values.get("use_rslora"):
        values["use_rslora"] = False
    # The factors are no longer what an initialisation made; loading must not run one again, and
    # some of them refuse odd ranks.
    if isinstance(values.get("init_lora_weights"), str):
        values["init_lora_weights"] = True
        for key in ("eva_config", "corda_config", "lora_ga_config"):
            if key in values:
                values[key] = None
        if "loftq_config" in values:
            values["loftq_config"] = {}
    if values.get("monteclora_config"):
        values["monteclora_config"] = None
    _check_distinct(values, adapter.modules)
    return values


def _check_distinct(values: Mapping[str, Any], modules: Mapping[str, ModuleChange]) -> None:
    """Refuse changes of parameters that no reader could tell apart again."""
    parts = _parts(modules)
    of_parameters = [path for path, part in parts.items() if part.layer.parameters]
    if not of_parameters:
        return
    found = _settings(PeftConfig(values), modules)
    for path in of_parameters:
        if found is None or found[path].rank != parts[path].rank:
            raise _indistinct(path)


def _indistinct(path: str) -> UnsupportedError:
    return UnsupportedError(
        "several parameters of one module need different ranks or scales, which a PEFT file cannot "
        "express without naming them",
        tensor=path,
        hint="Give them one rank and scale: `uniform=True` without `keep_alpha` does",
    )
