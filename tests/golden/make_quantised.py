"""Write `quantised.npz`: weights that compressed-tensors packed, and its own values of them.

    pip install --target FOLDER --no-deps compressed-tensors loguru
    PYTHONPATH=FOLDER python tests/golden/make_quantised.py

Keys are CASE/TENSOR, and CASE/values; 16-bit floats and F8_E4M3 are stored as their bits, and
CASE/TENSOR:TYPE says of which type. Made with compressed-tensors 0.20.1 and torch 2.13.
"""

from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).parent / "quantised.npz"
BITS = {
    torch.bfloat16: ("BF16", torch.uint16),
    torch.float16: ("F16", torch.uint16),
    torch.float8_e4m3fn: ("F8_E4M3", torch.uint8),
}


def case(name, arguments, scale, *, zero=None, of_all=None, shape=(32, 64)):
    """Pack one weight by a compressor, unpack it again, and return all tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    state = {"weight": weight, "weight_scale": scale}
    if zero is not None:
        state["weight_zero_point"] = zero
    if of_all is not None:
        state["weight_global_scale"] = of_all
    compressor = BaseCompressor.get_value_from_registry(name)
    packed = compressor.compress(state, scheme)
    values = compressor.decompress(packed, scheme)["weight"]
    return {**packed, "values": values.to(torch.bfloat16)}


def scales(*shape, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(shape, generator=generator) * 0.1 + 0.05).to(dtype)


def powers():
    return torch.exp2(torch.arange(64).reshape(32, 2).remainder(5) - 3.0).to(torch.bfloat16)


def integers(bits, *, strategy="group", symmetric=True):
    return {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
        **({"group_size": 32} if strategy == "group" else {}),
    }  # fmt: skip


def cases():
    """Return the tensors of every case."""
    found = {}
    for bits in range(2, 9):
        found[f"int{bits}"] = case("pack-quantized", integers(bits), scales(32, 2))
    for bits in (4, 8):
        half = 1 << (bits - 1)
        zero = torch.arange(64).reshape(32, 2).remainder(2 * half) - half
        arguments = integers(bits, symmetric=False)
        found[f"int{bits}-asymmetric"] = case(
            "pack-quantized", arguments, scales(32, 2), zero=zero.to(torch.int8)
        )
    channel = integers(4, strategy="channel")
    found["int4-channel"] = case("pack-quantized", channel, scales(32, 1), shape=(32, 33))
    channel = integers(8, strategy="channel")
    found["int8-bytes"] = case("int-quantized", channel, scales(32, 1))
    found["nvfp4"] = case(
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn},
        (scales(32, 4) * 900).to(torch.float8_e4m3fn).to(torch.bfloat16),
        of_all=torch.tensor([777.0]),
    )  # fmt: skip
    found["mxfp4"] = case(
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
         "scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
        powers(),
    )  # fmt: skip
    eight = {"num_bits": 8, "type": "float"}
    found["mxfp8"] = case(
        "mxfp8-quantized",
        {**eight, "strategy": "group", "group_size": 32,
         "scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
        powers(),
    )  # fmt: skip
    found["fp8-channel"] = case("float-quantized", {**eight, "strategy": "channel"}, scales(32, 1))
    found["fp8-block"] = case(
        "float-quantized", {**eight, "strategy": "block", "block_structure": [16, 32]}, scales(2, 2)
    )
    return found


def arrays():
    """Return what the file holds, by key."""
    found = {}
    for name, tensors in cases().items():
        for part, tensor in tensors.items():
            code, bits = BITS.get(tensor.dtype, ("", tensor.dtype))
            key = f"{name}/{part}:{code}" if code else f"{name}/{part}"
            found[key] = tensor.detach().contiguous().view(bits).numpy()
    return found


if __name__ == "__main__":
    np.savez_compressed(FILE, **arrays())
