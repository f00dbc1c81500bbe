"""Stacked experts in every order that programs write, read as one change, and written again.

The layouts are built here by their definitions, from canonical factors of each projection.
"""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loratools_formats import read_adapter, write_adapter
from loratools_formats.core.orientation import exchanged
from loratools_formats.disk.errors import AdapterError
from loratools_formats.formats.peft.packing import evidence

MODULE = "base_model.model.model.layers.0.mlp.experts"
ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj"
UNSLOTH = {
    "base_model_class": "Qwen3MoeForCausalLM",
    "parent_library": "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "unsloth_fixed": True,
}


def detail(order, parameters=("gate_up_proj", "down_proj")):
    own = {name: {"lora_B_layout": order, "num_experts": 3} for name in parameters}
    return {"lora_A_layout": "grouped_by_expert", "lora_B_layout": order, "parameters": own}


FULL = ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"]
BRIDGE = {"auto_mapping": None, "inference_mode": True, "target_parameters": FULL}
# name: (A on the outputs, B expert by expert, configuration)
LAYOUTS = {
    "PEFT 0.21": (False, False, {"peft_version": "0.21.2"}),
    "PEFT 0.18": (True, False, {"peft_version": "0.18.1"}),
    "PEFT 0.19.0": (True, False, {"peft_version": "0.19.0"}),
    "PEFT 0.21, saved again": (False, False, {"peft_version": "0.18.1"}),
    "Automodel": (True, False, {}),
    "Megatron-Bridge": (True, True, BRIDGE),
    "Unsloth, unmarked": (False, True, {"auto_mapping": UNSLOTH, "peft_version": "0.21.2"}),
    "Unsloth, unmarked, PEFT 0.18": (True, True,
                                     {"auto_mapping": UNSLOTH, "peft_version": "0.18.1"}),
    "Unsloth, flat marker": (False, True, {"lora_B_layout": "grouped_by_expert"}),
    "Unsloth, rank by rank": (False, False, {"auto_mapping": UNSLOTH,
                                             "lora_B_layout": "rank_major"}),
    "Unsloth, nested marker": (False, False, {
        "auto_mapping": UNSLOTH, "lora_B_layout": "grouped_by_expert",
        "unsloth_fused_expert_lora": detail("rank_major")}),
    "Unsloth, marker in auto_mapping": (False, True, {"auto_mapping": {
        **UNSLOTH, "unsloth_fused_expert_lora": detail("grouped_by_expert")}}),
}  # fmt: skip


def factors(experts, rank, width, inner, *, gated=True, seed=0):
    """Return (A (E, r, in), B (E, out, r)) of the parameter into the experts, and the one out."""
    rng = np.random.default_rng(seed)

    def pair(out, in_):
        return rng.normal(size=(experts, rank, in_)), rng.normal(size=(experts, out, rank))

    return pair((2 if gated else 1) * inner, width), pair(width, inner)


def flat(a, b, *, swapped, grouped):
    if swapped:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    columns = b.transpose(1, 0, 2) if grouped else b.transpose(1, 2, 0)
    return a.reshape(-1, a.shape[2]), columns.reshape(b.shape[1], -1)


def write(folder, into, out, layout, *, leaf="gate_up_proj", width=None):
    swapped, grouped, values = LAYOUTS[layout]
    tensors = {}
    for name, (a, b) in ((f"{MODULE}.base_layer", into), (MODULE, out)):
        stored = flat(a, b, swapped=swapped, grouped=grouped)
        for part, values_ in zip("AB", stored, strict=True):
            tensors[f"{name}.lora_{part}.weight"] = np.ascontiguousarray(values_, np.float32)
    experts, rank = into[0].shape[:2]
    values = json.loads(json.dumps(values).replace('"num_experts": 3', f'"num_experts": {experts}'))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [],
        "target_parameters": [f"mlp.experts.{leaf}", "mlp.experts.down_proj"], **values,
    }  # fmt: skip
    if width is not None:
        config["target_modules"] = ["q_proj"]
        tensors[f"{ATTENTION}.lora_A.weight"] = np.ones((rank, width), np.float32)
        tensors[f"{ATTENTION}.lora_B.weight"] = np.ones((4, rank), np.float32)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def check(folder, into, out):
    """Compare what is read with the canonical factors, bit for bit."""
    adapter = read_adapter(folder)
    modules = {path: d for path, d in adapter.modules.items() if d.layer.parameters}
    assert len(modules) == 2
    for path, change in modules.items():
        part = change.require_factors()
        assert part.layer.swapped is not None
        part = exchanged(part) if part.layer.swapped else part
        a, b = into if path.endswith("base_layer") else out
        np.testing.assert_array_equal(part.a.load(), a.astype(np.float32))
        np.testing.assert_array_equal(part.b.load(), b.astype(np.float32))
        assert part.scale == 2.0
    return adapter


# Widths where neither, the one or the other parameter is square.
SIZES = ((8, 5), (8, 4), (8, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "inner"), SIZES)
def test_every_layout_is_read_as_one_change(layout, width, inner, tmp_path):
    into, out = factors(3, 2, width, inner)
    check(write(tmp_path / "a", into, out, layout), into, out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_again_is_read_alike(layout, tmp_path):
    """The configuration then says the order that was written."""
    into, out = factors(3, 2, 8, 5)
    adapter = check(write(tmp_path / "a", into, out, layout), into, out)
    write_adapter(adapter, tmp_path / "b", "peft")
    again = check(tmp_path / "b", into, out)
    assert not [f for f in again.findings if f.code == "expert-order-guessed"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "inner"), SIZES[:2])
def test_without_a_gate_the_attention_tells(layout, width, inner, tmp_path):
    if LAYOUTS[layout][1] and "unmarked" in layout:
        pytest.skip("Unsloth does not pack `up_proj`")
    into, out = factors(3, 2, width, inner, gated=False)
    folder = write(tmp_path / "a", into, out, layout, leaf="up_proj", width=width)
    check(folder, into, out)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(2, 5),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_any_size(tmp_path_factory, layout, experts, rank, width, inner):
    into, out = factors(experts, rank, width, inner)
    check(write(tmp_path_factory.mktemp("a"), into, out, layout), into, out)


def test_a_guess_is_told_with_its_evidence(tmp_path):
    into, out = factors(3, 2, 8, 5)
    for layout, word in (("Unsloth, unmarked", "Unsloth"), ("Megatron-Bridge", "Megatron-Bridge")):
        adapter = read_adapter(write(tmp_path / word, into, out, layout))
        (found,) = [f for f in adapter.findings if f.code == "expert-order-guessed"]
        assert word in found.message
        assert "times as alike" in found.message
        assert "lora_B_layout: rank_major" in found.hint


def test_one_swapped_and_the_other_not_is_refused(tmp_path):
    into, out = factors(3, 2, 8, 5)
    turned = tuple(x.transpose(0, 2, 1) for x in reversed(out))
    folder = write(tmp_path / "a", into, turned, "PEFT 0.21")
    with pytest.raises(AdapterError, match="inputs where the other has its outputs"):
        read_adapter(folder)


def test_an_unknown_order_is_refused(tmp_path):
    into, out = factors(3, 2, 8, 5)
    folder = write(tmp_path / "a", into, out, "Unsloth, flat marker")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_B_layout"] = "other"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="lora_B_layout is wrong"):
        read_adapter(folder)


def test_evidence_tells_groups_of_like_columns():
    """Columns of one expert near one direction: a large ratio in the order that they are in."""
    from loratools_formats.core.tensors import in_memory

    rng = np.random.default_rng(0)
    b = rng.normal(size=(6, 16, 1)) + 0.2 * rng.normal(size=(6, 16, 4))
    by_rank = in_memory("b", b.transpose(1, 2, 0).reshape(16, -1))
    by_expert = in_memory("b", b.transpose(1, 0, 2).reshape(16, -1))
    for tensor, right in ((by_rank, 0), (by_expert, 1)):
        ratios = evidence(tensor, 6, 4)
        assert ratios[right] > 1.5 > ratios[1 - right]
    assert evidence(in_memory("b", np.zeros((4, 12))), 6, 2) is None
