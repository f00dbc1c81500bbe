"""What the formats' own libraries packed means what they unpacked.

`tests/golden/make_quantised.py` made one file, `make_quantised_by.py` one for each tool.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from quantised_cases import check, only

from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import in_memory

GOLDEN = Path(__file__).parents[1] / "golden"


def cases(path):
    found = {}
    with np.load(path) as file:
        for key in file.files:
            name, part = key.split("/")
            part, _, code = part.partition(":")
            found.setdefault(name, {})[part] = (file[key], code) if code else file[key]
    return found


CASES = cases(GOLDEN / "quantised.npz")
BY_TOOLS = {
    f"{path.stem} {name}": case
    for path in sorted((GOLDEN / "quantised_by").glob("*.npz"))
    for name, case in cases(path).items()
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_compressed_tensors(name):
    tensors = dict(CASES[name])
    bits, code = tensors.pop("values")
    stated = {"quant_method": "compressed-tensors"}
    if name.startswith("int"):
        stated["config_groups"] = {"group_0": {"weights": {"num_bits": int(name[3])}}}
    weight = only({f"x.{part}": tensor for part, tensor in tensors.items()}, stated)
    assert code == "BF16"
    if weight.dtype.code == "BF16":
        check(weight, bits.view(DTYPES["BF16"].numpy_dtype()), "BF16")
    else:  # products of eight-bit floats, which are rounded when they are stored
        assert weight.tensor(DTYPES["BF16"]).load().tobytes() == bits.tobytes()


@pytest.mark.parametrize("name", BY_TOOLS)
def test_values_are_those_of_the_tool_that_quantised(name):
    """All numbers are equal; only a zero may have another sign, as ModelOpt drops that of NVFP4."""
    tensors = dict(BY_TOOLS[name])
    values, stated = tensors.pop("values"), json.loads(str(tensors.pop("stated")))
    bits, code = (
        values if isinstance(values, tuple) else (values, in_memory("x", values).dtype.code)
    )
    want = bits.view(DTYPES[code].numpy_dtype()).astype(np.float32)
    metadata = json.loads(str(tensors.pop("metadata", "{}")))
    named = {f"x.{part}": tensor for part, tensor in tensors.items()}
    found = (
        only(named, stated, metadata, quantization_config=stated)
        .tensor(DTYPES[code])
        .load(np.float32)
    )
    if "convrot" in name:  # ours is a sum of fours, the library's a product of matrices
        np.testing.assert_allclose(found, want, rtol=0, atol=2.0**-20 * np.abs(want).max())
    else:
        assert np.array_equal(found, want)
    assert np.unique(want).size > 4
