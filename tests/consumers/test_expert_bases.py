"""Experts of classes with names or shapes of their own, in every layout, against the models.

ΔW is computed from the factors by definition, in float64, and compared with what fusing changes in
the class's parameters, loaded by transformers. One of JetMoe's pairs is square.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools_formats.disk.errors import UnsupportedError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

WIDTH, INNER, EXPERTS, RANK = 16, 24, 4, 3
SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 40,
}  # fmt: skip
MODELS = {
    "GraniteMoeShared": SIZES | {
        "intermediate_size": INNER, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
        "shared_intermediate_size": 20},
    "AriaText": SIZES | {
        "intermediate_size": INNER, "moe_num_experts": EXPERTS, "moe_topk": 2,
        "moe_num_shared_experts": 1},
    "NemotronH": SIZES | {
        "head_dim": 8, "intermediate_size": 32, "moe_intermediate_size": INNER,
        "moe_shared_expert_intermediate_size": INNER, "n_routed_experts": EXPERTS, "n_group": 1,
        "num_experts_per_tok": 2, "topk_group": 1, "layers_block_type": ["moe"],
        "mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 8},
    "JetMoe": {
        "hidden_size": WIDTH, "num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 40,
        "kv_channels": 8, "intermediate_size": INNER, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2},
    "Dbrx": {
        "d_model": WIDTH, "n_heads": 2, "n_layers": 1, "max_seq_len": 64, "vocab_size": 40,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2}},
}  # fmt: skip
OLD = {
    "GraniteMoeShared": {"gate_up_proj": "input_linear", "down_proj": "output_linear"},
    "AriaText": {"gate_up_proj": "experts.fc1", "down_proj": "experts.fc2"},
}
"""Modules of transformers 4 beside `experts`, by the parameter of transformers 5."""
NESTED = {"w1": 2, "v1": 1, "gate_up_proj": 1, "up_proj": 1}
TARGETS = {
    "as it is": {"to": "peft"}, "stacked": {"experts": "stacked"}, "each": {"experts": "each"},
    "3-D": {"experts": "3d"}, "Tinker": {"to": "tinker"}, "MLX": {"to": "mlx"},
    "GGUF": {"to": "gguf"},
}  # fmt: skip
REFUSED = {
    "GraniteMoeShared": {"MLX"}, "AriaText": {"MLX", "GGUF"}, "NemotronH": set(),
    "JetMoe": {"each", "3-D", "Tinker", "MLX", "GGUF"},
    "Dbrx": {"each", "3-D", "Tinker"},
}  # fmt: skip
"""What the program has no class for, or where the class has no other layout."""


def model_of(kind):
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def flat(a, b, *, swapped):
    if a.ndim == 2:
        return a, b
    if swapped:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    return a.reshape(-1, a.shape[2]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def saved(kind, folder, *, old=False, swapped=False):
    """Write an adapter of the class's experts; return ΔW by parameter, as it is stored."""
    rng = np.random.default_rng(0)
    tensors, deltas, targets = {}, {}, []
    for name, parameter in model_of(kind).named_parameters():
        owner, _, leaf = name.rpartition(".")
        of_experts = parameter.ndim == 3 or leaf in ("w1", "v1", "w2")
        if not of_experts or "shared" in name:
            continue
        *stack, rows, columns = parameter.shape
        turned = kind == "AriaText"
        out, in_ = (columns, rows) if turned else (rows, columns)
        a = rng.normal(0, 0.1, (*stack, RANK, in_)).astype(np.float32)
        b = rng.normal(0, 0.1, (*stack, out, RANK)).astype(np.float32)
        delta = 2.0 * b.astype(np.float64) @ a
        deltas[name] = delta.transpose(0, 2, 1) if turned else delta
        path = owner if leaf == "weight" else owner + ".base_layer" * NESTED.get(leaf, 0)
        if old and kind in OLD:
            path = f"{owner.removesuffix('.experts')}.{OLD[kind][leaf]}"
        stored = dict(zip("AB", flat(a, b, swapped=swapped), strict=True))
        for part, values in stored.items():
            key = f"base_model.model.{path}.lora_{part}.weight"
            tensors[key] = np.ascontiguousarray(values)
        targets.append(f"{path.removesuffix('.base_layer')}.weight" if old else name)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": [],
              "target_parameters": targets, "peft_version": "0.18.1" if swapped else "0.21.2",
              "base_model_name_or_path": "made/up"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def off(base, fused, kind, deltas):
    cls = type(model_of(kind))
    old, new = (
        {
            n: p.detach().numpy().astype(np.float64)
            for n, p in cls.from_pretrained(x).named_parameters()
        }
        for x in (base, fused)
    )
    worst = max(np.abs(new[n] - old[n] - deltas.get(n, 0)).max() for n in old)
    return worst / max(np.abs(values).max() for values in old.values())


@pytest.mark.parametrize("swapped", [False, True], ids=["0.21", "0.18"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_layout_is_the_same_change(kind, swapped, tmp_path):
    base = tmp_path / "base"
    model_of(kind).save_pretrained(base)
    deltas = saved(kind, tmp_path / "a", old=swapped and kind in OLD, swapped=swapped)
    lt.fuse(base, tmp_path / "a", output=tmp_path / "fused")
    assert off(base, tmp_path / "fused", kind, deltas) <= 2.0**-22
    for number, (target, asked) in enumerate(TARGETS.items()):
        out = tmp_path / (f"{number}.gguf" if target == "GGUF" else str(number))
        if target in REFUSED[kind]:
            with pytest.raises(UnsupportedError):
                lt.convert(tmp_path / "a", base=base, output=out, **asked)
            continue
        lt.convert(tmp_path / "a", base=base, output=out, **asked)
        if target in ("MLX", "GGUF"):
            lt.convert(out, base=base, to="peft", output=tmp_path / "back" / target)
            out = tmp_path / "back" / target
        lt.fuse(base, out, output=tmp_path / f"fused {number}")
        assert off(base, tmp_path / f"fused {number}", kind, deltas) <= 2.0**-22, target


@pytest.mark.parametrize("kind", ["GraniteMoeShared", "AriaText", "NemotronH", "JetMoe"])
def test_what_was_fused_is_extracted(kind, tmp_path):
    """JetMoE's modules that are one stack each had no place in a LoRA."""
    base = tmp_path / "base"
    model_of(kind).save_pretrained(base)
    deltas = saved(kind, tmp_path / "a")
    lt.fuse(base, tmp_path / "a", output=tmp_path / "fused")
    lt.extract(base, tmp_path / "fused", rank=RANK, output=tmp_path / "b")
    lt.fuse(base, tmp_path / "b", output=tmp_path / "again")
    assert off(base, tmp_path / "again", kind, deltas) <= 2.0**-20
