"""An adapter from one format to another, with proof that the weight changes are the same.

The way goes through the base model's module names: one format's translation to them, the other's
back. What the target cannot hold is listed before anything is written, and refused unless that is
asked for. After writing, the output is read again and every ΔW compared with the one intended:
the error reported is that of the file, not of a plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from loratools.base.repeated import stored_in, without_repeated
from loratools.folding.without_base import to_lora_command
from loratools.lowrank.rescale import folded, of_positive_scale
from loratools.lowrank.true_rank import of_true_rank
from loratools.naming.lists import names_of_adapter, names_of_base
from loratools.naming.rename import NamingOptions, Renamed, renamed
from loratools.naming.tables import find_table
from loratools.operations.convert.class_names import in_target_names, uses_names, with_flat_experts
from loratools.operations.convert.compare_written import ConversionCheck, compared
from loratools.operations.convert.experts.in_layout import in_layout
from loratools.operations.convert.experts.layouts import Wanted, stated
from loratools.operations.convert.options import SingleFileOptions
from loratools.operations.reported import adapter_report
from loratools.work.provenance import operation_record, record_metadata
from loratools.work.requests import Progress
from loratools_formats.contract.commands import FUSE_INSTEAD
from loratools_formats.contract.files import write_adapter
from loratools_formats.contract.format import Context, Format, Loss
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.dtypes import unrounded_multiples
from loratools_formats.core.factors import stored_as, without_float64
from loratools_formats.core.findings import Finding
from loratools_formats.core.metadata import without_training_data
from loratools_formats.disk.errors import OptionError, UnsupportedError
from loratools_formats.disk.provenance import with_record


@dataclass(frozen=True)
class Conversion:
    """An adapter ready to be written in another format.

    Attributes:
        source: the adapter as it was read.
        adapter: what to write.
        exact: the same with no factor rounded, to compare with.
        target: the format to write.
        losses: what the target does not hold; `adapter` is without it.
        findings: what a user should know.
    """

    source: Adapter
    adapter: Adapter
    exact: Adapter
    target: Format
    losses: tuple[Loss, ...]
    findings: tuple[Finding, ...]


def prepare(
    adapter: Adapter,
    format_name: str,
    context: Context | None = None,
    *,
    allow_lossy: bool = False,
    metadata: Mapping[str, str] | None = None,
    single: SingleFileOptions | None = None,
    names_of: Literal["4", "5"] | None = None,
    experts: Wanted | str | None = None,
) -> Conversion:
    """Translate an adapter into another format; loads no factor and writes nothing.

    Args:
        adapter: as read.
        format_name: the format to convert to.
        context: the base model and the type of the output's factors, where wanted.
        allow_lossy: leave out what the target cannot hold.
        metadata: text to add to the output's metadata.
        single: what single-file formats are asked for.
        names_of: the version of transformers whose names of modules to write; needs the base.
        experts: the layout of experts in a PEFT folder, or the program that shall read it.

    Raises:
        UnsupportedError: the target cannot hold the adapter, or a translation would be a guess.
        OptionError: a type was given that the format is not written in.
        AdapterError: names that nothing resolves, or values that are not finite where they matter.
    """
    context, single = context or Context(), single or SingleFileOptions()
    target = get_format(format_name)
    if not target.is_writable:
        raise UnsupportedError(f"format {target.name} can be read but not written")
    _check_dtype(target, context.dtype)
    _check_names_of(names_of, adapter, target, context)
    unused: tuple[Finding, ...] = ()
    if context.base is not None and not _uses_base(get_format(adapter.format), target):
        message = f"converting {adapter.format} to {target.name} needs no base model"
        unused = (Finding("base-unused", "note", None, message),)
        context = replace(context, base=None)
    if adapter.format != target.name:
        adapter.require_true_delta("convert", target.caveats_kept)
    with unrounded_multiples():
        model, wanted, laid = in_layout(
            adapter,
            target.name,
            context.base,
            experts,
            lambda given: _in_model_terms(given, target, context, names_of),
            names_of,
        )
    model = model if single.as_it_is else _with_positive_scales(model)
    if target.name in ("gguf", "mlx") and context.base is not None and model.replacements:
        model = without_repeated(model, stored_in(context.base))
    lost = [] if single.as_it_is else _lost_by_any_name(model, target)
    left = {loss.name for loss in lost}
    kept = {name: delta for name, delta in model.modules.items() if name not in left}
    _refuse_stacks(adapter, kept, target)
    _refuse_without_factors(adapter, kept, target)
    named = _named(replace(model, modules=kept), target, context, single)
    model = named.adapter
    out_of_place = [Loss(name, "is of another component") for name in named.left_out]
    unplaced = [] if adapter.format == target.name else target.without_place(model, context)
    losses = (*lost, *out_of_place, *unplaced, *target.losses(model))
    if losses and not allow_lossy:
        count = len(losses) - 1
        others = f"; {count} other{'s' * (count > 1)} would be lost too" if count else ""
        raise UnsupportedError(
            f"{losses[0].name} {losses[0].reason}{others}",
            path=adapter.source,
            hint=f"{losses[0].remedy}, or pass `allow_lossy=True` to leave such things out"
            if losses[0].remedy
            else "Pass `allow_lossy=True` to leave such things out",
        )
    gone = {loss.name for loss in unplaced}
    placed = {name: change for name, change in model.modules.items() if name not in gone}
    model = replace(model, modules=placed)
    _refuse_nothing(model, adapter, target, losses)
    if single.strip_training_metadata:
        model = replace(model, metadata=without_training_data(model.metadata))
    exact, made = (
        # The configuration of others was there from the beginning.
        one if one.format == adapter.format else stated(one, wanted)
        for one in _translated(adapter, model, named, target, context, single)
    )
    _refuse_other_form(made, adapter, target)
    options: dict[str, Any] = {"to": target.name, **single.record()}
    options |= {} if names_of is None else {"names_of": names_of}
    options |= wanted.record()
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
        metadata=with_record({**made.metadata, **(metadata or {})}, record_metadata(record)),
    )
    findings = (*unused, *laid, *_findings(adapter, made, target), *named.findings)
    return Conversion(adapter, made, exact, target, losses, findings)


def _refuse_stacks(adapter: Adapter, modules: Mapping[str, ModuleChange], target: Format) -> None:
    """Refuse stacked experts in a single file, before names are asked for that it would need."""
    stack = next((n for n, change in modules.items() if change.layer.kind == "experts"), None)
    if target.naming is not None and stack is not None:
        raise UnsupportedError(
            "stacked experts have no place in a single file",
            path=adapter.source,
            tensor=stack,
            hint=FUSE_INSTEAD,
        )


def _refuse_without_factors(
    adapter: Adapter, modules: Mapping[str, ModuleChange], target: Format
) -> None:
    """Refuse kinds other than LoRA in a format that has no place for them."""
    if target.naming is not None or adapter.format == target.name:
        return
    for name, change in modules.items():
        if change.factors is None:
            raise UnsupportedError(
                f"a change of kind {change.kind} is not converted to {target.name}",
                path=adapter.source,
                tensor=name,
                hint=f"Make it a plain LoRA first: {to_lora_command(adapter, change)}",
            )


def _refuse_nothing(
    model: Adapter, adapter: Adapter, target: Format, losses: tuple[Loss, ...]
) -> None:
    added = model.additions.keys() - {loss.name for loss in losses}
    if not (model.modules or added or model.replacements or model.shared):
        why = f": {losses[0].name} {losses[0].reason}" if losses else ""
        raise UnsupportedError(
            f"nothing would be left to write as {target.name}{why}",
            path=adapter.source,
            got=f"{len(adapter.modules)} modules",
            hint=losses[0].remedy or None if losses else None,
        )


def _refuse_other_form(made: Adapter, adapter: Adapter, target: Format) -> None:
    """Refuse an output that would not have the form that was asked for."""
    for told in target.writing_findings(made):
        if told.severity == "note":
            continue
        raise UnsupportedError(told.message, path=adapter.source, tensor=told.where, hint=told.hint)


def _with_positive_scales(adapter: Adapter) -> Adapter:
    modules = {name: of_positive_scale(delta) for name, delta in adapter.modules.items()}
    return replace(adapter, modules=modules)


def _check_dtype(target: Format, dtype: str | None) -> None:
    if dtype is not None and dtype not in target.dtypes:
        raise OptionError(
            f"format {target.name} cannot be written in this type",
            got=dtype,
            expected=" or ".join(target.dtypes) or "`dtype` to be left out",
        )


def _lost_by_any_name(adapter: Adapter, target: Format) -> list[Loss]:
    """Return the modules that a single file cannot hold, which may not come apart either."""
    if target.naming is None:
        return []
    return [loss for loss in target.losses(adapter) if loss.name in adapter.modules]


def _translated(
    adapter: Adapter,
    model: Adapter,
    named: Renamed,
    target: Format,
    context: Context,
    single: SingleFileOptions,
) -> tuple[Adapter, Adapter]:
    """Return the adapter as the target has it: with its values as they came, and as wanted."""
    if single.as_it_is:
        stored = {name: stored_as(delta, context.dtype) for name, delta in model.modules.items()}
        return model, replace(model, modules=stored)
    unrounded = replace(model, modules={**model.modules, **named.exact})
    with unrounded_multiples():
        exact = target.from_model(unrounded, replace(context, dtype=None))
    keep = single.alpha == "keep"
    plain = model if _has_float64(adapter) else _rounded(model)
    changed = {
        name: of_true_rank(plain.modules[name], keep_scale=keep)
        for name in plain.modules
        if name in named.split
    }
    wanted = replace(plain, modules={**plain.modules, **changed}) if changed else plain
    if target.naming is not None and not keep:
        rounding = single.alpha == "fold"
        modules = {n: folded(delta, rounding=rounding) for n, delta in wanted.modules.items()}
        wanted = replace(wanted, modules=modules)
    is_same = wanted is model and not named.exact and not _has_float64(exact)
    if context.dtype is None and is_same:
        return exact, exact
    return exact, target.from_model(wanted, context)


def _has_float64(adapter: Adapter) -> bool:
    return any(tensor.dtype.code == "F64" for tensor in adapter.tensors())


def _rounded(model: Adapter) -> Adapter:
    """Return a model with multiples as they are stored, of an adapter that has no float64."""
    modules = {name: without_float64(change) for name, change in model.modules.items()}
    is_same = all(modules[name] is change for name, change in model.modules.items())
    return model if is_same else replace(model, modules=modules)


def _named(
    adapter: Adapter, target: Format, context: Context, single: SingleFileOptions
) -> Renamed:
    """Return the adapter under the names of the target, if single files take part."""
    naming = target.naming
    if single.as_it_is or (naming is None and get_format(adapter.format).naming is None):
        return Renamed(adapter)
    dotted: list[str] = []
    base: tuple[str, ...] = ()
    if context.base is not None and naming is not None:
        base = tuple(names_of_base(context.base, single.component))
        dotted += base
    if single.names_from is not None:
        dotted += names_of_adapter(single.names_from)
    table = None if single.names is None else find_table(single.names)
    options = NamingOptions(table, tuple(dotted), base, single.component)
    return renamed(adapter, naming or "bare", options)


def _check_names_of(
    names_of: str | None, adapter: Adapter, target: Format, context: Context
) -> None:
    if names_of is None:
        return
    if target.name != "peft" or not uses_names(adapter.format, target.name):
        raise OptionError(
            "`names_of` is for names of PEFT",
            got=f"{adapter.format} to {target.name}",
            expected="peft or mlx to peft",
        )
    if context.base is None:
        raise OptionError("`names_of` needs the base, whose class tells the names: pass `base`")


def _in_model_terms(
    adapter: Adapter, target: Format, context: Context, names_of: str | None = None
) -> Adapter:
    source = get_format(adapter.format)
    model = adapter if source.name == target.name else source.to_model(adapter, context)
    of_llama_cpp = source.name == "gguf" and target.name == "mlx"
    if uses_names(source.name, target.name) or of_llama_cpp:
        return in_target_names(model, target.name, context.base, as_stored=names_of == "4")
    return with_flat_experts(model, context.base) if target.name == "peft" else model


def _uses_base(source: Format, target: Format) -> bool:
    """Return whether a base model has a part in a conversion between two formats."""
    if uses_names(source.name, target.name):
        return True
    return source.uses_base or target.uses_base


def _findings(adapter: Adapter, made: Adapter, target: Format) -> tuple[Finding, ...]:
    if target.is_folder or not adapter.attachments:
        return made.notices
    names = ", ".join(sorted(adapter.attachments))
    message = f"a {target.name} file has no place for {names}"
    return (*made.notices, Finding("attachments-left-out", "note", None, message))


class _TooInexactError(Exception):
    """The error is above the limit, so the output must not appear."""


def write(
    conversion: Conversion,
    path: Path,
    *,
    overwrite: bool = False,
    max_error: float | None = None,
    progress: Progress | None = None,
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

    def check(temporary: Path) -> Mapping[str, Any]:
        done.append(
            compared(
                conversion.exact,
                temporary,
                conversion.target.name,
                conversion.source,
                progress=progress,
            )
        )
        if max_error is not None and not done[0].relative_error <= max_error:
            raise _TooInexactError
        return adapter_report(
            conversion.adapter, done[0].relative_error, conversion.source.weights_nbytes
        )

    with contextlib.suppress(_TooInexactError):
        write_adapter(
            conversion.adapter, path, conversion.target.name, overwrite=overwrite, check=check
        )
    return done[0]
