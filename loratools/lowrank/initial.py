"""Adapters trained against a changed base, expressed against the original one.

PiSSA, OLoRA, CorDA and LoRA-GA subtract their initial product from the base weight, so that the
file's factors are not the change of the original weight. With the adapter as it was saved right
after initialisation, the change is scale · (B A − B₀ A₀), which has twice the rank and no error:
b = [B, −B₀], a = [A; A₀]. Source: `_convert_state_dict_for_initial_model` in peft 0.21.2.

LoftQ replaces the base by a quantised one plus its initial product; there the result is the change
relative to that sum, which stands for the original weight up to what LoftQ could not reproduce.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import common_dtype, encode
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError

_MUTATED_BASE = "mutated-base"


def subtract_initial(adapter: Adapter, initial: Adapter) -> Adapter:
    """Return the adapter relative to the original base, of twice the rank.

    Args:
        adapter: after training.
        initial: as saved before training, with the same modules, shapes and scales.

    Raises:
        OptionError: the adapter was not trained against a changed base.
        AdapterError: the two do not belong together.
        UnsupportedError: biases of factors, for which the difference is not defined here.
    """
    if all(caveat.code != _MUTATED_BASE for caveat in adapter.caveats):
        raise OptionError(
            "an initial adapter was given, but the adapter was not trained against a changed base",
            hint="Leave out `initial`",
        )
    if set(adapter.modules) != set(initial.modules):
        differing = sorted(set(adapter.modules) ^ set(initial.modules))
        raise AdapterError(
            "the initial adapter has other modules", path=initial.source, tensor=differing[0]
        )
    if initial.caveats and set(initial.caveats) != set(adapter.caveats):
        raise AdapterError(
            "the initial adapter is of another kind",
            path=initial.source,
            got=initial.caveats[0].message,
            expected=adapter.caveats[0].message,
        )
    if all(_equal(delta, initial.modules[name]) for name, delta in adapter.modules.items()):
        raise AdapterError(
            "the initial adapter equals the trained one",
            path=initial.source,
            hint="Give the adapter as it was saved before training",
        )
    modules = {
        name: _difference(name, delta, initial.modules[name].require_factors())
        for name, delta in adapter.modules.items()
    }
    return replace(
        adapter,
        modules=modules,
        findings=tuple(each for each in adapter.findings if each.code != _MUTATED_BASE),
        other_inputs={**adapter.other_inputs, "initial": initial.inputs},
    )


def _equal(whole: ModuleChange, other: ModuleChange) -> bool:
    first, second = whole.require_factors(), other.require_factors()
    pairs = ((first.a, second.a), (first.b, second.b))
    return all(
        x.shape == y.shape and np.array_equal(x.load(np.float64), y.load(np.float64))
        for x, y in pairs
    )


def _difference(name: str, whole: ModuleChange, start: LowRank) -> ModuleChange:
    delta = whole.require_factors()
    if delta.bias is not None or start.bias is not None:
        raise UnsupportedError("lora_bias on a changed base is not supported", tensor=name)
    if (delta.a.shape, delta.b.shape, delta.scale) != (start.a.shape, start.b.shape, start.scale):
        raise AdapterError(
            "the initial adapter has another shape or scale",
            tensor=name,
            got=f"a {list(start.a.shape)}, b {list(start.b.shape)}, scale {start.scale:g}",
            expected=f"a {list(delta.a.shape)}, b {list(delta.b.shape)}, scale {delta.scale:g}",
        )
    doubled = replace(
        delta,
        a=_joined(delta.a, start.a, axis=-2, sign=1),
        b=_joined(delta.b, start.b, axis=-1, sign=-1),
        alpha=None if delta.alpha is None else 2 * delta.alpha,
    )
    return whole.with_direction(doubled)


def _joined(first: TensorRef, second: TensorRef, axis: int, sign: int) -> TensorRef:
    dtype = common_dtype([first.dtype, second.dtype])
    shape = list(first.shape)
    shape[axis] += second.shape[axis]

    def read() -> bytes:
        parts = [first.load(np.float64), sign * second.load(np.float64)]
        return encode(np.concatenate(parts, axis=axis), dtype).tobytes()

    return TensorRef(first.key, dtype, tuple(shape), read)
