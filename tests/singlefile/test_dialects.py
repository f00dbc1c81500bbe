"""Every dialect's golden file is read as its definition says, and written back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from dialect_files import GOLDEN, MAKERS, DialectFile, save
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from loratools.kinds import get_kind
from loratools.kinds.declaration import Kronecker, Product
from loratools.lowrank.matrices import loaded
from loratools_formats import find_format, read_adapter, write_adapter
from loratools_formats.containers.safetensors_read import read_safetensors

NAMES = [maker.__name__ for maker in MAKERS]
FILES = {maker.__name__: maker for maker in MAKERS}


class Known:
    """A weight that is there."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def rows(self, start, stop):
        return self.values[start:stop]


def dense(delta, weight=None):
    """Return a delta's ΔW, of a DoRA that of its direction, as a matrix."""
    if delta.factors is None:
        change = get_kind(delta.kind).form(delta.kind_delta, weight)
        if isinstance(change, Product):
            return change.b @ change.a
        if isinstance(change, Kronecker):
            return change.scale * np.kron(change.left, change.right)
        return change.rows(0, change.shape[0])
    part = delta.factors
    ((b, a),) = loaded(part)
    return part.scale * b @ a


def tensors_of(path):
    return {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in deserialize(path.read_bytes())
    }


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_are_what_their_generator_makes(name, tmp_path):
    made = save(FILES[name](), tmp_path / "made.safetensors")
    golden = GOLDEN / f"{name}.safetensors"
    # The library orders metadata at random.
    assert tensors_of(made) == tensors_of(golden)
    assert read_safetensors(made).metadata == read_safetensors(golden).metadata


@pytest.mark.parametrize("name", NAMES)
def test_is_read_as_its_definition_says(name):
    file, path = FILES[name](), GOLDEN / f"{name}.safetensors"
    adapter = read_adapter(path)
    assert find_format(path).name == adapter.format == file.format
    assert {dialect.name for dialect in adapter.dialects} == file.dialects
    assert set(adapter.modules) == set(file.deltas)
    for module, expected in file.deltas.items():
        weight = file.weights.get(module)
        found = dense(adapter.modules[module], None if weight is None else Known(weight))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        delta = adapter.modules[module]
        known = zip(delta.shape, expected.shape, strict=True)
        assert all(side in (None, size) for side, size in known)
    assert set(adapter.additions) == file.additions
    assert set(adapter.replacements) == file.replacements
    assert set(adapter.carried) == file.carried


@pytest.mark.parametrize("name", NAMES)
def test_is_written_back_bit_for_bit(name, tmp_path):
    path = GOLDEN / f"{name}.safetensors"
    adapter = read_adapter(path)
    write_adapter(adapter, tmp_path / "copy.safetensors", adapter.format)
    assert tensors_of(tmp_path / "copy.safetensors") == tensors_of(path)
    copy = read_adapter(tmp_path / "copy.safetensors")
    assert dict(copy.metadata) == dict(adapter.metadata)


ALONE = {
    "diffusers_metadata",
    "wan_experts",
    "control_lora",
}  # which say something of the whole file


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(sorted(set(NAMES) - ALONE)), min_size=2, max_size=5))
def test_any_mixture_keeps_every_tensor_in_one_place(tmp_path_factory, names):
    files = [FILES[name]() for name in sorted(names)]
    modules = [module for file in files for module in file.deltas]
    assume(len(modules) == len(set(modules)))
    folder = tmp_path_factory.mktemp("mixture")
    mixed = DialectFile("safetensors", set())
    for file in files:
        mixed.tensors |= file.tensors
    path = save(mixed, folder / "in.safetensors")
    adapter = read_adapter(path)
    keys = [tensor.key for tensor in adapter.tensors()]
    assert sorted(keys) == sorted(mixed.tensors)
    write_adapter(adapter, folder / "out.safetensors", adapter.format)
    assert tensors_of(folder / "out.safetensors") == tensors_of(path)
