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

CONFIGS = {
    "llama": ("LlamaConfig", SIZES),
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


def adapted(model, seed=0, **config):
    """Return the model with a random LoRA, as PEFT makes it."""
    import torch
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def save(model, folder):
    """Save a base model as llama.cpp's converter wants it."""
    model.save_pretrained(folder)
    vocabulary = {f"t{token}": token for token in range(VOCABULARY)}
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []})
    )


def expected(model):
    """Return log-probabilities of the token after PROMPT, in float64."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def convert_bases(folders):
    done = subprocess.run(
        [sys.executable, HERE / "llama_cpp_bases.py", *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def start_llama_cpp(base, adapters, scales, vocabulary=VOCABULARY, prompt=PROMPT):
    request = {
        "base": str(base),
        "adapters": list(map(str, adapters)),
        "prompt": prompt,
        "vocabulary": vocabulary,
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
