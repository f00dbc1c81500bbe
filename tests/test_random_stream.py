"""Streams of random numbers, compared with the installed torch."""

import numpy as np
import pytest

from loratools.kinds.numbers.random_stream import TorchStream
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import UnsupportedError

SEEDS = [0, 1, 777, 2**40 + 5]


def generator(seed):
    import torch

    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_numbers_are_torchs_and_follow_each_other(seed):
    import torch

    drawn, stream = generator(seed), TorchStream(seed)
    for shape in ((37, 5), (3,), (4, 5, 6)):
        want = torch.empty(shape).uniform_(-0.3, 0.7, generator=drawn)
        np.testing.assert_array_equal(stream.uniform(shape, -0.3, 0.7), want.numpy())


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_numbers_of_narrow_types_are_torchs_to_rounding(code):
    import torch

    bound = 5**-0.5
    dtype = getattr(torch, DTYPES[code].torch)
    want = torch.empty((4000, 5), dtype=dtype).uniform_(-bound, bound, generator=generator(3))
    got = TorchStream(3).uniform_narrow((4000, 5), -bound, bound, DTYPES[code])
    rounding = float(torch.finfo(dtype).eps)
    np.testing.assert_allclose(got.astype(np.float32), want.float().numpy(), rtol=rounding)
    assert np.mean(got.astype(np.float32) == want.float().numpy()) > 0.999


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [10, 1000, 12345])
def test_permutations_begin_as_torchs_do(seed, size):
    import torch

    count = min(size, 77)
    want = torch.randperm(size, generator=generator(seed))[:count]
    np.testing.assert_array_equal(TorchStream(seed).first_of_permutation(size, count), want.numpy())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(64, 2, 2), (5, 7), (16,), (33,), (3, 5), (1,), (2, 2)])
def test_normal_numbers_are_torchs_to_rounding(seed, shape):
    import torch

    want = torch.normal(mean=0.0, std=0.7, size=shape, generator=generator(seed))
    np.testing.assert_allclose(TorchStream(seed).normal(shape, 0.7), want.numpy(), atol=1e-6)


def test_what_torch_does_otherwise_is_refused():
    with pytest.raises(UnsupportedError):
        TorchStream(0).first_of_permutation(2**31, 5)
