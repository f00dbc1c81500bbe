"""Quantised weights as codecs see them, and their values by element-wise definitions."""

import numpy as np

from loratools.base.codecs import Stored, coded_weights
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import TensorRef, in_memory

E2M1 = (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)


def stored(tensors, stated=None, metadata=None, **config):
    """Return tensors as codecs see them; a tuple names the type of bytes that NumPy has not."""
    refs = {}
    for key, value in tensors.items():
        values, code = value if isinstance(value, tuple) else (value, None)
        if code is None:
            refs[key] = in_memory(key, values)
        else:
            data = np.ascontiguousarray(values).tobytes()
            refs[key] = TensorRef(key, DTYPES[code], values.shape, lambda data=data: data)
    return Stored(refs, config, stated or {}, metadata or {})


def only(tensors, stated=None, metadata=None, **config):
    """Return the one quantised weight among tensors; every tensor belongs to it."""
    found = coded_weights(stored(tensors, stated, metadata, **config))
    ((key, weight),) = found.items()
    assert {part.key for part in weight.parts} == set(tensors)
    assert key == weight.key
    return weight


def check(weight, want, dtype):
    """Compare all values, and odd ranges of them, bit for bit."""
    want = np.asarray(want).astype(DTYPES[dtype].numpy_dtype())
    tensor = weight.tensor()
    assert (tensor.dtype.code, tensor.shape) == (dtype, want.shape)
    assert tensor.load().tobytes() == want.tobytes()
    flat, width = want.reshape(-1), want.shape[-1]
    for start, stop in (
        (0, 1), (5, 9), (1, flat.size), (flat.size // 2, flat.size // 2 + 7), (width - 1, width + 1)
    ):  # fmt: skip
        assert tensor.elements(start, stop).tobytes() == flat[start:stop].tobytes()


def to_words(codes, bits):
    """Pack codes along the last axis as one stream of bits, the lowest first: I32."""
    count = codes.shape[-1]
    words = -(-count * bits // 32)
    flat = codes.reshape(-1, count)
    out = np.zeros((len(flat), words), np.uint32)
    for row, values in enumerate(flat):
        number = sum(int(value) << (bits * i) for i, value in enumerate(values))
        for word in range(words):
            out[row, word] = number >> (32 * word) & 0xFFFFFFFF
    return out.view(np.int32).reshape(*codes.shape[:-1], words)


def pairs(codes):
    """Pack four-bit codes, the first of two in the low half: U8."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def e2m1(codes):
    return np.array([*E2M1, *(-x for x in E2M1)], np.float32)[codes]


def rounded(values, dtype):
    return np.asarray(values, np.float32).astype(DTYPES[dtype].numpy_dtype()).astype(np.float32)


def random_scales(rng, shape, dtype):
    return (rng.uniform(0.01, 0.1, shape)).astype(DTYPES[dtype].numpy_dtype())
