"""Variants of LoRA in PEFT folders whose change is not just scale · B @ A.

A configuration key shows some of them; others show only in a tensor beside the factors: LoRA-XS and
LoRA-SB
write a plain LoRA configuration, and without their middle matrix the factors are a large part of
the base weight. Source: `peft.tuners.lora.variants`, 0.21.2; the authors' code for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools_formats.core.change import KindDelta, Layer
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import square_orientation
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.peft import keys
from loratools_formats.formats.peft.config import MIDDLE_INITS, is_set

Parts = Mapping[keys.Part, TensorRef]

_RECONSTRUCTION = "reconstr_config.json"


def middle_of(parts: Parts) -> TensorRef | None:
    """Return the matrix between a module's factors, None if there is none."""
    return parts.get("middle") or parts.get("embedding_middle")


def variant_kind(values: Mapping[str, Any], path: str, parts: Parts) -> str | None:
    """Return which kind a module's change is, None if it is plain.

    Raises:
        AdapterError: configuration and tensors contradict each other.
    """
    diagonal = parts.get("diagonal")
    if is_set(values.get("kasa_config")) != (diagonal is not None):
        raise AdapterError(
            "config kasa_config and the tensors contradict each other",
            tensor=path,
            got="a diagonal" if diagonal is not None else "no diagonal",
        )
    found = [
        name
        for name, holds in (
            ("kasa", diagonal is not None),
            ("qalora", bool(values.get("use_qalora"))),
            ("blockdiag", is_set(values.get("use_bdlora")) and any(_blocks(values, path))),
            ("middle", middle_of(parts) is not None),
        )
        if holds
    ]
    if len(found) > 1:
        raise AdapterError("module is of several variants at once", tensor=path, got=found)
    if not found and values.get("init_lora_weights") in MIDDLE_INITS:
        raise AdapterError(
            "module lacks the matrix between its factors", tensor=path, expected="lora_N"
        )
    return found[0] if found else None


def variant_delta(
    kind: str,
    values: Mapping[str, Any],
    path: str,
    parts: Parts,
    factors: tuple[TensorRef, TensorRef, bool],
    setting: tuple[float, int],
    scale: float,
) -> KindDelta:
    """Return the change of a module of a variant.

    Args:
        kind: as `variant_kind` says.
        values: the configuration.
        path: the module.
        parts: its tensors.
        factors: A and B, and whether they are an embedding's.
        setting: alpha and rank.
        scale: that multiplies the product.

    Raises:
        AdapterError: rank or shapes do not fit.
        UnsupportedError: a combination that is not defined.
    """
    a, b, embedding = factors
    rank = setting[1]
    if len(a.shape) != 2 or len(b.shape) != 2 or "b_bias" in parts:
        raise UnsupportedError(
            f"variant {kind} is known for linear layers without lora_bias only",
            tensor=a.key,
            got=list(a.shape),
        )
    if a.shape[0] != rank:
        raise AdapterError(
            "rank in the file and rank in the config differ",
            tensor=a.key,
            got=f"shape {list(a.shape)}",
            expected=f"r = {rank} for {path}",
        )
    own = {"a": a, "b": b}
    settings: dict[str, Any] = {"scale": scale}
    out: int = b.shape[0]
    in_: int | None = a.shape[1]
    middle = middle_of(parts)
    if kind == "middle" and middle is not None:
        own["middle"] = middle
    elif kind == "kasa":
        own["diagonal"] = parts["diagonal"]
    elif kind == "qalora":
        settings["group"] = _group(values)
        in_ = None  # pooled on GPTQ layers only
    else:
        a_is_blocks, b_is_blocks = _blocks(values, path)
        count = _block_count(values)
        settings |= {"blocks": count, "a_is_blocks": a_is_blocks, "b_is_blocks": b_is_blocks}
        in_ = a.shape[1] * (count if a_is_blocks else 1)
    turn = square_orientation(bool(values.get("fan_in_fan_out")), path)
    layer = Layer("embedding") if embedding else Layer("linear", transposed_if_square=turn)
    return KindDelta(kind, own, settings, layer, (out, in_))


def lost_middle(folder: Path, has_middle: bool) -> list[Finding]:
    """Return why plain factors are not the change, if they come from LoRA-XS or LoRA-SB."""
    beside = [folder / _RECONSTRUCTION, folder.parent / _RECONSTRUCTION]
    if has_middle or not any(path.is_file() for path in beside):
        return []
    return [
        Finding(
            "latent-mapping-missing",
            "error",
            _RECONSTRUCTION,
            f"a {_RECONSTRUCTION} lies beside it, as LoRA-XS and LoRA-SB write, but the trained "
            "matrices between the factors are not in the file",
            "Save the adapter again with its lora_latent_mapping tensors",
        )
    ]


def _blocks(values: Mapping[str, Any], path: str) -> tuple[bool, bool]:
    """Return whether A and whether B is block-diagonal in a module."""
    found = values["use_bdlora"]
    if not isinstance(found, dict):
        raise AdapterError("config value use_bdlora is wrong", got=found, expected="a map")
    leaf = path.rpartition(".")[2]
    names = [found.get(f"target_modules_bd_{side}") or [] for side in "ab"]
    if not all(isinstance(each, list) and all(isinstance(n, str) for n in each) for each in names):
        raise AdapterError("config value use_bdlora is wrong", got=found)
    return any(n in leaf for n in names[0]), any(n in leaf for n in names[1])


def _block_count(values: Mapping[str, Any]) -> int:
    count = values["use_bdlora"].get("nblocks")
    if type(count) is not int or count < 1:
        raise AdapterError(
            "config value nblocks is wrong", got=count, expected="a whole number above 0"
        )
    return count


def _group(values: Mapping[str, Any]) -> int:
    size = values.get("qalora_group_size")
    if type(size) is not int or not 0 < size < 1 << 20:
        raise AdapterError(
            "config value qalora_group_size is wrong", got=size, expected="a whole number above 0"
        )
    return size
