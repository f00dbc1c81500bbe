"""squeeze of adapters of experts: PEFT loads every result, with the change that was written."""

import json
import warnings

import pytest

torch = pytest.importorskip("torch")

RULES = {
    "budget": {"budget": "60%"},
    "energy": {"energy": 0.7},
    "budget, uniform": {"budget": "60%", "uniform": True},
}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 8, "moe_intermediate_size": 24,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
RANK = 8


def decaying(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * 0.1 * (0.5 + seed % 3) ** torch.arange(RANK)[:, None]


def each(folder, without=()):
    """Write an adapter of the attention, the routers and the experts one by one."""
    from safetensors.torch import save_file

    modules = {}
    for layer in range(2):
        block = f"model.layers.{layer}"
        modules[f"{block}.self_attn.q_proj"] = (32, 32)
        modules[f"{block}.mlp.gate"] = (4, 32)
        for expert in range(4):
            for name, size in (("gate", (24, 32)), ("up", (24, 32)), ("down", (32, 24))):
                modules[f"{block}.mlp.experts.{expert}.{name}_proj"] = size
    tensors = {}
    for seed, (name, (out, in_)) in enumerate(modules.items()):
        if name.endswith(tuple(without)):
            continue
        tensors[f"base_model.model.{name}.lora_A.weight"] = decaying(RANK, in_, seed=seed)
        b = decaying(RANK, out, seed=seed + 1).T.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values))


def stacked(folder, base):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj"], init_lora_weights=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, settings).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["each", "stacked"])
def test_peft_loads_what_comes_out(layout, rule, tmp_path):
    import transformers

    import loratools

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    if layout == "each":
        each(tmp_path / "lora")
    else:
        stacked(tmp_path / "lora", tmp_path / "base")
    loratools.squeeze(tmp_path / "lora", output=tmp_path / "squeezed", **RULES[rule])
    before, after = (
        (tmp_path / name / "adapter_model.safetensors").stat().st_size
        for name in ("lora", "squeezed")
    )
    assert after < before
    check(tmp_path)


OTHERS = {
    "to-lora": lambda lt, one, other, base, out: lt.to_lora(one, energy=0.7, output=out),
    "to-lora, budget": lambda lt, one, other, base, out: lt.to_lora(one, budget="60%", output=out),
    "merge": lambda lt, one, other, base, out: lt.merge([one, other], output=out),
    "merge, energy": lambda lt, one, other, base, out: lt.merge(
        [one, other], energy=0.7, output=out
    ),
    "extract": lambda lt, one, other, base, out: lt.extract(
        base, fused(lt, base, one), energy=0.7, output=out
    ),
}


def fused(lt, base, adapter):
    lt.fuse(base, adapter, output=base.with_name("tuned"))
    return base.with_name("tuned")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("command", OTHERS)
@pytest.mark.parametrize("layout", ["each", "stacked"])
def test_peft_loads_what_other_commands_make(layout, command, tmp_path):
    import transformers

    import loratools

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    if layout == "each":
        each(tmp_path / "lora")
        each(tmp_path / "other", without=["experts.1.up_proj", "experts.2.down_proj"])
    else:
        stacked(tmp_path / "lora", tmp_path / "base")
        stacked(tmp_path / "other", tmp_path / "base")
    one, other = tmp_path / "lora", tmp_path / "other"
    OTHERS[command](loratools, one, other, tmp_path / "base", tmp_path / "squeezed")
    check(tmp_path)


def check(tmp_path):
    """Hold what PEFT makes of `squeezed` to what `fuse` does."""
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file

    import loratools

    loratools.fuse(tmp_path / "base", tmp_path / "squeezed", output=tmp_path / "fused")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, str(tmp_path / "squeezed"))
    assert not [w for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    base, merged, fused = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged", "fused")
    )
    changed = [key for key in base if not torch.equal(base[key], fused[key])]
    assert any("experts.3.down_proj" in key for key in changed)
    for key in base:
        change = (fused[key] - base[key]).norm()
        assert (fused[key] - merged[key]).norm() <= 2e-6 * change, key
