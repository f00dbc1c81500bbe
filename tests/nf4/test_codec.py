"""The four-bit codec against bitsandbytes' CPU code and against the definition."""

import numpy as np
import pytest
from fourbit_cases import DTYPES, dense, quantized, stored, torch_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.base.fourbit import scales
from loratools.base.fourbit.decode import Dequantizer
from loratools.base.fourbit.encode import CHUNK, FourBitOptions, StreamingQuantizer
from loratools.base.fourbit.scales import nest, unnest
from loratools.base.fourbit.tables import dynamic_map, four_bit
from loratools_formats.checkpoints.bitsandbytes import quantized_weights
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import AdapterError, OptionError

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = {"even": (64, 128), "odd": (33, 50), "tail": (7, 80), "one": (1, 1), "ragged": (5, 1003)}


@pytest.fixture(scope="module")
def bnb():
    import bitsandbytes.functional as functional
    import torch

    torch.set_num_threads(1)
    return functional


@pytest.fixture
def torch_mean(monkeypatch):
    """Take the mean of scales as torch does, whose last bit depends on how it adds them up."""
    import torch

    monkeypatch.setattr(scales, "mean", lambda a: torch.from_numpy(a).mean().numpy()[()])


def example(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * rng.choice([1e-3, 1.0, 40.0], (shape[0], 1))
    values[rng.random(shape) < 0.05] = 0
    if shape[0] > 4:
        values[3] = 0
    return values.astype(DTYPES[dtype])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_are_those_of_bitsandbytes(bnb, quant_type, blocksize, double, torch_mean):
    options = FourBitOptions(quant_type, blocksize, double)
    for dtype in DTYPES:
        for shape in SHAPES.values():
            values = example(shape, dtype)
            ours = quantized(values, options)
            theirs, state = bnb.quantize_4bit(
                torch_tensor(values),
                blocksize=blocksize,
                compress_statistics=double,
                quant_type=quant_type,
            )
            their_state = state.as_dict(packed=True)
            want = {"": theirs, **{f".{key}": value for key, value in their_state.items()}}
            assert set(ours) == set(want)
            for key, tensor in want.items():
                assert bytes(ours[key].raw()) == tensor.numpy().tobytes(), (dtype, shape, key)
                assert ours[key].shape == tuple(tensor.shape)


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_levels_are_the_number_of_thresholds_below(quant_type, blocksize):
    """By the definition, over many pieces, and with the tail's own scale."""
    values = example((3, 100_001), "f32", seed=1)
    options = FourBitOptions(quant_type, blocksize, double_quant=False)
    ours = quantized(values, options)
    flat = values.reshape(-1)
    codebook = four_bit(quant_type).codebook
    order = np.argsort(np.append(codebook, np.float32(0))[:16], kind="stable")
    if quant_type == "fp4":
        order = np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3])
    ascending = codebook[order]
    middles = (ascending[1:] + ascending[:-1]) / np.float32(2)
    codes = []
    for start in range(0, flat.size, blocksize):
        block = flat[start : start + blocksize]
        largest = np.maximum(np.abs(block).max(), np.float32(1e-38))
        scaled = block * (np.float32(1) / largest) if block.size == blocksize else block / largest
        codes.append(order[np.searchsorted(middles, scaled, side="left")])
    codes = np.concatenate([*codes, [7 if quant_type == "nf4" else 0]]).astype(np.uint8)
    packed = codes[0::2] << 4 | codes[1::2]
    assert np.array_equal(np.frombuffer(ours[""].raw(), np.uint8), packed)


@settings(max_examples=150, deadline=None)
@given(
    threshold=st.integers(-1, 14),
    cell=st.integers(0, 4097),
    steps=st.integers(-64, 64),
    quant_type=st.sampled_from(["nf4", "fp4"]),
)
def test_levels_near_thresholds_and_edges(threshold, cell, steps, quant_type):
    kind = four_bit(quant_type)
    edge = np.float32(cell / 2048 - 1)
    near = edge if threshold < 0 else kind.thresholds[threshold]
    spacing = max(float(np.spacing(np.abs(near))), 2.0**-149)
    around = np.float32(near + spacing * (steps + np.arange(-30, 31)))
    block = np.clip(np.concatenate([np.float32([1]), around, [0, -0.0]]), -1, 1)
    scaled = block.astype(np.float32)[:64]
    scaled = np.pad(scaled, (0, 64 - scaled.size))
    ours = quantized(scaled, FourBitOptions(quant_type, 64, double_quant=False))
    codes = np.frombuffer(ours[""].raw(), np.uint8)
    levels = (kind.thresholds[None] < scaled[:, None]).sum(axis=1)
    order = (
        np.arange(16)
        if quant_type == "nf4"
        else np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3])
    )
    want = order[levels].astype(np.uint8)
    assert np.array_equal(codes, want[0::2] << 4 | want[1::2])


def test_every_threshold_is_far_from_every_edge_of_a_cell():
    for quant_type, shift in (("nf4", 0.0), ("fp4", 0.5)):
        thresholds = four_bit(quant_type).thresholds.astype(np.float64)
        position = (thresholds + 1) * 2048 + shift
        assert np.abs(position - np.round(position)).min() / 2048 > 2e-5


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_pieces_of_any_length_give_the_same(quant_type):
    values = example((1, 3 * CHUNK + 777), "bf16")[0]
    options = FourBitOptions(quant_type, 64)
    whole = quantized(values, options)
    rng = np.random.default_rng(2)
    for cuts in ([1], [CHUNK - 1], [CHUNK + 1], sorted(rng.integers(0, values.size, 40))):
        parts = quantized(values, options, cuts=cuts)
        assert {k: bytes(t.raw()) for k, t in parts.items()} == {
            k: bytes(t.raw()) for k, t in whole.items()
        }


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_error_is_the_true_one(quant_type, blocksize, double, tmp_path):
    values = example((211, 333), "f32")
    options = FourBitOptions(quant_type, blocksize, double)
    quantizer = StreamingQuantizer("w", values.size, options)
    for _ in quantizer.push(values):
        pass
    found = quantizer.finish()
    weight = stored(values, options, tmp_path / "w.safetensors")
    exact = values.astype(np.float64).reshape(-1)
    difference = Dequantizer(weight).elements(0, values.size).astype(np.float64) - exact
    assert found.loss.squared_error == pytest.approx(np.sum(difference**2), rel=1e-5)
    assert found.loss.squared_norm == pytest.approx(np.sum(exact**2), rel=1e-5)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 2048])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_are_those_of_the_definition(quant_type, blocksize, double, tmp_path):
    for dtype in DTYPES:
        for number, shape in enumerate(SHAPES.values()):
            values = example(shape, dtype)
            options = FourBitOptions(quant_type, blocksize, double)
            weight = stored(values, options, tmp_path / f"{dtype}{number}.safetensors")
            out = np.empty(values.size, DTYPES[dtype])
            Dequantizer(weight).elements(0, values.size, out)
            assert out.tobytes() == dense(weight).astype(DTYPES[dtype]).tobytes()


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_reads_the_same_values_where_it_is_right(bnb, double, tmp_path):
    import torch

    for shape in ((64, 128), (7, 64), (3, 100)):
        for dtype in DTYPES:
            values = example(shape, dtype)
            options = FourBitOptions("nf4", 64, double)
            weight = stored(values, options, tmp_path / "w.safetensors")
            tensors = {t.key: t.torch() for t in weight.tensors}
            packed = tensors.pop("w")
            state = bnb.QuantState.from_dict(tensors, device=torch.device("cpu"))
            theirs = bnb.dequantize_4bit(packed, state).reshape(-1)
            out = np.empty(values.size, DTYPES[dtype])
            Dequantizer(weight).elements(0, values.size, out)
            assert out.tobytes() == theirs.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_scales_in_16_bits_mean_what_bitsandbytes_reads(bnb, dtype):
    """As it saves a model that has run on a CPU."""
    import torch

    values = example((64, 640), "bf16")
    packed, state = bnb.quantize_4bit(torch_tensor(values), blocksize=64, quant_type="nf4")
    half = state.absmax.to(torch.bfloat16 if dtype == "bf16" else torch.float16)
    state.offset = half.mean().float()
    state.absmax, state.state2 = bnb.quantize_blockwise(half - state.offset, blocksize=256)
    state.nested = True
    tensors = {"w": packed} | {f"w.{k}": v for k, v in state.as_dict(packed=True).items()}
    refs = {k: in_memory(k, np.ascontiguousarray(v.numpy())) for k, v in tensors.items()}
    weight = quantized_weights(refs)["w"]
    assert weight.nested.dtype.code == dtype.upper()
    out = np.empty(values.size, DTYPES["f32"])
    Dequantizer(weight).elements(0, values.size, out)
    state.dtype = torch.float32
    assert np.array_equal(out, bnb.dequantize_4bit(packed, state).numpy().reshape(-1))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_range_of_elements(ranges, data):
    weight, whole = ranges
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, min(whole.size, start + 1000)))
    assert np.array_equal(Dequantizer(weight).elements(start, stop), whole[start:stop])


@pytest.fixture(scope="module")
def ranges(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranges") / "w.safetensors"
    weight = stored(example((41, 101), "f32"), FourBitOptions("nf4", 64), path)
    return weight, dense(weight)


def test_scales_go_to_the_bins_of_bitsandbytes(bnb):
    import torch

    rng = np.random.default_rng(0)
    for size in (1, 255, 256, 257, 5000, 30_000):
        values = np.abs(rng.standard_normal(size)).astype(np.float32)
        ours = nest(values)
        theirs, state = bnb.quantize_blockwise(
            torch.from_numpy(values) - float(scales.mean(values)), blocksize=256
        )
        assert np.array_equal(ours.codes, theirs.numpy())
        assert np.array_equal(ours.absmax, state.absmax.numpy())
        want = bnb.dequantize_blockwise(theirs, state) + ours.offset
        assert np.array_equal(unnest(ours.codes, ours.absmax, ours.offset), want.numpy())
    assert np.array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 131, 500, 776])
def test_values_that_are_not_finite_are_refused(bad, position):
    values = np.ones(777, np.float32)
    values[position] = bad
    with pytest.raises(AdapterError, match="NaN or infinite") as caught:
        quantized(values, FourBitOptions())
    assert caught.value.tensor == "w"


def test_too_many_and_too_few_values():
    quantizer = StreamingQuantizer("w", 100, FourBitOptions())
    list(quantizer.push(np.ones(60, np.float32)))
    with pytest.raises(AdapterError, match="fewer values"):
        quantizer.finish()
    with pytest.raises(AdapterError, match="more values"):
        list(quantizer.push(np.ones(41, np.float32)))


def test_blocksizes():
    for blocksize in (0, 16, 63, 96, 8192):
        with pytest.raises(OptionError, match="no such blocksize"):
            FourBitOptions(blocksize=blocksize)


def test_extreme_magnitudes(bnb):
    for scale in (1e-44, 1e-39, 1e-30, 1e30, 3e38):
        values = (np.random.default_rng(0).uniform(-1, 1, 1000) * scale).astype(np.float32)
        for quant_type in ("nf4", "fp4"):
            ours = quantized(values, FourBitOptions(quant_type, 64, double_quant=False))
            theirs, state = bnb.quantize_4bit(
                torch_tensor(values), compress_statistics=False, quant_type=quant_type
            )
            assert bytes(ours[""].raw()) == theirs.numpy().tobytes()
            assert bytes(ours[".absmax"].raw()) == state.absmax.numpy().tobytes()
