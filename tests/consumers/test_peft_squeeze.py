"""Squeezed adapters as PEFT sees them, against dense float64 truncation of PEFT's own ΔW."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import peft_oracle as oracle
import pytest
from click.testing import CliRunner
from peft_cases import CASES, Case, old_experts
from rounding import EPS

from loratools.algebra.ranks import SERVE_RANKS, RankRule
from loratools.cli import cli
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.squeeze import squeeze
from loratools.work.selection import Selection
from loratools_formats import read_adapter, write_adapter

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

RANK = 2
# Unit roundoff of each stored type.
ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
FULL_WIDTH = [name for name in CASES if CASES[name].dtype in ("float32", "float64")]


def squeezed(saved, name, tmp_path, rule=None, options=None):
    """Squeeze a case, write it, and return source folder, target folder and result."""
    result = squeeze(read_adapter(saved(name)), rule or RankRule(rank=RANK), options)
    write_adapter(result.adapter, tmp_path / "out", "peft")
    return saved(name), tmp_path / "out", result


def is_stack(path, adapter):
    """Whether a module's weight is a stack, be it of one expert."""
    parameters = adapter.modules[path].require_factors().layer.parameters
    return any(".experts." in f".{name}" for name in parameters)


def names_of(adapter, base):
    """Return the base tensor of each module."""
    return {
        path: oracle.weight_name(path, delta.require_factors(), base)
        for path, delta in adapter.modules.items()
    }


def best(adapter, base, deltas, ranks):
    """Return the optimal truncation of dense deltas to a rank for each module."""
    return {
        name: oracle.truncated(deltas[name], ranks[path], is_stack(path, adapter))
        for path, name in names_of(adapter, base).items()
    }


def rounding_bound(sigma, roundoff):
    """Return the largest ‖b a − b̃ ã‖ when the balanced factors of σ are rounded elementwise.

    ‖b‖² = ‖a‖² = Σσ in the Frobenius norm and σ₁ in the spectral norm.
    """
    both = [2 * roundoff * math.sqrt(s.sum() * s[0]) + roundoff**2 * s.sum() for s in sigma]
    return math.sqrt(sum(one**2 for one in both))


@pytest.mark.parametrize("name", CASES)
def test_peft_finds_the_best_approximation_of_every_change(saved, tmp_path, name):
    source, target, result = squeezed(saved, name, tmp_path)
    case, adapter = CASES[name], read_adapter(source)
    before = oracle.peft_deltas(oracle.loaded(source, case))
    after = oracle.peft_deltas(oracle.loaded(target, case))
    base = oracle.base_state(case)
    want = best(adapter, base, before, dict.fromkeys(adapter.modules, RANK))
    for path, weight in names_of(adapter, base).items():
        sigma = oracle.spectrum(want[weight], is_stack(path, adapter))
        # Besides rounding, the floor of the factors' Gram matrices and of the dense SVD.
        allowed = rounding_bound(sigma, ROUNDOFF[case.dtype]) + 1e-13 * sigma.max()
        assert np.linalg.norm(after[weight] - want[weight]) <= allowed, weight
    assert {module.rank_out for module in result.modules} == {RANK}
    assert set(after) == set(before)


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_the_model_answers_as_if_the_best_approximation_had_been_added(saved, tmp_path, name):
    source, target, _ = squeezed(saved, name, tmp_path)
    case, adapter, base = CASES[name], read_adapter(source), oracle.base_state(CASES[name])
    whole = oracle.peft_deltas(oracle.loaded(source, case))
    deltas = best(adapter, base, whole, dict.fromkeys(adapter.modules, RANK))
    # Magnitudes, biases and replacements are those of the source, so they must have been kept.
    weights = oracle.predicted(adapter, base, deltas, case.ties)
    got = oracle.outputs(oracle.loaded(target, case), case)
    assert oracle.distance(got, oracle.outputs_with(case, weights)) <= 1e-5
    assert oracle.distance(got, oracle.outputs(oracle.loaded(source, case), case)) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_error_reported_is_the_one_peft_shows(saved, tmp_path, name):
    source, target, result = squeezed(saved, name, tmp_path)
    before = oracle.peft_deltas(oracle.loaded(source, CASES[name]))
    after = oracle.peft_deltas(oracle.loaded(target, CASES[name]))
    lost = {weight: after[weight] - before[weight] for weight in before}
    true_error = oracle.norm(lost) / oracle.norm(before)
    assert result.relative_error == pytest.approx(true_error, rel=1e-9)
    names = names_of(read_adapter(source), oracle.base_state(CASES[name]))
    for module in result.modules:
        weight = names[module.name]
        want = np.linalg.norm(lost[weight]) / np.linalg.norm(before[weight])
        assert module.relative_error == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_the_error_reported_is_the_discarded_spectrum(saved, tmp_path, name):
    source, _, result = squeezed(saved, name, tmp_path)
    case, adapter, base = CASES[name], read_adapter(source), oracle.base_state(CASES[name])
    deltas = oracle.peft_deltas(oracle.loaded(source, case))
    names = names_of(adapter, base)
    lost = total = 0.0
    for module in result.modules:
        sigma = oracle.spectrum(deltas[names[module.name]], is_stack(module.name, adapter))
        module_lost, module_total = (sigma[:, RANK:] ** 2).sum(), (sigma**2).sum()
        want = math.sqrt(module_lost / module_total)
        assert module.relative_error == pytest.approx(want, rel=1e-6)
        assert module.energy == pytest.approx(1 - module_lost / module_total, rel=1e-9)
        lost, total = lost + module_lost, total + module_total
    assert result.relative_error == pytest.approx(math.sqrt(lost / total), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_keeping_every_rank_keeps_every_bit(saved, tmp_path, name):
    source, target, result = squeezed(saved, name, tmp_path, RankRule(rank=1000))
    assert result.relative_error == 0.0
    before, after = read_adapter(source), read_adapter(target)
    assert oracle.stored_bytes(after) == oracle.stored_bytes(before)
    assert json.dumps(after.config) == json.dumps(before.config)


@pytest.mark.parametrize("name", CASES)
def test_all_the_energy_keeps_every_change(saved, tmp_path, name):
    source, target, result = squeezed(saved, name, tmp_path, RankRule(energy=1.0))
    case, adapter, base = CASES[name], read_adapter(source), oracle.base_state(CASES[name])
    before = oracle.peft_deltas(oracle.loaded(source, case))
    after = oracle.peft_deltas(oracle.loaded(target, case))
    for module in result.modules:
        weight = names_of(adapter, base)[module.name]
        # Gram matrices are sums over the inputs and outputs; their product is a sum of r² terms.
        out, in_ = adapter.modules[module.name].require_factors().shape
        assert module.energy == pytest.approx(1.0, abs=(out + in_ + module.rank_in**2) * EPS)
        if module.rank_out == module.rank_in:
            assert module.relative_error == 0.0
            assert oracle.distance(after[weight], before[weight]) <= 1e-12
        else:  # a layer smaller than its rank, whose factors had to be computed anew
            assert module.rank_out == np.linalg.matrix_rank(before[weight]) < module.rank_in
            assert oracle.distance(after[weight], before[weight]) <= 1e-7


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def settings_in_peft(folder, case):
    """Return PEFT's (rank, scale) of every adapted tensor."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in oracle.loaded(folder, case).named_modules()
        if isinstance(module, LoraLayer)
    }


KEEPING_ALPHA = [
    "linear-float-alpha", "rslora", "patterns", "lora-bias", "lora-bias-rslora", "conv-patterns",
    "conv1d-layout-patterns", "embedding", "experts-two", "dora-rslora", "parameter-2d",
]  # fmt: skip


@pytest.mark.parametrize("name", KEEPING_ALPHA)
def test_the_nominal_alpha_can_be_kept(saved, tmp_path, name):
    options = ComputeOptions(keep_alpha=True)
    source, target, _ = squeezed(saved, name, tmp_path, options=options)
    case, adapter, base = CASES[name], read_adapter(source), oracle.base_state(CASES[name])
    whole = oracle.peft_deltas(oracle.loaded(source, case))
    want = best(adapter, base, whole, dict.fromkeys(adapter.modules, RANK))
    oracle.assert_states_equal(oracle.peft_deltas(oracle.loaded(target, case)), want, 1e-5)
    weights = oracle.predicted(adapter, base, want, case.ties)
    got = oracle.outputs(oracle.loaded(target, case), case)
    assert oracle.distance(got, oracle.outputs_with(case, weights)) <= 1e-5
    alphas = {path: delta.require_factors().alpha for path, delta in adapter.modules.items()}
    for path, (rank, scale) in settings_in_peft(target, case).items():
        assert (rank, scale) == (RANK, pytest.approx(alphas[path] / RANK, rel=4 * EPS))


@pytest.mark.parametrize(
    "name", ["linear", "rslora", "patterns", "experts-two-ranks", "dora", "lora-bias-rslora"]
)
def test_ranks_and_scales_are_written_so_that_every_loader_gets_scale_one(saved, tmp_path, name):
    _, target, _ = squeezed(saved, name, tmp_path, RankRule(rank=1))
    assert set(settings_in_peft(target, CASES[name]).values()) == {(1, 1.0)}
    config = config_of(target)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (1, 1, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})


@pytest.mark.parametrize("rule", [RankRule(rank=3), RankRule(energy=0.8), RankRule(min_rank=4)])
@pytest.mark.parametrize(
    "name", ["rslora", "patterns", "conv-patterns", "experts-two-ranks", "experts-mixtral", "dora"]
)
def test_uniform_gives_one_rank_one_scale_and_no_patterns(saved, tmp_path, name, rule):
    uniform = dataclasses.replace(rule, uniform=True)
    source, target, result = squeezed(saved, name, tmp_path, uniform)
    case, adapter, base = CASES[name], read_adapter(source), oracle.base_state(CASES[name])
    ((rank, scale),) = set(settings_in_peft(target, case).values())
    config = config_of(target)
    assert (config["r"], config["lora_alpha"], scale) == (rank, rank, 1.0)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert {module.rank_out for module in result.modules} == {rank}
    whole = oracle.peft_deltas(oracle.loaded(source, case))
    ranks = dict.fromkeys(adapter.modules, rank)
    want = best(adapter, base, whole, ranks)
    oracle.assert_states_equal(oracle.peft_deltas(oracle.loaded(target, case)), want, 1e-5)


@pytest.mark.parametrize("name", ["linear", "patterns", "conv", "embedding", "experts-two", "dora"])
def test_ranks_that_vllm_serves_are_padded_without_changing_anything(saved, tmp_path, name):
    source, target, _ = squeezed(saved, name, tmp_path, RankRule(serve=True))
    settings = settings_in_peft(target, CASES[name])
    assert {rank for rank, _ in settings.values()} == {8} <= set(SERVE_RANKS)
    want = oracle.peft_deltas(oracle.loaded(source, CASES[name]))
    got = oracle.peft_deltas(oracle.loaded(target, CASES[name]))
    oracle.assert_states_equal(got, want, 1e-6)


@pytest.mark.parametrize("name", ["rslora", "patterns", "conv", "embedding", "dora", "linear"])
@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_ranks_that_differ_between_modules_load_under_their_own_names(
    saved, tmp_path, name, energy
):
    source, target, result = squeezed(saved, name, tmp_path, RankRule(energy=energy))
    case, adapter, base = CASES[name], read_adapter(source), oracle.base_state(CASES[name])
    ranks = {module.name: module.rank_out for module in result.modules}
    assert {path: rank for path, (rank, _) in settings_in_peft(target, case).items()} == ranks
    whole = oracle.peft_deltas(oracle.loaded(source, case))
    want = best(adapter, base, whole, ranks)
    oracle.assert_states_equal(oracle.peft_deltas(oracle.loaded(target, case)), want, 1e-5)
    for path, weight in names_of(adapter, base).items():
        kept = oracle.spectrum(want[weight], is_stack(path, adapter))
        total = oracle.spectrum(whole[weight], is_stack(path, adapter))
        share = (kept**2).sum() / (total**2).sum()
        assert share >= energy
        dropped = (total[:, : ranks[path] - 1] ** 2).sum() / (total**2).sum()
        assert dropped < energy, "a smaller rank would have done"


@pytest.mark.parametrize("init", ["orthogonal", "eva", "gaussian"])
def test_an_odd_rank_loads_where_the_initialisation_would_refuse_it(saved, tmp_path, init):
    # PEFT's orthogonal initialisation raises for odd ranks, also when weights are to be loaded.
    name = f"initial-{init}"
    source, target, _ = squeezed(saved, name, tmp_path, RankRule(rank=3))
    case, adapter, base = CASES[name], read_adapter(source), oracle.base_state(CASES[name])
    whole = oracle.peft_deltas(oracle.loaded(source, case))
    want = best(adapter, base, whole, dict.fromkeys(adapter.modules, 3))
    oracle.assert_states_equal(oracle.peft_deltas(oracle.loaded(target, case)), want, 1e-5)


def test_modules_left_out_keep_their_factors_scale_and_rank(saved, tmp_path):
    case = CASES["rslora"]
    adapter = read_adapter(saved("rslora"))
    result = squeeze(adapter, RankRule(rank=1), selection=Selection(exclude="square"))
    write_adapter(result.adapter, tmp_path / "out", "peft")
    before, after = oracle.stored_bytes(adapter), oracle.stored_bytes(result.adapter)
    untouched = [key for key in before if ".square." in key]
    assert {key: after[key] for key in untouched} == {key: before[key] for key in untouched}
    whole = oracle.peft_deltas(oracle.loaded(saved("rslora"), case))
    got = oracle.peft_deltas(oracle.loaded(tmp_path / "out", case))
    part = adapter.modules["square"].require_factors()
    size = part.scale * np.linalg.norm(part.b.load()) * np.linalg.norm(part.a.load())
    # Two sums of r products each, with the few roundings of a scale from another alpha.
    allowed = (part.rank + 4) * EPS * size / np.linalg.norm(whole["square.weight"])
    assert oracle.distance(got["square.weight"], whole["square.weight"]) <= allowed
    for name in ("up.weight", "down.weight"):
        want = oracle.truncated(whole[name], 1, is_stack=False)
        assert oracle.distance(got[name], want) <= 1e-6


@pytest.mark.parametrize("name", ["rslora", "dora", "experts-two", "linear-bfloat16"])
def test_the_command_prints_the_error_peft_shows(saved, tmp_path, name):
    before = oracle.peft_deltas(oracle.loaded(saved(name), CASES[name]))
    printed = {}
    for flag in ("--json", "--no-json"):
        arguments = ["squeeze", str(saved(name)), "-o", str(tmp_path / flag), "--rank", "2"]
        done = CliRunner().invoke(cli, arguments + ["--json"] * (flag == "--json"))
        assert done.exit_code == 0, done.output
        printed[flag] = done.stdout
    after = oracle.peft_deltas(oracle.loaded(tmp_path / "--json", CASES[name]))
    lost = {weight: after[weight] - before[weight] for weight in before}
    true_error = oracle.norm(lost) / oracle.norm(before)
    reported = json.loads(printed["--json"])
    assert reported["relative_error"] == pytest.approx(true_error, rel=1e-9)
    assert reported["directional"] == (name == "dora")
    (text,) = re.findall(r"relative error[^:\n]*: (\S+)", printed["--no-json"])
    assert float(text) == pytest.approx(true_error, rel=5e-3)  # printed with three digits


def test_experts_saved_before_0_19_keep_their_layout_and_version(tmp_path):
    case = Case("experts_square", CASES["experts-two"].config, prepare=old_experts)
    folder = oracle.save(tmp_path / "adapter", case)
    oracle.edit_config(folder, peft_version="0.18.1")
    adapter, base = read_adapter(folder), oracle.base_state(case)
    result = squeeze(adapter, RankRule(rank=RANK))
    write_adapter(result.adapter, tmp_path / "out", "peft")
    whole = oracle.peft_deltas(oracle.loaded(folder, case))
    want = best(adapter, base, whole, dict.fromkeys(adapter.modules, RANK))
    got = oracle.peft_deltas(oracle.loaded(tmp_path / "out", case))
    oracle.assert_states_equal(got, want, 1e-5)
    again = read_adapter(tmp_path / "out")
    assert again.config["peft_version"] == "0.18.1"
    oracle.assert_states_equal(oracle.own_deltas(again, base), got, 1e-12)


@pytest.mark.parametrize(
    "rule", [RankRule(patterns=((r"base_layer$", 2), ("", 3))), RankRule(energy=0.6)]
)
def test_two_expert_parameters_of_one_module_get_the_ranks_that_peft_loads(saved, tmp_path, rule):
    # PEFT tells the parameters of a module apart by their order, since files hold no names.
    case = CASES["experts-two"]
    source, target, result = squeezed(saved, "experts-two", tmp_path, rule)
    adapter, base = read_adapter(source), oracle.base_state(case)
    settings = settings_in_peft(target, case).values()
    ranks = {module.name: module.rank_out for module in result.modules}
    assert {rank for rank, _ in settings} == set(ranks.values())
    assert {scale for _, scale in settings} == {1.0}
    whole = oracle.peft_deltas(oracle.loaded(source, case))
    want = best(adapter, base, whole, ranks)
    oracle.assert_states_equal(oracle.peft_deltas(oracle.loaded(target, case)), want, 1e-5)


@pytest.mark.parametrize("name", ["experts-two-ranks", "experts-all-linear"])
def test_two_expert_parameters_with_different_alphas_keep_them(saved, tmp_path, name):
    adapter, case = read_adapter(saved(name)), CASES[name]
    result = squeeze(adapter, RankRule(rank=2), ComputeOptions(keep_alpha=True))
    write_adapter(result.adapter, tmp_path / "out", "peft")
    got = oracle.peft_deltas(oracle.loaded(tmp_path / "out", case))
    want = oracle.own_deltas(result.adapter, oracle.base_state(case))
    oracle.assert_states_equal(got, want, 1e-5)


def test_stacks_of_two_ranks_are_squeezed_to_ranks_of_their_own(saved, tmp_path):
    """PEFT gives gate_up_proj twice the rank of down_proj; what is read again is what was meant."""
    adapter = read_adapter(saved("experts-all-linear"))
    result = squeeze(adapter, RankRule(energy=0.7))
    write_adapter(result.adapter, tmp_path / "out", "peft")
    again = read_adapter(tmp_path / "out")
    for path, delta in result.adapter.modules.items():
        want, got = delta.require_factors(), again.modules[path].require_factors()
        assert (got.rank, got.scale, got.experts) == (want.rank, want.scale, want.experts)
