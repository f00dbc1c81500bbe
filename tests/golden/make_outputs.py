"""Makes the golden outputs of a released loratools: `python tests/golden/make_outputs.py`.

Run it with that release installed; the ones here are of 0.1.0. Later versions must read every
file for ever, find the changes that this one found, and repeat its recipes. Writes into
`outputs/VERSION/`:

    inputs/         adapters and a base model, of seeded random numbers
    ...             what each command below made of them
    expected.json   of every adapter, the shape and digest of each module's ΔW and what `info` told;
                    the digest of every model's weights; the commands

ΔW is scale · Σₖ bₖ aₖ in float64, with the ranks added one after the other, so that its bits depend
on no processor. The commands run with one worker in this script's process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from click.testing import CliRunner
from safetensors.numpy import save_file

OUTPUTS = Path(__file__).parent / "outputs"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 20,
    "tie_word_embeddings": False,
}
LAYER = "model.layers.0"
MODULES = {
    f"{LAYER}.self_attn.q_proj": (16, 16),
    f"{LAYER}.self_attn.k_proj": (8, 16),
    f"{LAYER}.mlp.down_proj": (16, 24),
}
FLUX = "lora_unet_double_blocks_0_img_mlp_0"

# What is made: the output's name, and the command that makes it in the folder.
COMMANDS = {
    "squeezed": "squeeze inputs/lora -o squeezed --rank 2",
    "squeezed-f16": "squeeze inputs/rslora -o squeezed-f16 --energy 0.9 --dtype f16",
    "squeezed-kohya.safetensors": "squeeze inputs/kohya.safetensors -o squeezed-kohya.safetensors"
    " --rank 2",
    "linear": "merge inputs/lora:0.75 inputs/rslora:-0.5 -o linear",
    "ties": "merge inputs/lora:0.75 inputs/rslora:0.5 -o ties --method ties --density 0.5 --rank 4",
    "dora-merged": "merge inputs/lora inputs/dora -o dora-merged --base inputs/model --rank 4",
    "plain": "to-lora inputs/dora -o plain --base inputs/model --rank 3",
    "dora": "to-dora inputs/lora -o dora --base inputs/model",
    "adapter.gguf": "convert inputs/lora adapter.gguf --base inputs/model",
    "mlx": "convert inputs/lora mlx --to mlx",
    "peft-of-gguf": "convert adapter.gguf peft-of-gguf --to peft --base inputs/model",
    "kohya.safetensors": "convert inputs/flux kohya.safetensors --to kohya",
    "fused": "fuse inputs/model inputs/lora -o fused --dtype f32",
    "extracted": "extract inputs/model fused -o extracted --rank 4",
    "four-bit": "quantize inputs/model -o four-bit",
    "dequantized": "dequantize four-bit -o dequantized",
}
MODELS = ("fused", "four-bit", "dequantized")


def main() -> None:
    """Write the outputs of the installed version."""
    from loratools import __version__

    folder = OUTPUTS / __version__
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    _write_inputs(Path("inputs"))
    for command in COMMANDS.values():
        run(*command.split(), "--workers", "1")
    names = (
        "inputs/lora",
        "inputs/rslora",
        "inputs/dora",
        "inputs/flux",
        "inputs/kohya.safetensors",
    )
    adapters = [*names, *(name for name in COMMANDS if name not in MODELS)]
    expected = {
        "adapters": {name: {"modules": changes(name), "info": info(name)} for name in adapters},
        "commands": COMMANDS,
        "models": {name: sha256(Path(name, "model.safetensors")) for name in MODELS},
    }
    text = json.dumps(expected, indent=1, sort_keys=True, ensure_ascii=False)
    Path("expected.json").write_text(text + "\n")


def run(*arguments: str) -> str:
    """Run a command in this process and return what it prints."""
    from loratools.cli import cli

    if arguments[0] in ("convert", "quantize", "dequantize"):
        arguments = tuple(a for a in arguments if a not in ("--workers", "1"))
    done = CliRunner().invoke(cli, arguments)
    if done.exit_code:
        raise SystemExit(f"{' '.join(arguments)}: {done.output}")
    return done.stdout


def changes(name: str) -> dict[str, dict[str, Any]]:
    """Return shape, norm and digest of each module's ΔW, and the digest of a DoRA's magnitude."""
    from loratools_formats import read_adapter

    found = {}
    for module, delta in read_adapter(Path(name)).modules.items():
        direction = getattr(delta, "direction", delta)
        change = product(
            direction.b.load(np.float64), direction.a.load(np.float64), direction.scale
        )
        found[module] = described(change)
        magnitude = getattr(delta, "magnitude", None)
        if magnitude is not None:
            found[module]["magnitude"] = described(magnitude.load(np.float64))["sha256"]
    return found


def product(b: Any, a: Any, scale: float) -> Any:
    """Return scale · b @ a, adding the ranks one after the other."""
    total = np.zeros((b.shape[0], a.shape[1]))
    for column, row in zip(b.T, a, strict=True):
        total = total + column[:, None] * row
    return scale * total


def described(values: Any) -> dict[str, Any]:
    """Return shape, norm and digest of float64 values."""
    stored = np.ascontiguousarray(values, "<f8") + 0.0  # no negative zeros
    return {
        "shape": list(stored.shape),
        "norm": float(np.sqrt(np.sum(stored**2))),
        "sha256": hashlib.sha256(stored.tobytes()).hexdigest(),
    }


def info(name: str) -> dict[str, Any]:
    """Return what `info --json` tells of an adapter, but for its path."""
    told = json.loads(run("info", name, "--json"))
    kept = ("format", "base_model", "parameters", "dtypes", "provenance")
    return {key: told[key] for key in kept}


def sha256(path: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_inputs(folder: Path) -> None:
    rng = np.random.default_rng(1)
    f32, bf16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
    weights = {f"{name}.weight": rng.standard_normal(shape) for name, shape in _shapes().items()}
    weights |= {
        name: np.ones(16)
        for name in (
            f"{LAYER}.input_layernorm.weight",
            f"{LAYER}.post_attention_layernorm.weight",
            "model.norm.weight",
        )
    }
    (folder / "model").mkdir(parents=True)
    save(folder / "model" / "model.safetensors", weights, bf16)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    _peft(folder / "lora", _factors(rng, MODULES, 4), bf16, r=4, lora_alpha=6)
    _peft(folder / "rslora", _factors(rng, MODULES, 3), f32, r=3, lora_alpha=3, use_rslora=True)
    magnitudes = {
        f"{name}.lora_magnitude_vector": 1 + np.abs(rng.standard_normal(out))
        for name, (out, _) in MODULES.items()
    }
    dora = _factors(rng, MODULES, 2) | magnitudes
    _peft(folder / "dora", dora, f32, r=2, lora_alpha=4, use_dora=True)
    flux = {"transformer_blocks.0.ff.net.0.proj": (16, 8), "transformer_blocks.0.ff.net.2": (8, 16)}
    _peft(folder / "flux", _factors(rng, flux, 2), bf16, r=2, lora_alpha=1)
    b, a = rng.standard_normal((16, 4)), rng.standard_normal((4, 8))
    kohya = {f"{FLUX}.lora_up.weight": b, f"{FLUX}.lora_down.weight": a}
    save(folder / "kohya.safetensors", kohya | {f"{FLUX}.alpha": np.float64(2)}, f32)


def _shapes() -> dict[str, tuple[int, int]]:
    """Return the shapes of the base's matrices."""
    return MODULES | {
        f"{LAYER}.self_attn.v_proj": (8, 16),
        f"{LAYER}.self_attn.o_proj": (16, 16),
        f"{LAYER}.mlp.up_proj": (24, 16),
        f"{LAYER}.mlp.gate_proj": (24, 16),
        "model.embed_tokens": (20, 16),
        "lm_head": (20, 16),
    }


def _factors(rng: Any, modules: Mapping[str, tuple[int, int]], rank: int) -> dict[str, Any]:
    tensors = {}
    for name, (out, in_) in modules.items():
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, in_))
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((out, rank)) * 0.5 ** np.arange(rank)
    return tensors


def _peft(folder: Path, tensors: Mapping[str, Any], dtype: Any, **config: Any) -> None:
    folder.mkdir()
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    save(folder / "adapter_model.safetensors", named, dtype)
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    values = {"peft_type": "LORA", "target_modules": targets, "base_model_name_or_path": "tiny"}
    text = json.dumps(values | config, indent=1, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n")


def save(path: Path, tensors: Mapping[str, Any], dtype: Any) -> None:
    """Write values as one stored type."""
    save_file({key: np.asarray(value, dtype) for key, value in tensors.items()}, path)


if __name__ == "__main__":
    main()
