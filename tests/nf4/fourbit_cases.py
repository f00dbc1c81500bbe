"""Four-bit weights in memory and on disk for the tests, and what they mean in plain NumPy."""

import json

import ml_dtypes
import numpy as np

from loratools.base.fourbit.store import blanks, fill
from loratools_formats.checkpoints.bitsandbytes import quantized_weights
from loratools_formats.containers.safetensors_read import read_safetensors
from loratools_formats.containers.safetensors_write import write_safetensors
from loratools_formats.core.dtypes import DTYPES as TYPES
from loratools_formats.core.tensors import in_memory

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class _Memory:
    """A sink that keeps what is written."""

    def __init__(self):
        self.data = bytearray()

    def write_at(self, offset, data):
        assert offset == len(self.data)
        self.data += data


def torch_tensor(values):
    """Return an array as a torch tensor of the same type."""
    import torch

    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def quantized(values, options, cuts=(), key="w"):
    """Return the tensors of a quantised weight by their suffix; pieces end at `cuts`."""
    sinks = {blank.key: _Memory() for blank in blanks(key, values.shape, options)}
    pieces = np.split(values.reshape(-1), cuts)
    dtype = TYPES[_CODES[values.dtype.name]]
    fill(sinks, key, values.shape, dtype, options, pieces)
    found = {}
    for blank in blanks(key, values.shape, options):
        data = sinks[blank.key].data
        shape = (len(data),) if blank.is_text else blank.shape
        array = np.frombuffer(data, blank.dtype.numpy_dtype()).reshape(shape)
        found[blank.key.removeprefix(key)] = in_memory(blank.key, array)
    return found


def stored(values, options, path):
    """Quantise a weight named w, write it into a file, and return it as it is read from there."""
    write_safetensors(path, quantized(values, options).values(), {}, overwrite=True)
    return quantized_weights(read_safetensors(path).tensors)["w"]


def dense(weight):
    """Return a weight's values in float32 by the definition, one code at a time."""
    tensors = {t.key.removeprefix(weight.key): t.load() for t in weight.tensors}
    state = json.loads(bytes(weight.state.raw()))
    codes = np.stack([tensors[""] >> 4, tensors[""] & 15], axis=-1).reshape(-1)[: weight.numel]
    scales = tensors[".absmax"]
    if "nested_offset" in state:
        group = np.arange(scales.size) // 256
        scales = tensors[".nested_quant_map"][scales] * tensors[".nested_absmax"][group]
        scales = scales + np.float32(state["nested_offset"])
    block = np.arange(weight.numel) // state["blocksize"]
    return tensors[".quant_map"][codes] * scales[block]
