"""Moves adapters between groups while that lowers the error, as Compress-then-Serve alternates.

Groups begin by how far spaces overlap: by a tree, which finds families and leaves outliers alone,
and around adapters that are in the middle of others, which divides a crowd. With bases for these,
each adapter goes to the group whose bases keep most of it; then bases are fitted again. Ranks stay,
and a round that does not lower the error is undone: the result is never worse than the tree's
groups. All of it is exact, on the cores between singular vectors, and nothing is random.
Source: arXiv 2407.00066, section on clustering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from loratools.algebra.joint import Triplets
from loratools.algebra.ranks import RankRule
from loratools.operations.shared.bases import joints_of
from loratools.operations.shared.units import Fleet, Unit
from loratools.work.parallel import in_order
from loratools_formats.core.dtypes import Array

_ROUNDS = 8
_LEAST_GAIN = 1e-6  # of what is not kept

Groups = list[list[int]]


Ranks = Mapping[tuple[str, int], int]
"""Of bases, by module and group."""


def fixed_ranks(
    rule: RankRule, units: Sequence[Unit], ranks: Mapping[str, int] | None
) -> Ranks | None:
    """Return the ranks of bases where a rule says how large they are; None if how much they keep.

    Args:
        rule: of ranks.
        units: modules of groups.
        ranks: that were chosen for all of them together; None if each has its own.
    """
    fixed = {unit.name: rule.override(unit.module.name) or rule.rank for unit in units}
    wanted = {name: rank for name, rank in (ranks or fixed).items() if rank is not None}
    if rule.energy or rule.sv_fro or len(wanted) < len(units):
        return None
    return {(unit.module.name, unit.group): wanted[unit.name] for unit in units}


def reassigned(
    fleet: Fleet,
    groups: Groups,
    others: Groups,
    ranks: Ranks | None,
    weights: Array,
    squares: Array,
    workers: int,
) -> Groups:
    """Return groups with which bases of the same ranks lose less, or the same groups.

    Args:
        fleet: the adapters.
        groups: to begin with.
        others: as many groups, to begin with as well.
        ranks: of the bases; None leaves the groups.
        weights: (N, M) what squared errors count.
        squares: (N, M) ‖ΔW‖².
        workers: threads over modules; results do not depend on it.
    """
    if ranks is None or len(groups) in (1, len(weights)) or fleet.options.cores == "diagonal":
        return groups
    whole = float(np.sum(weights * squares))
    best, least = groups, np.inf
    for start in (groups, others):
        now, kept = start, _kept(fleet, start, ranks, weights, workers)
        lost = whole - _sum(kept, now)
        for _ in range(_ROUNDS):
            moved = _moved(now, kept)
            if moved == now:
                break
            kept = _kept(fleet, moved, ranks, weights, workers)
            now_lost = whole - _sum(kept, moved)
            if not now_lost < lost * (1.0 - _LEAST_GAIN):
                break
            now, lost = moved, now_lost
        if lost < least * (1.0 - _LEAST_GAIN):
            best, least = now, lost
    return groups if best is groups else sorted(best, key=lambda each: (-len(each), each))


def _moved(groups: Groups, kept: Array) -> Groups:
    """Return each adapter in the group that keeps most of it; none is left empty."""
    now = np.zeros(len(kept), int)
    for group, members in enumerate(groups):
        now[members] = group
    own = kept[np.arange(len(kept)), now]
    chosen = np.where(kept.max(axis=1) > own * (1.0 + 1e-12), kept.argmax(axis=1), now)
    for group, members in enumerate(groups):
        if group in chosen:
            continue
        sizes = np.bincount(chosen, minlength=len(groups))
        spare = np.flatnonzero(sizes[chosen] > 1)  # whoever leaves, leaves no group empty
        stays = np.intersect1d(members, spare).astype(int)
        if len(stays):  # the one that gains least by leaving
            chosen[stays[int(np.argmin(kept[stays].max(axis=1) - own[stays]))]] = group
        else:  # the one that loses least by coming
            losses = kept[spare, chosen[spare]] - kept[spare, group]
            chosen[spare[int(np.argmin(losses))]] = group
    return [[int(i) for i in np.flatnonzero(chosen == group)] for group in range(len(groups))]


def _sum(kept: Array, groups: Groups) -> float:
    return float(sum(kept[i, group] for group, members in enumerate(groups) for i in members))


def _kept(
    fleet: Fleet,
    groups: Groups,
    ranks: Ranks,
    weights: Array,
    workers: int,
) -> Array:
    """Return what each group's bases keep of each adapter: (N, groups) of weighted ‖UᵀΔWV‖²."""

    def one(name: str) -> Array:
        loaded, own = fleet.loaded(name), weights[:, fleet.columns[name]]
        found = np.zeros((len(loaded), len(groups)))
        most = max(ranks.get((name, group), 0) for group in range(len(groups)))
        for group, members in enumerate(groups):
            having = [i for i in members if loaded[i] is not None]
            if not having:
                continue
            stacks = [each for i in having if (each := loaded[i]) is not None]
            rank = ranks.get((name, group), most)
            for place, joint in enumerate(joints_of(stacks, [float(own[i]) for i in having])):
                is_full = fleet.options.cores == "full"
                u, v = joint.full(rank) if is_full else joint.principal(rank)
                for i, each in enumerate(loaded):
                    if each is not None:
                        found[i, group] += own[i] * _energy(each[place], u, v)
        return found

    total = np.zeros((len(weights), len(groups)))
    for found in in_order(one, list(fleet.modules), workers):
        total += found
    return total


def _energy(one: Triplets, u: Array, v: Array) -> float:
    core = ((u.T @ one.u) * one.s) @ (one.v.T @ v)
    return float(np.sum(core * core))
