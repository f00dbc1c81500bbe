"""Tiny random models, PEFT adapters for them, and what torch predicts with each."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
VOCABULARY = 384
PROMPT = [17, 300, 45, 101, 222, 9, 350, 64, 128, 77]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}
HEAD = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# K-quants need rows of 256.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}

CONFIGS = {
    "llama": ("LlamaConfig", SIZES),
    "wide llama": ("LlamaConfig", SIZES | WIDE),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", SIZES | HEAD),
    "qwen3moe": ("Qwen3MoeConfig", SIZES | HEAD | EXPERTS | {"norm_topk_prob": True}),
    "mixtral": (
        "MixtralConfig",
        SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        SIZES | HEAD | {"tie_word_embeddings": True, "query_pre_attn_scalar": 16},
    ),
    "phi3": ("Phi3Config", SIZES | {"num_key_value_heads": 4}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_ctx": 256,
            "n_positions": 256,
            "initializer_range": 0.15,
        },
    ),
}
TIED = {"gemma3", "gpt2"}
GELU = {"gemma3", "gpt2"}


ATTENTION = {name: ["q_proj", "k_proj", "v_proj", "o_proj"] for name in CONFIGS} | {
    "phi3": ["qkv_proj", "o_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
}
MLP = {name: ["gate_proj", "up_proj", "down_proj"] for name in CONFIGS} | {
    "phi3": ["gate_up_proj", "mlp.down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
    "qwen3moe": [],
    "mixtral": [],
}


def variants(name):
    """Return LoRA configurations by what they try."""
    linears = ATTENTION[name] + MLP[name]
    one, other = linears[0], linears[-1]
    basic = {"r": 8, "lora_alpha": 16, "target_modules": linears}
    if name == "gpt2":
        basic["fan_in_fan_out"] = True
    found = {
        "plain": basic,
        "rslora": basic | {"use_rslora": True},
        "rank pattern": basic | {"rank_pattern": {one: 4, other: 3}},
        "alpha pattern": basic | {"alpha_pattern": {one: 4, other: 40}},
        "all": basic
        | {"use_rslora": True, "rank_pattern": {one: 4}, "alpha_pattern": {other: 5.5}},
    }
    if name not in TIED:
        found["embedding"] = basic | {"target_modules": ["embed_tokens", one]}
        found["output"] = basic | {"target_modules": ["lm_head", one]}
    if name in ("qwen3moe", "mixtral"):
        found["experts"] = basic | {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        }
        found["router"] = basic | {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
    return found


def make_model(name):
    import torch
    import transformers

    torch.manual_seed(0)
    kind, values = CONFIGS[name]
    config = getattr(transformers, kind)(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if key.endswith("mlp.gate.weight"):
                parameter.mul_(4.0)
    return model.eval()


def adapted(model, seed=0, std=0.1, **config):
    """Return the model with a random LoRA, as PEFT makes it."""
    import torch
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def save(model, folder):
    """Save a base model as llama.cpp's converter wants it."""
    model.save_pretrained(folder)
    vocabulary = {f"t{token}": token for token in range(VOCABULARY)}
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []})
    )


def expected(model, prompt=PROMPT):
    """Return log-probabilities of the token after the prompt, in float64."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def convert_bases(folders):
    done = subprocess.run(
        [sys.executable, HERE / "llama_cpp_bases.py", *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def quantised_base(source, out, kind):
    """Store the matrices of a GGUF model of 32-bit floats in another type."""
    import os

    from loratools_formats.containers.gguf.ggml_types import BY_NAME
    from loratools_formats.containers.gguf.model import ModelLayout
    from loratools_formats.containers.gguf.splits import read_model

    base = read_model(source)
    matrices = {n for n, t in base.tensors.items() if len(t.shape) == 2 and "gate_inp" not in n}
    layout = ModelLayout(base, dict.fromkeys(matrices, BY_NAME[kind]))
    descriptor = os.open(out, os.O_RDWR | os.O_CREAT, 0o666)
    layout.write_header(descriptor)
    for name, tensor in base.tensors.items():
        if name in matrices:
            values = np.frombuffer(tensor.raw(), "<f4").reshape(tensor.shape)
            os.pwrite(descriptor, quantised(values, kind), layout.offsets[name])
        else:
            layout.copy_tensor(name, descriptor)
    os.close(descriptor)


def split_base(source, out, most):
    """Write a GGUF model again, at most `most` tensors to a file; return the first file."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(out, architecture, split_max_tensors=most)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), *field.types[:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(out.parent.glob(f"{out.stem}-*"))


def quantised(values, kind):
    """Return values as stored in a type, made by ggml itself."""
    import ctypes

    import xllamacpp
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    code = GGMLQuantizationType[kind]
    if kind == "F16":
        return values.astype("<f2").tobytes()
    block, nbytes = GGML_QUANT_SIZES[code]
    out = ctypes.create_string_buffer(values.size // block * nbytes)
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = library.ggml_quantize_chunk(
        int(code),
        np.ascontiguousarray(values, np.float32).ctypes.data_as(ctypes.c_void_p),
        out,
        ctypes.c_int64(0),
        ctypes.c_int64(values.shape[0]),
        ctypes.c_int64(values.shape[1]),
        None,
    )
    assert written == len(out)
    return out.raw


def start_llama_cpp(base, adapters, scales, vocabulary=VOCABULARY, prompt=PROMPT, count=None):
    request = {
        "base": str(base),
        "adapters": list(map(str, adapters)),
        "prompt": prompt,
        "vocabulary": vocabulary,
        "count": count or vocabulary,
        "scales": scales,
    }
    return subprocess.run(
        [sys.executable, HERE / "llama_cpp_run.py"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )


def from_llama_cpp(base, adapters, scales=None, **options):
    """Return log-probabilities for each list of scales; by default each adapter alone."""
    if scales is None:
        scales = np.eye(len(adapters)).tolist()
    done = start_llama_cpp(base, adapters, scales, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.array(json.loads(done.stdout.splitlines()[-1]), dtype=np.float64)
