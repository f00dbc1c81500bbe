"""DBRX in llama.cpp: experts of one matrix in stacks, as its converter makes them of weights."""

import json
import subprocess
import sys
from pathlib import Path

import gguf_models
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_gguf_llama_cpp import EFFECT, SILU_TOLERANCE

import loratools as lt
from loratools.lowrank.matrices import loaded
from loratools_formats import read_adapter
from loratools_formats.disk.errors import UnsupportedError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

EXPERTS, INNER, WIDTH = 4, 48, 64
LINEARS = ["Wqkv", "out_proj", "router.layer", "wte", "lm_head"]
NAMES = [f"ffn.experts.mlp.{leaf}" for leaf in ("w1", "v1", "w2")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Save a base, PEFT's adapter and its GGUF model; return their folder and the merged model."""
    import transformers
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("dbrx")
    config = transformers.DbrxConfig(
        d_model=WIDTH, n_heads=4, n_layers=2, max_seq_len=256, vocab_size=gguf_models.VOCABULARY,
        ffn_config={"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip

    def model():
        torch.manual_seed(0)
        return transformers.DbrxForCausalLM(config).eval()

    gguf_models.save(model(), folder / "base")
    values = json.loads((folder / "base" / "config.json").read_text())
    values["attn_config"] |= {"rope_theta": 1e4, "clip_qkv": 8.0}  # which the converter reads
    (folder / "base" / "config.json").write_text(json.dumps(values))
    gguf_models.convert_bases([folder / "base"])
    torch.manual_seed(1)
    settings = LoraConfig(r=3, lora_alpha=6, target_modules=LINEARS,
                          target_parameters=NAMES, init_lora_weights=False)  # fmt: skip
    wrapped = get_peft_model(model(), settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
    wrapped.save_pretrained(folder / "a")
    return folder, gguf_models.expected(model()), wrapped.merge_and_unload()


@pytest.mark.parametrize("base", ["base", "base/model.gguf"])
def test_log_probabilities_equal_those_of_torch(made, base, tmp_path):
    folder, untouched, merged = made
    lt.convert(folder / "a", base=folder / base, output=tmp_path / "a.gguf")
    found = gguf_models.from_llama_cpp(folder / "base" / "model.gguf", [tmp_path / "a.gguf"])[0]
    wanted = gguf_models.expected(merged)
    assert np.abs(wanted - untouched).max() > EFFECT
    assert np.abs(found - wanted).max() < SILU_TOLERANCE


def test_the_converter_makes_the_same_of_the_weights(made, tmp_path):
    """ΔW of PEFT's merge, put through llama.cpp's own class as weights are."""
    folder, _, merged = made
    old = load_file(folder / "base" / "model.safetensors")
    new = {name: p.detach().double().numpy() for name, p in merged.named_parameters()}
    deltas = {name: new[name] - old[name].astype(np.float64) for name in new if name in old}
    changed = {name: delta for name, delta in deltas.items() if delta.any()}
    assert len(changed) == 2 * 6 + 2
    np.savez(folder / "base" / "weights.npz", **changed)
    script = Path(__file__).parent / "llama_cpp_layouts.py"
    out = tmp_path / "wanted.npz"
    subprocess.run([sys.executable, script, folder / "base", out], check=True)
    wanted = dict(np.load(out))
    assert str(wanted.pop("architecture")) == "dbrx"
    lt.convert(folder / "a", base=folder / "base", output=tmp_path / "a.gguf")
    adapter = read_adapter(tmp_path / "a.gguf")
    assert {f"{name}.weight" for name in adapter.modules} == set(wanted)
    for name, change in adapter.modules.items():
        part = change.require_factors()
        found = np.stack([part.scale * b.astype(np.float64) @ a for b, a in loaded(part)])
        found = found if part.layer.kind == "experts" else found[0]
        found = found.T if part.layer.kind == "embedding" else found
        np.testing.assert_allclose(found, wanted[f"{name}.weight"], atol=2.0**-20, err_msg=name)


def test_it_comes_back_bit_for_bit_and_through_mlx(made, tmp_path):
    folder, _, _ = made
    base = folder / "base"
    lt.convert(folder / "a", base=base, output=tmp_path / "a.gguf")
    lt.convert(tmp_path / "a.gguf", to="peft", base=base, output=tmp_path / "back")
    old, new = (
        load_file(f / "adapter_model.safetensors") for f in (folder / "a", tmp_path / "back")
    )
    assert new.keys() == {name for name in old if "lora_" in name}
    assert all(np.array_equal(old[name], new[name]) for name in new)
    lt.convert(folder / "a", to="mlx", base=base, output=tmp_path / "mlx")
    lt.convert(tmp_path / "mlx", to="gguf", base=base, output=tmp_path / "mlx.gguf")
    one, other = (read_adapter(tmp_path / name) for name in ("a.gguf", "mlx.gguf"))
    for name, change in one.modules.items():
        mine, theirs = change.require_factors(), other.modules[name].require_factors()
        for pair, same in zip(loaded(mine), loaded(theirs), strict=True):
            np.testing.assert_allclose(pair[0] @ pair[1], same[0] @ same[1], rtol=0, atol=2.0**-22)
    with pytest.raises(UnsupportedError, match="in one matrix") as told:
        lt.convert(tmp_path / "a.gguf", to="peft", output=tmp_path / "no")
    assert "--base FOLDER" in told.value.hint


def test_a_gguf_model_is_fused(made, tmp_path):
    folder, _, merged = made
    lt.fuse(folder / "base" / "model.gguf", folder / "a", output=tmp_path / "fused.gguf")
    found = gguf_models.from_llama_cpp(tmp_path / "fused.gguf", [], scales=[[]])[0]
    assert np.abs(found - gguf_models.expected(merged)).max() < SILU_TOLERANCE
