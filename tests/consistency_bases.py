"""Bases of every kind with an adapter for each, and how far the changes of commands are apart."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from loratools.cli import cli
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import LoratoolsError

U32, RANK, OUT, IN, EXPERTS = 2.0**-24, 4, 32, 64, 3
LAYER = "model.layers.0"
Q, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj"
STACK = f"{LAYER}.mlp.experts.down_proj"
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": OUT,
    "intermediate_size": IN, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_hidden_layers": 1, "vocab_size": 40, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": EXPERTS,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": OUT, "n_layer": 1}
FP8 = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32],
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A base, an adapter for it, the weights that it changes, and the changes.

    Attributes:
        base: folder.
        adapter: PEFT folder.
        weights: float64 values of the base's changed tensors, as stored.
        changes: ΔW of each, in its layout.
        fused: the change that fusing the adapter made to each; filled in by `setting`.
    """

    base: Path
    adapter: Path
    weights: dict[str, Array]
    changes: dict[str, Array]
    fused: dict[str, Array] = field(default_factory=dict)


def run(*arguments: object, code: int = 0) -> Any:
    """Run a command, check its exit code, and return its JSON; of a failure, the error's text."""
    given = [*map(str, arguments), "--json"]
    done = CliRunner().invoke(cli, given, standalone_mode=False)
    if done.exception is not None:
        assert isinstance(done.exception, LoratoolsError), (given, done.exception)
        assert code == 2, f"{given}: {done.exception}"
        return str(done.exception)
    assert (done.return_value or 0) == code, f"{given}: {done.output}"
    return json.loads(done.stdout)


def numbers(seed: int, *shape: int) -> Array:
    """Return random values of few bits, whose products and sums are exact in float64."""
    return np.round(np.random.default_rng(seed).standard_normal(shape) * 16) / 16


def write_base(folder: Path, tensors: dict[str, Array], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, factors: dict[str, tuple[Array, Array]], **config: Any) -> Path:
    """Write a PEFT folder of scale 1/2."""
    tensors = {}
    for path, (b, a) in factors.items():
        prefix = f"base_model.model.{path}.lora_"
        tensors |= {f"{prefix}A.weight": a.astype("f4"), f"{prefix}B.weight": b.astype("f4")}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({path.rpartition(".")[2] for path in factors})
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK / 2, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


def llama_tensors(dtype: Any) -> dict[str, Array]:
    """Return a whole tiny Llama, some of whose weights have been trained."""
    shapes = {
        f"{LAYER}.mlp.gate_proj": (IN, OUT), f"{LAYER}.mlp.up_proj": (IN, OUT), DOWN: (OUT, IN),
        "model.embed_tokens": (40, OUT), "lm_head": (40, OUT),
    } | {f"{LAYER}.self_attn.{letter}_proj": (OUT, OUT) for letter in "qkvo"}  # fmt: skip
    norms = ("input_layernorm", "post_attention_layernorm")
    found = {f"{LAYER}.{name}.weight": np.ones(OUT) for name in norms}
    found |= {"model.norm.weight": np.ones(OUT)}
    found |= {
        f"{name}.weight": numbers(i, *shape) for i, (name, shape) in enumerate(shapes.items())
    }
    return {name: value.astype(dtype) for name, value in found.items()}


def llama_adapter(folder: Path) -> tuple[Path, dict[str, Array]]:
    """Write an adapter of two modules; return it and its changes."""
    factors = {
        path: (numbers(seed, OUT, RANK), numbers(seed + 1, RANK, in_))
        for path, in_, seed in ((Q, OUT, 20), (DOWN, IN, 30))
    }
    changes = {f"{path}.weight": 0.5 * (b @ a) for path, (b, a) in factors.items()}
    return write_adapter(folder, factors), changes


def wide(tensors: dict[str, Array], names: Any) -> dict[str, Array]:
    return {name: tensors[name].astype(np.float64) for name in names}


def in_f32(root: Path) -> Setting:
    adapter, changes = llama_adapter(root / "adapter")
    tensors = llama_tensors(np.float32)
    base = write_base(root / "base", tensors, LLAMA)
    return Setting(base, adapter, wide(tensors, changes), changes)


def in_bf16(root: Path) -> Setting:
    adapter, changes = llama_adapter(root / "adapter")
    tensors = llama_tensors(ml_dtypes.bfloat16)
    base = write_base(root / "base", tensors, LLAMA)
    return Setting(base, adapter, wide(tensors, changes), changes)


def tied(root: Path) -> Setting:
    adapter, changes = llama_adapter(root / "adapter")
    tensors = llama_tensors(ml_dtypes.bfloat16)
    del tensors["lm_head.weight"]
    base = write_base(root / "base", tensors, LLAMA | {"tie_word_embeddings": True})
    return Setting(base, adapter, wide(tensors, changes), changes)


def in_four_bits(root: Path) -> Setting:
    adapter, changes = llama_adapter(root / "adapter")
    write_base(root / "wide", llama_tensors(np.float32), LLAMA)
    run("quantize", root / "wide", "-o", root / "base")
    run("dequantize", root / "base", "-o", root / "meant", "--dtype", "f32")
    weights = wide(load_file(root / "meant" / "model.safetensors"), changes)
    return Setting(root / "base", adapter, weights, changes)


def in_eight_bits(root: Path) -> Setting:
    adapter, changes = llama_adapter(root / "adapter")
    tensors = llama_tensors(ml_dtypes.bfloat16)
    weights = {}
    for name in [name for name in tensors if "proj" in name]:
        codes = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        rows, columns = codes.shape[0] // 16, codes.shape[1] // 32
        scale = 2.0 ** np.arange(rows * columns).reshape(rows, columns) / 4
        tensors |= {name: codes, f"{name}_scale_inv": scale.astype("f4")}
        weights[name] = codes.astype(np.float64) * np.kron(scale, np.ones((16, 32)))
    base = write_base(root / "base", tensors, LLAMA | {"quantization_config": FP8})
    return Setting(base, adapter, {name: weights[name] for name in changes}, changes)


def turned(root: Path) -> Setting:
    """GPT-2, whose Conv1D weights are (in, out)."""
    path = "transformer.h.0.attn.c_attn"
    b, a = numbers(40, 3 * OUT, RANK), numbers(41, RANK, OUT)
    key = f"{path}.weight"
    tensors = {
        key: numbers(42, OUT, 3 * OUT).astype("f4"),
        "transformer.wte.weight": numbers(43, 40, OUT).astype("f4"),
    }
    base = write_base(root / "base", tensors, GPT2)
    adapter = write_adapter(root / "adapter", {path: (b, a)}, fan_in_fan_out=True)
    return Setting(base, adapter, wide(tensors, [key]), {key: 0.5 * (b @ a).T})


def stacked(root: Path) -> Setting:
    """Mixtral, whose experts are one tensor; its adapter is extracted from the tuned model."""
    tensors = llama_tensors(np.float32)
    tensors = {name: value for name, value in tensors.items() if ".mlp." not in name}
    tensors |= {
        f"{LAYER}.mlp.experts.gate_up_proj": numbers(50, EXPERTS, 2 * IN, OUT).astype("f4"),
        STACK: numbers(51, EXPERTS, OUT, IN).astype("f4"),
        f"{LAYER}.mlp.gate.weight": numbers(52, EXPERTS, OUT).astype("f4"),
    }
    base = write_base(root / "base", tensors, MIXTRAL)
    changes = {
        STACK: numbers(53, EXPERTS, OUT, RANK) @ numbers(54, EXPERTS, RANK, IN) / 2,
        f"{Q}.weight": numbers(55, OUT, RANK) @ numbers(56, RANK, OUT) / 2,
    }
    new = {name: (tensors[name] + change).astype("f4") for name, change in changes.items()}
    tuned = write_base(root / "tuned", tensors | new, MIXTRAL)
    run("extract", base, tuned, "-o", root / "adapter", "--rank", RANK, "--dtype", "f32")
    return Setting(base, root / "adapter", wide(tensors, changes), changes)


BASES = {
    "f32": in_f32, "bf16": in_bf16, "tied": tied, "four-bit": in_four_bits, "fp8": in_eight_bits,
    "conv1d": turned, "experts": stacked,
}  # fmt: skip


def applied(here: Setting, adapter: Path, out: Path) -> dict[str, Array]:
    """Return the change that fusing an adapter in float32 makes to each weight, in float64."""
    run("fuse", here.base, adapter, "-o", out, "--dtype", "f32", "--overwrite")
    fused = load_file(out / "model.safetensors")
    return {name: fused[name].astype(np.float64) - here.weights[name] for name in here.weights}


def size(tensors: dict[str, Array]) -> float:
    return float(np.sqrt(sum(np.sum(value**2) for value in tensors.values())))


def gap(one: dict[str, Array], other: dict[str, Array]) -> float:
    assert set(one) == set(other)
    return size({name: one[name] - other[name] for name in one})


def rounding(here: Setting) -> float:
    """Return the most that storing W + ΔW in float32 moves all weights."""
    return U32 * size({name: here.weights[name] + here.changes[name] for name in here.weights})


def factor_rounding(here: Setting, unit: float = U32) -> float:
    """Return the most that storing balanced factors moves all changes: 2u‖√S‖² for each matrix."""
    found = 0.0
    for change in here.changes.values():
        sums = np.linalg.svd(change, compute_uv=False).sum(-1)
        found += float(np.sum((2 * unit * sums + unit**2 * sums) ** 2))
    return found**0.5


def dora(here: Setting, folder: Path) -> Path:
    """Write a DoRA with the adapter's factors and magnitudes that are not those of W + ΔW."""
    tensors = load_file(here.adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if ".lora_B." in name]:
        gains = 1 + 0.25 * np.abs(numbers(60, tensors[name].shape[0]))
        path = name.removeprefix("base_model.model.").partition(".lora_")[0]
        whole = here.weights[f"{path}.weight"] + here.changes[f"{path}.weight"]
        turned = whole.shape[0] != tensors[name].shape[0]
        lengths = np.linalg.norm(whole, axis=0 if turned else 1)
        tensors[f"base_model.model.{path}.lora_magnitude_vector"] = (gains * lengths).astype("f4")
    config = json.loads((here.adapter / "adapter_config.json").read_text())
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    return folder


def permuted(weight: Array) -> Array:
    """Return rows of q_proj in llama.cpp's order: each head's halves interleaved."""
    heads = LLAMA["num_attention_heads"]
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
