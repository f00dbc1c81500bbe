"""Every layout of experts written from every other, and read again as the same change."""

import json

import numpy as np
import pytest
from expert_files import (
    APART,
    LAYOUTS,
    PREFIX,
    SHARED,
    Change,
    base,
    each,
    largest_error,
    pair,
    read_deltas,
    save,
    stacked,
    three_d_apart,
    tinker,
)
from safetensors.numpy import load_file

import loratools as lt
from loratools_formats import read_adapter
from loratools_formats.disk.errors import LoratoolsError, OptionError, UnsupportedError

TARGETS = {
    "stacked": {"experts": "stacked"},
    "each": {"experts": "each"},
    "3d": {"experts": "3d"},
    "0.18": {"experts": "stacked", "peft_layout": "0.18"},
    "0.19.1": {"experts": "stacked", "peft_layout": "0.19.1"},
    "tinker": {"to": "tinker"},
}


def keys(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("width", "inner"), [(8, 6), (8, 4), (8, 8)])
def test_every_layout_to_every_layout_bit_for_bit(layout, target, width, inner, tmp_path):
    change = Change(width=width, inner=inner)
    model = base(tmp_path / "base", change, stacks=True)
    folder = save(tmp_path / "a", LAYOUTS[layout](change))
    lt.convert(folder, base=model, output=tmp_path / "b", **TARGETS[target])
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), change.deltas()) == 0.0
