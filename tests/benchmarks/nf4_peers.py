"""Quantise or dequantise every weight of a checkpoint in memory, and print how long it took.

Run as a child process. Only the arithmetic is timed: not imports, reading or writing. What is
timed of bitsandbytes is its public function, weight by weight, with a fresh output each, in torch's
threads; of ours the codec alone, with threads over weights.

`whole` is a complete program around bitsandbytes: load a shard, quantise it, save it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def bnb_quantize(folder: Path, threads: int) -> float:
    """Return seconds of `quantize_4bit`."""
    import bitsandbytes.functional as functional
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    spent = 0.0
    for shard in _shards(folder):
        for tensor in load_file(shard).values():
            start = time.perf_counter()
            functional.quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
            spent += time.perf_counter() - start
    return spent


def bnb_dequantize(folder: Path, threads: int) -> float:
    """Return seconds of `dequantize_4bit` of what `loratools quantize` wrote."""
    import bitsandbytes.functional as functional
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    spent = 0.0
    for shard in _shards(folder):
        tensors = load_file(shard)
        for key in [key for key in tensors if f"{key}.absmax" in tensors]:
            parts = {k: v for k, v in tensors.items() if k.startswith(f"{key}.")}
            state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            start = time.perf_counter()
            functional.dequantize_4bit(tensors[key], state)
            spent += time.perf_counter() - start
    return spent


def bnb_whole(folder: Path, threads: int) -> float:
    """Load, quantise and save every shard; returns the seconds of all that."""
    import bitsandbytes.functional as functional
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(threads)
    out = folder.with_name("whole")
    out.mkdir(exist_ok=True)
    start = time.perf_counter()
    for shard in _shards(folder):
        saved = {}
        for key, tensor in load_file(shard).items():
            packed, state = functional.quantize_4bit(tensor, compress_statistics=True)
            saved[key] = packed
            saved |= {f"{key}.{k}": v for k, v in state.as_dict(packed=True).items()}
        save_file(saved, out / shard.name, metadata={"format": "pt"})
    return time.perf_counter() - start


def our_quantize(folder: Path, threads: int) -> float:
    """Return seconds of our codec, the error it measures included."""
    import numpy as np

    from loratools.base.fourbit.encode import FourBitOptions, StreamingQuantizer
    from loratools_formats.checkpoints.checkpoint import read_checkpoint

    def job(values: Any) -> None:
        quantizer = StreamingQuantizer("w", values.size, FourBitOptions())
        for _ in quantizer.push(values):
            pass
        quantizer.finish()

    refs = read_checkpoint(folder).tensors.values()
    return _spent(job, [np.array(ref.load()) for ref in refs], threads)


def our_dequantize(folder: Path, threads: int) -> float:
    """Return seconds of our codec into a fresh output, reading from the page cache."""
    import ml_dtypes
    import numpy as np

    from loratools.base.fourbit.decode import Dequantizer
    from loratools_formats.checkpoints.bitsandbytes import quantized_weights
    from loratools_formats.checkpoints.checkpoint import read_checkpoint

    def job(weight: Any) -> None:
        out = np.empty(weight.numel, ml_dtypes.bfloat16)
        Dequantizer(weight).elements(0, weight.numel, out)

    weights = quantized_weights(read_checkpoint(folder).tensors).values()
    return _spent(job, weights, threads)


def _spent(job: Callable[[Any], None], items: Iterable[Any], threads: int) -> float:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(job, items))
        return time.perf_counter() - start


MODES = {
    "bnb-quantize": bnb_quantize,
    "bnb-dequantize": bnb_dequantize,
    "bnb-whole": bnb_whole,
    "our-quantize": our_quantize,
    "our-dequantize": our_dequantize,
}


def main() -> None:
    """Parse the command line and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    print(json.dumps(MODES[arguments.mode](arguments.folder, arguments.threads)))


if __name__ == "__main__":
    main()
