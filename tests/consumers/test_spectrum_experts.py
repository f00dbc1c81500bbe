"""Experts beside the base: stacks and single ones, on bases that stack them or keep them apart.

What ΔW is comes from PEFT's merge of the loaded model, in float64.
"""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

torch = pytest.importorskip("torch")

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 8, "moe_intermediate_size": 24,
    "num_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip
RANK = 4
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with a base in both layouts and an adapter in both."""
    import transformers
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES))
    model.save_pretrained(folder / "apart")
    (folder / "stacked").mkdir()
    config = (folder / "apart" / "config.json").read_text()
    (folder / "stacked" / "config.json").write_text(config)
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    assert whole[f"{EXPERTS}.gate_up_proj"].ndim == 3
    save_file(whole, folder / "stacked" / "model.safetensors", metadata={"format": "pt"})
    settings = LoraConfig(
        r=RANK, lora_alpha=8 * RANK, target_modules=["q_proj"], init_lora_weights=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    get_peft_model(model, settings).save_pretrained(folder / "all")
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for expert in (0, 2):
        for name, (out, in_) in (("gate", (24, 32)), ("up", (24, 32)), ("down", (32, 24))):
            prefix = f"base_model.model.{EXPERTS}.{expert}.{name}_proj"
            for side, shape in (("A", (RANK, in_)), ("B", (out, RANK))):
                tensors[f"{prefix}.lora_{side}.weight"] = 0.3 * torch.randn(
                    shape, generator=generator
                )
    (folder / "single").mkdir()
    save_file(tensors, folder / "single" / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "task_type": "CAUSAL_LM",
              "target_modules": ["gate_proj", "up_proj", "down_proj"]}  # fmt: skip
    (folder / "single" / "adapter_config.json").write_text(json.dumps(values))
    return folder


def weights(folders):
    """Return each expert's weights as stacks (E, out, in) and one by one, in float64."""
    from safetensors.torch import load_file

    stored = load_file(folders / "apart" / "model.safetensors")
    found = {key.removesuffix(".weight"): value.double().numpy() for key, value in stored.items()}
    for leaf, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        found[f"{EXPERTS}.{leaf}"] = np.stack([
            np.concatenate([found[f"{EXPERTS}.{e}.{part}"] for part in parts]) for e in range(3)
        ])  # fmt: skip
    return found


def merged_changes(folders, adapter):
    """Return ΔW of stacks, (E, out, in), as PEFT merges it in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders / "apart").double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, str(adapter)).double().merge_and_unload().state_dict()
    return {key: (after[key] - before[key]).numpy() for key in before if "experts." in key}


def intruders(weight, change):
    before = np.linalg.svd(weight)[0][:, : min(weight.shape)]
    after, sizes, right = np.linalg.svd(weight + change, full_matrices=False)
    cosines = np.abs(after.T @ before).max(axis=1)[:10]
    return cosines, (after, sizes, right)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", ["apart", "stacked"])
def test_stacks_are_measured_and_repaired_beside_either_base(folders, base, tmp_path):
    import loratools as lt

    result = lt.spectrum(folders / "all", base=folders / base, include="experts")
    assert result.notices == ()
    weight, changes = weights(folders), merged_changes(folders, folders / "all")
    assert len(result.matrices) == 6
    for matrix in result.matrices:
        leaf = "gate_up_proj" if 48 in matrix.shape else "down_proj"
        w = weight[f"{EXPERTS}.{leaf}"][matrix.expert]
        change = changes[f"{EXPERTS}.{leaf}"][matrix.expert]
        cosines = intruders(w, change)[0] if matrix.shape == w.shape else (
            intruders(w.T, change.T)[0]
        )  # fmt: skip
        assert_allclose(matrix.base.cosines, cosines, atol=1e-7)
        assert_allclose(
            matrix.base.relative_change, np.linalg.norm(change) / np.linalg.norm(w), rtol=1e-6
        )
    repaired = lt.repair(
        folders / "all", base=folders / base, include="experts", dtype="f32",
        output=tmp_path / "out", keep_every_rank=True, overwrite=True,
    )  # fmt: skip
    assert sum(module.intruders for module in repaired.modules) > 0
    after = merged_changes(folders, tmp_path / "out")
    turned = any(m.shape == (32, 48) for m in result.matrices)
    for leaf in ("gate_up_proj", "down_proj"):
        for expert in range(3):
            w = weight[f"{EXPERTS}.{leaf}"][expert]
            change, now = (x[f"{EXPERTS}.{leaf}"][expert] for x in (changes, after))
            if turned:
                w, change, now = w.T, change.T, now.T
            cosines, (u, s, vt) = intruders(w, change)
            bad = np.flatnonzero(cosines < 0.5)
            want = change - 0.25 * (u[:, bad] * s[bad]) @ vt[bad]
            assert np.linalg.norm(now - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", ["apart", "stacked"])
def test_single_experts_are_measured_and_repaired_beside_either_base(folders, base, tmp_path):
    from safetensors.torch import load_file

    import loratools as lt

    result = lt.spectrum(folders / "single", base=folders / base)
    assert result.notices == ()
    weight = weights(folders)
    stored = load_file(folders / "single" / "adapter_model.safetensors")
    changes = {}
    for matrix in result.matrices:
        b, a = (stored[f"base_model.model.{matrix.name}.lora_{x}.weight"].double() for x in "BA")
        change = changes[matrix.name] = (2.0 * b @ a).numpy()
        cosines, _ = intruders(weight[matrix.name], change)
        assert_allclose(matrix.base.cosines, cosines, atol=1e-7)
        relative = np.linalg.norm(change) / np.linalg.norm(weight[matrix.name])
        assert_allclose(matrix.base.relative_change, relative, rtol=1e-6)
    repaired = lt.repair(folders / "single", base=folders / base, dtype="f32", keep_every_rank=True)
    assert sum(module.intruders for module in repaired.modules) > 0
    for name, change in changes.items():
        cosines, (u, s, vt) = intruders(weight[name], change)
        bad = np.flatnonzero(cosines < 0.5)
        want = change - 0.25 * (u[:, bad] * s[bad]) @ vt[bad]
        now = lt.delta(repaired.adapter, name)
        assert np.linalg.norm(now - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.filterwarnings("ignore")
def test_stacks_compare_as_peft_merges_them(folders, tmp_path):
    import loratools as lt

    lt.squeeze(folders / "all", rank=2, output=tmp_path / "small")
    found = lt.compare([folders / "all", tmp_path / "small"], exact=True, include="experts")
    one, other = (merged_changes(folders, f) for f in (folders / "all", tmp_path / "small"))
    leaves = {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    assert set(one) == leaves
    wanted = {}
    for leaf in leaves:
        x, y = one[leaf].reshape(-1), other[leaf].reshape(-1)
        norms = np.linalg.norm(x), np.linalg.norm(y)
        wanted[round(norms[0], 6)] = (x @ y / norms[0] / norms[1], norms, np.mean(x * y < 0))
    assert len(found.modules) == 2
    for module in found.modules:
        cosine, norms, conflict = wanted[round(module.norms[0], 6)]
        assert_allclose(module.cosine, cosine, atol=1e-6)
        assert_allclose(module.norms, norms, rtol=1e-5)
        assert_allclose(module.sign_conflict, conflict, atol=2e-3)
