"""Quantised weights of every format that is written, small and random, and what makes them anew."""

import json

import numpy as np
from quantised_cases import only, pairs, random_scales, to_words

from loratools_formats.core.dtypes import DTYPES

F8 = DTYPES["F8_E4M3"].numpy_dtype()
AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round"}
OUT, IN = 64, 128


def mlx(rng, bits, dtype="BF16", group=64):
    scales = random_scales(rng, (OUT, IN // group), dtype)
    return {
        "x.weight": to_words(rng.integers(0, 1 << bits, (OUT, IN)), bits).view(np.uint32),
        "x.scales": scales,
        "x.biases": (-scales.astype(np.float32) * (1 << bits) / 2).astype(scales.dtype),
    }, {"quantization": {"bits": bits, "group_size": group}}


def mlx_mode(rng, bits, group, powers):
    codes = rng.integers(0, 1 << bits, (OUT, IN))
    if bits == 8:
        codes = np.where(codes & 0x7F == 0x7F, 1, codes)
    grid = (OUT, IN // group)
    scales = rng.integers(115, 125, grid) if powers else rng.uniform(0.1, 3, grid).astype(F8)
    return {
        "x.weight": to_words(codes, bits).view(np.uint32),
        "x.scales": scales.astype(np.uint8) if powers else scales.view(np.uint8),
    }, {}


def gptq(rng, bits, order=None, stated=None):
    groups = 4
    index = np.arange(IN) // (IN // groups)
    tensors = {
        "x.qweight": np.ascontiguousarray(to_words(rng.integers(0, 1 << bits, (OUT, IN)), bits).T),
        "x.qzeros": to_words(rng.integers(0, (1 << bits) - 1, (groups, OUT)), bits),
        "x.scales": random_scales(rng, (groups, OUT), "F16"),
    }
    if order is not None:
        tensors["x.g_idx"] = rng.permutation(index).astype(np.int32)
    return tensors, {"stated": stated or {"quant_method": "gptq"}}


def awq_gemm(rng, bits=4):
    return {
        "x.qweight": to_words(rng.integers(0, 1 << bits, (IN, OUT)), bits),
        "x.qzeros": to_words(rng.integers(0, 1 << bits, (2, OUT)), bits),
        "x.scales": random_scales(rng, (2, OUT), "F16"),
    }, {"stated": {"quant_method": "awq", "version": "gemm"}}


def awq_gemv(rng):
    return {
        "x.qweight": to_words(rng.integers(0, 16, (OUT, IN)), 4),
        "x.qzeros": to_words(rng.integers(0, 16, (OUT, 16)), 4),
        "x.scales": random_scales(rng, (OUT, 16), "F16"),
    }, {"stated": {"quant_method": "awq", "version": "gemv", "group_size": 64}}


def packed(rng, bits, *, grid=(OUT, 2), zero=False, order=False, width=IN, each=None):
    half = 1 << (bits - 1)
    pack = whole_codes if each else to_words
    tensors = {
        "x.weight_packed": pack(rng.integers(0, 2 * half, (OUT, width)), bits),
        "x.weight_scale": random_scales(rng, grid, "BF16"),
        "x.weight_shape": np.array([OUT, width], np.int64),
    }
    if zero:
        zeros = to_words(rng.integers(0, 2 * half, grid).T, bits)
        tensors["x.weight_zero_point"] = np.ascontiguousarray(zeros.T)
    if order:
        tensors["x.weight_g_idx"] = rng.permutation(np.arange(width) // 64).astype(np.int32)
    group = {"weights": {"num_bits": bits}}
    stated = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return tensors, {"stated": stated}


def whole_codes(codes, bits):
    """Pack as compressed-tensors did up to 0.17: as many whole codes to a word as fit."""
    each = 32 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    words = codes.reshape(len(codes), -1, each).astype(np.uint32)
    return (words << (np.arange(each, dtype=np.uint32) * bits)).sum(-1, dtype=np.uint32).view("i4")


def integers(rng, grid, *, zero=False):
    tensors = {
        "x.weight": rng.integers(-128, 128, (OUT, IN)).astype(np.int8),
        "x.weight_scale": np.asarray(random_scales(rng, grid, "BF16")),
    }
    if zero:
        tensors["x.weight_zero_point"] = rng.integers(-9, 9, grid).astype(np.int8)
    return tensors, {}


def gpt_oss(rng):
    return {
        "m.experts.down_proj_blocks": pairs(rng.integers(0, 16, (3, 10, 4, 32))),
        "m.experts.down_proj_scales": rng.integers(115, 125, (3, 10, 4)).astype(np.uint8),
    }, {"stated": {"quant_method": "mxfp4"}}


def mxfp4(rng, code, scale, kind, scale_kind):
    return {
        code: (pairs(rng.integers(0, 16, (2, 6, IN))), kind),
        scale: (rng.integers(115, 125, (2, 6, IN // 32)).astype(np.uint8), scale_kind),
    }, {}


def auto_round(rng, data_type, group):
    return {
        "x.weight_packed": pairs(rng.integers(0, 16, (OUT, IN))),
        "x.weight_scale": rng.integers(115, 125, (OUT, IN // group)).astype(np.uint8),
    }, {"stated": {"quant_method": "auto-round", "data_type": data_type}}


def nvfp4(rng, *, divides):
    names = ("weight_packed", "weight_global_scale") if divides else ("weight", "weight_scale_2")
    scales = rng.uniform(1, 400, (OUT, IN // 16)).astype(F8)
    return {
        f"x.{names[0]}": pairs(rng.integers(0, 16, (OUT, IN))),
        "x.weight_scale": (scales, "F8_E4M3"),
        f"x.{names[1]}": np.array([1.5], np.float32),
    }, {} if divides else {"stated": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}


def comfyui(rng, form, group):
    """Codes and scales in tiles of 128 rows, of which the weight fills the first in part."""
    tiles = (128, -(-(IN // group) // 4) * 4)
    tensors = {"x.weight": rng.integers(0, 256, (OUT, IN // 2)).astype(np.uint8)}
    if form == "nvfp4":
        tensors["x.weight_scale"] = (rng.uniform(1, 400, tiles).astype(F8), "F8_E4M3")
        tensors["x.weight_scale_2"] = np.float32(0.01).reshape(())
    else:
        values = (rng.standard_normal((OUT, IN)) * 20).astype(np.float32).astype(F8)
        tensors["x.weight"] = (values, "F8_E4M3")
        tensors["x.weight_scale"] = rng.integers(115, 125, tiles).astype(np.uint8)
    layers = {module: {"format": form} for module in ("x", "layers.0.q", "layers.1.q")}
    return tensors, {"metadata": {"_quantization_metadata": json.dumps({"layers": layers})}}


def convrot(rng, form, bits):
    codes = rng.integers(-100, 100, (OUT, IN * bits // 8)).astype(np.int8)
    said = {"format": form, "convrot": True, "convrot_groupsize": 16}
    layers = dict.fromkeys(("x", "layers.0.q", "layers.1.q"), said)
    return {
        "x.weight": codes,
        "x.weight_scale": numbers(rng, (OUT, 1)),
    }, {"metadata": {"_quantization_metadata": json.dumps({"layers": layers})}}


def fp8(rng, scale, *, kind="F8_E4M3", shape=(OUT, IN), inputs=None, stated=None):
    dtype = DTYPES[kind].numpy_dtype()
    values = (rng.standard_normal(shape) * 20).astype(np.float32).astype(dtype)
    tensors = {"x.weight": (values, kind), "x.weight_scale": scale}
    if inputs is not None:
        tensors["x.pre_quant_scale"] = inputs
    return tensors, {"quantization_config": {"quant_method": "fp8", **(stated or {})}}


def torchao(rng, kind, block, *, bits=8, zero=False):
    grid = (OUT // block[0], IN // block[1])
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, (OUT, IN)).astype(np.int8)
    if kind == "Float8Tensor":
        codes = ((rng.standard_normal((OUT, IN)) * 20).astype(np.float32).astype(F8), "F8_E4M3")
    data = {"block_size": list(block), "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    if bits != 8:
        data["target_dtype"] = {"_type": "torch.dtype", "_data": f"int{bits}"}
    tensors = {"x._weight_qdata": codes, "x._weight_scale": numbers(rng, grid)}
    if zero:
        tensors["x._weight_zero_point"] = rng.integers(-3, 3, grid).astype(np.int8)
    said = {"_type": kind, "_data": data, "_tensor_data_names": ["qdata", "scale"]}
    return tensors, {"metadata": {"x.weight": json.dumps(said)}}


def numbers(rng, shape):
    return rng.uniform(0.01, 0.1, shape).astype(np.float32)


CASES = {
    **{f"MLX {b}": lambda r, b=b: mlx(r, b) for b in (2, 3, 4, 5, 6, 8)},
    "MLX 4 in F16": lambda r: mlx(r, 4, "F16", 32),
    "MLX 8 in F32": lambda r: mlx(r, 8, "F32", 128),
    "MLX mxfp4": lambda r: mlx_mode(r, 4, 32, powers=True),
    "MLX mxfp8": lambda r: mlx_mode(r, 8, 32, powers=True),
    "MLX nvfp4": lambda r: mlx_mode(r, 4, 16, powers=False),
    **{f"GPTQ {b}": lambda r, b=b: gptq(r, b) for b in (2, 3, 4, 8)},
    "GPTQ 4, columns out of order": lambda r: gptq(r, 4, "mixed"),
    "GPTQ 3, columns out of order": lambda r: gptq(r, 3, "mixed"),
    **{f"GPTQ {b} of AutoRound": lambda r, b=b: gptq(r, b, stated=AUTO_ROUND) for b in (5, 6, 7)},
    "AWQ gemm": awq_gemm,
    **{f"AWQ gemm {b}": lambda r, b=b: awq_gemm(r, b) for b in (5, 6, 7)},
    "AWQ gemv": awq_gemv,
    **{f"packed {b}": lambda r, b=b: packed(r, b) for b in range(2, 9)},
    **{f"packed {b}, zeros": lambda r, b=b: packed(r, b, zero=True) for b in (2, 3, 4, 8)},
    "packed 4, a row": lambda r: packed(r, 4, grid=(OUT, 1)),
    "packed 4, a matrix": lambda r: packed(r, 4, grid=(1,)),
    "packed 4, columns out of order": lambda r: packed(r, 4, order=True),
    "packed 4, words not filled": lambda r: packed(r, 4, grid=(OUT, 1), width=33),
    "packed 3, whole codes": lambda r: packed(r, 3, grid=(OUT, 1), each=10),
    **{f"INT8 {g}": lambda r, g=g: integers(r, g) for g in ((OUT, 1), (OUT,), (1,), (OUT, 4))},
    "INT8, zeros": lambda r: integers(r, (OUT, 4), zero=True),
    "INT8, blocks of rows": lambda r: integers(r, (8, 2)),
    "gpt-oss": gpt_oss,
    "MXFP4 packed": lambda r: mxfp4(r, "x.weight_packed", "x.weight_scale", "U8", "U8"),
    "MXFP4 DeepSeek": lambda r: mxfp4(r, "x.weight", "x.scale", "I8", "F8_E8M0"),
    "MXINT4": lambda r: auto_round(r, "mx_int", 32),
    "NVFP4 of E5M3": lambda r: auto_round(r, "nvfp4_v2", 16),
    "NVFP4 compressed-tensors": lambda r: nvfp4(r, divides=True),
    "NVFP4 ModelOpt": lambda r: nvfp4(r, divides=False),
    "FP8 one": lambda r: fp8(r, numbers(r, ())),
    "FP8 a row": lambda r: fp8(r, numbers(r, (OUT, 1))),
    "FP8 E5M2": lambda r: fp8(r, numbers(r, (OUT, 1)), kind="F8_E5M2"),
    "FP8 blocks": lambda r: fp8(r, numbers(r, (4, 4))),
    "FP8 ragged": lambda r: fp8(r, numbers(r, (3, 6)), stated={"weight_block_size": [24, 24]}),
    "FP8 experts": lambda r: fp8(r, numbers(r, (3, 4, 2)), shape=(3, 32, 64)),
    "FP8 inputs": lambda r: fp8(r, numbers(r, ()), inputs=numbers(r, (IN,)) + 1),
    "torchao INT8": lambda r: torchao(r, "Int8Tensor", (1, IN), zero=True),
    "torchao FP8": lambda r: torchao(r, "Float8Tensor", (1, IN)),
    "torchao FP8 blocks": lambda r: torchao(r, "Float8Tensor", (32, 32)),
    "torchao INT4": lambda r: torchao(r, "IntxUnpackedToInt8Tensor", (1, 32), bits=4, zero=True),
    "ComfyUI NVFP4": lambda r: comfyui(r, "nvfp4", 16),
    "ComfyUI MXFP8": lambda r: comfyui(r, "mxfp8", 32),
    "ConvRot INT8": lambda r: convrot(r, "int8_tensorwise", 8),
    "ConvRot INT4": lambda r: convrot(r, "convrot_w4a4", 4),
    "MXFP8": lambda r: fp8(r, r.integers(115, 125, (OUT, IN // 32)).astype(np.uint8)),
}  # fmt: skip


def weight_of(name, seed=0):
    """Return a weight of a case, with its tensors and what is said of them."""
    tensors, told = CASES[name](np.random.default_rng(seed))
    return only(tensors, **told), tensors, told
