"""DBRX, whose experts lie below each other in one matrix, on the way to mlx-lm and back.

PEFT's A is common to all experts, and w2 acts from rows to columns; mlx-lm has linear layers.
"""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EXPERTS, INNER, WIDTH, RANK = 4, 24, 32, 2


@pytest.fixture
def made(tmp_path):
    """Save a base and PEFT's adapter of it; return the base's weights and what PEFT merges."""
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    config = transformers.DbrxConfig(
        d_model=WIDTH, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=96,
        ffn_config={"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.DbrxForCausalLM(config).save_pretrained(tmp_path / "base")

    def model():
        return transformers.DbrxForCausalLM.from_pretrained(tmp_path / "base")

    names = [f"ffn.experts.mlp.{leaf}" for leaf in ("w1", "v1", "w2")]
    settings = LoraConfig(r=RANK, lora_alpha=6, target_modules=["out_proj"],
                          target_parameters=names, init_lora_weights=False)  # fmt: skip
    get_peft_model(model(), settings).save_pretrained(tmp_path / "a")

    def merged(adapter):
        whole = PeftModel.from_pretrained(model().double(), str(adapter)).merge_and_unload()
        return {name: p.detach().numpy() for name, p in whole.named_parameters()}

    old = {name: p.detach().double().numpy() for name, p in model().named_parameters()}
    return old, merged


def test_mlx_loads_it_and_it_comes_back_bit_for_bit(made, tmp_path):
    old, merged = made
    base = tmp_path / "base"
    lt.convert(tmp_path / "a", to="mlx", base=base, output=tmp_path / "mlx")
    new = merged(tmp_path / "a")
    for name, delta in in_mlx(base, tmp_path / "mlx").items():
        single = re.fullmatch(r"(.*ffn\.experts)\.(\d+)\.(\w+)\.weight", name)
        wanted = new[name] - old[name] if single is None else None
        if single is not None:
            key, rows = f"{single[1]}.mlp.{single[3]}", slice(*span(int(single[2])))
            wanted = (new[key] - old[key])[rows]
            wanted = wanted.T if single[3] == "w2" else wanted
        np.testing.assert_allclose(delta, wanted, atol=1e-6, err_msg=name)
    lt.convert(tmp_path / "mlx", to="peft", base=base, output=tmp_path / "again")
    again = merged(tmp_path / "again")
    assert all(np.array_equal(again[name], new[name]) for name in new)
    first, last = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("a", "again"))
    assert first.keys() == last.keys()
    assert all(np.array_equal(first[name], last[name]) for name in first)


def span(expert):
    return expert * INNER, (expert + 1) * INNER


def in_mlx(base, adapter):
    """Return what mlx-lm adds to its weights for an adapter that it loads."""
    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models import dbrx
    from mlx_lm.tuner.utils import load_adapters

    config = json.loads((base / "config.json").read_text())
    model = dbrx.Model(dbrx.ModelArgs.from_dict(config))
    weights = model.sanitize(dict(mx.load(str(base / "model.safetensors"))))
    model.load_weights(list(weights.items()))
    before = {name: np.array(w, dtype="f8") for name, w in tree_flatten(model.parameters())}
    load_adapters(model, str(adapter))
    layers = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    assert len(layers) == 2 * (3 * EXPERTS + 1)
    model.update_modules(tree_unflatten(layers))
    after = {name: np.array(w, dtype="f8") for name, w in tree_flatten(model.parameters())}
    return {name: after[name] - before[name] for name in after}


def test_experts_with_factors_of_their_own_are_fused_and_put_together(made, tmp_path):
    """An adapter that mlx-lm trained: PEFT's has the ranks of all experts, one beside another."""
    old, merged = made
    base = tmp_path / "base"
    lt.convert(tmp_path / "a", to="mlx", base=base, output=tmp_path / "mlx")
    file = tmp_path / "mlx" / "adapters.safetensors"
    rng = np.random.default_rng(1)
    tensors = {
        name: rng.normal(size=values.shape).astype(np.float32)
        for name, values in load_file(file).items()
    }
    save_file(tensors, file)
    scale = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    scale = scale["lora_parameters"]["scale"]
    lt.convert(tmp_path / "mlx", to="peft", base=base, output=tmp_path / "peft")
    lt.fuse(base, tmp_path / "mlx", output=tmp_path / "fused")
    new = merged(tmp_path / "peft")
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    for name, before in old.items():
        *_, leaf = name.split(".")
        if leaf not in ("w1", "v1", "w2"):
            continue
        owner = name.removesuffix(f".mlp.{leaf}")
        wanted = before.copy()
        for expert in range(EXPERTS):
            a, b = (tensors[f"{owner}.{expert}.{leaf}.lora_{x}"] for x in "ab")
            delta = scale * (a.astype(np.float64) @ b.astype(np.float64))  # (in, out)
            wanted[slice(*span(expert))] += delta if leaf == "w2" else delta.T
        size = np.abs(wanted).max()
        np.testing.assert_allclose(new[name], wanted, atol=size * 2.0**-44)
        np.testing.assert_allclose(fused[name], wanted, atol=size * 2.0**-22)
