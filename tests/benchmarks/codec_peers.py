"""Decode one quantised weight in memory, and print GB/s of its 16-bit values at the best run.

Run as a child process: `codec_peers.py ours|library|encode FORMAT`. The weight is 2048 × 4096, its
codes are random; nothing is read from a disk, and the output is in 16 bits. Ours is computed as
`fuse` reads it, 2^19 elements at a time, on one core. The library's function is called as its own
loader does, on one thread where it has threads. compressed-tensors gets an eighth of the rows,
since it takes minutes to pack all of them. Seconds are of processor time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

OUT, IN = 2048, 4096
PACKED_ROWS = OUT // 8
RUNS = 3
CHUNK = 1 << 19
Tensors = dict[str, Any]


def _random(*shape: int, top: int = 256, dtype: Any = np.uint8) -> Any:
    return np.random.default_rng(0).integers(0, top, shape).astype(dtype)


def _scales(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(1).uniform(0.01, 0.1, shape).astype(dtype)


def _bf16() -> Any:
    from loratools_formats.core.dtypes import DTYPES

    return DTYPES["BF16"].numpy_dtype()


def _words(*shape: int) -> Any:
    return _random(*shape[:-1], shape[-1] * 4).view(np.uint32)


def _mlx(bits: int) -> tuple[Tensors, Tensors]:
    tensors = {
        "x.weight": _words(OUT, IN * bits // 32),
        "x.scales": _scales(OUT, IN // 64, dtype=_bf16()),
        "x.biases": _scales(OUT, IN // 64, dtype=_bf16()),
    }
    return tensors, {"config": {"quantization": {"bits": bits, "group_size": 64}}}


def _gptq() -> tuple[Tensors, Tensors]:
    return {
        "x.qweight": _words(IN // 8, OUT).view(np.int32),
        "x.qzeros": _words(IN // 128, OUT // 8).view(np.int32),
        "x.scales": _scales(IN // 128, OUT, dtype=np.float16),
    }, {"stated": {"quant_method": "gptq"}}


def _awq() -> tuple[Tensors, Tensors]:
    return {
        "x.qweight": _words(IN, OUT // 8).view(np.int32),
        "x.qzeros": _words(IN // 128, OUT // 8).view(np.int32),
        "x.scales": _scales(IN // 128, OUT, dtype=np.float16),
    }, {"stated": {"quant_method": "awq", "version": "gemm"}}


def _packed() -> tuple[Tensors, Tensors]:
    group = {"weights": {"num_bits": 4}}
    stated = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return {
        "x.weight_packed": _words(OUT, IN // 8).view(np.int32),
        "x.weight_scale": _scales(OUT, IN // 128, dtype=_bf16()),
        "x.weight_shape": np.array([OUT, IN], np.int64),
    }, {"stated": stated}


def _int8() -> tuple[Tensors, Tensors]:
    codes = _random(OUT, IN).view(np.int8)
    return {"x.weight": codes, "x.weight_scale": _scales(OUT, 1, dtype=_bf16())}, {}


def _mxfp4() -> tuple[Tensors, Tensors]:
    scales = _random(OUT, IN // 32, top=20) + np.uint8(110)
    return {"x.weight_packed": _random(OUT, IN // 2), "x.weight_scale": scales}, {}


def _gpt_oss() -> tuple[Tensors, Tensors]:
    scales = _random(1, OUT, IN // 32, top=20) + np.uint8(110)
    return {"x.experts.w_blocks": _random(1, OUT, IN // 32, 16), "x.experts.w_scales": scales}, {}


def _nvfp4() -> tuple[Tensors, Tensors]:
    return {
        "x.weight": _random(OUT, IN // 2),
        "x.weight_scale": (_random(OUT, IN // 16, top=120), "F8_E4M3"),
        "x.weight_scale_2": _scales(1),
    }, {}


def _fp8() -> tuple[Tensors, Tensors]:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    codes = _random(OUT, IN, top=120)
    return {
        "x.weight": (codes, "F8_E4M3"), "x.weight_scale_inv": _scales(OUT // 128, IN // 128),
    }, {"config": config}  # fmt: skip


FORMATS: dict[str, Callable[[], tuple[Tensors, Tensors]]] = {
    "MLX 4": lambda: _mlx(4),
    "MLX 8": lambda: _mlx(8),
    "GPTQ 4": _gptq,
    "AWQ": _awq,
    "INT4": _packed,
    "INT8": _int8,
    "MXFP4": _mxfp4,
    "gpt-oss": _gpt_oss,
    "NVFP4": _nvfp4,
    "FP8 blocks": _fp8,
}


def _weight(name: str) -> Any:
    from loratools.base.codecs import Stored, coded_weights
    from loratools_formats.core.dtypes import DTYPES
    from loratools_formats.core.tensors import TensorRef, in_memory

    tensors, told = FORMATS[name]()
    refs = {}
    for key, value in tensors.items():
        values, code = value if isinstance(value, tuple) else (value, None)
        if code is None:
            code = in_memory(key, values).dtype.code
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        refs[key] = TensorRef(key, DTYPES[code], values.shape, lambda data=data: data)
    stored = Stored(refs, told.get("config", {}), told.get("stated", {}))
    (weight,) = coded_weights(stored).values()
    return weight


def _ours(name: str) -> Callable[[], object]:
    weight = _weight(name)
    tensor = weight.tensor(None if weight.dtype.bits == 16 else _dtype("BF16"))
    count = OUT * IN

    def decode() -> None:
        for start in range(0, count, CHUNK):
            tensor.elements(start, min(start + CHUNK, count))

    return decode


def _dtype(code: str) -> Any:
    from loratools_formats.core.dtypes import DTYPES

    return DTYPES[code]


def _encode(name: str) -> Callable[[], object]:
    weight = _weight(name)
    encoder = weight.encoder()
    height = max(encoder.step, (1 << 17) // weight.shape[-1] // encoder.step * encoder.step)
    rows = weight.shape[-2]
    values = weight.tensor().load(np.float32).reshape(-1, weight.shape[-1])
    values = values + np.float32(0.01) * np.abs(values).mean()

    def encode() -> None:
        for top in range(0, rows, height):
            list(encoder.encode(top, values[top : top + height]).pieces)

    return encode


def _copy() -> Callable[[], object]:
    source = np.ones(OUT * IN, np.uint16)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source)


def _library(name: str) -> Callable[[], object] | None:
    """Return the library's own function; None where it is not installed or has none here."""
    if name.startswith("MLX"):
        return _by_mlx(int(name[-1]))
    if name == "gpt-oss":
        return _by_transformers()
    if name in ("INT4", "INT8", "NVFP4"):
        return _by_compressed_tensors(name)
    return None


def _by_mlx(bits: int) -> Callable[[], object] | None:
    try:
        import mlx.core as mx
    except ImportError:
        return None
    weight = mx.random.normal((OUT, IN)).astype(mx.bfloat16)
    parts = mx.quantize(weight, 64, bits)
    mx.eval(*parts)
    return lambda: mx.eval(mx.dequantize(*parts, 64, bits))


def _by_transformers() -> Callable[[], object]:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.set_num_threads(1)
    tensors, _ = _gpt_oss()
    blocks, scales = (torch.from_numpy(t) for t in tensors.values())
    return lambda: convert_moe_packed_tensors(blocks, scales)


def _by_compressed_tensors(name: str) -> Callable[[], object] | None:
    try:
        import torch
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    except ImportError:
        return None
    torch.set_num_threads(1)
    kind, arguments = {
        "INT4": ("pack-quantized", {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
        "INT8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        "NVFP4": ("nvfp4-pack-quantized", {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}),
    }[name]  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor = BaseCompressor.get_value_from_registry(kind)
    groups = {"INT4": IN // 128, "INT8": 1, "NVFP4": IN // 16}[name]
    state = {
        "weight": torch.randn(PACKED_ROWS, IN).to(torch.bfloat16),
        "weight_scale": torch.rand(PACKED_ROWS, groups).to(torch.bfloat16),
    }
    if name == "NVFP4":
        state["weight_global_scale"] = torch.tensor([777.0])
    packed = compressor.compress(state, scheme)
    return lambda: compressor.decompress(dict(packed), scheme)


def main() -> None:
    """Time one, and print its GB/s; null where there is nothing to time."""
    what, name = sys.argv[1:]
    if what == "copy":
        work: Callable[[], object] | None = _copy()
    else:
        work = {"ours": _ours, "encode": _encode, "library": _library}[what](name)
    if work is None:
        print("null")
        return
    work()
    best = float("inf")
    for _ in range(RUNS):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    is_packed = what == "library" and name in ("INT4", "INT8", "NVFP4")
    print(json.dumps(2 * (PACKED_ROWS if is_packed else OUT) * IN / best / 1e9))


if __name__ == "__main__":
    main()
