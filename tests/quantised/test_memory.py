"""A range of a weight needs memory for a range, however large the weight is."""

import tracemalloc

import pytest

from loratools.base.codecs import Stored, coded_weights
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import in_file

OUT, IN = 8192, 16384
GROUPS = IN // 128
CASES = {
    "GPTQ": {
        "qweight": ("I32", IN // 8, OUT), "qzeros": ("I32", GROUPS, OUT // 8),
        "scales": ("F16", GROUPS, OUT),
    },
    "AWQ": {
        "qweight": ("I32", IN, OUT // 8), "qzeros": ("I32", GROUPS, OUT // 8),
        "scales": ("F16", GROUPS, OUT),
    },
    "MLX": {
        "weight": ("U32", OUT, IN // 8), "scales": ("BF16", OUT, GROUPS),
        "biases": ("BF16", OUT, GROUPS),
    },
    "compressed-tensors": {
        "weight": ("I8", OUT, IN), "weight_scale": ("BF16", OUT, GROUPS),
        "weight_zero_point": ("I8", OUT, GROUPS),
    },
    "gpt-oss": {
        "experts.w_blocks": ("U8", 2, OUT, IN // 32, 16),
        "experts.w_scales": ("U8", 2, OUT, IN // 32),
    },
}  # fmt: skip


class Zeros:
    """A file of zeros that counts what is read of it."""

    def __init__(self):
        self.nbytes = 0

    def read_at(self, offset, nbytes):  # noqa: ARG002 - a file's
        self.nbytes += nbytes
        return bytes(nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_range_needs_memory_for_a_range(name):
    file = Zeros()
    tensors = {
        f"x.{leaf}": in_file(f"x.{leaf}", DTYPES[code], tuple(shape), file, 0)
        for leaf, (code, *shape) in CASES[name].items()
    }
    config = {"quantization": {"bits": 4, "group_size": 128}}
    ((_, weight),) = coded_weights(Stored(tensors, config, {})).items()
    tensor = weight.tensor()
    count = 1 << 19
    tensor.elements(0, 64)
    tracemalloc.start()
    try:
        tensor.elements(tensor.numel // 2, tensor.numel // 2 + count)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert weight.nbytes > 60 << 20
    assert peak < 20 * count
    assert file.nbytes < weight.nbytes // 4
