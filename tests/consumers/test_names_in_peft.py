"""Names of modules, as trainers, releases and mlx-lm spell them: PEFT judges what is written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys

import peft_oracle
import pytest

import loratools as lt
from loratools_formats import read_adapter
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError

pytestmark = [pytest.mark.filterwarnings(line) for line in peft_oracle.WARNINGS]

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip


def moe():
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    return Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager")


def llava():
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = LlavaConfig(
        text_config={"model_type": "llama", **SIZES}, vision_config=vision, image_token_index=90
    )
    return LlavaForConditionalGeneration(config)


def lora(make, path, seed, **config):
    """Save an adapter of random factors of a model."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make(), LoraConfig(r=4, lora_alpha=8, **config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape) * 0.1)
    model.save_pretrained(path)
    return path


def changes(make, path):
    """Return what PEFT changes, by parameter."""
    from peft import PeftModel

    before = {name: weight.detach().clone() for name, weight in make().named_parameters()}
    after = PeftModel.from_pretrained(make(), str(path)).merge_and_unload().named_parameters()
    return {name: weight.detach() - before[name] for name, weight in after}


def distance(got, want):
    """Return the relative Frobenius distance of changes."""
    off = sum(float((got[name] - want[name]).norm() ** 2) for name in want)
    return (off / sum(float(change.norm() ** 2) for change in want.values())) ** 0.5


def respelled(source, path, spell):
    """Copy an adapter with other names of tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, path)
    tensors = load_file(path / "adapter_model.safetensors")
    renamed = {spell(key): tensor for key, tensor in tensors.items()}
    save_file(renamed, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


WRAPPED = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled within": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "DDP": lambda key: f"module.{key}",
    "DDP within": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "FSDP": lambda key: key.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "checkpointed": lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "in memory": lambda key: key.replace(".weight", ".default.weight"),
    "without prefix": lambda key: key.removeprefix("base_model.model."),
    "PEFT in PEFT": lambda key: f"base_model.model.{key}",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_names_with_wrappers_are_read_and_written_as_peft_saves_them(name, tmp_path):
    clean = lora(llava, tmp_path / "clean", 1, target_modules=r".*language_model.*(q|up)_proj")
    wrapped = respelled(clean, tmp_path / "wrapped", WRAPPED[name])
    found = [each.code for each in read_adapter(wrapped).findings]
    assert found.count("wrapped-names") == 1
    lt.squeeze(wrapped, energy=1.0, output=tmp_path / "out")
    assert distance(changes(llava, tmp_path / "out"), changes(llava, clean)) <= 1e-6


def test_a_file_of_several_adapters_is_refused(tmp_path):
    clean = lora(llava, tmp_path / "clean", 1, target_modules=r".*language_model.*(q|up)_proj")
    two = respelled(
        clean,
        tmp_path / "two",
        lambda key: key.replace(".weight", ".one.weight" if "q_proj" in key else ".two.weight"),
    )
    with pytest.raises(AdapterError, match="the file holds several adapters; got one, two"):
        read_adapter(two)


def test_stacked_and_single_experts_are_merged_with_the_base_only(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    moe().save_pretrained(tmp_path / "base")
    stacked = lora(
        moe,
        tmp_path / "stacked",
        1,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    torch.manual_seed(2)
    tensors = {}
    for key, weight in sorted(load_file(tmp_path / "base/model.safetensors").items()):
        if ".experts." in key or "q_proj" in key:
            path = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(4, weight.shape[1]) * 0.1
            tensors[f"{path}.lora_B.weight"] = torch.randn(weight.shape[0], 4) * 0.1
    each = tmp_path / "each"
    each.mkdir()
    save_file(tensors, each / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    config["target_modules"] = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    (each / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="two adapters name one module differently"):
        lt.merge([stacked, each])
    lt.merge([stacked, each], base=tmp_path / "base", output=tmp_path / "both")
    one, other = changes(moe, stacked), changes(moe, each)
    want = {name: one[name] + other[name] for name in one}
    assert distance(changes(moe, tmp_path / "both"), want) <= 1e-6


def old(key):
    """Return a name as transformers before 4.52 had it."""
    return key.replace("model.model.language_model.", "model.language_model.model.")


def test_old_names_become_those_of_the_base(tmp_path):
    llava().save_pretrained(tmp_path / "base")
    new = lora(llava, tmp_path / "new", 1, target_modules=r".*language_model.*(q|v)_proj")
    before = respelled(new, tmp_path / "old", old)
    result = lt.convert(before, to="peft", base=tmp_path / "base", output=tmp_path / "renamed")
    assert result.relative_error == 0.0
    assert distance(changes(llava, tmp_path / "renamed"), changes(llava, new)) == 0.0
    with pytest.raises(AdapterError, match="two adapters name one module differently"):
        lt.merge([new, before])
    lt.merge([new, before], base=tmp_path / "base", output=tmp_path / "both")
    want = {name: 2 * change for name, change in changes(llava, new).items()}
    assert distance(changes(llava, tmp_path / "both"), want) <= 1e-6


def mixtral():
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM._from_config(config, experts_implementation="eager")


@pytest.mark.parametrize("make", [mixtral, llava])
def test_mlx_and_peft_agree_on_logits_both_ways(make, tmp_path):
    import mlx.core as mx
    import mlx_adapters
    import numpy as np
    import torch
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model
    from peft import PeftModel

    words = [[1, 5, 9, 2, 7, 3, 11, 4]]
    make().save_pretrained(tmp_path / "base")
    model, _ = load_model(tmp_path / "base", strict=False)
    keys = ["self_attn.q_proj"]
    block = "block_sparse_moe.switch_mlp" if make is mixtral else "mlp"
    keys += [f"{block}.{leaf}_proj" for leaf in ("gate", "up", "down")]
    mlx_adapters.adapted(model, tmp_path / "mlx", keys)
    with pytest.raises(UnsupportedError, match=r"name .* differently"):
        lt.convert(tmp_path / "mlx", to="peft")
    base = tmp_path / "base"
    lt.convert(tmp_path / "mlx", to="peft", base=base, output=tmp_path / "peft")
    adapted = PeftModel.from_pretrained(make(), str(tmp_path / "peft")).eval()
    with torch.no_grad():
        want = adapted(input_ids=torch.tensor(words)).logits.double().numpy()
    got = np.array(model(mx.array(words))).astype("f8")
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    lt.squeeze(tmp_path / "peft", rank=8, uniform=True, output=tmp_path / "uniform")
    lt.convert(tmp_path / "uniform", to="mlx", base=base, output=tmp_path / "back")
    again, _ = load_model(base, strict=False)
    load_adapters(again, str(tmp_path / "back"))
    got = np.array(again(mx.array(words))).astype("f8")
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("command", ["to_lora", "to_dora", "merge"])
def test_commands_with_a_base_give_modules_its_names(command, tmp_path):
    llava().save_pretrained(tmp_path / "base")
    new = lora(llava, tmp_path / "new", 1, target_modules=r".*language_model.*(q|v)_proj")
    before = respelled(new, tmp_path / "old", old)
    given = [before] if command == "merge" else before
    result = getattr(lt, command)(given, base=tmp_path / "base", output=tmp_path / "out")
    assert all(name.startswith("model.language_model.") for name in result.adapter.modules)
    assert distance(changes(llava, tmp_path / "out"), changes(llava, new)) <= 2e-6
    lt.fuse(tmp_path / "base", before, output=tmp_path / "fused")
    found = lt.verify(tmp_path / "fused", base=tmp_path / "base", adapters=before)
    assert found.contained


def test_what_a_text_model_lacks_is_told_or_refused_and_the_hint_works(tmp_path):
    base = tmp_path / "text"
    llama().save_pretrained(base)
    both = lora(llava, tmp_path / "both", 1, target_modules=r".*(q_proj|down_proj)")
    (told,) = lt.merge([both, both], base=base).findings
    (caution,) = lt.to_lora(both, base=base).cautions
    assert told.message == caution
    assert re.match(r"model\.vision_tower\..+ and 1 more are not in the base", caution)
    with pytest.raises(AdapterError, match="no base tensor fits") as error:
        lt.fuse(base, both, output=tmp_path / "fused")
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(error.value.hint.partition("Without them: ")[2])],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lt.fuse(base, tmp_path / "without", output=tmp_path / "fused")
    whole = changes(llava, both)
    found = dict(type(llama()).from_pretrained(tmp_path / "fused").named_parameters())
    before = dict(llama().named_parameters())
    want = {
        key.replace("model.language_model.", "model."): change
        for key, change in whole.items()
        if "language_model" in key
    }
    got = {key: (found[key] - before[key]).detach().double() for key in want}
    assert distance(got, want) <= 1e-5


def single_experts(path):
    """Save an adapter of experts and attention as transformers 4 names them."""
    return lora(
        moe,
        path,
        1,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )


MAKERS = {
    "moe": (moe, single_experts, r"layers\.0\.mlp\.experts\.3\.gate_proj"),
    "llava": (
        llava,
        lambda path: lora(llava, path, 1, target_modules=r".*language_model.*(q|v)_proj"),
        r"^language_model\.model\.layers",
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_names_of_transformers_4_and_back(name, tmp_path):
    make, write, pattern = MAKERS[name]
    base = tmp_path / "base"
    make().save_pretrained(base)
    new = write(tmp_path / "new")
    old = lt.convert(new, to="peft", base=base, names_of="4", output=tmp_path / "old")
    assert old.relative_error == 0.0
    assert any(re.search(pattern, module) for module in old.adapter.modules)
    lt.convert(tmp_path / "old", to="peft", base=base, names_of="5", output=tmp_path / "back")
    assert distance(changes(make, tmp_path / "back"), changes(make, new)) <= 1e-6
    for source in ("old", "new"):
        lt.fuse(base, tmp_path / source, output=tmp_path / f"{source}-fused")
    found = lt.verify(tmp_path / "new-fused", base=base, adapters=tmp_path / "old")
    assert found.contained


def test_names_of_a_version_need_a_base(tmp_path):
    new = lora(llava, tmp_path / "new", 1, target_modules=r".*language_model.*(q|v)_proj")
    with pytest.raises(OptionError, match="names_of"):
        lt.convert(new, to="peft", names_of="4", output=tmp_path / "old")


def llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def test_adapters_of_a_text_model_fit_the_model_of_several_parts_and_back(tmp_path):
    llama().save_pretrained(tmp_path / "text")
    llava().save_pretrained(tmp_path / "parts")
    text = lora(llama, tmp_path / "lora", 1, target_modules=["q_proj", "down_proj"])
    lt.convert(text, to="peft", base=tmp_path / "parts", output=tmp_path / "there")
    lt.convert(tmp_path / "there", to="peft", base=tmp_path / "text", output=tmp_path / "back")
    want, there = changes(llama, text), changes(llava, tmp_path / "there")
    assert distance(changes(llama, tmp_path / "back"), want) == 0.0
    renamed = {
        key.replace("model.language_model.", "model."): change
        for key, change in there.items()
        if "language_model" in key or key == "lm_head.weight"
    }
    assert distance(renamed, want) <= 1e-6
