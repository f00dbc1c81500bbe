"""Every format of quantised weights, bit for bit, against its element-wise definition.

`golden` holds what the formats' own libraries made; the definitions here reach what they do not.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from quantised_cases import (
    check,
    e2m1,
    only,
    pairs,
    random_scales,
    rounded,
    stored,
    to_words,
)

import loratools
from loratools.base.codecs import CODECS, coded_weights
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import AdapterError, UnsupportedError

RNG = np.random.default_rng(0)
F8 = DTYPES["F8_E4M3"].numpy_dtype()


def of_groups(grid, width):
    """Spread numbers of groups over the columns."""
    return np.repeat(grid, width // grid.shape[-1], axis=-1)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_mlx_affine(bits, dtype, stack):
    codes = RNG.integers(0, 1 << bits, (*stack, 5, 128))
    scales = random_scales(RNG, (*stack, 5, 2), dtype)
    biases = (-scales.astype(np.float32) * 3).astype(scales.dtype)
    tensors = {
        "x.weight": to_words(codes, bits).view(np.uint32), "x.scales": scales, "x.biases": biases,
    }  # fmt: skip
    s, b = (of_groups(g.astype(np.float32), 128) for g in (scales, biases))
    want = rounded(rounded(codes * s, dtype) + b, dtype)
    weight = only(tensors, quantization={"bits": bits, "group_size": 64})
    check(weight, want, dtype)
    assert (weight.scheme.bits, weight.scheme.group) == (bits, 64)


def mlx(bits, group, width=128):
    groups = width // group
    return {
        "m.x.weight": np.zeros((2, width * bits // 32), np.uint32),
        "m.x.scales": np.ones((2, groups), np.float16),
        "m.x.biases": np.ones((2, groups), np.float16),
    }


def test_mlx_entries_of_modules_and_wrong_statements():
    """8 bits in groups of 32 look like 4 bits in groups of 64: the module's own entry tells."""
    own = {"bits": 4, "group_size": 64, "m.x": {"bits": 8, "group_size": 32}}
    assert only(mlx(8, 32), quantization=own).shape == (2, 128)
    assert only(mlx(5, 64), quantization={"bits": 4, "group_size": 64}).scheme.bits == 5
    with pytest.raises(
        UnsupportedError, match=r"m.x.weight.*2 in groups of 128 or 4 in groups of 64 or 8 in"
    ):
        coded_weights(stored(mlx(4, 64)))


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (6, 64)])
def test_a_statement_of_mlx_that_is_not_about_a_weight_does_not_decide(bits, group):
    """8 bits in groups of 64 have the shapes of 4 in groups of 128, of twice as many columns."""
    of_others = {"bits": 4, "group_size": 64}
    with pytest.raises(
        UnsupportedError, match=rf"4 in groups of 64; .*{bits} in groups of {group}"
    ):
        coded_weights(stored(mlx(bits, group), quantization=of_others))
    own = {"m.x": {"bits": bits, "group_size": group}}
    assert only(mlx(bits, group), quantization=of_others | own).shape == (2, 128)


def test_transformers_metal_has_another_name_for_biases():
    tensors = mlx(4, 64)
    tensors["m.x.qbiases"] = tensors.pop("m.x.biases")
    weight = only(tensors, {"quant_method": "metal", "bits": 4})
    check(weight, np.ones((2, 128)), "F16")


@pytest.mark.parametrize("first_version", [True, False])
@pytest.mark.parametrize("act_order", [None, "in order", "mixed"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [64, 128])
def test_gptq(bits, act_order, first_version, width):
    """Groups of 64 are looked up, where a code has few values; others are computed."""
    out, groups = 96, 2
    codes = RNG.integers(0, 1 << bits, (out, width))
    zeros = RNG.integers(1, 1 << bits, (groups, out))
    scales = random_scales(RNG, (groups, out), "F16")
    index = np.arange(width) // (width // groups)
    if act_order == "mixed":
        index = RNG.permutation(index)
    tensors = {
        "x.qweight": np.ascontiguousarray(to_words(codes, bits).T),
        "x.qzeros": to_words(zeros - first_version, bits),
        "x.scales": scales,
    }
    if act_order is not None:
        tensors["x.g_idx"] = index.astype(np.int32)
    form = "gptq" if first_version else "gptq_v2"
    weight = only(tensors, {"quant_method": "gptq", "checkpoint_format": form})
    want = scales.astype(np.float32)[index] * (codes.T - zeros[index])
    check(weight, np.ascontiguousarray(want.T), "F16")
    assert str(weight.scheme) == f"GPTQ, {bits} bits, groups of {width // 2}"


@pytest.mark.parametrize("mixed", [False, True])
def test_many_groups_at_once(mixed):
    """More meanings of codes than two bytes can count."""
    out, width, groups = 320, 1024, 16
    codes = RNG.integers(0, 16, (out, width))
    zeros = RNG.integers(0, 16, (groups, out))
    scales = random_scales(RNG, (groups, out), "F16")
    index = np.arange(width) // (width // groups)
    index = RNG.permutation(index) if mixed else index
    tensors = {
        "x.qweight": np.ascontiguousarray(to_words(codes, 4).T),
        "x.qzeros": to_words(zeros, 4),
        "x.scales": scales,
        **({"x.g_idx": index.astype(np.int32)} if mixed else {}),
    }
    weight = only(tensors, {"checkpoint_format": "gptq_v2"})
    want = (scales.astype(np.float32)[index] * (codes.T - zeros[index])).T
    assert weight.rows(0, out).tobytes() == want.astype(np.float16).tobytes()


@pytest.mark.parametrize(
    ("stated", "offset"),
    [
        ({"quant_method": "gptq"}, 1),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, 1),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, 0),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}, 0),
    ],
)
def test_zeros_of_gptq_by_who_wrote_them(stated, offset):
    tensors = {
        "x.qweight": np.zeros((8, 32), np.int32),
        "x.qzeros": to_words(np.full((1, 32), 6), 4),
        "x.scales": np.ones((1, 32), np.float16),
    }
    check(only(tensors, stated), np.full((32, 64), -6.0 - offset), "F16")


def test_zeros_of_gptq_wrap():
    """A stored zero of 15 means 0: the first version stores one less, in four bits."""
    tensors = {
        "x.qweight": to_words(np.full((32, 64), 3), 4).T.copy(),
        "x.qzeros": to_words(np.full((1, 32), 15), 4),
        "x.scales": np.ones((1, 32), np.float16),
    }
    check(only(tensors, {"quant_method": "gptq"}), np.full((32, 64), 3.0), "F16")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_of_gptq_of_which_nothing_tells(bits):
    """Where no configuration is there, symmetric weights tell by their zeros, others cannot."""
    half = 1 << (bits - 1)
    codes = RNG.integers(0, 1 << bits, (32, 64))
    tensors = {
        "x.qweight": np.ascontiguousarray(to_words(codes, bits).T),
        "x.scales": np.ones((1, 32), np.float16),
    }
    for zero in (half - 1, half):
        zeros = {"x.qzeros": to_words(np.full((1, 32), zero), bits)}
        check(only(tensors | zeros), (codes - half).astype(np.float32), "F16")
    mixed = {"x.qzeros": to_words(RNG.integers(0, half, (1, 32)) + np.arange(32) % 2, bits)}
    with pytest.raises(UnsupportedError, match=r"stored less one.*x.qzeros.*quantize_config.json"):
        only(tensors | mixed)


def test_unknown_forms_of_gptq_are_named():
    tensors = {
        "x.qweight": np.zeros((8, 32), np.int32),
        "x.qzeros": np.zeros((1, 4), np.int32),
        "x.scales": np.ones((1, 32), np.float16),
    }
    with pytest.raises(UnsupportedError, match=r"x.qweight.*auto_round:fake"):
        coded_weights(stored(tensors, {"packing_format": "auto_round:fake"}))
    tensors["x.g_idx"] = np.full(64, 1, np.int32)
    with pytest.raises(AdapterError, match=r"group that does not exist.*x.g_idx"):
        only(tensors, {"quant_method": "gptq"}).tensor().load()


@pytest.mark.parametrize("with_order", [True, False])
@pytest.mark.parametrize("out", [4, 8, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_of_few_outputs(bits, out, with_order):
    """All zeros of a group are in one word or two, whatever the bits."""
    codes = RNG.integers(0, 1 << bits, (out, 96))
    tensors = {
        "x.qweight": np.ascontiguousarray(to_words(codes, bits).T),
        "x.qzeros": to_words(np.full((1, out), 1), bits),
        "x.scales": np.ones((1, out), np.float16),
        **({"x.g_idx": np.zeros(96, np.int32)} if with_order else {}),
    }
    said = {"quant_method": "gptq", "bits": bits}
    check(only(tensors, said), (codes - 2).astype(np.float32), "F16")
    if with_order:
        del said["bits"]
        check(only(tensors, said), (codes - 2).astype(np.float32), "F16")


def test_bits_of_gptq_that_nothing_tells():
    tensors = {
        "x.qweight": np.zeros((12, 8), np.int32),
        "x.qzeros": np.zeros((1, 1), np.int32),
        "x.scales": np.ones((1, 8), np.float16),
    }
    with pytest.raises(UnsupportedError, match=r"bits.*x.qweight.*Keep config.json"):
        coded_weights(stored(tensors))


def test_groups_of_gptq_that_end_early_need_an_order():
    """Two groups of 128 for 192 columns are not two of 96."""
    codes, index = RNG.integers(0, 16, (32, 192)), np.arange(192, dtype=np.int32) // 128
    tensors = {
        "x.qweight": np.ascontiguousarray(to_words(codes, 4).T),
        "x.qzeros": to_words(np.full((2, 32), 7), 4),
        "x.scales": np.repeat(np.array([[1], [2]], np.float16), 32, axis=1),
    }
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    with pytest.raises(AdapterError, match=r"x.scales.*groups that divide 192 columns, or g_idx"):
        coded_weights(stored(tensors, stated))
    weight = only(tensors | {"x.g_idx": index}, stated)
    check(weight, (codes - 8) * (1 + index), "F16")


def test_an_order_of_gptq_without_order_is_refused():
    """exllama takes zeros for columns in order, gptqmodel for columns of the first group."""
    tensors = {
        "x.qweight": np.zeros((8, 32), np.int32),
        "x.qzeros": np.zeros((2, 4), np.int32),
        "x.scales": np.ones((2, 32), np.float16),
        "x.g_idx": np.zeros(64, np.int32),
    }
    said = {"quant_method": "gptq"}
    with pytest.raises(AdapterError, match=r"first of several groups.*x.g_idx.*without desc_act"):
        only(tensors, said).tensor().load()
    del tensors["x.g_idx"]
    assert only(tensors, said).shape == (32, 64)


ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def in_awq_order(codes):
    """Pack eight columns to a word, nibble i being column ORDER[i]."""
    words = codes.reshape(len(codes), -1, 8)[:, :, ORDER]
    return to_words(words.reshape(len(codes), -1), 4)


def test_awq_gemm():
    out, width, groups = 40, 128, 2
    codes, zeros = RNG.integers(0, 16, (width, out)), RNG.integers(0, 16, (groups, out))
    scales = random_scales(RNG, (groups, out), "F16")
    tensors = {
        "x.qweight": in_awq_order(codes), "x.qzeros": in_awq_order(zeros), "x.scales": scales,
    }  # fmt: skip
    spread = (np.repeat(part, width // groups, axis=0) for part in (zeros, scales))
    z, s = (part.astype(np.float32) for part in spread)
    weight = only(tensors, {"quant_method": "awq", "version": "gemm"})
    check(weight, np.ascontiguousarray(((codes - z) * s).T), "F16")


@pytest.mark.parametrize(("group", "width", "padded"), [(128, 256, 8), (64, 256, 16), (32, 64, 32)])
def test_awq_gemv(group, width, padded):
    out, groups = 24, width // group
    codes = RNG.integers(0, 16, (out, width))
    zeros = np.zeros((out, padded), int)
    zeros[:, :groups] = RNG.integers(0, 16, (out, groups))
    scales = np.zeros((out, padded), np.float16)
    scales[:, :groups] = random_scales(RNG, (out, groups), "F16")
    tensors = {
        "x.qweight": to_words(codes, 4), "x.qzeros": to_words(zeros, 4), "x.scales": scales,
    }  # fmt: skip
    z, s = (of_groups(p[:, :groups].astype(np.float32), width) for p in (zeros, scales))
    stated = {"quant_method": "awq", "version": "gemv", "group_size": group}
    check(only(tensors, stated), (codes - z) * s, "F16")


def test_awq_gemv_whose_shapes_are_those_of_gemm():
    codes, zeros = RNG.integers(0, 16, (32, 32)), np.zeros((32, 32), int)
    zeros[:, 0] = RNG.integers(0, 16, 32)
    tensors = {
        "x.qweight": to_words(codes, 4), "x.qzeros": to_words(zeros, 4),
        "x.scales": np.ones((32, 32), np.float16),
    }  # fmt: skip
    stated = {"quant_method": "awq", "version": "gemv", "group_size": 32}
    check(only(tensors, stated), codes - zeros[:, :1], "F16")


def packed_integers(bits, *, grid, zero=None, shape=(96, 64), dtype="BF16", words=to_words):
    half = 1 << (bits - 1)
    codes = RNG.integers(-half, half, shape)
    tensors = {
        "x.weight_packed": words(codes + half, bits),
        "x.weight_scale": random_scales(RNG, grid, dtype),
        "x.weight_shape": np.array(shape, np.int64),
    }
    if zero is not None:
        down = words((zero + half).T, bits)
        tensors["x.weight_zero_point"] = np.ascontiguousarray(down.T)
    return codes, tensors


def stated_bits(bits):
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": bits}}},
    }  # fmt: skip


@pytest.mark.parametrize("grid", [(96, 2), (96, 1), (1,)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_integers_of_compressed_tensors(bits, grid):
    codes, tensors = packed_integers(bits, grid=grid)
    scale = tensors["x.weight_scale"].astype(np.float32).reshape(grid if len(grid) > 1 else (1, 1))
    weight = only(tensors, stated_bits(bits))
    check(weight, codes * of_groups(scale, 64), "BF16")
    assert weight.scheme.bits == bits


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_zeros_of_compressed_tensors_are_packed_down_the_rows(bits, dtype):
    half = 1 << (bits - 1)
    zero = RNG.integers(-half, half, (96, 2))
    codes, tensors = packed_integers(bits, grid=(96, 2), zero=zero, dtype=dtype)
    scale = of_groups(tensors["x.weight_scale"].astype(np.float32), 64)
    want = rounded(codes - of_groups(zero, 64), dtype) * scale
    check(only(tensors, stated_bits(bits)), want, dtype)


@pytest.mark.parametrize("shape", [(12, 2), (96, 1), (11, 2), (2, 12)])
def test_zeros_of_other_shapes_are_refused(shape):
    _, tensors = packed_integers(4, grid=(96, 2))
    tensors["x.weight_zero_point"] = np.zeros(shape, np.int32)
    if shape == (12, 2):
        assert only(tensors).shape == (96, 64)
        return
    with pytest.raises(AdapterError, match=r"wrong shape.*weight_zero_point.*96 × 2 groups"):
        coded_weights(stored(tensors))


def whole_codes(codes, bits):
    """Pack as compressed-tensors did up to 0.17: as many whole codes to a word as fit."""
    each = 32 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    words = codes.reshape(len(codes), -1, each).astype(np.uint32)
    return (words << (np.arange(each, dtype=np.uint32) * bits)).sum(-1, dtype=np.uint32).view("i4")


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_of_whole_codes(bits):
    half = 1 << (bits - 1)
    zero = RNG.integers(-half, half, (96, 1))
    codes, tensors = packed_integers(bits, grid=(96, 1), zero=zero, words=whole_codes)
    want = rounded(codes - zero, "BF16") * tensors["x.weight_scale"].astype(np.float32)
    check(only(tensors, stated_bits(bits)), want, "BF16")


def test_columns_that_do_not_fill_a_word_and_mixed_groups():
    codes, tensors = packed_integers(4, grid=(96, 1), shape=(96, 33))
    check(only(tensors), codes * tensors["x.weight_scale"].astype(np.float32), "BF16")
    codes, tensors = packed_integers(4, grid=(96, 2))
    index = RNG.permutation(np.arange(64) // 32).astype(np.int32)
    tensors["x.weight_g_idx"] = index
    check(only(tensors), codes * tensors["x.weight_scale"].astype(np.float32)[:, index], "BF16")


@pytest.mark.parametrize("grid", [(24, 1), (24,), (1,), (), (24, 2), (6, 2)])
@pytest.mark.parametrize("with_zero", [False, True])
def test_integers_of_a_byte(grid, with_zero):
    codes = RNG.integers(-128, 128, (24, 64)).astype(np.int8)
    scale = np.asarray(random_scales(RNG, grid, "BF16"))
    tensors = {"x.weight": codes, "x.weight_scale": scale}
    matrix = (1, 1) if scale.size == 1 else (*grid, 1)[:2]
    zero = np.zeros(matrix, np.int8)
    if with_zero:
        zero = RNG.integers(-9, 9, matrix).astype(np.int8)
        tensors["x.weight_zero_point"] = zero.reshape(grid)

    def spread(part):
        return np.repeat(of_groups(part, 64), 24 // len(part), axis=0).astype(np.float32)

    want = rounded(codes - spread(zero), "BF16") * spread(scale.reshape(matrix))
    check(only(tensors), want, "BF16")


def test_gpt_oss():
    """Rows of the parameter are columns of what is stored, and may begin inside a group."""
    codes = RNG.integers(0, 16, (3, 10, 2, 32))
    scales = RNG.integers(110, 135, (3, 10, 2)).astype(np.uint8)
    tensors = {"m.experts.down_proj_blocks": pairs(codes), "m.experts.down_proj_scales": scales}
    values = (e2m1(codes) * np.exp2(scales[..., None] - 127.0)).reshape(3, 10, 64)
    weight = only(tensors, {"quant_method": "mxfp4"})
    assert weight.key == "m.experts.down_proj"
    check(weight, np.ascontiguousarray(values.swapaxes(1, 2)), "BF16")


def test_gpt_oss_as_transformers_saves_it_after_dequantising():
    tensors = {"m.experts.down_proj_blocks": np.ones((3, 64, 10), DTYPES["BF16"].numpy_dtype())}
    with pytest.raises(UnsupportedError, match=r"plain numbers.*BF16.*rename"):
        coded_weights(stored(tensors))


@pytest.mark.parametrize(
    ("code", "scale", "kind", "scale_kind"),
    [
        ("x.weight_packed", "x.weight_scale", "U8", "U8"),
        ("x.weight", "x.weight_scale", "U8", "U8"),
        ("x.weight", "x.scale", "I8", "F8_E8M0"),
    ],
)
def test_mxfp4_of_others(code, scale, kind, scale_kind):
    codes = RNG.integers(0, 16, (2, 6, 64))
    scales = RNG.integers(110, 135, (2, 6, 2)).astype(np.uint8)
    tensors = {code: (pairs(codes), kind), scale: (scales, scale_kind)}
    check(only(tensors), e2m1(codes) * of_groups(np.exp2(scales - 127.0), 64), "BF16")


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("divides", [True, False])
def test_nvfp4(divides, stack):
    codes = RNG.integers(0, 16, (*stack, 6, 64))
    scales = RNG.uniform(1, 400, (*stack, 6, 4)).astype(F8)
    number = RNG.uniform(0.5, 2, stack or (1,)).astype(np.float32)
    names = ("weight_packed", "weight_global_scale") if divides else ("weight", "weight_scale_2")
    tensors = {
        f"x.{names[0]}": pairs(codes), "x.weight_scale": (scales, "F8_E4M3"),
        f"x.{names[1]}": number,
    }  # fmt: skip
    spread = number.reshape(*stack, 1, 1) if stack else number
    s = scales.astype(np.float32)
    s = s / spread if divides else s * spread
    stated = {} if divides else {"quant_method": "modelopt"}
    check(only(tensors, stated), e2m1(codes) * of_groups(s, 64), "BF16")


def test_nvfp4_of_which_nothing_is_said_is_refused():
    """ComfyUI's tensors have the names of ModelOpt's, and mean something else."""
    tensors = {
        "x.weight": pairs(np.full((2, 32), 3)),
        "x.weight_scale": (np.ones((2, 2), F8), "F8_E4M3"),
        "x.weight_scale_2": np.float32(0.1).reshape(()),
    }
    with pytest.raises(UnsupportedError, match="does not say whose NVFP4 it has"):
        only(tensors)


def test_nvfp4_of_a_model_in_f16():
    tensors = {
        "x.weight": pairs(np.full((2, 32), 3)),
        "x.weight_scale": (np.ones((2, 2), F8), "F8_E4M3"),
        "x.weight_scale_2": np.float32(0.1).reshape(()),
    }
    want = np.full((2, 32), np.float32(1.5) * np.float32(0.1))
    check(only(tensors, torch_dtype="float16"), want, "F16")


@pytest.mark.parametrize(
    ("bits", "group", "scale_of"), [(4, 32, "powers"), (8, 32, "powers"), (4, 16, "e4m3")]
)
def test_mlx_modes(bits, group, scale_of):
    width = 64
    if scale_of == "powers":
        scales = RNG.integers(110, 135, (5, width // group)).astype(np.uint8)
        s = np.exp2(scales - 127.0).astype(np.float32)
    else:
        s = RNG.uniform(0.1, 300, (5, width // group)).astype(F8)
        scales, s = s.view(np.uint8), s.astype(np.float32)
    codes = RNG.integers(0, 100 if bits == 8 else 16, (5, width))
    values = e2m1(codes) if bits == 4 else codes.astype(np.uint8).view(F8).astype(np.float32)
    tensors = {"x.weight": to_words(codes, bits).view(np.uint32), "x.scales": scales}
    check(only(tensors), values * of_groups(s, width), "BF16")


def planes(codes, bits):
    """Pack rows in planes, the first of them in the highest bits, as HQQ does."""
    each = 10 if bits == 3 else 8 // bits
    step = -(-len(codes) // each)
    padded = np.pad(codes, ((0, step * each - len(codes)), (0, 0)))
    parts = padded.reshape(each, step, -1).astype(np.int32)
    shifts = bits * (each - 1 - np.arange(each))[:, None, None]
    packed = (parts << shifts).sum(0)
    return packed.astype(np.int32 if bits == 3 else np.uint8)


def text(letters):
    return np.frombuffer(letters.encode(), np.uint8)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_hqq(bits, axis, dtype):
    out, width, group = 48, 64, 32
    groups = out * width // group
    shape = (groups, group) if axis == 1 else (group, groups)
    codes = RNG.integers(0, 1 << bits, shape)
    grid = (groups, 1) if axis == 1 else (1, groups)
    scale = random_scales(RNG, grid, dtype)
    zero = RNG.uniform(0, 1 << bits, grid).astype(DTYPES[dtype].numpy_dtype())
    packing = {3: "3bit_32", 5: "8bit_u8"}.get(bits, f"{bits}bit_u8")
    tensors = {
        "x.W_q": planes(codes, 8 if bits == 5 else bits), "x.scale": scale, "x.zero": zero,
        "x.nbits": np.int32(bits).reshape(()), "x.group_size": np.int32(group).reshape(()),
        "x.axis": np.int32(axis).reshape(()), "x.shape": np.array([out, width], np.int64),
        "x.packing": text(packing), "x.quant_scale": np.uint8(0).reshape(()),
        "x.compute_dtype": text("torch.bfloat" if dtype == "BF16" else "torch.float16"),
    }  # fmt: skip
    z, s = zero.astype(np.float32), scale.astype(np.float32)
    want = (rounded(codes - z, dtype) * s).reshape(out, width)
    weight = only(tensors, {"quant_method": "hqq"})
    check(weight, want, dtype)
    assert weight.encoder() is None
    assert (weight.scheme.bits, weight.scheme.group) == (bits, group)


def test_hqq_with_quantised_scales_is_refused():
    tensors = {
        "x.W_q": np.zeros((24, 32), np.uint8), "x.scale": np.ones((48, 1), np.float16),
        "x.zero": np.ones((48, 1), np.float16), "x.nbits": np.int32(4).reshape(()),
        "x.group_size": np.int32(32).reshape(()), "x.axis": np.int32(1).reshape(()),
        "x.shape": np.array([24, 64], np.int64), "x.quant_scale": np.uint8(1).reshape(()),
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"HQQ.*quant_scale.*x.W_q"):
        coded_weights(stored(tensors))
    tensors["x.quant_scale"] = np.uint8(0).reshape(())
    tensors["x.shape"] = np.array([24, 63], np.int64)
    with pytest.raises(AdapterError, match=r"wrong shape.*x.shape"):
        coded_weights(stored(tensors))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rows_of_bitsandbytes_in_eight_bits(dtype):
    """The values are those of bitsandbytes' own function, bit for bit."""
    import torch
    from bitsandbytes.functional import int8_vectorwise_dequant

    codes = RNG.integers(-127, 128, (24, 40)).astype(np.int8)
    scales = RNG.uniform(0.001, 9, 24).astype(np.float32)
    tensors = {"x.weight": codes, "x.SCB": scales, "x.weight_format": np.uint8(0).reshape(())}
    named = {"BF16": "bfloat16", "F16": "float16"}[dtype]
    (weight,) = coded_weights(stored(tensors, dtype=named)).values()
    want = int8_vectorwise_dequant(torch.from_numpy(codes), torch.from_numpy(scales)).numpy()
    check(weight, want, dtype)
    assert weight.encoder() is None
    assert (weight.scheme.bits, weight.scheme.group) == (8, None)
    assert {part.key for part in weight.parts} == set(tensors)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, "BF16"),
        ({"dtype": None, "text_config": {"torch_dtype": "float16"}}, "F16"),
        ({"torch_dtype": "bfloat16", "text_config": {"dtype": "float16"}}, "BF16"),
    ],
)
def test_the_type_of_computing_may_be_said_of_the_parts_of_a_model(config, dtype):
    assert stored({}, **config).dtype == dtype


def test_rows_of_bitsandbytes_in_an_order_of_the_gpu_are_refused():
    tensors = {"x.weight": np.zeros((8, 32), np.int8), "x.SCB": np.ones(8, np.float32)}
    assert set(coded_weights(stored(tensors))) == {"x.weight"}
    tensors["x.weight_format"] = np.uint8(3).reshape(())
    with pytest.raises(UnsupportedError, match=r"order of the GPU.*x.weight_format"):
        coded_weights(stored(tensors))
    tensors["x.weight_format"] = np.uint8(0).reshape(())
    tensors["x.SCB"] = np.ones(7, np.float32)
    with pytest.raises(AdapterError, match=r"wrong shape.*x.SCB"):
        coded_weights(stored(tensors))


def torchao_said(kind, **data):
    said = {"_type": kind, "_data": {"dtype": {"_data": "float16"}, **data}}
    return {"x.weight": json.dumps(said)}


def test_torchao_integers_and_their_zeros():
    codes = RNG.integers(-8, 8, (6, 64)).astype(np.int8)
    scale = RNG.uniform(0.1, 1, (6, 2)).astype(np.float32)
    zero = RNG.integers(-3, 3, (6, 2)).astype(np.int8)
    tensors = {
        "x._weight_qdata": codes, "x._weight_scale": scale, "x._weight_zero_point": zero,
    }  # fmt: skip
    said = torchao_said(
        "IntxUnpackedToInt8Tensor", block_size=[1, 32], target_dtype={"_data": "int4"}
    )
    weight = only(tensors, metadata=said)
    want = (codes.astype(np.float32) - of_groups(zero, 64)) * of_groups(scale, 64)
    check(weight, want, "F16")
    assert weight.scheme.bits == 4


def test_torchao_scales_of_inputs_are_refused_and_those_of_running_mean_nothing():
    codes = RNG.integers(-8, 8, (6, 64)).astype(np.int8)
    tensors = {
        "x._weight_qdata": codes, "x._weight_scale": np.ones((6, 1), np.float32),
        "x._weight_act_quant_scale": np.ones(1, np.float32),
    }  # fmt: skip
    said = torchao_said("Int8Tensor", block_size=[1, 64])
    check(only(tensors, metadata=said), codes.astype(np.float32), "F16")
    tensors["x._weight_act_pre_scale"] = np.full(64, 2, np.float32)
    with pytest.raises(UnsupportedError, match=r"scales its inputs.*x._weight_act_pre_scale"):
        coded_weights(stored(tensors, metadata=said))


def test_other_tensors_of_torchao_are_refused_by_their_name():
    tensors = {"x._weight_qdata": np.zeros((4, 8), np.int8)}
    said = torchao_said("Int4Tensor", block_size=[1, 8])
    with pytest.raises(UnsupportedError, match=r"torchao.*x.weight.*Int4Tensor"):
        coded_weights(stored(tensors, metadata=said))
    assert not coded_weights(stored(tensors))


def test_no_operation_knows_a_format_by_its_name():
    """What differs between formats is asked of codecs."""
    folder = Path(loratools.__file__).parent
    files = [
        path.stem
        for path in (folder / "base" / "codecs").glob("*.py")
        if "\nCODEC = " in path.read_text()
    ]
    assert len(files) == len(CODECS)
    named = re.compile(rf"base\.codecs\.(?:{'|'.join(files)})\b|checkpoints\.bitsandbytes\b")
    for path in (folder / "operations").rglob("*.py"):
        if path.name != "quantize.py" and not path.name.startswith("__"):
            assert not named.search(path.read_text()), path
