"""What a base checkpoint is, from headers and configuration: how its weights are quantised, if so.

No weight is decoded. A quantisation that cannot be read is named, since that is what a user
wants to know before anything else.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.base.codecs import CodedWeight
from loratools.base.dequantised import DequantisedCheckpoint, as_stored, dequantised
from loratools.work.json_object import named
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.quantization import format_found, stated_of
from loratools_formats.containers.gguf.ggml_types import GgmlType
from loratools_formats.containers.gguf.splits import GgufModel
from loratools_formats.disk.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class QuantisedInfo:
    """Weights that are quantised in one way.

    Attributes:
        format: of the quantisation.
        bits: of a code.
        group: values along the inputs that share a scale; None if the format has no such number.
        weights: how many.
        parameters: values that they stand for.
        nbytes: of their codes and scales.
    """

    format: str
    bits: int
    group: int | None
    weights: int
    parameters: int
    nbytes: int = named("bytes")


@dataclass(frozen=True, kw_only=True)
class BaseInfo:
    """What a base checkpoint is.

    Attributes:
        model: its class as its configuration names it, or its type; None if neither is there.
        quant_method: what its configuration says of its quantisation; None if nothing.
        quantised: its quantised weights, by how they are.
        left_out: modules that are not quantised although others are.
        problem: why its quantisation cannot be read; None if it can, or there is none.
        dtypes: number of its plain tensors by their type.
        tensors: number of stored tensors.
        parameters: values of its weights; None if not known.
        nbytes: of its tensors.
        files: number of its weight files.
    """

    model: str | None
    quant_method: str | None
    quantised: tuple[QuantisedInfo, ...]
    left_out: tuple[str, ...]
    problem: str | None
    dtypes: Mapping[str, int]
    tensors: int
    parameters: int | None
    nbytes: int = named("bytes")
    files: int


def describe_base(base: Checkpoint) -> BaseInfo:
    """Return what a base checkpoint is; tensors are not loaded.

    Raises:
        AdapterError: malformed quantised weights.
        UnsupportedError: its weights are rotated.
    """
    problem = None
    try:
        view = dequantised(base)
    except UnsupportedError as error:
        view, problem = as_stored(base), _problem(base, error)
    plain = {k: t for k, t in view.checkpoint.tensors.items() if k not in view.weights}
    method = stated_of(base).get("quant_method")
    return BaseInfo(
        model=_model(base.config),
        quant_method=None if method is None else str(method),
        quantised=_quantised(view.weights.values()),
        left_out=_left_out(view.weights, {key: t.shape for key, t in plain.items()}),
        problem=problem,
        dtypes=dict(sorted(Counter(tensor.dtype.code for tensor in plain.values()).items())),
        tensors=len(base.tensors),
        parameters=_parameters(view) if problem is None else None,
        nbytes=sum(tensor.nbytes for tensor in base.tensors.values()),
        files=len(base.files),
    )


def _problem(base: Checkpoint, error: UnsupportedError) -> str:
    told = format_found(base.tensors)
    what = error.args[0] if error.args else str(error)
    found = f"{error.tensor}: " if error.tensor else ""
    return f"{what} ({found}{error.got or told})" if error.got or told else str(what)


def _model(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    kind = config.get("model_type", config.get("_class_name"))
    return kind if isinstance(kind, str) else None


def _quantised(weights: Iterable[CodedWeight]) -> tuple[QuantisedInfo, ...]:
    by_scheme: dict[tuple[str, int, int | None], list[CodedWeight]] = {}
    for weight in weights:
        scheme = weight.scheme
        by_scheme.setdefault((scheme.name, scheme.bits, scheme.group), []).append(weight)
    return tuple(
        QuantisedInfo(
            format=name,
            bits=bits,
            group=group,
            weights=len(found),
            parameters=sum(math.prod(weight.shape) for weight in found),
            nbytes=sum(weight.nbytes for weight in found),
        )
        for (name, bits, group), found in by_scheme.items()
    )


def describe_gguf(base: GgufModel) -> BaseInfo:
    """Return what a GGUF model is; a type of its tensors is a format of its own."""
    coded = {key: tensor for key, tensor in base.tensors.items() if tensor.kind.block > 1}
    plain = {key: tensor for key, tensor in base.tensors.items() if key not in coded}
    sizes = {key: math.prod(tensor.shape) for key, tensor in base.tensors.items()}
    by_kind: dict[GgmlType, list[str]] = {}
    for key, tensor in coded.items():
        by_kind.setdefault(tensor.kind, []).append(key)
    name = base.get("general.architecture", "string")
    return BaseInfo(
        model=None if name is None else str(name),
        quant_method="gguf" if coded else None,
        quantised=tuple(
            QuantisedInfo(
                format=kind.name,
                bits=int("".join(re.findall(r"\d", kind.name.partition("_")[0]))),
                group=kind.block,
                weights=len(keys),
                parameters=sum(sizes[key] for key in keys),
                nbytes=sum(kind.nbytes(coded[key].shape) for key in keys),
            )
            for kind, keys in by_kind.items()
        ),
        left_out=_left_out(coded, {key: tensor.shape for key, tensor in plain.items()}),
        problem=None,
        dtypes=dict(sorted(Counter(tensor.kind.name for tensor in plain.values()).items())),
        tensors=len(base.tensors),
        parameters=sum(sizes.values()),
        nbytes=sum(tensor.kind.nbytes(tensor.shape) for tensor in base.tensors.values()),
        files=len(base.parts),
    )


def _left_out(coded: Collection[str], plain: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the modules with plain matrices, the numbers in their paths as `*`, each once."""
    if not coded:
        return ()
    modules = [
        key.removesuffix(".weight")
        for key, shape in plain.items()
        if len(shape) > 1 and key.endswith(".weight")
    ]
    return tuple(dict.fromkeys(_general(module) for module in modules))


def _general(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _parameters(view: DequantisedCheckpoint) -> int:
    return sum(tensor.numel for tensor in view.checkpoint.tensors.values())
