"""What compressed-tensors packed means what it unpacked; `tests/golden/make_quantised.py`."""

from pathlib import Path

import numpy as np
import pytest
from quantised_cases import check, only

from loratools_formats.core.dtypes import DTYPES

FILE = Path(__file__).parents[1] / "golden" / "quantised.npz"


def cases():
    found = {}
    with np.load(FILE) as file:
        for key in file.files:
            name, part = key.split("/")
            part, _, code = part.partition(":")
            found.setdefault(name, {})[part] = (file[key], code) if code else file[key]
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_compressed_tensors(name):
    tensors = dict(CASES[name])
    bits, code = tensors.pop("values")
    stated = {"quant_method": "compressed-tensors"}
    if name.startswith("int"):
        stated["config_groups"] = {"group_0": {"weights": {"num_bits": int(name[3])}}}
    weight = only({f"x.{part}": tensor for part, tensor in tensors.items()}, stated)
    assert code == "BF16"
    check(weight, bits.view(DTYPES["BF16"].numpy_dtype()), "BF16")
