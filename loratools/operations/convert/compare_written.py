"""What a written file holds, compared with what was to be written: every ΔW, every other tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loratools.algebra import linalg, residuals
from loratools.lowrank.matrices import loaded
from loratools.operations.reported import ratio
from loratools.work.parallel import done_in_order, usable_cores
from loratools.work.requests import Progress
from loratools_formats.contract.files import read_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import Array, is_power_of_two
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk.errors import AdapterError, OutputError


@dataclass(frozen=True)
class ModuleError:
    """How far one written module is from the one intended.

    Attributes:
        name: module path, as the target names it.
        rank: of the factors.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖.
    """

    name: str
    rank: int | None
    relative_error: float


@dataclass(frozen=True)
class ConversionCheck:
    """What the written file holds, compared with what was intended.

    Attributes:
        modules: one entry each, in path order.
        relative_error: over all modules together.
        other_error: the largest relative error of a tensor that is no factor: a magnitude, a
            bias, a replacement.
    """

    modules: tuple[ModuleError, ...]
    relative_error: float
    other_error: float


def compared(
    exact: Adapter,
    path: Path,
    format_name: str,
    source: Adapter,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ConversionCheck:
    """Read a written output and compare everything in it with what was intended.

    Args:
        exact: what was intended, as the output's format names it.
        path: the output.
        format_name: its format.
        source: the input, whose keys are those that a user knows.
        workers: threads over modules, the usable cores by default.
        progress: called with (modules compared, modules in all).

    Raises:
        OutputError: a module or tensor is missing, there is one too many, or infinite values.
        AdapterError: the input holds NaN or infinite values.
    """
    written = read_adapter(path, format_name, carry_unknown=True)
    _same_names(path, set(exact.modules), set(written.modules))
    _same_names(path, set(exact.additions), set(written.additions))
    _same_names(path, set(exact.carried), set(written.carried))
    _same_names(path, set(exact.replacements), set(written.replacements))
    names = list(exact.modules)

    def one(name: str) -> tuple[float, float]:
        return _residual(name, exact.modules[name], written.modules[name], source)

    found = done_in_order(one, names, workers or usable_cores(), progress)
    modules = [
        ModuleError(name, written.modules[name].rank, ratio(*squares))
        for name, squares in zip(names, found, strict=True)
    ]
    pairs = [
        pair for name in names for pair in _others(name, exact.modules[name], written.modules[name])
    ]
    pairs += [(each.tensor, written.additions[key].tensor) for key, each in exact.additions.items()]
    pairs += [
        (each.tensor, written.replacements[key].tensor) for key, each in exact.replacements.items()
    ]
    others = [ratio(*_difference(mine, theirs, source)) for mine, theirs in pairs]
    return ConversionCheck(
        modules=tuple(modules),
        relative_error=ratio(sum(e for e, _ in found), sum(n for _, n in found)),
        other_error=max(others, default=0.0),
    )


def _same_names(path: Path, wanted: set[str], found: set[str]) -> None:
    different = sorted(wanted ^ found)
    if different:
        kind = "lost" if different[0] in wanted else "gained"
        raise OutputError(f"the written file {kind} a part", path=path, tensor=different[0])


def _others(
    name: str, mine: ModuleChange, theirs: ModuleChange
) -> list[tuple[TensorRef, TensorRef]]:
    """Return pairs of tensors that are no factors: biases, magnitudes, those of other kinds."""
    first, second = _beside_factors(mine), _beside_factors(theirs)
    if set(first) != set(second):
        raise OutputError(
            "the written module has other parts",
            tensor=name,
            got=", ".join(sorted(second)),
            expected=", ".join(sorted(first)),
        )
    return [(tensor, second[part]) for part, tensor in first.items()]


def _beside_factors(delta: ModuleChange) -> dict[str, TensorRef]:
    other = delta.kind_delta
    named = {
        **({} if other is None else other.parts),
        "magnitude": delta.magnitude,
        "bias": delta.direction.bias if delta.factors is None else _scaled_bias(delta.factors),
    }
    return {part: tensor for part, tensor in named.items() if tensor is not None}


def _scaled_bias(part: LowRank) -> TensorRef | None:
    """Return what is added to the layer's bias: scale · bias in float64."""
    if part.bias is None:
        return None
    return in_memory(part.bias.key, part.bias.load(np.float64) * part.scale, "F64")


@np.errstate(over="ignore", invalid="ignore")
def _residual(
    name: str, mine: ModuleChange, theirs: ModuleChange, source: Adapter
) -> tuple[float, float]:
    """Return (‖ΔW − ΔW'‖², ‖ΔW‖²) of one module; zeros for a kind without factors."""
    first, second = mine.factors, theirs.factors
    if first is None or second is None:
        if _settled(mine) != _settled(theirs):
            raise OutputError("the written module is of another kind or scale", tensor=name)
        return 0.0, 0.0
    same_kind = mine.is_dora == theirs.is_dora
    if (first.shape, first.experts) != (second.shape, second.experts) or not same_kind:
        raise OutputError(
            "the written module is another",
            tensor=name,
            got=f"{list(second.shape)}, {second.experts} matrices",
            expected=f"{list(first.shape)}, {first.experts}",
        )
    error = norm = 0.0
    for (b, a), (new_b, new_a) in zip(loaded(first), loaded(second), strict=True):
        both = linalg.grams(b, a)
        norm += first.scale * first.scale * both.squared_norm
        if not math.isfinite(norm):
            raise _not_finite(source)
        if first.scale == second.scale * _multiple(new_b, b) * _multiple(new_a, a):
            continue
        if np.array_equal(a, new_a):
            change = second.scale * new_b - first.scale * b
            error += linalg.Grams(linalg.gram(change), both.a).squared_norm if change.any() else 0.0
        else:
            error += (
                residuals.residual_norm(b, a, first.scale, both, second.scale * new_b, new_a)[0]
                ** 2
            )
    if not math.isfinite(error):
        raise OutputError("a value is beyond the range of the output's type", tensor=name)
    return error, norm


def _multiple(new: Array, old: Array) -> float:
    """Return k if `new` is k·`old` for a power of two k, bit for bit; NaN if it is not."""
    places = np.flatnonzero(old)
    if new.shape != old.shape or not len(places):
        return math.nan
    ratio = float(new.flat[places[0]]) / float(old.flat[places[0]])
    same = is_power_of_two(ratio) and np.array_equal(new, old * ratio)
    return ratio if same else math.nan


def _settled(delta: ModuleChange) -> object:
    other = delta.kind_delta
    return None if other is None else (other.kind, dict(other.settings), other.shape)


def _not_finite(source: Adapter) -> AdapterError:
    """Return the error that names a tensor by its key in the input."""
    for tensor in source.tensors():
        if tensor.dtype.floating and not np.isfinite(tensor.load(np.float64)).all():
            return AdapterError(
                "tensor holds NaN or infinite values", path=source.source, tensor=tensor.key
            )
    return AdapterError("squares of the values overflow float64", path=source.source)


@np.errstate(over="ignore", invalid="ignore")
def _difference(mine: TensorRef, theirs: TensorRef, source: Adapter) -> tuple[float, float]:
    a, b = mine.load(np.float64).reshape(-1), theirs.load(np.float64).reshape(-1)
    if a.shape != b.shape:
        raise OutputError("the written tensor has another size", tensor=mine.key)
    error, norm = float(np.sum((a - b) ** 2)), float(np.sum(a**2))
    if not math.isfinite(norm):
        raise _not_finite(source)
    return error, norm
