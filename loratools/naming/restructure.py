"""Deltas of fused modules taken apart, and of split modules put together; exact, and lazy.

A slice of a fused ΔW's rows has a slice of `b` and all of `a`; columns of `b` that are zero
throughout the slice have no part in it and are dropped with their rows of `a`, so that what was
put together comes apart with the ranks it had. Put together, `a` is stacked and `b` block-diagonal,
unless all parts have one `a`. Bytes move; values change only where parts whose scales differ by no
power of two must share one, and are float32 then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loratools_formats.contract.commands import command_on
from loratools_formats.core.change import KindDelta, LowRank, ModuleChange
from loratools_formats.core.dtypes import (
    DTYPES,
    DType,
    common_dtype,
    dtype_of_multiples,
    encode,
    is_power_of_two,
)
from loratools_formats.core.tensors import TensorRef, have_same_bits, rounded
from loratools_formats.disk.errors import AdapterError, UnsupportedError


def units(name: str, out: int, parts: Sequence[int]) -> int:
    """Return how many rows one part has.

    Raises:
        AdapterError: the rows do not divide so.
    """
    whole = sum(parts)
    if out % whole:
        raise AdapterError(
            "the rows of a fused module cannot be divided among its parts",
            tensor=name,
            got=out,
            expected=f"a multiple of {whole}",
        )
    return out // whole


def rows_of(name: str, delta: ModuleChange, start: int, stop: int) -> ModuleChange:
    """Return rows [start, stop) of a delta.

    Raises:
        UnsupportedError: a kind whose rows are not of the same kind.
    """
    part, magnitude = delta.direction, delta.magnitude
    if isinstance(part, LowRank):
        if magnitude is not None:
            if delta.axis == "input":
                raise _kept_whole(name, "a DoRA with a magnitude for each input")
            shape = tuple(stop - start if n == part.shape[0] else n for n in magnitude.shape)
            rows = magnitude.reshaped((magnitude.numel,)).row_range(start, stop)
            magnitude = rows.reshaped(shape)
        return replace(delta, direction=_low_rank_rows(part, start, stop), magnitude=magnitude)
    if delta.kind == "full" and magnitude is None:
        diff = part.parts["diff"].row_range(start, stop)
        shorter = replace(part, parts={"diff": diff}, shape=(stop - start, part.shape[1]))
        return delta.with_direction(shorter)
    raise _kept_whole(name, f"a weight change of kind {delta.kind}")


def _kept_whole(name: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} cannot be split or joined",
        tensor=name,
        hint="Make it a plain LoRA first: "
        + command_on(None, "to-lora", "--base MODEL --rank RANK"),
    )


def _low_rank_rows(delta: LowRank, start: int, stop: int) -> LowRank:
    b = delta.b.row_range(start, stop)
    bias = None if delta.bias is None else delta.bias.row_range(start, stop)
    used = np.flatnonzero(b.load(np.float64).any(axis=0))
    if len(used) == delta.rank:
        return replace(delta, b=b, bias=bias, alpha_tensor=None)
    used = used if len(used) else np.zeros(1, dtype=np.intp)
    rank = len(used)
    return replace(
        delta,
        a=_taken(delta.a, used, 0),
        b=_taken(b, used, 1),
        bias=bias,
        alpha=None if delta.alpha is None else delta.scale * rank,
        alpha_tensor=None,
    )


def _taken(tensor: TensorRef, indices: np.ndarray, axis: int) -> TensorRef:
    shape = tuple(len(indices) if i == axis else n for i, n in enumerate(tensor.shape))

    def read() -> bytes:
        units = np.dtype(f"V{tensor.dtype.bits // 8}")
        stored = np.frombuffer(tensor.raw(), dtype=units).reshape(tensor.shape)
        return np.take(stored, indices, axis=axis).tobytes()

    return TensorRef(tensor.key, tensor.dtype, shape, read)


def fused(
    name: str, parts: Sequence[ModuleChange | None], heights: Sequence[int], *, exact: bool = False
) -> ModuleChange:
    """Return the delta whose rows are those of several, one after another.

    Args:
        name: of the fused module, for messages.
        parts: in the order of their rows; None where nothing changes.
        heights: rows of each.
        exact: whether rows for which `is_rounding` is true are float64, to measure errors.

    Raises:
        UnsupportedError: kinds that cannot be put together.
        AdapterError: shapes that do not fit.
    """
    present = [part for part in parts if part is not None]
    kinds = {part.kind for part in present}
    if kinds == {"lora"} or (kinds == {"dora"} and len(present) == len(parts)):
        factors = [None if part is None else part.require_factors() for part in parts]
        magnitude = _fused_magnitude(name, present)
        return replace(
            present[0],
            direction=_fused_factors(name, factors, heights, exact=exact),
            magnitude=magnitude,
        )
    if "full" in kinds and kinds <= {"full", "lora"}:
        return _fused_full(name, parts, heights, exact=exact)
    raise _kept_whole(name, "modules of different or incomplete kinds")


def is_rounding(parts: Sequence[ModuleChange | None]) -> bool:
    """Return whether `fused` rounds.

    It does where scales differ by no power of two, and are of one `b` after; and where factors
    become a full difference.
    """
    if any(part is not None and part.kind == "full" for part in parts):
        return any(part is not None and part.factors is not None for part in parts)
    return _rounds([part.factors for part in parts if part is not None])


def _rounds(parts: Sequence[LowRank | None]) -> bool:
    factors = [part for part in parts if part is not None]
    if not factors:
        return False
    first = _leading(factors)
    ratios = [_ratio(part, first) for part in factors]
    return not all(ratio == 0.0 or is_power_of_two(ratio) for ratio in ratios)


def _leading(parts: Sequence[LowRank]) -> LowRank:
    """Return the part whose scale the fused module gets: the first that is not zero, if any."""
    return next((part for part in parts if part.scale != 0.0), parts[0])


def _ratio(part: LowRank, first: LowRank) -> float:
    return 1.0 if part.scale == first.scale else part.scale / first.scale


def _fused_factors(
    name: str, parts: Sequence[LowRank | None], heights: Sequence[int], *, exact: bool
) -> LowRank:
    present = [part for part in parts if part is not None]
    first = _leading(present)
    for part, height in zip(parts, heights, strict=True):
        if part is not None and (part.shape, part.layer) != ((height, first.shape[1]), first.layer):
            raise AdapterError(
                "parts of a fused module do not fit together",
                tensor=name,
                got=f"{list(part.shape)}",
                expected=f"{[height, first.shape[1]]}",
            )
    dtype = common_dtype([t.dtype for part in present for t in (part.a, part.b)])
    shared = len(present) == len(parts) and all(
        part is first or have_same_bits(part.a, first.a) for part in present
    )
    rank = first.rank if shared else sum(part.rank for part in present)
    a = rounded(first.a, dtype) if shared else _stacked([part.a for part in present], dtype)
    ratios = [ratio for part in present if (ratio := _ratio(part, first)) != 0.0]
    dtype_of_b = dtype_of_multiples(dtype, ratios)
    if exact and _rounds(present):
        dtype_of_b = DTYPES["F64"]
    b = _blocks(parts, heights, rank, first, dtype_of_b, shared=shared)
    return replace(
        first,
        a=a,
        b=b,
        bias=_fused_bias(parts, heights, first, exact=exact),
        alpha=None if first.alpha is None else first.scale * rank,
        alpha_tensor=None,
    )


def _stacked(tensors: Sequence[TensorRef], dtype: DType) -> TensorRef:
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    return TensorRef(
        tensors[0].key,
        dtype,
        shape,
        lambda: b"".join(bytes(rounded(tensor, dtype).raw()) for tensor in tensors),
    )


def _blocks(
    parts: Sequence[LowRank | None],
    heights: Sequence[int],
    rank: int,
    first: LowRank,
    dtype: DType,
    *,
    shared: bool,
) -> TensorRef:
    """Return `b` of the fused module, with the scale of the first part."""
    shape = (sum(heights), rank)

    def read() -> bytes:
        whole = np.zeros(shape, dtype=dtype.numpy_dtype())
        row = column = 0
        for part, height in zip(parts, heights, strict=True):
            if part is not None:
                ratio = _ratio(part, first)
                values = part.b.load() if ratio == 1.0 else part.b.load(np.float64) * ratio
                whole[row : row + height, column : column + part.rank] = encode(values, dtype)
                column += 0 if shared else part.rank
            row += height
        return whole.tobytes()

    return TensorRef(first.b.key, dtype, shape, read)


def _fused_bias(
    parts: Sequence[LowRank | None], heights: Sequence[int], first: LowRank, *, exact: bool
) -> TensorRef | None:
    """Return the biases one after another, zeros where there is none, to be scaled as `b` is."""
    biases = [part.bias for part in parts if part is not None and part.bias is not None]
    if not biases:
        return None
    dtype = common_dtype([bias.dtype for bias in biases])
    if _rounds(parts):
        dtype = common_dtype([dtype, DTYPES["F64" if exact else "F32"]])

    def read() -> bytes:
        pieces = [
            np.zeros(height)
            if part is None or part.bias is None
            else part.bias.load(np.float64) * _ratio(part, first)
            for part, height in zip(parts, heights, strict=True)
        ]
        return encode(np.concatenate(pieces), dtype).tobytes()

    return TensorRef(biases[0].key, dtype, (sum(heights),), read)


def _fused_magnitude(name: str, parts: Sequence[ModuleChange]) -> TensorRef | None:
    if any(part.axis == "input" for part in parts):
        raise _kept_whole(name, "a DoRA with a magnitude for each input")
    magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
    if not magnitudes:
        return None
    flat = [magnitude.reshaped((magnitude.numel,)) for magnitude in magnitudes]
    return _stacked(flat, common_dtype([magnitude.dtype for magnitude in magnitudes]))


def _fused_full(
    name: str, parts: Sequence[ModuleChange | None], heights: Sequence[int], *, exact: bool
) -> ModuleChange:
    """Return the full difference of parts, of which some may have factors, and some be nothing."""
    present = [part for part in parts if part is not None]
    whole_one = next(part for part in present if part.kind_delta is not None)
    full = whole_one.direction
    if not isinstance(full, KindDelta):
        raise TypeError("not a full difference")
    sides = full.parts["diff"].shape[1:]
    diffs = []
    for part, height in zip(parts, heights, strict=True):
        diff = (
            _zeros(full.parts["diff"], height) if part is None else _full(name, part, exact=exact)
        )
        if diff.shape != (height, *sides):
            raise AdapterError(
                "parts of a fused module do not fit together",
                tensor=name,
                got=f"{list(diff.shape)}",
                expected=f"{[height, *sides]}",
            )
        diffs.append(diff)
    whole = _stacked(diffs, common_dtype([diff.dtype for diff in diffs]))
    shape = (whole.shape[0], math.prod(whole.shape[1:]))
    return whole_one.with_direction(replace(full, parts={"diff": whole}, shape=shape))


def _zeros(like: TensorRef, height: int) -> TensorRef:
    shape = (height, *like.shape[1:])
    nbytes = math.prod(shape) * like.dtype.bits // 8
    return TensorRef(like.key, like.dtype, shape, lambda: bytes(nbytes))


def _full(name: str, part: ModuleChange, *, exact: bool) -> TensorRef:
    """Return a part's difference; of factors it is rounded to float32, unless it is to be exact."""
    if part.kind_delta is not None:
        return part.kind_delta.parts["diff"]
    factors = part.require_factors()
    if factors.bias is not None or len(factors.a.shape) != 2:
        raise _kept_whole(name, "factors of a convolution or with a bias, beside a full difference")
    dtype = DTYPES["F64" if exact else "F32"]

    def read() -> bytes:
        product = factors.b.load(np.float64) @ factors.a.load(np.float64)
        return encode(factors.scale * product, dtype).tobytes()

    return TensorRef(factors.b.key, dtype, (factors.b.shape[0], factors.a.shape[1]), read)


def swapped_halves(name: str, delta: ModuleChange) -> ModuleChange:
    """Return the delta with the two halves of its rows in the other order.

    A magnitude for each output moves with its row; norms of columns do not change.

    Raises:
        UnsupportedError: a kind whose rows cannot be moved.
    """
    part, full, magnitude = delta.factors, delta.kind_delta, delta.magnitude
    if full is not None and full.kind == "full" and magnitude is None:
        half = units(name, full.parts["diff"].shape[0], (1, 1))
        diff = _swapped(full.parts["diff"], half)
        return delta.with_direction(replace(full, parts={"diff": diff}))
    if part is None:
        raise _kept_whole(name, f"a weight change of kind {delta.kind}")
    half = units(name, part.b.shape[0], (1, 1))
    bias = None if part.bias is None else _swapped(part.bias, half)
    if magnitude is not None and delta.axis == "output":
        flat = _swapped(magnitude.reshaped((magnitude.numel,)), half)
        magnitude = flat.reshaped(magnitude.shape)
    direction = replace(part, b=_swapped(part.b, half), bias=bias)
    return replace(delta, direction=direction, magnitude=magnitude)


def _swapped(tensor: TensorRef, half: int) -> TensorRef:
    halves = [tensor.row_range(half, 2 * half), tensor.row_range(0, half)]
    return _stacked(halves, tensor.dtype)
