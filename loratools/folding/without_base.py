"""ToLoraOptions without the base: exactly, on the fly, and with settings that the user gives."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.base.shape_only import ShapeOnly
from loratools.folding.decomposed import exact_factors
from loratools.folding.module import checked_form, known_shape, stored_as_is
from loratools.kinds import get_kind
from loratools.kinds.declaration import Product
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions
from loratools.work.parallel import one_blas_thread
from loratools.work.scratch import Scratch
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import text_values
from loratools_formats.contract.commands import command_on
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer, Missing, ModuleChange
from loratools_formats.disk.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    from loratools.base.placement.names import Names


def folds_alone(delta: ModuleChange) -> bool:
    """Return whether a change folds exactly without a look at the base."""
    return delta.factors is None and get_kind(delta.kind).folds_alone


def needs_base(delta: ModuleChange) -> bool:
    """Return whether a change depends on the base's weights or shapes."""
    if delta.is_dora or delta.factors is not None:
        return delta.is_dora
    needs = get_kind(delta.kind).needs
    return needs == "weight" or (needs == "shape" and None in delta.shape)


def folded_exactly(
    adapter: Adapter,
    operation: str,
    scratch_folder: Path | None,
    base: Checkpoint | None = None,
    *,
    keeps: Callable[[ModuleChange], bool] = lambda _: False,
) -> Adapter:
    """Return an adapter whose other kinds are folded, exactly and without the base's weights.

    Plain and DoRA modules stay; a DoRA of another kind becomes an ordinary one.

    Args:
        adapter: of any kind.
        operation: what it is for, for messages.
        scratch_folder: where new factors wait until they are written.
        base: the base model, whose configuration states settings that a file lacks.
        keeps: whether the operation takes a change that has no factors.

    Raises:
        UnsupportedError: a module does not fold exactly, or only with the base.
        AdapterError: NaN or infinite values, or tensors that do not fit.
    """
    folded = folded_where_exact(adapter, operation, scratch_folder, base=base)
    for name, delta in folded.modules.items():
        if delta.factors is None and not keeps(delta):
            raise UnsupportedError(
                f"a weight change of kind {delta.kind} has no factors that {operation} could use",
                path=adapter.source,
                tensor=name,
                hint=f"Make it a plain LoRA first: {to_lora_command(adapter, delta)}",
            )
    return folded


def folded_where_exact(
    adapter: Adapter,
    operation: str,
    scratch_folder: Path | None,
    *,
    base: Checkpoint | None = None,
    leave: Container[str] = (),
    dense: bool = True,
) -> Adapter:
    """Return an adapter whose modules are folded where that is exact; others stay unchanged.

    Args:
        adapter: of any kind.
        operation: what it is for, for messages.
        scratch_folder: where new factors wait until they are written.
        base: the base model, whose configuration states settings that a file lacks.
        leave: modules to leave as they are.
        dense: also decompose deltas that are not a product of two factors (slow). DoRAs are always
            decomposed.

    Raises:
        UnsupportedError: a setting that the change depends on is not in the file.
        AdapterError: NaN or infinite values, or tensors that do not fit.
    """
    missing = get_format(adapter.format).left_to_loader(adapter)
    if missing:
        raise UnsupportedError(
            f"the file does not hold {missing}, which PEFT computes from the base model",
            path=adapter.source,
            hint="Make it a plain LoRA first: " + command_on(adapter, "to-lora", "--base MODEL"),
        )
    if all(delta.factors is not None for delta in adapter.modules.values()):
        return adapter
    adapter.require_true_delta(operation)
    scratch = Scratch(scratch_folder)
    modules = dict(with_settings(adapter, {}, base).modules)
    for name, whole in list(modules.items()):
        delta = whole.kind_delta
        if delta is None or name in leave or not folds_alone(whole):
            continue
        with one_blas_thread():  # the bits must not depend on the machine's threads
            found = checked_form(name, delta, ShapeOnly(known_shape(delta)))
            if not isinstance(found, Product) and not dense and not whole.is_dora:
                continue
            change = exact_factors(found, of_any_rank=True)
        if change is None:
            continue
        shape = (len(change.b), change.a.shape[1])
        planned = PlannedFactors.new(
            name, delta.layer, shape, experts=delta.experts, bias=delta.bias
        )
        factors = stored_as_is(planned, change, ComputeOptions(), scratch)
        magnitude = get_kind(delta.kind).magnitude_of(whole)
        modules[name] = ModuleChange(factors, magnitude, whole.axis)
    return plain_adapter(adapter, modules)


def with_kernels(adapter: Adapter) -> Adapter:
    """Return an adapter whose LoHa and LoKr of convolutions are such, where a table tells it.

    LyCORIS flattens the kernel into the columns, so that only the module's name tells it.
    """
    modules = dict(adapter.modules)
    for name, whole in adapter.modules.items():
        delta, columns = whole.kind_delta, whole.shape[1]
        if delta is None or delta.kind not in ("loha", "lokr") or delta.layer.kind != "linear":
            continue
        from loratools.naming.choice import kernel_of

        kernel = kernel_of(name)
        if kernel is not None and columns is not None and columns % math.prod(kernel) == 0:
            modules[name] = whole.with_direction(replace(delta, layer=Layer("conv", kernel)))
    return replace(adapter, modules=modules)


def to_lora_command(adapter: Adapter, delta: ModuleChange) -> str:
    """Return the command that makes a plain LoRA of what does not become one on the fly."""
    is_low_rank = get_kind(delta.kind).low_rank and not delta.is_dora
    return command_on(
        adapter,
        "to-lora",
        *(["--base MODEL"] if needs_base(delta) else []),
        *([] if is_low_rank else ["--rank RANK"]),
    )


def with_settings(
    adapter: Adapter, given: Mapping[str, str], base: Checkpoint | None = None
) -> Adapter:
    """Return an adapter with settings that its file does not hold filled in.

    Args:
        adapter: of any kind.
        given: values by the setting's name, for all modules that lack it.
        base: the base model. The shape of a module's own weight tells some settings for certain,
            its configuration others that are not given.

    Raises:
        UnsupportedError: a setting is still missing.
        OptionError: a value is not one, or no module lacks the setting.
    """
    adapter = with_kernels(adapter)
    unused = set(given)
    of_base = _Base(base)
    modules: dict[str, ModuleChange] = {}
    for name, change in adapter.modules.items():
        modules[name] = change
        delta = change.kind_delta
        if delta is not None:
            missing = {k: v for k, v in delta.settings.items() if isinstance(v, Missing)}
            unused -= set(missing)
            texts: dict[str, str] = {}
            for key, value in missing.items():
                text = of_base.weight_tells(name, value)
                if text is None:
                    text = given[key] if key in given else of_base.config_tells(value)
                if text is not None:
                    texts[key] = text
            lacking = {key: value for key, value in missing.items() if key not in texts}
            if lacking:
                raise _lacks(adapter, name, lacking, given, has_base=base is not None)
            filled = {key: _parsed(key, texts[key], value) for key, value in missing.items()}
            whole = replace(delta, settings={**delta.settings, **filled})
            completed = get_kind(delta.kind).completed
            modules[name] = change.with_direction(whole if completed is None else completed(whole))
    if unused:
        raise OptionError("no module lacks this setting", got=", ".join(sorted(unused)))
    return replace(adapter, modules=modules)


def _lacks(
    adapter: Adapter,
    module: str,
    lacking: Mapping[str, Missing],
    given: Mapping[str, str],
    *,
    has_base: bool,
) -> UnsupportedError:
    """Return the error that settings are missing: all of them, and a command that gives them."""
    names = list(lacking)
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    command = command_on(
        adapter,
        "to-lora",
        *(f"--set {key}={shlex.quote(value)}" for key, value in given.items()),
        *(f"--set {key}=VALUE" for key in lacking),
    )
    may_tell = all(value.is_in_base for value in lacking.values()) and not has_base
    expected = [f"{key}: {value.expected}" for key, value in lacking.items()]
    return UnsupportedError(
        f"the weight change depends on {listed}, which the file does not hold",
        path=adapter.source,
        tensor=module,
        expected="; ".join(expected) if len(expected) > 1 else lacking[names[0]].expected,
        hint=f"Make it a plain LoRA: {command}{', or with `base`' if may_tell else ''}",
    )


class _Base:
    """The settings that a base model determines where the file lacks them."""

    def __init__(self, base: Checkpoint | None) -> None:
        self._base = base
        self._names: Names | None = None

    def weight_tells(self, module: str, missing: Missing) -> str | None:
        """Return the value that the shape of a module's own weight implies; None if none."""
        if self._base is None or missing.of_weight is None:
            return None
        from loratools.base.dequantised import dequantised
        from loratools.base.placement.names import Names
        from loratools.base.placement.sites import sites

        self._names = self._names or Names(dequantised(self._base).checkpoint)
        found = sites(self._names, module, "weight")
        return missing.of_weight(self._names.tensors[found[0].key].shape) if found else None

    def config_tells(self, missing: Missing) -> str | None:
        """Return the value that the base's configuration states; None if it states none."""
        config = {} if self._base is None else self._base.config
        values = text_values(config)
        found = next((values[k] for k in missing.in_base if values.get(k) is not None), None)
        if found is None:
            return None
        return missing.meaning.get(str(found)) if missing.meaning else str(found)


def _parsed(key: str, text: str, missing: Missing) -> str | float:
    if missing.choices or missing.pattern:
        if text in missing.choices or re.fullmatch(missing.pattern or "(?!)", text):
            return text
    elif missing.whole:
        if re.fullmatch(r"[1-9]\d{0,8}", text):
            return int(text)
    else:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise OptionError(f"not a value of {key}", got=text, expected=missing.expected)


def plain_adapter(adapter: Adapter, modules: Mapping[str, ModuleChange]) -> Adapter:
    """Return an adapter of plain modules, with the configuration of a plain LoRA."""
    chosen = get_format(adapter.format)
    return (chosen if chosen.is_writable else get_format("peft")).with_factors(adapter, modules)
