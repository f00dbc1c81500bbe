"""Rules about values. They read every tensor once; the statistics are those of `spectrum`.

‖ΔW‖_F of a module is scale · √(Σ (BᵀB) ∘ (A Aᵀ)), which needs no matrix larger than r × r.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from loratools.algebra.median import median
from loratools.algebra.outliers import DEAD, ONE_SIDED, scores_in_families
from loratools.operations.check.remedy import Remedy
from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.subject import Subject
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank
from loratools_formats.core.dtypes import Array
from loratools_formats.core.tensors import TensorRef

_LARGEST_F16 = 65504.0
_STANDS_OUT = 8.0  # robust standard deviations; 3.5 flags two of three clean adapters
_BLOCK = 1 << 22  # elements that are looked at together


@dataclass(frozen=True)
class ModuleNumbers:
    """What the values of a module are.

    Attributes:
        infinite: keys of tensors with NaN or infinite values.
        norm: ‖ΔW‖_F; of a DoRA that of its direction; None where factors do not tell it.
        largest: largest absolute value of a stored factor.
        balance: ‖B‖/‖A‖; None if there are no factors, or one is zero.
        dead_ranks: columns of B or rows of A that are zero, of all matrices.
    """

    infinite: tuple[str, ...]
    norm: float | None
    largest: float
    balance: float | None
    dead_ranks: int


def scanned(adapter: Adapter) -> dict[str, ModuleNumbers]:
    """Return the numbers of every module, and of tensors that belong to none under their key."""
    found: dict[str, ModuleNumbers] = {}
    for name, change in adapter.modules.items():
        part = change.factors
        factors = () if part is None else (part.a.key, part.b.key)
        others = [tensor for tensor in change.tensors() if tensor.key not in factors]
        infinite = tuple(tensor.key for tensor in others if not _is_finite(tensor))
        if part is None:
            found[name] = ModuleNumbers(infinite, None, 0.0, None, 0)
        else:
            found[name] = _of_factors(part, infinite)
    loose = [*adapter.shared.values(), *(r.tensor for r in adapter.replacements.values())]
    loose += [addition.tensor for addition in adapter.additions.values()]
    for tensor in loose:
        if not _is_finite(tensor):
            found[tensor.key] = ModuleNumbers((tensor.key,), None, 0.0, None, 0)
    return found


def _is_finite(tensor: TensorRef) -> bool:
    if not tensor.dtype.floating or tensor.dtype.bits < 16:
        return True
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        return all(
            bool(np.isfinite(tensor.elements(start, min(start + _BLOCK, tensor.numel))).all())
            for start in range(0, tensor.numel, _BLOCK)
        )


def _of_factors(part: LowRank, infinite: tuple[str, ...]) -> ModuleNumbers:
    dtype = np.float64 if "F64" in (part.a.dtype.code, part.b.dtype.code) else np.float32
    a, b = (np.atleast_3d(_stack(each.load(dtype))) for each in (part.a, part.b))
    # NaN and infinity go through a maximum: one pass tells values, ranks and what is finite.
    rows, columns = np.abs(a).max(axis=2), np.abs(b).max(axis=1)
    ends = ((part.a, rows.max()), (part.b, columns.max()))
    broken = [tensor.key for tensor, end in ends if not np.isfinite(end)]
    if broken:
        return ModuleNumbers((*infinite, *broken), None, math.inf, None, 0)
    largest = max(float(end) for _, end in ends)
    dead = int(np.count_nonzero((rows == 0.0) | (columns == 0.0)))
    with np.errstate(over="ignore", invalid="ignore"):
        if largest > 1e9:
            a, b = a.astype(np.float64), b.astype(np.float64)
        gram_a, gram_b = a @ a.transpose(0, 2, 1), b.transpose(0, 2, 1) @ b
        squared = float(np.sum(gram_a.astype(np.float64) * gram_b.astype(np.float64)))
    norm_a = math.sqrt(float(np.trace(gram_a, axis1=1, axis2=2).sum(dtype=np.float64)))
    norm_b = math.sqrt(float(np.trace(gram_b, axis1=1, axis2=2).sum(dtype=np.float64)))
    balance = norm_b / norm_a if norm_a > 0.0 and norm_b > 0.0 else None
    norm = abs(part.scale) * math.sqrt(max(squared, 0.0))
    return ModuleNumbers(infinite, norm, largest, balance, dead)


def _stack(array: Array) -> Array:
    return array if array.ndim == 3 else array[None]


def _norms(subject: Subject) -> Mapping[str, float]:
    return {n: m.norm for n, m in subject.numbers.items() if m.norm is not None}


def _is_dora(subject: Subject, name: str) -> bool:
    return subject.adapter is not None and subject.adapter.modules[name].is_dora


def _dead(subject: Subject) -> list[str]:
    """Return the modules whose norm is zero or tiny beside the others', DoRAs aside."""
    norms = _norms(subject)
    if not norms:
        return []
    limit = DEAD * median(list(norms.values()))
    return [n for n, norm in norms.items() if norm <= limit and not _is_dora(subject, n)]


def _non_finite(subject: Subject) -> Iterator[Found]:
    for numbers in subject.numbers.values():
        for key in numbers.infinite:
            yield Found(f"{key} holds NaN or infinite values", key)


def _does_nothing(subject: Subject) -> Iterator[Found]:
    adapter, norms = subject.adapter, _norms(subject)
    if adapter is None or not norms or adapter.replacements or adapter.additions:
        return
    has_dora = any(change.is_dora for change in adapter.modules.values())
    if len(norms) == len(adapter.modules) and not any(norms.values()) and not has_dora:
        yield Found("every module's change is zero, as before training")


def _dead_modules(subject: Subject) -> Iterator[Found]:
    norms, dead = _norms(subject), _dead(subject)
    if not any(norms.values()):
        return
    for name in dead:
        text = f"{name} changes nothing: ‖ΔW‖ = {norms[name]:.3g}"
        yield Found(text, name, remedy=Remedy("drop-dead") if _repairable(subject) else None)


def _repairable(subject: Subject) -> bool:
    changes = () if subject.adapter is None else subject.adapter.modules.values()
    return not any(change.is_dora or change.factors is None for change in changes)


def _overflow(subject: Subject) -> Iterator[Found]:
    for name, numbers in subject.numbers.items():
        if _LARGEST_F16 < numbers.largest < math.inf:
            text = f"{name} has a factor with values up to {numbers.largest:.3g}"
            yield Found(text, name, remedy=Remedy("rebalance") if _repairable(subject) else None)


def _mixed_types(subject: Subject) -> Iterator[Found]:
    changes = () if subject.adapter is None else subject.adapter.modules.values()
    parts = [change.factors for change in changes if change.factors is not None]
    counts = Counter(tensor.dtype.code for part in parts for tensor in (part.a, part.b))
    if len(counts) > 1:
        listed = ", ".join(f"{count} of {code}" for code, count in counts.most_common())
        yield Found(f"factors are of several types: {listed}")


def _stands_out(subject: Subject) -> Iterator[Found]:
    norms = _norms(subject)
    for name, score in scores_in_families(norms).items():
        if abs(score) > _STANDS_OUT:
            side = "above" if score > 0 else "below"
            text = (
                f"‖ΔW‖ = {norms[name]:.3g} of {name} is {abs(score):.1f} robust standard "
                f"deviations {side} the trend of its kind over depth"
            )
            yield Found(text, name)


def _one_sided(subject: Subject) -> Iterator[Found]:
    for name, numbers in subject.numbers.items():
        balance = numbers.balance
        if balance is not None and not 1 / ONE_SIDED <= balance <= ONE_SIDED:
            remedy = Remedy("rebalance") if _repairable(subject) else None
            yield Found(f"{name} has ‖B‖/‖A‖ = {balance:.3g}", name, remedy=remedy)


def _dead_ranks(subject: Subject) -> Iterator[Found]:
    padded = any(t.scales == "one" or t.mixed_ranks != "yes" for t in subject.targets)
    dead = set(_dead(subject))
    hit = {
        name: numbers.dead_ranks
        for name, numbers in subject.numbers.items()
        if numbers.dead_ranks and numbers.norm and name not in dead
    }
    if hit and not padded:
        first = next(iter(hit))
        more = f", and {len(hit) - 1} more modules have some" if len(hit) > 1 else ""
        text = f"{first} has {hit[first]} ranks that are zero{more}"
        yield Found(text, first, remedy=Remedy("tidy"))


RULES = (
    Rule(
        "LT301", "non-finite", "error",
        "A tensor holds NaN or infinite values.",
        "The model's output is then NaN.",
        "Use a checkpoint from before the training diverged.",
        "IEEE 754",
        _non_finite,
    ),
    Rule(
        "LT302", "does-nothing", "error",
        "Every module's change is zero.",
        "The adapter loads, and the model behaves like its base. B is zero before the first "
        "step of training.",
        "Save the adapter after training; gather sharded parameters before saving.",
        "PEFT initialises lora_B with zeros",
        _does_nothing,
    ),
    Rule(
        "LT303", "dead-module", "warning",
        "A module's change is zero, or a millionth of the median.",
        "It costs time and memory in serving, and does nothing.",
        "Drop it: `loratools repair ADAPTER -o NEW --keep-intruders --drop-dead`.",
        "The threshold of the findings of spectrum",
        _dead_modules,
    ),
    Rule(
        "LT304", "overflows-in-f16", "warning",
        "A factor has values that float16 cannot hold.",
        "Programs that serve in float16 read infinity.",
        "Move a power of two into the other factor: "
        "`loratools repair ADAPTER -o NEW --keep-intruders --rebalance`.",
        "IEEE 754: the largest is 65504",
        _overflow,
    ),
    Rule(
        "LT305", "mixed-types", "note",
        "Factors are stored in several types.",
        "The adapter has the precision of the smallest type and the size of the largest.",
        "Choose one: `loratools convert ADAPTER -o NEW --to peft --dtype bf16`.",
        "safetensors headers",
        _mixed_types,
    ),
    Rule(
        "LT306", "stands-out", "note",
        "A module's change is much larger or smaller than those of its kind.",
        "This is a statistic, not a verdict: a layer that was trained differently, a planted "
        "change and mere chance look the same.",
        "Look at it with `loratools spectrum ADAPTER`, and accept it in a baseline if the "
        "training explains it.",
        "Robust standard deviations from the trend over depth, after Iglewicz and Hoaglin 1993; "
        "above 8, by what is measured here",
        _stands_out, statistical=True,
    ),
    Rule(
        "LT307", "one-sided", "note",
        "One factor is a thousand times the other.",
        "Types with few bits lose the smaller one.",
        "Balance them without rounding: "
        "`loratools repair ADAPTER -o NEW --keep-intruders --rebalance`.",
        "The threshold of the findings of spectrum",
        _one_sided,
    ),
    Rule(
        "LT308", "dead-ranks", "note",
        "Some ranks of a module are zero.",
        "They cost time and memory. If the ranks are padded because a program needs one rank "
        "for all modules, the rule does not apply.",
        "Cut them off without loss: `loratools squeeze ADAPTER -o NEW --energy 1`.",
        "The definition of rank",
        _dead_ranks,
    ),
)  # fmt: skip
