"""Parts of a fused module side by side; gate and up of a layer's experts in one tensor or in two.

Bases made with `convert_hf_to_gguf.py --fuse-gate-up-exps` have one tensor, `ffn_gate_up_exps`,
which holds gate's outputs and then up's, and llama.cpp looks for an adapter of that name. Source:
`conversion/base.py` and `llama_model_base::create_tensor_gate_up_exps`, llama.cpp b10605.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import DType, common_dtype, dtype_of_multiples, encode
from loratools_formats.core.tensors import TensorRef, have_same_bits, joined
from loratools_formats.disk.errors import AdapterError

GATE, UP, BOTH = "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"


def cut(modules: Mapping[str, ModuleChange], has: Callable[[str], bool]) -> dict[str, ModuleChange]:
    """Return modules with every joined gate and up as two: A twice, and each half of B.

    Args:
        modules: by the names of GGUF tensors.
        has: whether there is such a tensor, which then stays as it is.

    Raises:
        AdapterError: an odd number of outputs has no halves.
    """
    made: dict[str, ModuleChange] = {}
    for name, change in modules.items():
        if not _is(name, BOTH) or has(name):
            made[name] = change
            continue
        part = change.require_factors()
        out = part.shape[0]
        if out % 2:
            raise AdapterError("odd number of rows has no halves", tensor=name, got=out)
        for leaf, rows in ((GATE, range(out // 2)), (UP, range(out // 2, out))):
            half = replace(part, b=part.b.rows(list(rows)))
            made[_called(name, leaf)] = change.with_direction(half)
    return made


def as_in_base(
    modules: Mapping[str, ModuleChange], has: Callable[[str], bool]
) -> dict[str, ModuleChange]:
    """Return modules with gate and up of experts joined where the base has them so, and only there.

    A projection that is not adapted gets zeros.

    Args:
        modules: by the names of GGUF tensors.
        has: whether the base has a tensor, by its name without `.weight`.
    """
    made = cut(modules, has)
    for name in list(made):
        both = _called(name, BOTH)
        if not (_is(name, GATE) or _is(name, UP)) or has(name) or not has(both):
            continue
        found = [made.pop(_called(name, leaf), None) for leaf in (GATE, UP)]
        present = [change.require_factors() for change in found if change is not None]
        if not present:  # joined with its counterpart already
            continue
        parts = [
            _nothing(present[0]) if change is None else change.require_factors() for change in found
        ]
        made[both] = ModuleChange(side_by_side(both, parts))
    return made


def _is(name: str, leaf: str) -> bool:
    return name == leaf or name.endswith(f".{leaf}")


def _called(name: str, leaf: str) -> str:
    owner, dot, _ = name.rpartition(".")
    return f"{owner}{dot}{leaf}"


def _nothing(like: LowRank) -> LowRank:
    return replace(like, b=TensorRef(like.b.key, like.b.dtype, like.b.shape, _Zeros(like.b.nbytes)))


class _Zeros:
    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def __call__(self) -> bytes:
        return bytes(self._nbytes)


def side_by_side(path: str, parts: Sequence[LowRank]) -> LowRank:
    """Return one pair of factors, of a matrix or a stack, for parts on top of each other.

    If all have one A, it is kept; else ranks add up: [B₁ 0; 0 B₂] [A₁; A₂]. Bytes move; values
    change only where scales differ by no power of two, and are float32 then.
    """
    first = parts[0]
    same = all(part.scale == first.scale and have_same_bits(part.a, first.a) for part in parts)
    if not same:
        return _block_diagonal(path, parts)
    rows = sum(part.shape[0] for part in parts)
    if len(first.b.shape) == 2:
        return replace(first, b=joined(first.b.key, [p.b for p in parts], (rows, first.rank)))
    stack = first.experts
    flat = joined(first.b.key, [part.b for part in parts], (stack * rows, first.rank))
    order: list[int] = []
    for expert in range(stack):
        starts = 0
        for part in parts:
            height = part.shape[0]
            order += range(starts + expert * height, starts + (expert + 1) * height)
            starts += stack * height
    return replace(first, b=flat.rows(order).reshaped((stack, rows, first.rank)))


def _block_diagonal(path: str, parts: Sequence[LowRank]) -> LowRank:
    first = parts[0]
    stack = first.a.shape[:-2]
    rank, rows = sum(part.rank for part in parts), sum(part.shape[0] for part in parts)
    ratios = [part.scale / first.scale for part in parts]
    dtype_a = common_dtype([part.a.dtype for part in parts])
    dtype_b = dtype_of_multiples(common_dtype([part.b.dtype for part in parts]), ratios)

    def a() -> Any:
        import numpy as np

        return np.concatenate([encode(part.a.load(), dtype_a) for part in parts], axis=-2)

    def b() -> Any:
        import numpy as np

        made = np.zeros((*stack, rows, rank), dtype_b.numpy_dtype())
        row = column = 0
        for part, ratio in zip(parts, ratios, strict=True):
            height, width = part.shape[0], part.rank
            block = part.b.load() if ratio == 1.0 else ratio * part.b.load(np.float64)
            made[..., row : row + height, column : column + width] = encode(block, dtype_b)
            row, column = row + height, column + width
        return made

    return replace(
        first,
        a=_made(path, dtype_a, (*stack, rank, first.shape[1]), a),
        b=_made(path, dtype_b, (*stack, rows, rank), b),
        alpha=None,
    )


def _made(key: str, dtype: DType, shape: tuple[int, ...], values: Any) -> TensorRef:
    def read() -> bytes:
        import numpy as np

        return np.ascontiguousarray(values()).tobytes()

    return TensorRef(key, dtype, shape, read)
