"""An adapter from one format to another, with proof that the weight changes are the same.

The way goes through the base model's module names: one format's translation to them, the other's
back. What the target cannot hold is listed before anything is written, and refused unless that is
asked for. After writing, the output is read again and every ΔW compared with the one intended:
the error reported is that of the file, not of a plan.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loratools import linalg
from loratools.decompose import loaded
from loratools.naming.lists import names_of_adapter, names_of_base
from loratools.naming.rename import NamingOptions, Renamed, renamed
from loratools.naming.tables import find_table
from loratools.parallel import in_order
from loratools.provenance import operation_record, record_metadata
from loratools.rescale import folded
from loratools_formats.adapter import Adapter, Delta, Dora, LowRank, OtherDelta, low_rank_part
from loratools_formats.errors import AdapterError, OptionError, OutputError, UnsupportedError
from loratools_formats.factors import stored_as
from loratools_formats.registry import (
    Context,
    Format,
    Loss,
    get_format,
    read_adapter,
    write_adapter,
)
from loratools_formats.singlefile.metadata import without_training_data
from loratools_formats.singlefile.write import SINGLE_FILES
from loratools_formats.tensors import TensorRef

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Conversion:
    """An adapter ready to be written in another format.

    Attributes:
        adapter: what to write.
        exact: the same with every factor in the type it came in, to compare with.
        target: the format to write.
        losses: what the target does not hold; `adapter` is without it.
        notes: what a user should know.
    """

    adapter: Adapter
    exact: Adapter
    target: Format
    losses: tuple[Loss, ...]
    notes: tuple[str, ...]


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
class SingleFileOptions:
    """How to write or read single-file adapters, whose names need resolving.

    Attributes:
        names: a bundled table of names, or the path of a user's.
        names_from: an adapter whose dotted names resolve flattened ones.
        component: what part of a pipeline paths without a component are of, or which part to take.
        alpha: what becomes of scales: moved into the factors where that is `exact`, or always
            (`fold`), or never (`keep`).
        as_it_is: whether keys and scales stay as they are, since the naming does.
        strip_training_metadata: whether metadata about the training data is left out.
    """

    names: str | None = None
    names_from: Path | None = None
    component: str | None = None
    alpha: Literal["exact", "fold", "keep"] = "exact"
    as_it_is: bool = False
    strip_training_metadata: bool = False

    def record(self) -> dict[str, Any]:
        """Return what is set, for an output's provenance."""
        values = {
            "names": None if self.names is None else Path(self.names).name,
            "names_from": None if self.names_from is None else self.names_from.name,
            "component": self.component,
            "alpha": None if self.alpha == "exact" else self.alpha,
            "strip_training_metadata": self.strip_training_metadata or None,
        }
        return {key: value for key, value in values.items() if value is not None}


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


def prepare(
    adapter: Adapter,
    format_name: str,
    context: Context | None = None,
    *,
    allow_lossy: bool = False,
    metadata: Mapping[str, str] | None = None,
    single: SingleFileOptions | None = None,
) -> Conversion:
    """Translate an adapter into another format; loads no factor and writes nothing.

    Args:
        adapter: as read.
        format_name: the format to convert to.
        context: the base model and the type of the output's factors, where wanted.
        allow_lossy: leave out what the target cannot hold.
        metadata: text to add to the output's metadata.
        single: what single-file formats are asked for.

    Raises:
        UnsupportedError: the target cannot hold the adapter, or a translation would be a guess.
        OptionError: a type or base model was given that neither format has a use for.
    """
    context, single = context or Context(), single or SingleFileOptions()
    target = get_format(format_name)
    if target.write is None or target.losses is None:
        raise UnsupportedError(f"format {target.name} can be read but not written")
    if context.dtype is not None and context.dtype not in target.dtypes:
        raise OptionError(
            f"format {target.name} is not written in this type",
            got=context.dtype,
            expected=" or ".join(target.dtypes) or "no --outtype",
        )
    _require_true_delta(adapter, target)
    named = _named(_in_model_terms(adapter, target, context), target, context, single)
    model = named.adapter
    out_of_place = [Loss(name, "is of another component") for name in named.left_out]
    losses = (*out_of_place, *target.losses(model))
    if losses and not allow_lossy:
        others = f" and {len(losses) - 1} more" if len(losses) > 1 else ""
        raise UnsupportedError(
            f"{losses[0].name} {losses[0].reason}{others}",
            path=adapter.source,
            hint="Pass --allow-lossy to leave such things out",
        )
    if single.strip_training_metadata:
        model = replace(model, metadata=without_training_data(model.metadata))
    exact, made = _translated(model, target, context, single)
    options: dict[str, Any] = {"to": target.name, **single.record()}
    if context.dtype is not None:
        options["outtype"] = context.dtype
    if losses:
        options["lost"] = [loss.name for loss in losses]
    if metadata:
        options["metadata"] = dict(metadata)
    record = operation_record("convert", {"adapter": exact}, options)
    made = replace(
        made,
        provenance=record,
        metadata={**made.metadata, **(metadata or {}), **record_metadata(record)},
    )
    notes = (*_notes(adapter, made, target), *named.notes)
    return Conversion(made, exact, target, losses, notes)


def _translated(
    model: Adapter, target: Format, context: Context, single: SingleFileOptions
) -> tuple[Adapter, Adapter]:
    """Return the adapter as the target has it: with its values as they came, and as wanted."""
    if single.as_it_is:
        stored = {name: stored_as(delta, context.dtype) for name, delta in model.modules.items()}
        return model, replace(model, modules=stored)
    from_model = target.from_model or _as_it_is(target)
    exact = from_model(model, replace(context, dtype=None))
    wanted = model
    if target.name in SINGLE_FILES and single.alpha != "keep":
        rounding = single.alpha == "fold"
        modules = {n: folded(delta, rounding=rounding) for n, delta in model.modules.items()}
        wanted = replace(model, modules=modules)
    if context.dtype is None and wanted is model:
        return exact, exact
    return exact, from_model(wanted, context)


def _named(
    adapter: Adapter, target: Format, context: Context, single: SingleFileOptions
) -> Renamed:
    """Return the adapter under the names of the target, if single files take part."""
    naming = next((name for name in SINGLE_FILES if name == target.name), None)
    if single.as_it_is or (naming is None and adapter.format not in SINGLE_FILES):
        return Renamed(adapter)
    dotted: list[str] = []
    if context.base is not None and naming is not None:
        dotted += names_of_base(context.base, single.component)
    if single.names_from is not None:
        dotted += names_of_adapter(single.names_from)
    table = None if single.names is None else find_table(single.names)
    return renamed(adapter, naming or "bare", NamingOptions(table, tuple(dotted), single.component))


def _require_true_delta(adapter: Adapter, target: Format) -> None:
    caveats = tuple(c for c in adapter.caveats if c.code not in target.caveats_kept)
    if adapter.format != target.name:
        replace(adapter, caveats=caveats).require_true_delta("convert")


def _in_model_terms(adapter: Adapter, target: Format, context: Context) -> Adapter:
    source = get_format(adapter.format)
    has_use = (source.to_model, target.to_model) != (None, None) and source.name != target.name
    has_use |= source.name in SINGLE_FILES or target.name in SINGLE_FILES
    if context.base is not None and not has_use:
        raise OptionError(f"converting {source.name} to {target.name} needs no base model")
    if source.name == target.name or source.to_model is None:
        return adapter
    return source.to_model(adapter, context)


def _as_it_is(target: Format) -> Callable[[Adapter, Context], Adapter]:
    return lambda adapter, _: replace(adapter, format=target.name)


def _notes(adapter: Adapter, made: Adapter, target: Format) -> tuple[str, ...]:
    if target.is_folder or not adapter.attachments:
        return made.notes
    names = ", ".join(sorted(adapter.attachments))
    return (*made.notes, f"a {target.name} file has no place for {names}")


class _TooInexactError(Exception):
    """The error is above the limit, so the output must not appear."""


def write(
    conversion: Conversion,
    path: Path,
    *,
    overwrite: bool = False,
    max_error: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionCheck:
    """Write the output, read it again, and let it appear if it holds what was intended.

    Args:
        conversion: what to write.
        path: where.
        overwrite: whether an output that exists may be replaced.
        max_error: nothing appears if the relative error is above it.
        progress: called with (modules compared, modules in all).

    Returns:
        What the written file holds, even if it did not appear.

    Raises:
        OutputError: writing failed, or the output lacks a part or holds infinite values.
        OutputExistsError: the output exists and `overwrite` is false.
        AdapterError: the input holds NaN or infinite values.
    """
    done: list[ConversionCheck] = []

    def check(temporary: Path) -> None:
        done.append(compared(conversion, temporary, progress=progress))
        if max_error is not None and not done[0].relative_error <= max_error:
            raise _TooInexactError

    with contextlib.suppress(_TooInexactError):
        write_adapter(
            conversion.adapter, path, conversion.target.name, overwrite=overwrite, check=check
        )
    return done[0]


def compared(
    conversion: Conversion,
    path: Path,
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionCheck:
    """Read a written output and compare everything in it with what was intended.

    Raises:
        OutputError: a module or tensor is missing, there is one too many, or infinite values.
        AdapterError: the input holds NaN or infinite values.
    """
    written = read_adapter(path, conversion.target.name)
    exact = conversion.exact
    _same_names(path, set(exact.modules), set(written.modules))
    _same_names(path, set(exact.additions), set(written.additions))
    _same_names(path, set(exact.replacements), set(written.replacements))
    names = list(exact.modules)

    def one(name: str) -> tuple[float, float]:
        return _residual(name, exact.modules[name], written.modules[name])

    found: list[tuple[float, float]] = []
    for squares in in_order(one, names, workers):
        found.append(squares)
        if progress is not None:
            progress(len(found), len(names))
    modules = [
        ModuleError(name, rank_of(written.modules[name]), _ratio(*squares))
        for name, squares in zip(names, found, strict=True)
    ]
    pairs = [
        pair for name in names for pair in _others(name, exact.modules[name], written.modules[name])
    ]
    pairs += [(each.tensor, written.additions[key].tensor) for key, each in exact.additions.items()]
    pairs += [
        (each.tensor, written.replacements[key].tensor) for key, each in exact.replacements.items()
    ]
    others = [_ratio(*_difference(mine, theirs)) for mine, theirs in pairs]
    return ConversionCheck(
        modules=tuple(modules),
        relative_error=_ratio(sum(e for e, _ in found), sum(n for _, n in found)),
        other_error=max(others, default=0.0),
    )


def rank_of(delta: Delta) -> int | None:
    """Return a delta's rank, None for a kind without factors."""
    return None if isinstance(delta, OtherDelta) else low_rank_part(delta).rank


def _same_names(path: Path, wanted: set[str], found: set[str]) -> None:
    different = sorted(wanted ^ found)
    if different:
        kind = "lost" if different[0] in wanted else "gained"
        raise OutputError(f"the written file {kind} a part", path=path, tensor=different[0])


def _others(name: str, mine: Delta, theirs: Delta) -> list[tuple[TensorRef, TensorRef]]:
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


def _beside_factors(delta: Delta) -> dict[str, TensorRef]:
    named: dict[str, TensorRef | None]
    if isinstance(delta, OtherDelta):
        named = {**delta.parts, "magnitude": delta.magnitude, "bias": delta.bias}
    elif isinstance(delta, Dora):
        named = {"magnitude": delta.magnitude, "bias": delta.direction.bias}
    else:
        named = {"bias": delta.bias}
    return {part: tensor for part, tensor in named.items() if tensor is not None}


def _residual(name: str, mine: Delta, theirs: Delta) -> tuple[float, float]:
    """Return (‖ΔW − ΔW'‖², ‖ΔW‖²) of one module; zeros for a kind without factors."""
    if isinstance(mine, OtherDelta) or isinstance(theirs, OtherDelta):
        if _settled(mine) != _settled(theirs):
            raise OutputError("the written module is of another kind or scale", tensor=name)
        return 0.0, 0.0
    first, second = low_rank_part(mine), low_rank_part(theirs)
    same_kind = isinstance(mine, Dora) == isinstance(theirs, Dora)
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
        norm += first.scale**2 * both.squared_norm
        if first.scale == second.scale * _multiple(new_b, b) * _multiple(new_a, a):
            continue
        if np.array_equal(a, new_a):
            change = second.scale * new_b - first.scale * b
            error += linalg.Grams(linalg.gram(change), both.a).squared_norm if change.any() else 0.0
        else:
            error += (
                linalg.residual_norm(b, a, first.scale, both, second.scale * new_b, new_a)[0] ** 2
            )
    if not math.isfinite(norm):
        raise _not_finite(first)
    if not math.isfinite(error):
        raise OutputError("a value is beyond the range of the output's type", tensor=name)
    return error, norm


def _multiple(new: Array, old: Array) -> float:
    """Return k if `new` is k·`old` for a power of two k, bit for bit; NaN if it is not."""
    places = np.flatnonzero(old)
    if new.shape != old.shape or not len(places):
        return math.nan
    ratio = float(new.flat[places[0]]) / float(old.flat[places[0]])
    same = abs(math.frexp(ratio)[0]) == 0.5 and np.array_equal(new, old * ratio)
    return ratio if same else math.nan


def _settled(delta: Delta) -> object:
    if not isinstance(delta, OtherDelta):
        return None
    return delta.kind, dict(delta.settings), delta.shape


def _not_finite(delta: LowRank) -> AdapterError:
    return AdapterError("factor holds NaN or infinite values", tensor=delta.a.key)


def _difference(mine: TensorRef, theirs: TensorRef) -> tuple[float, float]:
    a, b = mine.load(np.float64).reshape(-1), theirs.load(np.float64).reshape(-1)
    if a.shape != b.shape:
        raise OutputError("the written tensor has another size", tensor=mine.key)
    return float(np.sum((a - b) ** 2)), float(np.sum(a**2))


def _ratio(squared: float, squared_whole: float) -> float:
    return math.sqrt(squared / squared_whole) if squared_whole else math.sqrt(squared)
