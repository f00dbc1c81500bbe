"""Experts in llama.cpp: one by one for models whose files have stacks, and gate and up in one."""

import gguf_models
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_gguf_llama_cpp import EFFECT, SILU_TOLERANCE

import loratools as lt
from loratools_formats import read_adapter, write_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.tensors import in_memory

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "gpt_oss": ("GptOss", gguf_models.HEAD | EXPERTS | {
        "intermediate_size": 32, "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "cohere2_moe": ("Cohere2Moe", gguf_models.HEAD | EXPERTS | {
        "intermediate_size": 32, "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64, "use_qk_norm": False, "first_k_dense_replace": 0,
        "num_shared_experts": 0}),
    "granitemoe_swa": ("GraniteMoeSWA", EXPERTS | {"intermediate_size": 32}),
}  # fmt: skip
OWNER = {"granitemoe_swa": "block_sparse_moe"}


def model_of(name):
    kind, values = MODELS[name]
    gguf_models.CONFIGS[name] = (f"{kind}Config", gguf_models.SIZES | values)
    try:
        return gguf_models.make_model(name)
    finally:
        del gguf_models.CONFIGS[name]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for name in MODELS:
        gguf_models.save(model_of(name), root / name)
    gguf_models.convert_bases(["--fuse-gate-up-exps", root / "cohere2_moe"])
    gguf_models.convert_bases([root / name for name in MODELS if name != "cohere2_moe"])
    return root


def changed(name, *, listed=False, missing=False):
    """Return a model with its experts changed, and the change as an adapter of single experts."""
    import torch

    model = model_of(name)
    rng = np.random.default_rng(3)
    modules = {}
    for layer in range(2):
        path = f"model.layers.{layer}.{OWNER.get(name, 'mlp')}.experts"
        owner = model.get_submodule(path)
        turned = name == "gpt_oss"
        for expert in range(4 - missing):
            both, down = owner.gate_up_proj.data[expert], owner.down_proj.data[expert]
            both, down = (both.T, down.T) if turned else (both, down)
            half = len(both) // 2
            gate, up = (both[::2], both[1::2]) if turned else (both[:half], both[half:])
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            if listed:
                parts = {"gate_up_proj": both, "down_proj": down}
            for leaf, weight in parts.items():
                rank = 3 + expert % 2  # ranks of experts differ, and zeros make up for it
                a = rng.normal(0, 0.2, (rank, weight.shape[1])).astype(np.float32)
                b = rng.normal(0, 0.2, (weight.shape[0], rank)).astype(np.float32)
                weight.add_(1.5 * torch.from_numpy(b @ a))
                called = f"{path}.{leaf}s.{expert}" if listed else f"{path}.{expert}.{leaf}"
                factors = LowRank(in_memory("a", a), in_memory("b", b), 1.5, Layer("linear"))
                modules[called] = ModuleChange(factors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6.0, "target_modules": ["gate_proj"]}
    return gguf_models.expected(model), Adapter("peft", None, modules=modules, config=config)


CASES = {
    "gpt-oss": ("gpt_oss", "", {}),
    "gpt-oss, an expert missing": ("gpt_oss", "", {"missing": True}),
    "gpt-oss, gate_up_projs": ("gpt_oss", "", {"listed": True}),
    "joined": ("cohere2_moe", "joined.gguf", {}),
    "not joined": ("cohere2_moe", "model.gguf", {}),
    "always joined": ("granitemoe_swa", "", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_equal_those_of_torch(case, bases, tmp_path):
    name, file, options = CASES[case]
    untouched = gguf_models.expected(model_of(name))
    wanted, adapter = changed(name, **options)
    assert np.abs(wanted - untouched).max() > EFFECT
    write_adapter(adapter, tmp_path / "a", "peft")
    lt.convert(tmp_path / "a", to="gguf", base=bases / name / file, output=tmp_path / "a.gguf")
    stored = "ffn_gate_up_exps" if "joined" in case and "not" not in case else "ffn_gate_exps"
    assert any(stored in path for path in read_adapter(tmp_path / "a.gguf").modules)
    base = bases / name / (file or "model.gguf")
    lt.fuse(base, tmp_path / "a", output=tmp_path / "fused.gguf")
    (found,) = gguf_models.from_llama_cpp(base, [tmp_path / "a.gguf"])
    assert np.abs(found - wanted).max() < SILU_TOLERANCE
    (fused,) = gguf_models.from_llama_cpp(tmp_path / "fused.gguf", [], [[]])
    assert np.abs(fused - wanted).max() < SILU_TOLERANCE


def test_joined_and_not_joined_become_each_other(bases, tmp_path):
    """Files for one form of a base are written for the other, and read back to one change."""
    base = bases / "cohere2_moe"
    wanted, adapter = changed("cohere2_moe")
    write_adapter(adapter, tmp_path / "a", "peft")
    lt.convert(tmp_path / "a", to="gguf", base=base / "model.gguf", output=tmp_path / "two.gguf")
    lt.convert(tmp_path / "two.gguf", base=base / "joined.gguf", output=tmp_path / "one.gguf")
    lt.convert(tmp_path / "one.gguf", base=base / "model.gguf", output=tmp_path / "again.gguf")
    for file, model in (("one", "joined"), ("again", "model")):
        (found,) = gguf_models.from_llama_cpp(base / f"{model}.gguf", [tmp_path / f"{file}.gguf"])
        assert np.abs(found - wanted).max() < SILU_TOLERANCE
    truth = tmp_path / "truth"
    lt.fuse(base, tmp_path / "a", output=truth)
    for file in ("one", "two", "again"):
        lt.convert(tmp_path / f"{file}.gguf", to="peft", base=base, output=tmp_path / file)
        lt.fuse(base, tmp_path / file, output=tmp_path / f"{file} fused")
        new, old = (load_file(f / "model.safetensors") for f in (tmp_path / f"{file} fused", truth))
        for key, values in old.items():
            assert np.abs(new[key] - values).max() <= 2.0**-22 * np.abs(values).max(), key
