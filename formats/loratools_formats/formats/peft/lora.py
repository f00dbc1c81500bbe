"""LoRA's modules in a PEFT folder: factors, scale, orientation, bias and magnitude of each.

Other kinds are read in `kinds`, variants of LoRA in `variants`, and the order of stacked experts
is settled in `stacks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from loratools_formats.core.adapter import ExpertLayout
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.factors import check_factor, check_magnitude, flattened_convolution
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import square_orientation
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.peft import keys
from loratools_formats.formats.peft.config import PeftConfig
from loratools_formats.formats.peft.parameters import Setting, settings
from loratools_formats.formats.peft.stacks import Pair, Stack, layout_of, stacks, unstacked
from loratools_formats.formats.peft.variants import variant_delta, variant_kind


def read_lora(
    config: PeftConfig,
    tensors: Mapping[str, TensorRef],
    straight: frozenset[str],
    folder: Path,
) -> tuple[dict[str, ModuleChange], dict[str, TensorRef], list[Finding], ExpertLayout | None]:
    """Sort tensors into modules.

    Args:
        config: of the folder.
        tensors: under the names that PEFT saves.
        straight: modules of stacked parameters whose A is known to be on the inputs.
        folder: for messages.

    Returns:
        Every module's change, the tensors that belong to none, what was found about stacks, and
        how experts are stored.

    Raises:
        AdapterError: a module lacks a factor, or its tensors contradict the configuration.
        UnsupportedError: a variant whose layout is not known, or a grouped convolution.
    """
    parts: dict[str, dict[keys.Part, TensorRef]] = {}
    rest: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        key = keys.parse(name)
        if key is None or key.part == "token_rows":
            rest[name] = tensor
        else:
            parts.setdefault(key.path, {})[key.part] = tensor
    pairs = {path: _factor_pair(path, parts[path], folder) for path in sorted(parts)}
    rows = {path: pair.a.shape[0] if pair.a.shape else 0 for path, pair in pairs.items()}
    resolved = settings(config, rows, folder)
    flat = {path: Pair(pair.a, pair.b) for path, pair in pairs.items()}
    lying, findings = stacks(config, flat, resolved, straight, folder)
    modules: dict[str, ModuleChange] = {
        path: _delta(config, path, parts[path], pair, resolved[path], lying.get(path), folder)
        for path, pair in pairs.items()
    }
    return modules, rest, findings, layout_of(modules, lying)


def caveats_of_lora(modules: Mapping[str, ModuleChange]) -> list[Finding]:
    """Return why the factors of some modules do not tell the true ΔW.

    For `nn.MultiheadAttention`, peft 0.21.2 merges the output projection's change twice, in its
    forward pass too, so that is what such adapters were trained with.
    """
    doubled = [path for path in modules if keys.setting_name(path) != path]
    return [
        Finding(
            "multihead-attention",
            "error",
            path,
            f"PEFT applies the change of {path} twice, since it belongs to an "
            "nn.MultiheadAttention",
            "This kind is not supported yet",
        )
        for path in doubled[:1]
    ]


def _delta(
    config: PeftConfig,
    path: str,
    parts: dict[keys.Part, TensorRef],
    pair: _Pair,
    setting: Setting,
    stack: Stack | None,
    folder: Path,
) -> ModuleChange:
    a, b, is_embedding = pair
    kind = variant_kind(config.values, path, parts)
    if setting.names:
        direction = unstacked(config, Pair(a, b), setting, stack, folder)
    else:
        if kind is not None:
            scale = config.scale(setting.alpha, setting.rank)
            resolved = (setting.alpha, setting.rank)
            other = variant_delta(kind, config.values, path, parts, pair, resolved, scale)
            return ModuleChange(other, parts.get("magnitude"))
        direction = _ordinary(config, path, a, b, setting, is_embedding, folder)
    bias = parts.get("b_bias")
    if bias is not None:
        if not config.values.get("lora_bias"):
            raise _contradiction(bias, "a bias of lora_B, but config lora_bias is not true", folder)
        direction = replace(direction, bias=bias)
    return _with_magnitude(config, path, direction, parts.get("magnitude"), folder)


class _Pair(NamedTuple):
    """The two factors of a module, and whether they are an embedding's."""

    a: TensorRef
    b: TensorRef
    is_embedding: bool


_BESIDE = ("b_bias", "diagonal", "embedding_middle", "magnitude", "middle")
"""Parts that may stand beside a module's factors."""


def _factor_pair(path: str, parts: dict[keys.Part, TensorRef], folder: Path) -> _Pair:
    embedding = "embedding_a" in parts or "embedding_b" in parts
    wanted: tuple[keys.Part, keys.Part] = (
        ("embedding_a", "embedding_b") if embedding else ("a", "b")
    )
    for part in wanted:
        if part not in parts:
            raise AdapterError(
                "module lacks one of its two factors",
                path=folder,
                tensor=path,
                got=", ".join(tensor.key for tensor in parts.values()),
                expected=keys.compose(path, part),
            )
    for part, tensor in parts.items():
        if part not in (*wanted, *_BESIDE):
            raise AdapterError(
                "module has both linear and embedding factors", path=folder, tensor=tensor.key
            )
        check_factor(tensor, folder)
    return _Pair(parts[wanted[0]], parts[wanted[1]], embedding)


def _with_magnitude(
    config: PeftConfig, path: str, direction: LowRank, magnitude: TensorRef | None, folder: Path
) -> ModuleChange:
    if magnitude is None:
        if config.use_dora:
            raise AdapterError(
                "config use_dora is true, but the module has no magnitude", path=folder, tensor=path
            )
        return ModuleChange(direction)
    if not config.use_dora:
        raise _contradiction(magnitude, "a magnitude, but config use_dora is not true", folder)
    check_magnitude(magnitude, direction.shape[0], folder)
    return ModuleChange(direction, magnitude)


def _contradiction(tensor: TensorRef, message: str, folder: Path) -> AdapterError:
    return AdapterError(f"file has {message}", path=folder, tensor=tensor.key)


def _ordinary(
    config: PeftConfig,
    path: str,
    a: TensorRef,
    b: TensorRef,
    setting: Setting,
    embedding: bool,
    folder: Path,
) -> LowRank:
    _, alpha, rank = setting
    if a.shape[:1] != (rank,):
        raise AdapterError(
            "rank in the file and rank in the config differ",
            path=folder,
            tensor=a.key,
            got=f"shape {list(a.shape)}",
            expected=f"r = {rank} for {path}",
        )
    dims = len(a.shape)
    if embedding and dims != 2:
        raise AdapterError(
            "embedding factor is not a matrix", path=folder, tensor=a.key, got=list(a.shape)
        )
    layer = Layer("embedding" if embedding else "linear")
    if not embedding and dims > 2:
        stored = list(b.shape)
        a, b, layer = flattened_convolution(a, b, folder)
        if b.shape[1] != a.shape[0] and a.shape[0] % b.shape[1] == 0:
            raise UnsupportedError(
                "grouped convolution: its weight change is not defined, PEFT cannot merge it "
                "either",
                path=folder,
                tensor=b.key,
                got=stored,
            )
    elif not embedding:
        turn = square_orientation(bool(config.values.get("fan_in_fan_out")), path)
        layer = Layer("linear", transposed_if_square=turn)
    return LowRank(a, b, config.scale(alpha, rank), layer, alpha=alpha)
