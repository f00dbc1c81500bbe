"""fuse of stacked experts of recent model types, against the model that PEFT merges.

Sizes make `gate_up_proj` square in some, so that shapes alone do not tell how it lies.
"""

import pytest

torch = pytest.importorskip("torch")

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
ATTENTION = ["sliding_attention", "full_attention"]
CASES = {
    "NemotronH": {
        **MOE, "layers_block_type": ["mamba", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 1, "n_routed_experts": 4, "head_dim": 8,
        "moe_shared_expert_intermediate_size": 16},
    "Lfm2Moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "num_dense_layers": 1, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "MiMoV2Flash": {
        **MOE, "n_routed_experts": 4, "head_dim": 8, "v_head_dim": 8, "layer_types": ATTENTION},
    "Afmoe": {
        **MOE, "num_experts": 4, "num_shared_experts": 1, "head_dim": 8, "num_dense_layers": 1,
        "layer_types": ATTENTION},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", CASES)
def test_fuse_equals_the_merge_of_peft(kind, tmp_path):
    import transformers
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    import loratools

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **CASES[kind]})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "base")
    names = sorted(
        {
            ".".join(name.split(".")[-3:])
            for name, parameter in model.named_parameters()
            if parameter.ndim == 3 and "expert" in name
        }
    )
    assert len(names) == 2
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=[], target_parameters=names, init_lora_weights=False
    )
    peft_model = get_peft_model(model, settings)
    peft_model.save_pretrained(tmp_path / "lora")
    peft_model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loratools.fuse(tmp_path / "base", tmp_path / "lora", output=tmp_path / "fused")
    base, merged, fused = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged", "fused")
    )
    assert set(fused) == set(base) == set(merged)
    changed = [key for key in base if not torch.equal(base[key], merged[key])]
    assert changed
    for key in changed:
        change = (merged[key] - base[key]).norm()
        assert (fused[key] - merged[key]).norm() < 1e-6 * change, key
    assert all(torch.equal(fused[key], base[key]) for key in set(base) - set(changed))
