"""Compares the changes of adapters module by module, from their factors.

Every inner product ⟨ΔWᵢ, ΔWⱼ⟩ comes from two Gram matrices of the adapters' factors side by side:
N adapters of rank r cost O(d (Nr)²) a module, and no ΔW is formed. Two adapters are compared in
detail: spaces, angles, signs, and what merging them would lose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loratools.algebra.clusters import clusters, leaves, linkage
from loratools.folding.thin_modules import ThinModule, ThinModules
from loratools.operations.compare.names import in_one_naming
from loratools.operations.compare.pair import pair_module
from loratools.operations.compare.products import MANY, Workspace, inner_products
from loratools.operations.compare.result import CompareResult, PairModule, Unmatched
from loratools.operations.compare.starts import FLOOR, FLOOR_IN_SINGLE, Starts, starts, unknown
from loratools.work.declared import option
from loratools.work.parallel import done_in_order
from loratools.work.requests import Progress
from loratools.work.seeds import seed_of_64_bits
from loratools.work.selection import Selection, require_selected
from loratools.work.typed import check_options
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.dtypes import Array
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, OptionError

_FAMILY = 0.5
_DUPLICATE = 0.99
_LINEAGE = 0.5


@dataclass(frozen=True)
class CompareOptions:
    """How to compare.

    Attributes:
        exact: use every entry for signs and TIES, instead of a sample.
        sample: the number of entries of a module in the sample, without `exact`.
        seed: seed of the sample.

    Raises:
        OptionError: a number out of range.
    """

    exact: bool = option(False, heading="Method")
    sample: int = option(1 << 16, heading="Method")
    seed: int = option(0, heading="Computing")

    def __post_init__(self) -> None:
        check_options(self)
        if self.sample < 1:
            raise OptionError("the sample is too small", got=self.sample, expected="at least 1")
        object.__setattr__(self, "seed", seed_of_64_bits(self.seed))

    @property
    def drawn(self) -> int | None:
        """Entries to draw; None for all."""
        return None if self.exact else self.sample


@dataclass(frozen=True)
class _Module:
    """One module of all adapters.

    Attributes:
        name: module path.
        present: which adapters have it.
        problem: why it is not compared; empty if it is.
        changes: (N, N) inner products of the changes, 0 for an absent one.
        starts: how the A factors as stored relate.
        numbers: in the rows of A that all have.
        detail: of two adapters.
        partial: whether a change is known by its leading triplets only.
    """

    name: str
    present: tuple[int, ...]
    problem: str
    changes: Array
    starts: Starts
    numbers: int = 0
    detail: PairModule | None = None
    partial: bool = False

    @property
    def is_compared(self) -> bool:
        """Whether at least two adapters have it, in one shape."""
        return len(self.present) > 1 and not self.problem


def compare(
    adapters: Mapping[str, Adapter],
    *,
    base: Checkpoint | None = None,
    options: CompareOptions | None = None,
    selection: Selection | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> CompareResult:
    """Compare adapters where their modules match.

    Args:
        adapters: at least two, by the names they go by.
        base: the base model, for DoRA and kinds that need it; DoRAs are compared by their
            directions without it.
        options: how to compare.
        selection: modules to compare.
        workers: threads over modules; results do not depend on it.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: fewer than two adapters.
        AdapterError: they share no module, or values are not finite.
        UnsupportedError: a change depends on the base, or is not known.
    """
    if len(adapters) < 2:
        raise OptionError("a comparison needs at least two adapters", got=len(adapters))
    options, selection = options or CompareOptions(), selection or Selection()
    named, found = in_one_naming(list(adapters.values()), base)
    many = len(named) >= MANY
    openers = [ThinModules(adapter, base, "compare") for adapter in named]
    known = sorted({name for opener in openers for name in opener.modules})
    require_selected(selection, known, "compare", named[0].source)
    wanted = [name for name in known if name in selection]
    workspace = Workspace()

    def one(name: str) -> _Module:
        return _module(name, openers, options, workspace)

    done = done_in_order(one, wanted, workers, progress)
    if not any(module.is_compared for module in done):
        examples = [next(iter(opener.modules)) for opener in openers]
        why = next((f"{module.name}: {module.problem}" for module in done if module.problem), None)
        raise AdapterError(
            "the adapters share no module" + (" that can be compared" if why else ""),
            got=why or " and ".join(dict.fromkeys(examples)),
            hint="; ".join(each.message for each in found)
            or ("Are they adapters of one model?" if base is not None else _OTHER_NAMES),
        )
    if any(opener.directional for opener in openers):
        message = "DoRA modules are compared by their directions; `base` gives their changes"
        found.append(Finding("direction-only", "warning", None, message))
    if many:
        message = "sums are in blocks of float32, for speed: cosines are good to 1e-6"
        found.append(Finding("single-precision", "note", None, message))
    partial = sum(module.partial for module in done)
    if partial:
        message = (
            f"{partial} modules have full rank and are compared by their leading singular triplets"
        )
        found.append(Finding("leading-part", "warning", None, message))
    return _result(adapters, done, found)


def _problem(modules: Sequence[ThinModule]) -> str:
    """Return why modules of one name are not compared; empty if they are."""
    parameters = {p.rpartition(".")[2] for module in modules for p in module.layer.parameters}
    stacks = [module for module in modules if module.layer.kind == "experts"]
    if len(parameters) > 1 and all(len(m.layer.parameters) == 1 for m in modules):
        return f"it is of different parameters, {', '.join(sorted(parameters))}: {_BASE_TELLS}"
    if len({(module.shape, len(module.matrices)) for module in modules}) > 1:
        shapes = ", ".join(f"{module.shape[0]}×{module.shape[1]}" for module in modules)
        return f"its shapes differ: {shapes}"
    square = any(module.shape[0] == module.shape[1] for module in stacks)
    if square and len({module.layer.swapped for module in stacks}) > 1:
        return f"which side of the experts A is on is told of one only: {_BASE_TELLS}"
    return ""


_OTHER_NAMES = (
    "Are they adapters of one model? If so, pass `base`, whose class tells which names are of one "
    "module"
)
_BASE_TELLS = "`base` brings them together"


def _module(
    name: str, openers: Sequence[ThinModules], options: CompareOptions, workspace: Workspace
) -> _Module:
    opened = [o.open(name) if name in o.modules else None for o in openers]
    found = [(i, module) for i, module in enumerate(opened) if module is not None]
    present = tuple(i for i, _ in found)
    count = len(openers)
    changes, begun = np.zeros((count, count)), unknown(count)
    problem = _problem([module for _, module in found])
    if problem:
        for i, module in found:
            changes[i, i] = sum(thin.squared_norm for thin in module.matrices)
        return _Module(name, present, problem, changes, begun)
    modules = [module for _, module in found]
    here = np.ix_(present, present)
    changes[here], grams = inner_products(modules, workspace)
    ranks = [None if openers[i].modules[name].is_dora else module.rank for i, module in found]
    begun = _starts(modules, present, ranks, grams, count)
    least = min((rank for rank in ranks if rank), default=0)
    numbers = least * modules[0].shape[1] * len(modules[0].matrices)
    detail = None
    if count == len(found) == 2:
        first, second = modules
        detail = pair_module(name, first, second, changes, begun, options.drawn, options.seed)
    partial = any(thin.tail > 0.0 for module in modules for thin in module.matrices)
    return _Module(name, present, "", changes, begun, numbers, detail, partial)


def _starts(
    modules: Sequence[ThinModule],
    present: Sequence[int],
    ranks: Sequence[int | None],
    grams: Sequence[Array],
    count: int,
) -> Starts:
    """Compare the A factors of those of the `present` modules that have factors."""
    known = [place for place, rank in enumerate(ranks) if rank is not None]
    found = unknown(count)
    if not known:
        return found
    sizes = [module.matrices[0].rank for module in modules]
    ends = np.cumsum([0, *sizes])
    rows = np.concatenate([np.arange(ends[place], ends[place + 1]) for place in known])
    width = modules[0].shape[1]
    if len(known) < len(modules):
        grams = [gram[np.ix_(rows, rows)] for gram in grams]
    floor = FLOOR if len(modules) < MANY else FLOOR_IN_SINGLE
    some = starts(grams, [sizes[place] for place in known], width, floor)
    here = np.ix_([present[place] for place in known], [present[place] for place in known])
    for whole, part in zip(vars(found).values(), vars(some).values(), strict=True):
        whole[here] = part
    return found


def _result(
    adapters: Mapping[str, Adapter], done: Sequence[_Module], found: Sequence[Finding]
) -> CompareResult:
    names = tuple(adapters)
    count = len(names)
    total = np.sum([module.changes for module in done], axis=0)
    inner, ours, theirs = np.zeros((3, count, count))
    stored, own_a, other_a = np.zeros((3, count, count))
    overlaps, told = np.zeros((2, count, count))
    shared = np.zeros((count, count), np.int64)
    numbers = 0
    for module in done:
        both = np.zeros((count, count), bool)
        if not module.problem:
            both[np.ix_(module.present, module.present)] = True
        diagonal = np.diag(module.changes)
        inner += np.where(both, module.changes, 0.0)
        ours += np.where(both, diagonal[:, None], 0.0)
        theirs += np.where(both, diagonal[None, :], 0.0)
        stored += np.nan_to_num(module.starts.inner)
        own_a += np.nan_to_num(module.starts.ours)
        other_a += np.nan_to_num(module.starts.theirs)
        overlaps += np.nan_to_num(module.starts.overlaps)
        told += np.isfinite(module.starts.overlaps)
        shared += both
        numbers += module.numbers
    cosines = _cosines(inner, ours, theirs)
    a_cosines = _cosines(stored, own_a, other_a)
    a_overlaps = np.divide(overlaps, told, out=np.full_like(overlaps, np.nan), where=told > 0)
    alike = np.fmax(a_cosines, a_overlaps)
    squares = np.diag(total)
    merges = linkage(1.0 - np.nan_to_num(cosines))
    mean = total.mean()
    return CompareResult(
        names=names,
        sources=tuple(None if a.source is None else str(a.source) for a in adapters.values()),
        norms=tuple(float(value) for value in np.sqrt(squares)),
        cosines=_rows(cosines),
        whole_cosines=_rows(_cosines(total, squares[:, None], squares[None, :])),
        a_cosines=_rows(a_cosines),
        a_overlaps=_rows(a_overlaps),
        a_random=1.0 / math.sqrt(numbers) if numbers else None,
        shared=tuple(tuple(int(value) for value in row) for row in shared),
        merges=tuple(tuple(float(value) for value in row) for row in merges),
        order=tuple(leaves(merges)),
        families=_groups(names, clusters(merges, 1.0 - _FAMILY)),
        duplicates=tuple(
            (names[i], names[j])
            for i in range(count)
            for j in range(i + 1, count)
            if cosines[i, j] >= _DUPLICATE
        ),
        lineages=_groups(names, _joined(np.nan_to_num(alike) >= _LINEAGE)),
        modules=tuple(module.detail for module in done if module.detail is not None),
        unmatched=tuple(
            Unmatched(
                module.name,
                tuple(names[i] for i in module.present),
                module.problem or "only one adapter has it",
            )
            for module in done
            if not module.is_compared
        ),
        linear_losses=tuple(
            math.sqrt(max(mean - 2.0 * total[i].mean() + squares[i], 0.0) / squares[i])
            if squares[i]
            else None
            for i in range(count)
        ),
        findings=tuple(found),
    )


def _cosines(inner: Array, ours: Array, theirs: Array) -> Array:
    """Return cosines, NaN where a norm is zero."""
    products = np.sqrt(ours) * np.sqrt(theirs)
    quotients = np.divide(inner, products, out=np.full_like(inner, np.nan), where=products > 0.0)
    cosines: Array = np.clip(quotients, -1.0, 1.0)
    return cosines


def _rows(matrix: Array) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(None if math.isnan(v) else float(v) for v in row) for row in matrix)


def _groups(names: Sequence[str], groups: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of more than one."""
    return tuple(tuple(names[i] for i in group) for group in groups if len(group) > 1)


def _joined(near: Array) -> list[list[int]]:
    """Return the connected groups of a relation."""
    groups: list[set[int]] = []
    for i in range(len(near)):
        touching = [group for group in groups if any(near[i, j] for j in group)]
        groups = [group for group in groups if group not in touching]
        groups.append(set().union({i}, *touching))
    return sorted((sorted(group) for group in groups), key=lambda g: (-len(g), g))
