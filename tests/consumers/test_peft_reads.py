"""What our reader finds in adapters that PEFT saved, against what PEFT makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import peft_oracle as oracle
import pytest
from peft_cases import CASES, SHARED, Case, old_experts
from peft_oracle import edit_config, stored_bytes
from whole_delta import effective_delta

from loratools_formats import read_adapter
from loratools_formats.disk.errors import UnsupportedError

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

EXACT = 1e-12  # both sides compute in float64 from the same stored factors


@pytest.mark.parametrize("name", CASES)
def test_every_change_is_the_one_peft_computes(saved, name):
    case, folder = CASES[name], saved(name)
    want = oracle.peft_deltas(oracle.loaded(folder, case))
    got = oracle.own_deltas(read_adapter(folder), oracle.base_state(case))
    assert all(np.linalg.norm(delta) > 0 for delta in want.values())
    oracle.assert_states_equal(got, want, EXACT)


@pytest.mark.parametrize("name", sorted(set(CASES) - SHARED))
def test_merging_by_the_formulas_gives_the_weights_peft_merges(saved, name):
    case, folder = CASES[name], saved(name)
    adapter, base = read_adapter(folder), oracle.base_state(case)
    got = oracle.predicted(adapter, base, oracle.own_deltas(adapter, base), case.ties)
    want = oracle.state(oracle.loaded(folder, case).merge_and_unload())
    oracle.assert_states_equal(got, want, EXACT)
    assert len(oracle.changes(want, base)) >= len(adapter.modules)


@pytest.mark.parametrize("name", CASES)
def test_merging_by_the_formulas_gives_the_outputs_of_peft(saved, name):
    case, folder = CASES[name], saved(name)
    adapter, base = read_adapter(folder), oracle.base_state(case)
    weights = oracle.predicted(adapter, base, oracle.own_deltas(adapter, base), case.ties)
    want = oracle.outputs(oracle.loaded(folder, case), case)
    assert oracle.distance(oracle.outputs_with(case, weights), want) <= EXACT
    assert oracle.distance(oracle.outputs_with(case, base), want) > 0.05


REPLACED = {
    "bias-all": {("bias", f"{name}.bias") for name in ("up", "square", "norm", "head")},
    "bias-lora-only": {("bias", "up.bias")},  # `down` has none
    "modules-to-save": {
        ("module", f"{name}.{leaf}") for name in ("norm", "head") for leaf in ("weight", "bias")
    },
    "embedding-saved": {
        ("embedding", "model.embed_tokens.weight"),
        ("embedding", "lm_head.weight"),
    },
    "vocabulary-grown": {
        ("embedding", "model.embed_tokens.weight"),
        ("embedding", "lm_head.weight"),
    },
    "vocabulary-grown-modules-to-save": {
        ("module", "model.embed_tokens.weight"),
        ("module", "lm_head.weight"),
    },
    "vocabulary-grown-token-rows": {
        ("embedding", "model.embed_tokens.weight"),
        ("embedding", "lm_head.weight"),
        ("token_rows", "model.embed_tokens.weight"),
    },
    "token-rows": {("token_rows", "model.embed_tokens.weight")},
    "token-rows-of-two": {
        ("token_rows", "model.embed_tokens.weight"),
        ("token_rows", "lm_head.weight"),
    },
}


@pytest.mark.parametrize("name", REPLACED)
def test_replacements_name_the_tensor_they_replace(saved, name):
    found = read_adapter(saved(name)).replacements.values()
    assert {(one.kind, one.target) for one in found} == REPLACED[name]


def test_rows_of_tokens_keep_the_order_of_the_config(saved):
    found = read_adapter(saved("token-rows-of-two")).replacements.values()
    assert {one.target: one.rows for one in found} == {
        "model.embed_tokens.weight": (1, 5, 3),
        "lm_head.weight": (2, 0),
    }


def test_the_spare_copies_of_saved_modules_are_carried_as_peft_does_not_use_them(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    case = CASES["vocabulary-grown-modules-to-save"]
    folder = oracle.copied(saved("vocabulary-grown-modules-to-save"), tmp_path / "adapter")
    carried = read_adapter(folder).carried
    assert set(carried) == {
        f"base_model.model.{module}.{wrapper}.weight"
        for module in ("model.embed_tokens", "lm_head")
        for wrapper in ("original_module", "modules_to_save")
    }
    want = oracle.outputs(oracle.loaded(folder, case), case)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name] + 1 for name in carried}, path, {"format": "pt"})
    assert np.array_equal(oracle.outputs(oracle.loaded(folder, case), case), want)


@pytest.mark.parametrize("name", ["embedding-ensure-tying", "head-ensure-tying"])
def test_tied_layers_are_both_saved_and_each_is_the_other_transposed(saved, name):
    modules = read_adapter(saved(name)).modules
    embedding, head = (modules[name].direction for name in ("model.embed_tokens", "lm_head"))
    assert np.array_equal(head.a.load(), embedding.b.load().T)
    assert np.array_equal(head.b.load(), embedding.a.load().T)


@pytest.mark.parametrize("stored", [True, False])
def test_a_square_weight_is_read_right_or_refused(tmp_path, stored):
    # `fan_in_fan_out` is what PEFT found out about the layer it wrapped last.
    case = Case("mixed", {"target_modules": ["c_fc", "c_proj", "dense", "head"]})
    folder = oracle.save(tmp_path / "adapter", case)
    edit_config(folder, fan_in_fan_out=stored)
    adapter, base = read_adapter(folder), oracle.base_state(case)
    want = oracle.peft_deltas(oracle.loaded(folder, case))
    refused = []
    for path, delta in adapter.modules.items():
        name = f"{path}.weight"
        try:
            got = effective_delta(path, delta, base[name].shape)
        except UnsupportedError:
            refused.append(path)
            continue
        assert oracle.distance(got, want[name]) <= EXACT, path
    assert refused == ["dense" if stored else "c_proj"]


@pytest.mark.parametrize("model", ["experts", "experts_square"])
@pytest.mark.parametrize("version", ["0.17.1", "0.18.1"])
def test_experts_saved_before_0_19_are_stored_in_out(tmp_path, model, version):
    config = CASES["experts-two"].config
    case = Case(model, config, prepare=old_experts)
    folder = oracle.save(tmp_path / "adapter", case)
    edit_config(folder, peft_version=version)
    want = oracle.peft_deltas(oracle.loaded(folder, case))
    got = oracle.own_deltas(read_adapter(folder), oracle.base_state(case))
    oracle.assert_states_equal(got, want, EXACT)


@pytest.mark.parametrize("version", ["0.19.0", "0.21.2", "0.18.2.dev0", None])
def test_square_experts_are_refused_where_the_version_does_not_tell(tmp_path, version):
    case = Case("experts_square", CASES["experts-two"].config)
    folder = oracle.save(tmp_path / "adapter", case)
    edit_config(folder, peft_version=version)
    (inner,) = (
        delta
        for delta in read_adapter(folder).modules.values()
        if delta.direction.experts == 3 and delta.shape == (6, 6)
    )
    with pytest.raises(UnsupportedError, match="square"):
        effective_delta("experts", inner, (3, 6, 6))


def test_expert_parameters_of_one_module_are_told_apart_by_their_order(tmp_path):
    config = CASES["experts-two"].config | {"alpha_pattern": {"gate_up_proj": 8}}
    case = Case("experts", config)
    folder = oracle.save(tmp_path / "adapter", case)
    got = oracle.own_deltas(read_adapter(folder), oracle.base_state(case))
    oracle.assert_states_equal(got, oracle.peft_deltas(oracle.loaded(folder, case)), 1e-5)


def test_pickled_weights_are_the_same_adapter(saved, tmp_path):
    case = CASES["dora"]
    pickled = replace(case, save_options={"safe_serialization": False})
    folder = oracle.save(tmp_path / "adapter", pickled)
    assert (folder / "adapter_model.bin").exists()
    want = stored_bytes(read_adapter(saved("dora")))
    assert stored_bytes(read_adapter(folder)) == want
    got = oracle.own_deltas(read_adapter(folder), oracle.base_state(case))
    oracle.assert_states_equal(got, oracle.peft_deltas(oracle.loaded(folder, case)), EXACT)


def test_named_adapters_lie_in_sub_folders(tmp_path):
    import peft_models
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(
        peft_models.build("linear"), LoraConfig(r=4, lora_alpha=12, target_modules=["up"])
    )
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"]))
    oracle.fill(model, 0)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    oracle.fill(model, 1)
    folder = tmp_path / "adapters"
    model.save_pretrained(str(folder))
    both = {"default": read_adapter(folder), "second": read_adapter(folder / "second")}
    assert set(both["default"].modules) == {"up"}
    assert set(both["second"].modules) == {"up", "down"}
    assert any("second" in note for note in both["default"].remarks)

    base = peft_models.build("linear").double()
    again = PeftModel.from_pretrained(base, str(folder))
    again.load_adapter(str(folder / "second"), "second")
    weights = oracle.base_state(CASES["linear"])
    for name, adapter in both.items():
        got = oracle.own_deltas(adapter, weights)
        oracle.assert_states_equal(got, oracle.peft_deltas(again, name), EXACT)
