"""One module's delta at another rank: computed, rounded to its stored type, and its error measured.

Shared by every operation that ends in factors of a chosen rank. Two ways lead there. Where the
rank does not shrink and the type holds every value, factors keep their values, padded with zeros
if the rank grows, and the scale moves into `b` if it is a power of two, which is exact. Otherwise
the factors are computed anew in canonical form, and the error of the stored ones is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loratools.algebra.device import Computing
from loratools.algebra.one_matrix import Decomposed, Method, RandomisedSvd, padded
from loratools.algebra.ranks import Spectrum
from loratools.lowrank.matrices import loaded
from loratools.lowrank.planned import PlannedFactors, PlannedTensor
from loratools.work.declared import option
from loratools.work.scratch import Scratch
from loratools.work.seeds import seed_of_64_bits, seed_of_matrix
from loratools.work.spellings import dtype as dtype_name
from loratools_formats.core.change import LowRank
from loratools_formats.core.dtypes import DTYPES, Array, DType, encode, is_power_of_two
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, OptionError

OutputDtype = Literal["f32", "f16", "bf16"]
Scaling = Callable[[LowRank | PlannedFactors, int], float]

_MOST = {"oversample": 1 << 16, "power_iterations": 100}
_ROUNDING_UNITS = 2.0  # a sound rounding changes an array by under half a unit
_WIDE = "BF16", "F32"  # of the types that can be asked for, those that reach farthest


@dataclass(frozen=True)
class ComputeOptions(Computing):
    """How to compute factors and how to store them.

    Attributes:
        dtype: type of new factors: f32, f16 or bf16; by default each factor keeps its own.
        method: how to decompose: exact, or rsvd, the randomised SVD of the LoRA-Squeeze paper.
        oversample: oversampling of the randomised SVD.
        power_iterations: power iterations of the randomised SVD.
        seed: seed of all random numbers; every matrix derives its own seed from it.
        keep_alpha: keep each module's alpha and change the factors accordingly; by default alpha
            becomes the rank, and in a UNet's kohya file the alpha that most modules have.

    Raises:
        OptionError: a number out of range, or an unknown type.
    """

    dtype: OutputDtype | None = option(
        None, heading="Computing", aliases=("--outtype",), parse=dtype_name
    )
    method: Method = option("exact", heading="Computing", name="svd", aliases=("--method",))
    oversample: int = option(10, heading="Computing")
    power_iterations: int = option(2, heading="Computing")
    seed: int = option(0, heading="Computing")
    keep_alpha: bool = option(False, heading="Computing")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seed", seed_of_64_bits(self.seed))
        for name, most in _MOST.items():
            if not 0 <= getattr(self, name) <= most:
                problem = "is negative" if getattr(self, name) < 0 else "is too large"
                raise OptionError(
                    f"{name} {problem}", got=getattr(self, name), expected=f"0 to {most}"
                )

    def stored(self, tensor: TensorRef | PlannedTensor) -> DType:
        """Return the type in which a factor is stored."""
        return tensor.dtype if self.dtype is None else DTYPES[self.dtype.upper()]

    def record(self) -> dict[str, Any]:
        """Return the options that determine the output's bytes, for its provenance."""
        names = ["method", "device"]
        if self.method == "rsvd":
            names += ["oversample", "power_iterations", "seed"]
        names += [name for name in ("dtype", "keep_alpha") if getattr(self, name)]
        return {name: getattr(self, name) for name in names}


def spectrum_of(
    name: str, planned: PlannedFactors, matrices: Sequence[Decomposed], options: ComputeOptions
) -> Spectrum:
    """Return a module's singular values, and what a rank of it costs in the output."""
    out, in_ = planned.shape
    bits = in_ * options.stored(planned.a).bits + out * options.stored(planned.b).bits
    rows = np.stack([matrix.singular_values for matrix in matrices])
    return Spectrum(name, planned.shape, rows, planned.rank, planned.experts * bits // 8)


@dataclass(frozen=True)
class Compressed:
    """A delta of lower rank.

    Attributes:
        delta: its factors, rounded and stored.
        squared_error: ‖ΔW − ΔW'‖²_F of the stored factors.
        energy: ‖·‖²_F of the factors before rounding.
    """

    delta: LowRank
    squared_error: float
    energy: float


@dataclass(frozen=True)
class Resizer:
    """Gives deltas other ranks.

    Attributes:
        options: how to compute and store.
        scratch: where new factors wait until they are written.
        one_scale: whether every module must come out with the same scale.
        scaling: the scale that a module will have at a rank, where it is decided elsewhere, as in
            training; by default the options decide.
    """

    options: ComputeOptions
    scratch: Scratch
    one_scale: bool
    scaling: Scaling | None = None

    def without_loss(self, delta: LowRank, rank: int, *, keep_scale: bool = True) -> LowRank | None:
        """Return factors of the same ΔW at `rank` without rounding a value; None if there are none.

        Args:
            delta: what to keep.
            rank: at least its own.
            keep_scale: whether it may come out with its old scale where that cannot be moved into
                the factors.
        """
        same_type = all(self.options.stored(t) == t.dtype for t in (delta.a, delta.b))
        holds = all(_holds(self.options.stored(t), t.dtype) for t in (delta.a, delta.b))
        if rank < delta.rank or not holds:
            return None
        scale = self._scale(delta, rank)
        ratio = delta.scale / scale
        if ratio == 1.0 and same_type and rank == delta.rank:
            return delta
        pairs = [padded(b * ratio, a, rank) for b, a in loaded(delta)]
        bias = _scaled_bias(delta.bias, ratio)
        exact = is_power_of_two(ratio) and (
            _is_exact([b for b, _ in pairs], self.options.stored(delta.b))
            and (delta.bias is None or _is_exact([np.asarray(bias)], delta.bias.dtype))
        )
        if exact:
            types = self.options.stored(delta.b), self.options.stored(delta.a)
            pairs = [(encode(b, types[0]), encode(a, types[1])) for b, a in pairs]
            return self._stored(PlannedFactors.like(delta), pairs, scale, bias)
        stays = same_type and rank == delta.rank and self._may_stay(keep_scale)
        return delta if stays else None

    def planned(
        self, like: PlannedFactors, rank: int, *, keep_scale: bool = True
    ) -> PlannedFactors:
        """Return the plan of the factors that will be made: types, shapes and scale.

        The scale is another one only if factors keep their values, their scale should move into
        them, and the type cannot hold what comes out.

        Args:
            like: the factors to be replaced, or to be kept at their own rank.
            rank: wanted.
            keep_scale: as for `without_loss`.
        """
        scale = self._scale(like, rank)
        a, b = self.options.stored(like.a), self.options.stored(like.b)
        keeps = rank == like.rank and (a, b) == (like.a.dtype, like.b.dtype)
        if keeps and not is_power_of_two(like.scale / scale) and self._may_stay(keep_scale):
            scale = like.scale
        return like.resized(rank, a, b, scale)

    def _may_stay(self, keep_scale: bool) -> bool:
        """Return whether a scale that cannot move into factors may stay beside them."""
        return keep_scale and not self.one_scale and not self.options.keep_alpha

    def compressed(
        self, name: str, like: PlannedFactors, matrices: Sequence[Decomposed], rank: int
    ) -> Compressed:
        """Return the best factors of `rank` as they are stored, and their error.

        Args:
            name: the module, from which random seeds derive.
            like: the factors to be replaced.
            matrices: the module's ΔW, taken apart.
            rank: wanted.

        Raises:
            AdapterError: values do not fit the stored type.
        """
        scale = self._scale(like, rank)
        root, sign = math.sqrt(abs(scale)), math.copysign(1.0, scale)  # a live model's may be < 0
        b_type, a_type = self.options.stored(like.b), self.options.stored(like.a)
        pairs = []
        squared_error = energy = 0.0
        for index, matrix in enumerate(matrices):
            b, a = matrix.factors(rank, self._randomised(f"{name}#{index}"))
            energy += float(np.einsum("ij,ij->j", b, b) @ np.einsum("ij,ij->i", a, a))
            if scale != 1.0:
                b, a = b / (sign * root), a / root
            b, b_back = rounded(b, b_type, like.b.key)
            a, a_back = rounded(a, a_type, like.a.key)
            scaled = b_back if scale == 1.0 else b_back * scale
            squared_error += matrix.squared_error(scaled, a_back)
            pairs.append((b, a))
        bias = _scaled_bias(like.bias, like.scale / scale)
        return Compressed(self._stored(like, pairs, scale, bias), squared_error, energy)

    def _scale(self, like: LowRank | PlannedFactors, rank: int) -> float:
        """Return the scale to write: 1, or alpha/rank where a positive alpha is to be kept."""
        if self.scaling is not None:
            return self.scaling(like, rank)
        if self.options.keep_alpha and like.alpha is not None and like.alpha > 0:
            return like.alpha / rank
        return 1.0

    def _stored(
        self,
        like: PlannedFactors,
        pairs: list[tuple[Array, Array]],
        scale: float,
        bias: Array | None,
    ) -> LowRank:
        """Store rounded factors, one pair per expert, and return the delta they make."""
        b_type, a_type = self.options.stored(like.b), self.options.stored(like.a)
        new_bias = like.bias
        if like.bias is not None and bias is not None:
            stored, _ = rounded(bias, like.bias.dtype, like.bias.key)
            new_bias = self.scratch.store(like.bias.key, stored, like.bias.dtype)
        if len(like.a.shape) == 3:
            b, a = np.stack([b for b, _ in pairs]), np.stack([a for _, a in pairs])
        else:
            ((b, a),) = pairs
        new_a = self.scratch.store(like.a.key, a, a_type)
        new_b = self.scratch.store(like.b.key, b, b_type)
        return like.made(new_a, new_b, scale, new_bias)

    def _randomised(self, label: str) -> RandomisedSvd | None:
        options = self.options
        if options.method == "exact":
            return None
        seed = seed_of_matrix(options.seed, label)
        return RandomisedSvd(options.oversample, options.power_iterations, seed)


def _holds(wide: DType, narrow: DType) -> bool:
    """Return whether every value of `narrow` is one of `wide`."""
    return wide == narrow or (wide.code == "F32" and narrow.bits <= 16) or wide.code == "F64"


def _is_exact(arrays: list[Array], dtype: DType) -> bool:
    """Return whether storing as `dtype` rounds no value."""
    return all(np.array_equal(encode(array, dtype).astype(array.dtype), array) for array in arrays)


def _scaled_bias(bias: TensorRef | None, factor: float) -> Array | None:
    """Return the bias of the second factor times a number; None if it has no bias.

    Raises:
        AdapterError: NaN or infinite values.
    """
    if bias is None:
        return None
    values: Array = bias.load(np.float64) * factor
    if not np.isfinite(values).all():
        raise AdapterError("bias holds NaN or infinite values", tensor=bias.key)
    return values


def rounded(array: Array, dtype: DType, key: str) -> tuple[Array, Array]:
    """Round the values of a tensor once; return them in `dtype`, and in float64.

    Raises:
        AdapterError: values are too large for the type, or so small that it loses them.
    """
    stored = encode(array, dtype)
    back = stored.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = back - array
        size, change = float(np.vdot(array, array)), float(np.vdot(difference, difference))
    if change <= (_ROUNDING_UNITS * _epsilon(dtype)) ** 2 * size:
        return stored, back
    too_large = ~np.isfinite(back)
    vanished = (back == 0.0) & (array != 0.0)
    if too_large.any():
        lost, what = too_large, "do not fit"
    elif vanished.any():
        lost, what = vanished, "vanish in"
    else:
        lost, what = (
            np.abs(difference) > _epsilon(dtype) * np.abs(array),
            "lose most of their digits in",
        )
    raise AdapterError(
        f"{np.count_nonzero(lost)} values {what} dtype {dtype.code}",
        tensor=key,
        got=f"up to {np.abs(array).max():.3g}",
        hint=None if dtype.code in _WIDE else "Ask for `dtype=bf16` or f32",
    )


def _epsilon(dtype: DType) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy_dtype()).eps)  # type: ignore[no-untyped-call]
