"""What the limits are measured with: two checkpoints, kohya files, and the least that is possible.

python limits_peer.py checkpoints | kohya FOLDER COUNT     write them into the current folder
python limits_peer.py optimum RANK                         least relative error of an extract
python limits_peer.py form FOLDER...                       form each ΔW once in float32
python limits_peer.py pair                                 what two processes at once gain over one
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
TRAINED_RANK = 32
KOHYA_MODULES, TAGS = 264, 400
PRODUCTS = 2400


def checkpoints() -> None:
    """Write `old` and `new`: bfloat16, apart by rank 32 and noise."""
    rng = np.random.default_rng(0)
    for name in ("old", "new"):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(CONFIG))
    old, new = {}, {}
    for name, (rows, columns) in SHAPES.items():
        weight = 0.02 * rng.standard_normal((rows, columns), dtype=np.float32)
        b = 0.02 * rng.standard_normal((rows, TRAINED_RANK), dtype=np.float32)
        a = 0.02 * rng.standard_normal((TRAINED_RANK, columns), dtype=np.float32)
        key = f"model.layers.0.{name}.weight"
        old[key] = weight.astype(ml_dtypes.bfloat16)
        new[key] = (weight + b @ a).astype(ml_dtypes.bfloat16)
    save_file(old, "old/model.safetensors")
    save_file(new, "new/model.safetensors")


def optimum(rank: int) -> float:
    """Return the least relative error that an extract of a rank can have."""
    old, new = (load_file(f"{name}/model.safetensors") for name in ("old", "new"))
    kept = whole = 0.0
    for key, weight in old.items():
        change = new[key].astype(np.float32) - weight.astype(np.float32)
        gram = np.zeros((change.shape[1],) * 2)
        for start in range(0, len(change), 1024):
            rows = change[start : start + 1024].astype(np.float64)
            gram += rows.T @ rows
        energies = np.linalg.eigvalsh(gram)
        whole += float(energies.sum())
        kept += float(energies[-rank:].sum())
    return float(np.sqrt(1.0 - kept / whole))


def form(folders: list[str]) -> float:
    """Return the processor seconds of forming every ΔW once, reading apart."""
    total = 0.0
    for folder in folders:
        stored = load_file(f"{folder}/adapter_model.safetensors")
        factors = {key: value.astype(np.float32) for key, value in stored.items()}
        start = time.process_time()
        for key, a in factors.items():
            if "lora_A" in key:
                factors[key.replace("lora_A", "lora_B")] @ a
        total += time.process_time() - start
    return total


def pair() -> float:
    """Return by how much two processes at once, which share nothing, do more than one alone."""
    alone, both = (min(_seconds(count) for _ in range(3)) for count in (1, 2))
    return 2.0 * alone / both


def _seconds(processes: int) -> float:
    start = multiprocessing.Barrier(processes + 1)
    done = multiprocessing.Barrier(processes + 1)
    for _ in range(processes):
        multiprocessing.Process(target=_multiply, args=(start, done), daemon=True).start()
    start.wait()
    began = time.monotonic()
    done.wait()
    return time.monotonic() - began


def _multiply(start: Any, done: Any) -> None:
    """Form blocks of a ΔW in float64 and round them, as an elementwise merge does."""
    left, right = np.ones((64, 16)), np.ones((16, 4096))
    with threadpool_limits(1):
        start.wait()
        for _ in range(PRODUCTS):
            np.abs((left @ right).astype(np.float32))
        done.wait()


def kohya(folder: str, count: int) -> None:
    """Write small files whose headers are those of real ones, training tags included."""
    tags = {"img": {f"tag {number}, with a comma": number for number in range(TAGS)}}
    metadata = {"ss_tag_frequency": json.dumps(tags), "ss_network_dim": "1"}
    metadata |= {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_alpha": "1"}
    tensors = {}
    for block in range(KOHYA_MODULES // 4):
        for name in ("to_q", "to_k", "to_v", "to_out_0"):
            place = f"down_blocks_1_attentions_0_transformer_blocks_{block}_attn1_{name}"
            tensors[f"lora_unet_{place}.lora_down.weight"] = np.ones((1, 4), np.float16)
            tensors[f"lora_unet_{place}.lora_up.weight"] = np.ones((4, 1), np.float16)
            tensors[f"lora_unet_{place}.alpha"] = np.array(1.0, np.float16)
    Path(folder).mkdir(parents=True)
    for number in range(count):
        save_file(tensors, Path(folder, f"style-{number:04}.safetensors"), metadata)


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "checkpoints":
        checkpoints()
    elif command == "kohya":
        kohya(words[0], int(words[1]))
    elif command == "pair":
        print(pair())
    else:
        print(optimum(int(words[0])) if command == "optimum" else form(words))
