"""Make a GGUF model with the shapes of a 1.1B Llama, its matrices in one type.

Every layer has the same values. Blocks of K types, which gguf-py cannot make, are random bits with
small scales.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
from synthetic_base import HIDDEN, KEY_VALUE, SHAPES

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEADS, WIDTH = 32, 64


def stored(shape: tuple[int, int], kind: gguf.GGMLQuantizationType, seed: int) -> np.ndarray:
    """Return the bytes of a matrix, or its values if they are plain."""
    rng = np.random.default_rng(seed)
    if kind == gguf.GGMLQuantizationType.Q4_K:
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (shape[0], shape[1] // block, nbytes), dtype=np.uint8)
        blocks[..., :4] = np.array([1e-4, 1e-3], np.float16).view(np.uint8)
        return blocks.reshape(shape[0], -1)
    values = 0.02 * rng.standard_normal(shape, dtype=np.float32)
    return gguf.quants.quantize(values, kind)


def make(out: Path, kind: gguf.GGMLQuantizationType, layers: int) -> None:
    """Write the model."""
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type("model")
    writer.add_block_count(layers)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE // WIDTH)
    one = {name: stored(shape, kind, i) for i, (name, shape) in enumerate(SHAPES.items())}
    raw = None if kind == gguf.GGMLQuantizationType.F16 else kind
    for layer in range(layers):
        for name, values in one.items():
            writer.add_tensor(f"blk.{layer}.{NAMES[name]}.weight", values, raw_dtype=raw)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Parse the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=["F16", "Q8_0", "Q4_K"], required=True)
    parser.add_argument("--layers", type=int, required=True)
    arguments = parser.parse_args()
    make(arguments.out, gguf.GGMLQuantizationType[arguments.kind], arguments.layers)


if __name__ == "__main__":
    main()
