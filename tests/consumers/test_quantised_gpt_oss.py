"""Packed experts of gpt-oss: transformers' own function says what they mean."""

import numpy as np

from loratools.base.codecs import Stored, coded_weights
from loratools_formats.core.tensors import in_memory


def test_values_are_those_of_transformers():
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    parts = {
        "x.experts.w_blocks": rng.integers(0, 256, (2, 96, 3, 16)).astype(np.uint8),
        "x.experts.w_scales": rng.integers(100, 140, (2, 96, 3)).astype(np.uint8),
    }
    want = convert_moe_packed_tensors(*map(torch.from_numpy, parts.values()))
    tensors = {key: in_memory(key, values) for key, values in parts.items()}
    (weight,) = coded_weights(Stored(tensors, {}, {})).values()
    got = weight.tensor().torch()
    assert got.shape == want.shape
    assert torch.equal(got.view(torch.int16), want.contiguous().view(torch.int16))
