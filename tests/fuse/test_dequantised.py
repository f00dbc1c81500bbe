"""Quantised checkpoints read as plain ones: against values computed with torch."""

import json

import numpy as np
import pytest
import rounding
from safetensors.torch import load_file, save_file

from loratools.base.dequantised import dequantised
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import AdapterError, UnsupportedError

QUANT = {"quant_method": "fp8"}


@pytest.fixture
def make(tmp_path):
    """Return a function that writes a checkpoint folder."""

    def made(tensors, quantization=None, **config):
        folder = tmp_path / "base"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        values = {"model_type": "llama", "dtype": "bfloat16"} | config
        if quantization is not None:
            values["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(values))
        return read_checkpoint(folder)

    return made


def codes(*shape, dtype="float8_e4m3fn", seed=0):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 20).to(getattr(torch, dtype))


def once(exact):
    """Return float64 numbers rounded to bfloat16 once; torch goes by way of float32."""
    import torch

    return torch.from_numpy(
        rounding.rounded(exact.numpy(), rounding.TYPES["bf16"]).astype(np.float64)
    )


def spread(scale, block, shape):
    """Return one scale per element, as the definition says."""
    rows = np.arange(shape[-2]) // block[0]
    columns = np.arange(shape[-1]) // block[1]
    return scale.float().numpy()[..., rows[:, None], columns[None, :]]


def check(base, wanted):
    """Compare whole tensors and odd ranges with float32 values."""
    (key,) = (k for k in base.tensors if k.endswith(".weight"))
    tensor = dequantised(base).checkpoint.tensors[key]
    assert tensor.dtype.code == "F32"
    assert tensor.shape == wanted.shape
    np.testing.assert_array_equal(tensor.load(), wanted)
    flat = wanted.reshape(-1)
    for start, stop in ((0, 1), (5, 9), (1, flat.size), (flat.size // 2, flat.size // 2 + 7)):
        np.testing.assert_array_equal(tensor.elements(start, stop), flat[start:stop])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    ("shape", "block"), [((6, 10), (4, 4)), ((8, 8), (4, 4)), ((3, 5), (4, 8))]
)
def test_blocks(make, shape, block, dtype):
    import torch

    w = codes(*shape, dtype=dtype)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scale = torch.rand(grid) + 0.5
    quantization = QUANT | {"weight_block_size": list(block)}
    base = make({"q.weight": w, "q.weight_scale_inv": scale}, quantization)
    check(base, w.float().numpy() * spread(scale, block, shape))


def test_blocks_of_stacked_experts(make):
    import torch

    w, scale = codes(3, 6, 10), torch.rand(3, 2, 3) + 0.5
    quantization = QUANT | {"weight_block_size": [4, 4]}
    base = make({"e.weight": w, "e.weight_scale_inv": scale}, quantization)
    check(base, w.float().numpy() * spread(scale, (4, 4), (6, 10)))


def test_blocks_of_128_by_default(make):
    import torch

    w, scale = codes(130, 257), torch.rand(2, 3) + 0.5
    base = make({"q.weight": w, "q.weight_scale_inv": scale}, QUANT)
    check(base, w.float().numpy() * spread(scale, (128, 128), (130, 257)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale(make, shape):
    import torch

    w, scale = codes(6, 10), torch.full(shape, 0.37)
    base = make({"q.weight": w, "q.weight_scale": scale}, {"quant_method": "compressed-tensors"})
    check(base, w.float().numpy() * scale.float().numpy().reshape(-1)[0])


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_scale_per_output(make, shape):
    import torch

    w, scale = codes(6, 10), torch.rand(shape) + 0.5
    base = make({"q.weight": w, "q.weight_scale": scale}, {"quant_method": "fbgemm_fp8"})
    check(base, w.float().numpy() * scale.numpy().reshape(6, 1))


def test_scales_that_only_serve_running_are_dropped_and_the_config_is_plain(make):
    import torch

    tensors = {
        "a.q.weight": codes(6, 10),
        "a.q.weight_scale": torch.ones(()),
        "a.q.input_scale": torch.ones(()),
        "a.k_scale": torch.ones(()),
        "norm.weight": torch.ones(10, dtype=torch.bfloat16),
    }
    base = make(tensors, {"quant_method": "modelopt"}, text_config={"dtype": "float8_e4m3fn"})
    found = dequantised(base)
    assert set(found.checkpoint.tensors) == {"a.q.weight", "norm.weight"}
    assert set(found.dropped) == {"a.q.weight_scale", "a.q.input_scale", "a.k_scale"}
    assert "quantization_config" not in found.checkpoint.config
    assert found.checkpoint.config["text_config"] == {"dtype": "bfloat16"}
    assert {key: dtype.code for key, dtype in found.stored.items()} == {"a.q.weight": "BF16"}


def test_a_plain_checkpoint_stays_itself(make):
    import torch

    base = make({"q.weight": torch.ones(2, 2)})
    assert dequantised(base).checkpoint is base
    assert not dequantised(base).is_quantized


@pytest.mark.parametrize(
    ("tensors", "quantization", "error", "words"),
    [
        ({"q.weight": (6, 10)}, QUANT, UnsupportedError, "without one scale"),
        ({"q.weight": (6, 10), "q.scales": (1,)}, None, UnsupportedError, "without one scale"),
        ({"q.weight": (6, 10), "q.weight_scale_inv": (2, 3)}, QUANT, AdapterError, "128 × 128"),
        (
            {"q.weight": (6, 10), "q.weight_scale_inv": (2, 2)},
            QUANT | {"weight_block_size": "4x4"},
            AdapterError,
            "weight_block_size",
        ),
        ({"q.weight": (6, 10)}, {"quant_method": "gptq"}, UnsupportedError, "gptq"),
        ({"q.weight": (6, 10)}, {"quant_method": "awq"}, UnsupportedError, "awq"),
        (
            {"q.weight": (6, 10)},
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            UnsupportedError,
            "bitsandbytes",
        ),
        (
            {"q.weight": (6, 10)},
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            UnsupportedError,
            "compressed-tensors, format pack-quantized",
        ),
        (
            {"q.weight": (6, 10)},
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            UnsupportedError,
            "modelopt, quant_algo NVFP4",
        ),
    ],
)
def test_refusals(make, tensors, quantization, error, words):
    import torch

    filled = {k: torch.ones(v) if "scale" in k else codes(*v) for k, v in tensors.items()}
    base = make(filled, quantization)
    with pytest.raises(error, match=words):
        dequantised(base)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ],
)
def test_variants_that_store_eight_bit_floats(make, quantization):
    import torch

    base = make({"q.weight": codes(6, 10), "q.weight_scale": torch.tensor(0.5)}, quantization)
    (tensor,) = dequantised(base).checkpoint.tensors.values()
    np.testing.assert_array_equal(tensor.load(), 0.5 * codes(6, 10).float().numpy())


def test_fused_into_eight_bits(make, make_folder, tmp_path):
    """Fusing into an eight-bit base stores correctly rounded 16-bit sums and a plain config."""
    import torch

    from loratools.operations.fuse.draft import FuseInput
    from loratools.operations.fuse.operation import Fusion
    from loratools.operations.fuse.options import FuseOptions
    from loratools_formats import read_adapter

    w, other = codes(24, 20), codes(8, 20, seed=1)
    scale = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) + 0.5
    quantization = QUANT | {"weight_block_size": [4, 4]}
    tensors = {"layers.0.q.weight": w, "layers.0.q.weight_scale_inv": scale}
    tensors |= {"layers.0.o.weight": other, "layers.0.o.weight_scale_inv": torch.ones(2, 5)}
    base = make(tensors, quantization)
    (base.path / "hf_quant_config.json").write_text("{}")
    adapter = read_adapter(make_folder(dtype="f32"))
    result = Fusion(base, [FuseInput(adapter, 1.0, "a")], FuseOptions()).write(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    delta = adapter.modules["layers.0.q"].direction
    change = delta.scale * (delta.b.load(np.float64) @ delta.a.load(np.float64))
    dequantised = w.float() * torch.from_numpy(spread(scale, (4, 4), (24, 20)))
    exact = torch.from_numpy(dequantised.double().numpy() + change)
    assert set(written) == {"layers.0.q.weight", "layers.0.o.weight"}
    assert torch.equal(written["layers.0.q.weight"].double(), once(exact))
    assert torch.equal(written["layers.0.o.weight"], other.to(torch.bfloat16))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": "bfloat16"}
    assert (len(result.tensors), result.converted, result.copied) == (1, 1, 0)
    assert result.left_out == ("hf_quant_config.json",)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("dtype", [None, "f16"])
def test_eight_bit_floats_without_scales_are_numbers(make, make_folder, tmp_path, dtype):
    """What changes becomes 16 bits wide, what does not stays as it is."""
    import torch

    from loratools.operations.fuse.draft import FuseInput
    from loratools.operations.fuse.operation import Fusion
    from loratools.operations.fuse.options import FuseOptions
    from loratools_formats import read_adapter

    w, other = codes(24, 20), codes(8, 20, seed=1)
    base = make({"layers.0.q.weight": w, "layers.0.o.weight": other})
    adapter = read_adapter(make_folder(dtype="f32"))
    options = FuseOptions(dtype=dtype)
    result = Fusion(base, [FuseInput(adapter, 1.0, "a")], options).write(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    delta = adapter.modules["layers.0.q"].direction
    change = delta.scale * (delta.b.load(np.float64) @ delta.a.load(np.float64))
    exact = torch.from_numpy(w.float().double().numpy() + change)
    if dtype is None:
        assert torch.equal(written["layers.0.q.weight"].double(), once(exact))
        assert torch.equal(written["layers.0.o.weight"].view(torch.uint8), other.view(torch.uint8))
        (finding,) = result.findings
        assert finding.message == "weights in eight bits that change are stored as BF16: 1"
    else:
        assert torch.equal(written["layers.0.q.weight"], exact.to(torch.float16))
        assert torch.equal(written["layers.0.o.weight"], other.to(torch.float16))
        assert result.findings == ()
