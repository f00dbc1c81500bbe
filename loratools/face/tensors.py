"""`delta`, `factors` and `from_factors`: weight changes as arrays, and adapters from arrays."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from loratools.algebra.ranks import RankRule
from loratools.face.declare import public
from loratools.face.source import Model, model_or_pipeline
from loratools.folding.decomposed import dense as whole_of
from loratools.folding.regenerate import regenerated
from loratools.folding.with_base import Opened, Opener
from loratools.folding.without_base import needs_base, with_settings
from loratools.lowrank.matrices import loaded
from loratools.lowrank.resize import ComputeOptions
from loratools_formats.contract.format import Context
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk.errors import OptionError, UnsupportedError


@public()
def delta(
    adapter: Adapter,
    name: str,
    *,
    dtype: type[Any] | np.dtype[Any] | str = np.float64,
    base: Model | None = None,
) -> Array:
    """Return the change ΔW of one module as a dense array, scale included.

    >>> import loratools as lt
    >>> adapter = lt.read("examples/tiny-llama/lora")
    >>> lt.delta(adapter, "model.layers.0.self_attn.q_proj").shape
    (128, 128)

    Args:
        adapter: of any kind.
        name: the module's path, a key of `adapter.modules`.
        dtype: element type of the result; ΔW is computed in float64.
        base: the base model, for kinds whose change depends on it (DoRA, OFT, IA³ …).

    Returns:
        (out, in); (E, out, in) for stacked experts; (out, in · kernel) for a convolution; (dim,
        vocabulary) for an embedding.

    Raises:
        OptionError: the adapter has no such module.
        UnsupportedError: the change is not known, or not without the base.
        AdapterError: tensors that do not fit, or NaN and infinite values.
    """
    opened = _opened(adapter, name, base)
    if isinstance(opened, LowRank):
        dense = [opened.scale * (b.astype(np.float64) @ a) for b, a in loaded(opened)]
        is_stack = len(opened.a.shape) == 3
    elif opened.exact is not None:
        dense, is_stack = [opened.exact.b @ opened.exact.a], False
    else:
        dense = [whole_of(part) for part in opened.matrices]
        is_stack = opened.planned.layer.kind == "experts"
    whole: Array = np.stack(dense) if is_stack else dense[0]
    return whole.astype(dtype, copy=False)


@public()
def factors(adapter: Adapter, name: str) -> tuple[Array, Array]:
    """Return (b, a) of one module in float64, with ΔW = b @ a: the scale is folded into b.

    >>> import loratools as lt
    >>> b, a = lt.factors(lt.read("examples/tiny-llama/lora"), "model.layers.0.self_attn.q_proj")
    >>> b.shape, a.shape
    ((128, 32), (32, 128))

    Args:
        adapter: plain, or of a kind that folds into factors exactly.
        name: the module's path, a key of `adapter.modules`.

    Returns:
        b: (out, r) and a: (r, in); (E, out, r) and (E, r, in) for stacked experts.

    Raises:
        OptionError: the adapter has no such module.
        UnsupportedError: the change is no product of two factors; `to_lora` approximates it.
        AdapterError: tensors that do not fit, or NaN and infinite values.
    """
    opened = None if _depends_on_base(adapter, name) else _opened(adapter, name, None)
    if isinstance(opened, LowRank):
        return opened.scale * opened.b.load(np.float64), opened.a.load(np.float64)
    if opened is None or opened.exact is None:
        raise UnsupportedError(
            "the weight change is not a product of two factors",
            path=adapter.source,
            tensor=name,
            hint="Approximate it by to_lora",
        )
    return opened.exact.b, opened.exact.a


@public()
def from_factors(
    modules: Mapping[str, tuple[Any, Any]],
    *,
    alpha: float | None = None,
    base_model: str | None = None,
) -> Adapter:
    """Return a PEFT adapter of linear layers, made from arrays.

    >>> import numpy as np
    >>> import loratools as lt
    >>> b, a = np.ones((6, 2), np.float32), np.ones((2, 4), np.float32)
    >>> adapter = lt.from_factors({"model.layers.0.self_attn.q_proj": (b, a)}, alpha=4)
    >>> float(lt.delta(adapter, "model.layers.0.self_attn.q_proj")[0, 0])
    4.0

    Args:
        modules: (b, a) by module path, b: (out, r) and a: (r, in), as NumPy arrays or torch
            tensors of a floating-point type; they are copied.
        alpha: ΔW = alpha / r · b @ a; without it ΔW = b @ a.
        base_model: what to record as the base model's name.

    Raises:
        OptionError: no modules, or arrays that are not factors.
    """
    if not modules:
        raise OptionError("no modules given")
    changes = {name: ModuleChange(_low_rank(name, pair, alpha)) for name, pair in modules.items()}
    plain = Adapter(format="arrays", source=None, modules=changes, base_model=base_model)
    return get_format("peft").from_model(plain, Context())


def _depends_on_base(adapter: Adapter, name: str) -> bool:
    return name in adapter.modules and needs_base(adapter.modules[name])


def _opened(adapter: Adapter, name: str, base: Model | None) -> LowRank | Opened:
    """Return a module's factors, or its change ready to be asked.

    Raises:
        OptionError: the adapter has no such module.
        LoratoolsError: the change is not known, or not without the base.
    """
    if name not in adapter.modules:
        raise OptionError(
            "no such module", got=name, expected="a key of adapter.modules, which info lists"
        )
    adapter.require_true_delta("delta")
    change = adapter.modules[name]
    if change.factors is not None and not change.is_dora:
        return change.factors
    checkpoint = None if base is None else model_or_pipeline(base)
    complete = regenerated(adapter, checkpoint, {})
    told = with_settings(complete.adapter, complete.unused, checkpoint)
    if checkpoint is None:  # what other modules depend on does not matter then
        told = replace(told, modules={name: told.modules[name]})
    # With a rank, only the leading triplets are computed; nobody asks for them here.
    return Opener(told, RankRule(rank=1), ComputeOptions(), checkpoint).open(name)


def _low_rank(name: str, pair: Any, alpha: float | None) -> LowRank:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise OptionError("not factors", got=type(pair).__name__, expected=f"(b, a) for {name}")
    b, a = _tensor(f"{name}.b", pair[0]), _tensor(f"{name}.a", pair[1])
    if b.shape[1] != a.shape[0]:
        raise OptionError(
            f"factors of {name} do not fit together",
            got=f"b {list(b.shape)} and a {list(a.shape)}",
            expected="b (out, r) and a (r, in)",
        )
    return LowRank(a, b, 1.0 if alpha is None else alpha / a.shape[0], alpha=alpha)


def _tensor(key: str, value: Any) -> TensorRef:
    """Return a copy of a matrix in memory, bit for bit."""
    if hasattr(value, "detach"):  # a torch tensor, whose bfloat16 NumPy does not know
        torch, value = sys.modules["torch"], value.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:
            import ml_dtypes

            value = value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            value = value.numpy()
    array = np.array(value)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "fV":
        raise OptionError(
            f"{key} is no matrix of a floating-point type",
            got=f"{array.dtype} of shape {list(array.shape)}",
        )
    return in_memory(key, array)
