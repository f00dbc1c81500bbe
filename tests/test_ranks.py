"""Rank rules against their textbook definitions, and the budget against exhaustive search."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.algebra.budget import Limit, choose_ranks, rank_table
from loratools.algebra.ranks import (
    SERVE_RANKS,
    Budget,
    RankRule,
    Spectrum,
    gavish_donoho,
    pattern_rank,
)
from loratools.work.spellings import nbytes as size_of
from loratools_formats.disk.errors import OptionError


def spectrum(sigma, name="m", price=10, shape=(100, 80)):
    rows = np.atleast_2d(np.asarray(sigma, dtype=np.float64))
    return Spectrum(name, shape, rows, rows.shape[1], price)


SIGMA = [4.0, 2.0, 1.0, 1.0]  # σ²: 16, 4, 1, 1 of 22; σ: 4, 6, 7, 8 of 8


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (RankRule(rank=3), 3),
        (RankRule(rank=9), 4),
        (RankRule(energy=16 / 22), 1),
        (RankRule(energy=16 / 22 + 1e-9), 2),
        (RankRule(energy=1.0), 4),
        (RankRule(sv_fro=(16 / 22) ** 0.5 - 1e-12), 1),
        (RankRule(sv_fro=(16 / 22) ** 0.5 + 1e-9), 2),
        (RankRule(sv_cumulative=0.75), 2),
        (RankRule(sv_cumulative=0.76), 3),
        (RankRule(sv_ratio=1.0), 1),
        (RankRule(sv_ratio=2.0), 2),
        (RankRule(sv_ratio=3.9), 2),
        (RankRule(sv_ratio=4.0), 4),
        (RankRule(energy=0.1, min_rank=3), 3),
        (RankRule(energy=1.0, max_rank=2), 2),
        (RankRule(max_rank=3), 3),
        (RankRule(rank=3, patterns=(("m", 2),)), 2),
        (RankRule(rank=3, patterns=(("other", 2),)), 3),
        (RankRule(rank=2, serve=True), 8),
        (RankRule(rank=2, serve=True, max_rank=7), 1),
    ],
)
def test_rank_of_one_module(rule, want):
    assert rule.of_module(spectrum(SIGMA)) == want


def test_all_zero_module_keeps_rank_one():
    for rule in (RankRule(energy=0.9), RankRule(sv_cumulative=0.9), RankRule(threshold=True)):
        assert rule.of_module(spectrum([0.0, 0.0, 0.0])) == 1


def test_experts_get_the_largest_rank_any_of_them_needs():
    rows = [[4.0, 0.1, 0.1], [1.0, 1.0, 1.0]]
    assert RankRule(energy=0.9).of_module(spectrum(rows)) == 3


def test_threshold_finds_planted_signal():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((200, 100)) / np.sqrt(200)
    signal = np.diag([8.0, 6.0, 4.0] + [0.0] * 97)
    matrix = noise.copy()
    matrix[:100] += signal
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert RankRule(threshold=True).of_module(spectrum(sigma, shape=(200, 100))) == 3
    # ω(0.5) = 2.1711 exactly, the paper's table; its cubic is within 0.02.
    assert gavish_donoho(np.ones(5), (200, 100)) == pytest.approx(2.1711, abs=0.02)


def test_uniform_takes_the_largest():
    spectra = [spectrum(SIGMA, "a"), spectrum([1.0, 0.0, 0.0, 0.0], "b")]
    rule = RankRule(energy=0.99, uniform=True)
    assert choose_ranks(spectra, rule) == {"a": 4, "b": 4}


def budgeted(spectra, nbytes, groups=(), header=0, **kwargs):
    rule = RankRule(budget=Budget(nbytes=nbytes), **kwargs)
    limit = Limit(nbytes, lambda ranks: spent(spectra, ranks) + header)
    return choose_ranks(spectra, rule, limit=limit, groups=groups)


def lost(spectra, ranks):
    return sum(float(s.energies[ranks[s.name] :].sum()) for s in spectra)


def spent(spectra, ranks):
    return sum(ranks[s.name] * s.bytes_per_rank for s in spectra)


sigmas = st.lists(st.floats(0.01, 10), min_size=1, max_size=4).map(
    lambda values: sorted(values, reverse=True)
)


@given(st.lists(sigmas, min_size=1, max_size=4), st.integers(4, 20))
@settings(max_examples=80, deadline=None)
def test_budget_at_equal_prices_is_optimal(rows, units):
    spectra = [spectrum(row, f"m{i}", price=10) for i, row in enumerate(rows)]
    got = budgeted(spectra, units * 10)
    options = itertools.product(*(range(1, s.rank + 1) for s in spectra))
    names = [s.name for s in spectra]
    candidates = [dict(zip(names, option, strict=True)) for option in options]
    affordable = [c for c in candidates if spent(spectra, c) <= units * 10]
    best = min(lost(spectra, c) for c in affordable)
    assert spent(spectra, got) <= units * 10
    assert lost(spectra, got) == pytest.approx(best, abs=1e-9)


@given(
    st.lists(st.tuples(sigmas, st.integers(1, 30)), min_size=1, max_size=4), st.integers(120, 400)
)
@settings(max_examples=80, deadline=None)
def test_budget_at_any_prices_is_optimal_for_what_it_spends(rows, nbytes):
    spectra = [spectrum(row, f"m{i}", price) for i, (row, price) in enumerate(rows)]
    got = budgeted(spectra, nbytes)
    assert spent(spectra, got) <= nbytes
    # No module could take another rank with what is left.
    left = nbytes - spent(spectra, got)
    assert all(got[s.name] == s.rank or s.bytes_per_rank > left for s in spectra)


def test_budget_prefers_energy_per_byte():
    cheap = spectrum([1.0, 0.9], "cheap", price=1)
    dear = spectrum([3.0, 1.5], "dear", price=10)
    assert budgeted([cheap, dear], 12) == {"cheap": 2, "dear": 1}


def test_budget_combines_with_other_options():
    spectra = [spectrum(SIGMA, "a"), spectrum(SIGMA, "b")]
    assert budgeted(spectra, 60, uniform=True) == {"a": 3, "b": 3}
    assert budgeted(spectra, 80, max_rank=2) == {"a": 2, "b": 2}
    assert budgeted(spectra, 60, patterns=(("a", 1),)) == {"a": 1, "b": 4}
    assert budgeted(spectra, 60, min_rank=3) == {"a": 3, "b": 3}
    wide = [spectrum(np.linspace(9, 1, 20), "a"), spectrum(np.linspace(9, 1, 20), "b")]
    assert set(budgeted(wide, 300, serve=True).values()) <= set(SERVE_RANKS)


@pytest.mark.parametrize("kwargs", [{}, {"uniform": True}])
def test_too_small_a_budget_is_an_error(kwargs):
    with pytest.raises(OptionError, match="budget is too small"):
        budgeted([spectrum(SIGMA, "a"), spectrum(SIGMA, "b")], 19, **kwargs)


def test_budget_counts_what_is_no_factor():
    assert Budget.parse("50%").resolve(60) == 30
    assert budgeted([spectrum(SIGMA)], 30, header=10) == {"m": 2}


def test_budget_gives_modules_of_a_group_one_rank():
    spectra = [spectrum([9.0, 1.0, 0.5], "a"), spectrum([2.0, 1.9, 0.5], "b"), spectrum(SIGMA)]
    alone = budgeted(spectra[:2], 30)
    assert alone == {"a": 1, "b": 2}
    assert budgeted(spectra[:2], 39, groups=[["a", "b"]]) == {"a": 1, "b": 1}
    assert budgeted(spectra[:2], 40, groups=[["a", "b"]]) == {"a": 2, "b": 2}
    together = budgeted(spectra, 90, groups=[["a", "b"]])
    assert together["a"] == together["b"]
    assert spent(spectra, together) <= 90


def test_a_budget_whose_header_grows_with_the_ranks_is_kept():
    rng = np.random.default_rng(0)
    spectra = [spectrum(sorted(rng.random(12), reverse=True), f"m{i}") for i in range(9)]

    def size(ranks):
        return spent(spectra, ranks) + sum(
            3 * (rank > 4) + 7 * (rank > 9) for rank in ranks.values()
        )

    for nbytes in range(90, 1000, 13):
        rule = RankRule(budget=Budget(nbytes=nbytes))
        got = choose_ranks(spectra, rule, limit=Limit(nbytes, size))
        assert size(got) <= nbytes
        for name, rank in got.items():
            assert rank == 12 or size(got | {name: rank + 1}) > nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("12MB", 12_000_000), ("12 mib", 12 << 20), ("800", 800), (".5kB", 500), ("1GiB", 1 << 30),
        ("3kb", 3_000), ("3KB", 3_000), ("2G", 2 * 10**9), ("0.5TB", 5 * 10**11), ("7 B", 7),
        ("1.001kB", 1_001),
    ],
)  # fmt: skip
def test_budget_sizes(text, nbytes):
    assert Budget.parse(text).resolve(1) == nbytes


@pytest.mark.parametrize(
    "text", ["", "x", "-5MB", "0%", "0", "0.0", "12 apples", "1e9", "١٢MB", "9" * 400, "5%%", "k"]
)
def test_bad_budgets(text):
    with pytest.raises(OptionError, match=r"not a (budget|size|share)"):
        Budget.parse(text)


@pytest.mark.parametrize(("text", "meant"), [("0.25", "25%"), (".5", "50%"), (" 0.125 ", "12.5%")])
def test_a_budget_that_lacks_its_percent_sign_is_refused(text, meant):
    with pytest.raises(OptionError, match=f"is a size in bytes; did you mean {meant}"):
        Budget.parse(text)
    with pytest.raises(OptionError, match="not a size above zero"):
        size_of(text)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"rank": 2, "energy": 0.5},
        {"energy": 0.0},
        {"energy": 1.5},
        {"energy": float("nan")},
        {"sv_ratio": 0.5},
        {"rank": 0},
        {"max_rank": 2, "min_rank": 3},
        {"patterns": (("q", 0),)},
    ],
)
def test_bad_rules(kwargs):
    with pytest.raises(OptionError):
        RankRule(**kwargs)


def test_pattern_rank():
    assert pattern_rank(r"q=1\.q=4") == (r"q=1\.q", 4)
    for bad in ("q", "q=", "q=-1", "(=3"):
        with pytest.raises(OptionError):
            pattern_rank(bad)


def test_table_goes_from_one_to_the_present_rank():
    spectra = [spectrum([3.0, 2.0, 1.0]), spectrum([5.0, 0.0], "n")]
    rows = rank_table(spectra, lambda ranks: spent(spectra, ranks) + 7)
    assert [row.rank for row in rows] == [1, 2, 3]
    assert [row.nbytes for row in rows] == [27, 47, 57]
    assert rows[0].relative_error == pytest.approx((5 / 39) ** 0.5)
    assert rows[-1].relative_error == 0.0
    assert rows[0].energy == pytest.approx(34 / 39)


def test_served_ranks_use_the_budget_and_keep_other_options():
    spectra = [spectrum(np.linspace(9, 1, 40), name) for name in "abc"]
    got = budgeted(spectra, 10 * 50, serve=True)
    assert set(got.values()) <= set(SERVE_RANKS)
    assert sorted(got.values()) == [16, 16, 16]
    with_options = budgeted(spectra, 10 * 80, serve=True, min_rank=9, patterns=(("b", 12),))
    assert with_options["b"] == 16
    assert min(with_options.values()) >= 16


def test_budget_is_not_spent_on_nothing():
    spectra = [spectrum([3.0, 2.0, 0.0, 0.0], "a"), spectrum([1.0, 0.0, 0.0, 0.0], "b")]
    assert budgeted(spectra, 1000) == {"a": 2, "b": 1}


def test_all_zero_module_has_rank_one_by_ratio():
    assert RankRule(sv_ratio=10.0).of_module(spectrum([0.0, 0.0])) == 1


def test_ranks_beyond_what_vllm_accepts_are_refused():
    wide = spectrum(np.ones(600))
    with pytest.raises(OptionError, match="vLLM accepts no rank that large"):
        RankRule(rank=600, serve=True).of_module(wide)


def test_uniform_budget_has_no_place_for_patterns():
    with pytest.raises(OptionError, match="no place for rank patterns"):
        RankRule(budget=Budget(share=0.5), uniform=True, patterns=(("a", 2),))


def test_rules_that_need_more_values_than_are_known_are_refused():
    known = [[4.0, 2.0, 1.0]]
    partial = Spectrum("m", (100, 80), np.array(known), 3, 10, tail=np.array([1.5]))
    for rule in (RankRule(sv_cumulative=0.5), RankRule(threshold=True)):
        with pytest.raises(OptionError, match="needs every singular value"):
            rule.of_module(partial)
    with pytest.raises(OptionError, match="do not fall as far as σ₁/5"):
        RankRule(sv_ratio=5.0).of_module(partial)
    assert RankRule(sv_ratio=3.0).of_module(partial) == 2
    assert RankRule(sv_ratio=5.0, max_rank=3).of_module(partial) == 3
    nothing_left = Spectrum("m", (100, 80), np.array(known), 3, 10, tail=np.array([1e-9]))
    assert RankRule(sv_ratio=5.0).of_module(nothing_left) == 3
