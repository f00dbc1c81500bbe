"""The bundled, really trained adapters on their real bases, squeezed to half their rank."""

from __future__ import annotations

import functools

import peft_oracle as oracle
import pytest
from peft_cases import Case
from peft_models import EXAMPLES

from loratools.algebra.ranks import RankRule
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.squeeze import squeeze
from loratools_formats import read_adapter, write_adapter

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

BASES = {
    "minilm-lora": Case("minilm", {}),
    "tiny-llama/lora": Case("tiny_llama", {}),
    "tiny-llama/rslora": Case("tiny_llama", {}),
    "tiny-llama/dora": Case("tiny_llama", {}),
}


@functools.cache
def truth(name):
    """Return adapter, base, PEFT's changes, PEFT's answers, and the best of half the rank."""
    folder, case = EXAMPLES / name, BASES[name]
    adapter, base = read_adapter(folder), oracle.base_state(case)
    model = oracle.loaded(folder, case)
    deltas, answers = oracle.peft_deltas(model), oracle.outputs(model, case)
    half = {}
    for path, delta in adapter.modules.items():
        weight = oracle.weight_name(path, delta.require_factors(), base)
        rank = delta.require_factors().rank // 2
        half[weight] = oracle.truncated(deltas[weight], rank, is_stack=False)
    return adapter, base, deltas, answers, half


def halved(adapter):
    """Return the rule that halves the rank of each module."""
    ranks = {path: delta.require_factors().rank // 2 for path, delta in adapter.modules.items()}
    return RankRule(patterns=tuple((f"^{path}$", rank) for path, rank in ranks.items()))


@pytest.mark.parametrize("name", BASES)
def test_reading_gives_the_weights_and_answers_of_peft(name):
    adapter, base, deltas, answers, _ = truth(name)
    own = oracle.own_deltas(adapter, base)
    oracle.assert_states_equal(own, deltas, 1e-12)
    weights = oracle.predicted(adapter, base, own)
    assert oracle.distance(oracle.outputs_with(BASES[name], weights), answers) <= 1e-12


@pytest.mark.parametrize("dtype", ["f32", None])
@pytest.mark.parametrize("name", BASES)
def test_half_the_rank_is_the_best_half_in_peft(tmp_path, name, dtype):
    adapter, base, deltas, answers, half = truth(name)
    result = squeeze(adapter, halved(adapter), ComputeOptions(dtype=dtype))
    write_adapter(result.adapter, tmp_path / "out", "peft")
    model = oracle.loaded(tmp_path / "out", BASES[name])
    after = oracle.peft_deltas(model)
    # bf16 has a roundoff of 2⁻⁸, and two factors.
    oracle.assert_states_equal(after, half, 1e-5 if dtype else 2 * 2.0**-8)

    got = oracle.outputs(model, BASES[name])
    want = oracle.outputs_with(BASES[name], oracle.predicted(adapter, base, half))
    assert oracle.distance(got, want) <= (1e-5 if dtype else 0.02)
    assert oracle.distance(got, answers) > 1e-4

    lost = {weight: after[weight] - deltas[weight] for weight in deltas}
    true_error = oracle.norm(lost) / oracle.norm(deltas)
    assert result.relative_error == pytest.approx(true_error, rel=1e-9)
    best = {weight: half[weight] - deltas[weight] for weight in deltas}
    optimum = oracle.norm(best) / oracle.norm(deltas)
    assert true_error == pytest.approx(optimum, rel=1e-6 if dtype else 0.05)
    assert result.directional == name.endswith("dora")


@pytest.mark.parametrize("name", BASES)
def test_a_copy_changes_no_bit(tmp_path, name):
    adapter = read_adapter(EXAMPLES / name)
    write_adapter(adapter, tmp_path / "copy", "peft")
    copy = read_adapter(tmp_path / "copy")
    assert oracle.stored_bytes(copy) == oracle.stored_bytes(adapter)
    assert (copy.config, copy.metadata) == (adapter.config, adapter.metadata)
