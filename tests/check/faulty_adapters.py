"""Adapters with one fault each, by the rule that finds it, and how each is checked.

`test_rules.py` holds that the rule finds it, `test_fixes.py` that the documented fix mends it.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from handmade_adapters import CARD, IN, MODULES, OUT, base, folder, tensors
from safetensors.numpy import load_file, save_file

import loratools as lt

FIRST = f"base_model.model.{MODULES[0]}"
A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"


def changed(**arrays):
    return {**tensors(), **{{"a": A, "b": B}[name]: array for name, array in arrays.items()}}


def renamed(old, new):
    return {key.replace(old, new): array for key, array in tensors().items()}


def with_file(path, name, content=b"x"):
    folder(path)
    (path / name).write_bytes(content)
    return path


def linked(path):
    folder(path)
    (path.parent / "outside.txt").write_text("x")
    (path / "notes.txt").symlink_to(path.parent / "outside.txt")
    return path


def nested(path):
    folder(path / "checkpoint-1")
    return folder(path)


def pickled(path):
    torch = pytest.importorskip("torch")
    folder(path)
    (path / "adapter_model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in tensors().items()}, path / "adapter_model.bin")
    return path


def truncated(path):
    folder(path)
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return path


def experts(path, **config):
    name = "base_model.model.model.layers.0.mlp.experts"
    weights = {f"{name}.lora_A.weight": np.ones((8, IN), np.float32),
               f"{name}.lora_B.weight": np.ones((OUT, 8), np.float32)}  # fmt: skip
    values = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": [], "r": 4}
    return folder(path, weights, **(values | config))


def single_experts(path, shared=True):
    """Return an adapter of experts one by one, with a shared expert beside them."""
    names = [f"experts.{e}.{leaf}" for e in range(2) for leaf in ("gate_proj", "up_proj")]
    names += ["shared_expert.gate_proj"] if shared else []
    weights = tensors()
    for name in names:
        key = f"base_model.model.model.layers.0.mlp.{name}"
        weights[f"{key}.lora_A.weight"] = np.ones((4, IN), np.float32)
        weights[f"{key}.lora_B.weight"] = np.ones((OUT, 4), np.float32)
    return folder(path, weights, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"])


def in_parts(path):
    """Return an adapter of a part of a projection, as Tinker has it."""
    weights = tensors()
    key = "base_model.model.model.layers.0.linear_attn.in_proj_q"
    weights[f"{key}.lora_A.weight"] = np.ones((4, IN), np.float32)
    weights[f"{key}.lora_B.weight"] = np.ones((OUT, 4), np.float32)
    return folder(path, weights, target_modules=["q_proj", "v_proj", "in_proj_q"])


def doubtful(path):
    """Return an adapter whose columns are alike expert by expert, and whose marker says else."""
    rng = np.random.default_rng(0)
    name = "base_model.model.model.layers.0.mlp.experts"
    b = rng.normal(size=(8, OUT, 1)) + 0.1 * rng.normal(size=(8, OUT, 4))
    weights = {
        f"{name}.lora_A.weight": rng.normal(size=(32, IN)).astype(np.float32),
        f"{name}.lora_B.weight": np.ascontiguousarray(
            b.transpose(1, 0, 2).reshape(OUT, 32), np.float32
        ),
    }
    return folder(path, weights, target_parameters=["mlp.experts.down_proj"], target_modules=[],
                  r=4, lora_B_layout="rank_major")  # fmt: skip


def embedding(path, name="model.embed_tokens"):
    key = f"base_model.model.{name}"
    weights = tensors() | {
        f"{key}.lora_embedding_A": np.ones((4, 16), np.float32),
        f"{key}.lora_embedding_B": np.ones((IN, 4), np.float32),
    }
    return folder(path, weights, target_modules=["embed_tokens", "q_proj", "v_proj"])


def trained_embedding(path):
    weights = tensors() | {
        "base_model.model.model.embed_tokens.weight": np.ones((20, IN), np.float32)
    }
    return folder(path, weights, modules_to_save=["embed_tokens"])


def wide_embedding(path):
    key = "base_model.model.model.embed_tokens.weight"
    weights = tensors() | {key: np.ones((16, IN + 1), np.float32)}
    return folder(path, weights, modules_to_save=["embed_tokens"])


def card(**values):
    lines = CARD.splitlines()
    for key, value in values.items():
        lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in lines]
    return "\n".join(line for line in lines if not line.endswith(": -"))


def dora(path):
    weights = tensors() | {
        f"base_model.model.{name}.lora_magnitude_vector": np.ones(OUT, np.float32)
        for name in MODULES
    }
    return folder(path, weights, use_dora=True)


def patterned(path):
    name = f"base_model.model.{MODULES[0]}"
    weights = tensors() | {f"{name}.lora_A.weight": np.ones((2, IN), np.float32),
                           f"{name}.lora_B.weight": np.ones((OUT, 2), np.float32)}  # fmt: skip
    return folder(path, weights, rank_pattern={MODULES[0]: 2})


def outlying(path):
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(9)]
    weights = tensors(names)
    weights["base_model.model.model.layers.4.mlp.up_proj.lora_B.weight"] *= 1000
    return folder(path, weights, target_modules=["up_proj"])


def biased(path):
    weights = tensors() | {f"{FIRST}.base_layer.bias": np.ones(OUT, np.float32)}
    return folder(path, weights, bias="lora_only")


def large(path):
    return folder(path, tensors(rank=1024), r=1024)


GOLDEN = Path(__file__).parents[1] / "golden" / "kinds"
SAMPLER = f"{FIRST}.lora_monteclora_sampler.default.gate"
MONTECLORA = {"monteclora_config": {"num_samples": 2}}
A_GGUF, B_GGUF = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"


def without_basis(path):
    """PEFT leaves out the bases of FRoD unless asked."""
    shutil.copytree(GOLDEN / "frod" / "adapter", path)
    weights = load_file(path / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "frod_V" not in k},
              path / "adapter_model.safetensors")  # fmt: skip
    return path


def renamed_weights(path):
    folder(path)
    (path / "adapter_model.safetensors").rename(path / "final.safetensors")
    return path


def dangling(path):
    folder(path)
    (path / "tokenizer.json").symlink_to(path / "nowhere.json")
    return path


def single(path, arrays):
    path = path.with_suffix(".safetensors")
    save_file(arrays, path)
    return path


def kohya(**more):
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    return {
        f"{name}.lora_down.weight": np.ones((4, IN), np.float32),
        f"{name}.lora_up.weight": np.ones((OUT, 4), np.float32),
        f"{name}.alpha": np.array(4.0, np.float32),
    } | more


def of_another_naming(path):
    """Stable Diffusion 3, of which diffusers has no converter of kohya's names."""
    name = "lora_unet_joint_blocks_0_x_block_attn_proj"
    arrays = {
        f"{name}.lora_down.weight": np.ones((4, IN), np.float32),
        f"{name}.lora_up.weight": np.ones((IN, 4), np.float32),
    }
    return single(path, arrays)


def of_a_bare_body(path):
    """Named as the body alone has them, which a class with an output layer keeps in `model`."""
    bare = {key.replace(".model.model.", ".model."): array for key, array in tensors().items()}
    return folder(path, bare)


OF_MAMBA = (MODULES[0], MODULES[1].replace("v_proj", "out_proj"))


def of_mamba(path):
    return folder(path, tensors(OF_MAMBA), target_modules=["q_proj", "out_proj"])


def unknown(path):
    return single(path, kohya(nobody_knows=np.ones(3, np.float32)))


def without_config(path):
    return single(path, tensors())


def described(path):
    path = single(path, kohya())
    save_file(kohya(), path, {"ss_tag_frequency": "x" * 70_000})
    return path


def repeated(path):
    """PEFT writes a saved embedding under its wrapper's name, too."""
    key = "base_model.model.model.embed_tokens"
    weights = tensors() | {
        f"{key}.weight": np.ones((20, IN), np.float32),
        f"{key}.original_module.weight": np.ones((20, IN), np.float32),
    }
    (folder(path, weights, modules_to_save=["embed_tokens"]) / "tokenizer.json").write_text("{}")
    return path


def repeating(path):
    """Its embedding is the base's own."""
    weights = tensors() | {
        "base_model.model.model.embed_tokens.weight": np.ones((16, IN), np.float32)
    }
    return folder(path, weights, modules_to_save=["embed_tokens"])


def gguf_file(path, arrays, kind=None):
    gguf = pytest.importorskip("gguf")
    path = path.with_suffix(".gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, array in arrays.items():
        if kind is not None and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair_of_gguf(width=64):
    random = np.random.default_rng(1)
    return {A_GGUF: random.normal(size=(32, width)).astype(np.float32),
            B_GGUF: random.normal(size=(width, 32)).astype(np.float32)}  # fmt: skip


def quantised(path):
    return gguf_file(path, pair_of_gguf(), "Q8_0")


def with_norm(path):
    return gguf_file(path, pair_of_gguf() | {"output_norm.weight": np.ones(64, np.float32)})


def guessed(path):
    """Nothing says how Unsloth has packed the experts of this folder."""
    module, random = "base_model.model.model.layers.0.mlp.experts", np.random.default_rng(0)
    count, rank, width, inner = 3, 2, 8, 5

    def packed(out, in_):
        a = random.normal(size=(count * rank, in_))
        b = random.normal(size=(out, count * rank))
        return a.astype(np.float32), b.astype(np.float32)

    weights = {}
    for name, (a, b) in ((f"{module}.base_layer", packed(2 * inner, width)),
                         (module, packed(width, inner))):  # fmt: skip
        weights |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    library = {"parent_library": "transformers.models.qwen3_moe.modeling_qwen3_moe",
               "base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}  # fmt: skip
    return folder(path, weights, target_modules=[], target_parameters=targets, r=rank,
                  auto_mapping=library)  # fmt: skip


def attention(path):
    name = "base_model.model.model.layers.0.attn.base_layer.out_proj"
    weights = {f"{name}.lora_A.weight": np.ones((4, IN), np.float32),
               f"{name}.lora_B.weight": np.ones((IN, 4), np.float32)}  # fmt: skip
    return folder(path, weights, target_modules=["attn"])


def gappy(path):
    """Layer 1 has no q_proj."""
    return folder(path, tensors([name for name in MODULES if name != MODULES[2]]))


def with_tokens(path):
    return with_file(path, "added_tokens.json", b'{"<new>": 16}')


def shared(path):
    """Write a set of one adapter in bases of its own."""
    path = path.with_name(f"{path.name}.safetensors")
    lt.fleet_share({"one": folder(path.with_suffix(".one"))}, rank=2, output=path)
    return path


CASES = {
    "LT001": truncated,
    "LT002": pickled,
    "LT003": lambda p: with_file(p, "adapter_model.bin"),
    "LT004": lambda p: with_file(p, "modeling.py"),
    "LT005": lambda p: with_file(p, "optimizer.pt"),
    "LT006": linked,
    "LT007": lambda p: folder(p, auto_mapping={"parent_library": "evil"}),
    "LT008": lambda p: with_file(p, "chat_template.jinja"),
    "LT009": lambda p: with_file(p, "holiday.jpg"),
    "LT010": nested,
    "LT011": described,
    "LT012": lambda p: with_file(p, "odd\u202ename.txt"),
    "LT015": shared,
    "LT101": lambda p: folder(p, {k: v for k, v in tensors().items() if k != B}),
    "LT102": lambda p: folder(p, changed(b=np.ones((OUT, 3), np.float32))),
    "LT104": lambda p: folder(
        p,
        tensors() | {k.replace("q_proj", "Q_proj"): v for k, v in tensors().items()},
        target_modules=["Q_proj", "q_proj", "v_proj"],
    ),
    "LT105": lambda p: folder(p, {}),
    "LT201": lambda p: folder(p, brand_new_option=3),
    "LT202": lambda p: folder(p, layer_replication=[[0, 1]]),
    "LT203": lambda p: folder(p, lora_alpha=0),
    "LT204": lambda p: folder(p, init_lora_weights="pissa"),
    "LT206": lambda p: folder(p, alora_invocation_tokens=[1, 2]),
    "LT211": lambda p: folder(p, base_model_name_or_path="/home/me/base"),
    "LT212": lambda p: folder(p, base_model_name_or_path=None),
    "LT213": lambda p: folder(p, target_modules=["v_proj", "q_proj"]),
    "LT214": lambda p: folder(p, lora_alpha=1000),
    "LT215": lambda p: folder(p, target_modules=["k_proj", "q_proj", "v_proj"]),
    "LT216": lambda p: folder(p, rank_pattern={"o_proj": 2}),
    "LT217": lambda p: folder(p, target_modules="(((q_proj"),
    "LT301": lambda p: folder(p, changed(a=np.full((4, IN), np.nan, np.float32))),
    "LT302": lambda p: folder(p, {k: v * ("lora_A" in k) for k, v in tensors().items()}),
    "LT303": lambda p: folder(p, changed(b=np.zeros((OUT, 4), np.float32))),
    "LT304": lambda p: folder(p, changed(b=np.full((OUT, 4), 1e6, np.float32))),
    "LT305": lambda p: folder(p, changed(b=np.ones((OUT, 4), np.float16))),
    "LT306": outlying,
    "LT307": lambda p: folder(p, changed(b=np.full((OUT, 4), 1e5, np.float32))),
    "LT308": lambda p: folder(p, changed(b=np.float32([[1, 1, 0, 0]] * OUT))),
    "LT401": lambda p: folder(p, target_modules=["q_proj"]),
    "LT402": lambda p: folder(
        p, renamed("self_attn", "_orig_mod.self_attn"), target_modules=["q_proj", "v_proj"]
    ),
    "LT403": lambda p: folder(p, renamed(".weight", ".default.weight")),
    "LT404": lambda p: folder(p, renamed("base_model.model.", "")),
    "LT405": lambda p: experts(p, peft_version="0.18.0"),
    "LT406": (folder, {"base": lambda p: base(p, modules=MODULES[:2])}),
    "LT407": (folder, {"base": lambda p: base(p, shape=(OUT, IN + 1))}),
    "LT408": (embedding, {"base": base}),
    "LT410": (trained_embedding, {"base": base}),
    "LT501": (folder, {"target": ["ollama"]}),
    "LT502": (folder, {"target": ["llamacpp"]}),
    "LT503": (dora, {"target": ["vllm"]}),
    "LT504": (large, {"target": ["vllm"]}),
    "LT505": (lambda p: folder(p, tensors(rank=32), r=32), {"target": ["vllm"]}),
    "LT506": (patterned, {"target": ["vllm@0.26"]}),
    "LT507": (patterned, {"target": ["lorax"]}),
    "LT509": (trained_embedding, {"target": ["vllm"]}),
    "LT510": (biased, {"target": ["vllm"]}),
    "LT511": (embedding, {"target": ["lorax"]}),
    "LT512": (
        lambda p: folder(p, renamed("q_proj", "c_attn"), target_modules=["c_attn", "v_proj"]),
        {"target": ["fireworks"]},
    ),
    "LT513": (pickled, {"target": ["together"]}),
    "LT701": lambda p: folder(p, card=None),
    "LT702": lambda p: folder(p, card="---\na: *b\n---\n"),
    "LT703": lambda p: folder(p, card=card(license="-")),
    "LT704": (
        folder, {"base": lambda p: base(p, card="---\nlicense: cc-by-nc-4.0\n---\n")},
    ),
    "LT705": lambda p: folder(p, card=card(base_model="org/other")),
    "LT706": lambda p: folder(p, card=card(base_model_relation="merge")),
    "LT707": lambda p: folder(p, card=card(pipeline_tag="-")),
    "LT708": trained_embedding,
    "LT013": renamed_weights,
    "LT014": dangling,
    "LT103": (unknown, {"carry_unknown": True}),
    "LT106": repeated,
    "LT107": (repeating, {"base": base}),
    "LT108": quantised,
    "LT109": with_norm,
    "LT110": lambda p: folder(p, tensors() | {SAMPLER: np.ones(3, np.float32)}, **MONTECLORA),
    "LT111": lambda p: folder(p, tensors() | {f"{FIRST}.lora_A_rho": np.ones((4, IN), np.float32)}),
    "LT113": guessed,
    "LT114": doubtful,
    "LT115": in_parts,
    "LT205": without_config,
    "LT207": without_basis,
    "LT208": lambda p: with_file(p, "reconstr_config.json"),
    "LT209": attention,
    "LT210": lambda p: folder(
        p, {"prompt_embeddings": np.ones((4, IN), np.float32)}, peft_type="PROMPT_TUNING"
    ),
    "LT218": (without_config, {"format": "safetensors"}),
    "LT409": lambda p: experts(p, lora_B_layout="grouped_by_expert"),
    "LT411": single_experts,
    "LT414": lambda p: experts(p, lora_dropout=0.1),
    "LT412": (of_a_bare_body, {"base": base}),
    "LT413": (of_mamba, {
        "base": lambda p: base(p, modules=OF_MAMBA, model_type="mamba", architectures=[]),
    }),
    "LT517": (lambda p: single_experts(p, shared=False), {"target": ["unsloth"]}),
    "LT508": (lambda p: folder(p, use_rslora=True), {"target": ["sglang"]}),
    "LT514": (lambda p: folder(p, init_lora_weights="pissa"), {"target": ["vllm"]}),
    "LT515": (gappy, {"target": ["lorax"]}),
    "LT518": (of_another_naming, {"target": ["diffusers"]}),
    "LT516": (with_tokens, {"target": ["sglang"], "base": base}),
}  # fmt: skip
"""Rule → what makes a folder that it is about; with options where it needs any."""


def made(case, tmp_path):
    make, options = case if isinstance(case, tuple) else (case, {})
    options = dict(options)
    if "base" in options:
        options["base"] = options["base"](tmp_path / "base")
    return make(tmp_path / "adapter"), options
