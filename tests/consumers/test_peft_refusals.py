"""Variants of LoRA whose factors alone do not tell the change: saved by PEFT, refused by name."""

from __future__ import annotations

import peft_oracle as oracle
import pytest
from peft_cases import Case
from peft_oracle import edit_config, stored_bytes

from loratools.algebra.ranks import RankRule
from loratools.operations.squeeze import rank_choices, squeeze
from loratools_formats import read_adapter, write_adapter
from loratools_formats.disk.errors import AdapterError, UnsupportedError

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

_TWO = {"target_modules": ["up", "square"]}
_QUERY = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}

VARIANTS = {
    "kasa": Case("linear", _TWO | {"kasa_config": {}}),
    "alora_invocation_tokens": Case("llama", _QUERY | {"alora_invocation_tokens": [3, 4]}),
    "layer_replication": Case("llama", _QUERY | {"layer_replication": [[0, 2], [1, 2]]}),
}

EDITED = {
    "arrow_config": {"top_k": 3, "router_temperature": 1.0, "use_gks": False},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "use_future_lora": True,
    "future_config": {"blocks": 4},
    "init_lora_weights": "future",
}


def assert_refused(folder, tmp_path, name):
    """It can be read and copied, and operations refuse it by a name."""
    adapter = read_adapter(folder)
    for operation in (lambda: squeeze(adapter, RankRule(rank=2)), lambda: rank_choices(adapter)):
        with pytest.raises(UnsupportedError, match=name):
            operation()
    write_adapter(adapter, tmp_path / "copy", "peft")
    copy = read_adapter(tmp_path / "copy")
    assert stored_bytes(copy) == stored_bytes(adapter)
    assert copy.config == adapter.config
    assert copy.caveats == adapter.caveats


@pytest.mark.parametrize("key", VARIANTS)
def test_variants_are_refused_by_the_name_of_their_key(tmp_path, key):
    assert_refused(oracle.save(tmp_path / "adapter", VARIANTS[key]), tmp_path, key)


@pytest.mark.parametrize("key", EDITED)
def test_config_values_that_change_the_delta_are_refused_by_name(saved, tmp_path, key):
    folder = oracle.copied(saved("linear"), tmp_path / "adapter")
    edit_config(folder, **{key: EDITED[key]})
    assert_refused(folder, tmp_path, key)


@pytest.mark.parametrize("value", [False, [], {}, ""])
def test_unknown_config_values_that_say_nothing_are_kept_and_change_nothing(saved, tmp_path, value):
    folder = oracle.copied(saved("linear"), tmp_path / "adapter")
    edit_config(folder, use_future_lora=value)
    adapter = read_adapter(folder)
    assert adapter.caveats == ()
    result = squeeze(adapter, RankRule(rank=2))
    write_adapter(result.adapter, tmp_path / "out", "peft")
    assert read_adapter(tmp_path / "out").config["use_future_lora"] == value


INITIAL = ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq"]


@pytest.mark.parametrize("init", INITIAL)
def test_initialisations_that_change_the_base_are_refused_by_name(saved, tmp_path, init):
    folder = oracle.copied(saved("linear"), tmp_path / "adapter")
    edit_config(folder, init_lora_weights=init)
    assert_refused(folder, tmp_path, f"init_lora_weights '{init}'")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_initialisations_that_leave_the_base_alone_are_no_obstacle(saved, tmp_path, init):
    folder = oracle.copied(saved("linear"), tmp_path / "adapter")
    edit_config(folder, init_lora_weights=init)
    assert squeeze(read_adapter(folder), RankRule(rank=2)).relative_error > 0


def test_multihead_attention_is_refused_since_peft_applies_one_change_twice(tmp_path):
    case = Case("attention", {"target_modules": ["mha"], "alpha_pattern": {"mha": 30}})
    folder = oracle.save(tmp_path / "adapter", case)
    assert_refused(folder, tmp_path, "mha.base_layer.out_proj")

    model, base = oracle.loaded(folder, case), oracle.base_state(case)
    deltas = oracle.own_deltas(read_adapter(folder), base)
    oracle.assert_states_equal(deltas, oracle.peft_deltas(model), 1e-12)
    deltas["mha.out_proj.weight"] *= 2
    weights = {name: array + deltas.get(name, 0) for name, array in base.items()}
    want = oracle.outputs(model, case)
    assert oracle.distance(oracle.outputs_with(case, weights), want) <= 1e-12


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
def test_grouped_convolutions_are_refused_as_peft_cannot_merge_them(tmp_path):
    case = Case("grouped_conv", {"target_modules": ["wide", "point"]})
    folder = oracle.save(tmp_path / "adapter", case)
    with pytest.raises(UnsupportedError, match="grouped convolution"):
        read_adapter(folder)


def with_tensors(folder, **tensors):
    """Add tensors to a saved adapter."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "up.lora_latent_mapping.weight",
        "up.lora_N.bias",
        "up.gate",
        "head.lora_latent_mapping.weight",
    ],
)
def test_an_unknown_tensor_beside_factors_is_an_error(saved, tmp_path, name):
    import torch

    name = f"base_model.model.{name}"
    folder = oracle.copied(saved("bias-all"), tmp_path / "adapter")
    with_tensors(folder, **{name: torch.randn(4, 4)})
    with pytest.raises(AdapterError, match="unknown tensor beside adapter factors") as caught:
        read_adapter(folder)
    assert caught.value.tensor == name


def test_unrelated_tensors_are_carried_through_a_squeeze_bit_for_bit(saved, tmp_path):
    import torch

    extra = {
        "step": torch.tensor(7),
        "base_model.model.norm.running_mean": torch.randn(20),
        "base_model.prompt.table": torch.randn(3, 5).bfloat16(),
    }
    folder = oracle.copied(saved("linear"), tmp_path / "adapter")
    with_tensors(folder, **extra)
    adapter = read_adapter(folder)
    assert set(adapter.carried) | set(adapter.replacements) == set(extra)
    write_adapter(squeeze(adapter, RankRule(rank=2)).adapter, tmp_path / "out", "peft")
    before, after = stored_bytes(adapter), stored_bytes(read_adapter(tmp_path / "out"))
    assert {name: after[name] for name in extra} == {name: before[name] for name in extra}
