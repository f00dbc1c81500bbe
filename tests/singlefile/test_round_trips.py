"""Every table there and back: kohya, diffusers and ComfyUI lead to the same values, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_resolution import run

import loratools as lt
from loratools.naming.tables import bundled_tables, filled, find_table

_NAMINGS = ("kohya", "diffusers", "comfyui")


def shapes_of(row):
    """Return the smallest (out, in) and kernel of the weights of a row's parts."""
    rows, columns = row.shape or (sum(row.parts), 1)
    unit = 2 * sum(row.parts)
    out, in_ = rows * unit, columns * unit
    whole = sum(row.parts)
    return [(out * part // whole, in_) for part in row.parts], row.kernel or ()


def diffusers_file(table, path):
    """Write one module for each part of each row of a table, in diffusers' names."""
    generator = np.random.default_rng(0)
    tensors = {}
    for row in table._rows:
        numbers = ("0",) * row.original.count("{}")
        sizes, kernel = shapes_of(row)
        for name, (out, in_) in zip(row.diffusers, sizes, strict=True):
            full = f"{row.component or table.component}.{filled(name, numbers)}"
            ones = tuple(1 for _ in kernel)
            a = generator.standard_normal((2, in_, *kernel)).astype(np.float32)
            b = generator.standard_normal((out, 2, *ones)).astype(np.float32)
            tensors[f"{full}.lora_A.weight"], tensors[f"{full}.lora_B.weight"] = a, b
    save_file(tensors, path)
    return path


def deltas(path):
    adapter = lt.read(path)
    return {name: lt.delta(adapter, name) for name in adapter.modules}


@pytest.mark.slow
@pytest.mark.parametrize("name", [table.name for table in bundled_tables()])
def test_there_and_back(name, tmp_path):
    table = find_table(name)
    source = diffusers_file(table, tmp_path / "diffusers.safetensors")
    wanted = deltas(source)
    files = {"diffusers": source}
    for naming in ("kohya", "comfyui"):
        files[naming] = tmp_path / f"{naming}.safetensors"
        run("convert", source, files[naming], "--to", naming, "--names", name)
    for start, path in files.items():
        for target in _NAMINGS:
            if target == start:
                continue
            there = tmp_path / f"{start}-{target}.safetensors"
            run("convert", path, there, "--to", target, "--names", name)
            found, other = deltas(there), deltas(files[target])
            assert found.keys() == other.keys()
            for module, change in other.items():
                assert np.array_equal(found[module], change), (start, target, module)
    back = tmp_path / "kohya-diffusers.safetensors"
    found = deltas(back)
    assert found.keys() == wanted.keys()
    for module, change in wanted.items():
        assert np.array_equal(found[module], change), module


@pytest.mark.slow
@pytest.mark.parametrize("name", [table.name for table in bundled_tables()])
def test_two_spellings_merge_exactly(name, tmp_path):
    """The commonest spellings of one architecture: kohya's original names, and diffusers'."""
    table = find_table(name)
    diffusers = diffusers_file(table, tmp_path / "diffusers.safetensors")
    kohya = tmp_path / "kohya.safetensors"
    run("convert", diffusers, kohya, "--to", "kohya", "--names", name)
    lines = {file.stem: deltas(file) for file in (diffusers, kohya)}
    lt.merge({kohya: 0.5, diffusers: 0.25}, output=tmp_path / "m.safetensors")
    merged = deltas(tmp_path / "m.safetensors")
    assert merged.keys() == lines["kohya"].keys()
    for module, change in lines["kohya"].items():
        wanted = 0.75 * change
        np.testing.assert_allclose(
            merged[module], wanted, rtol=0, atol=1e-6 * max(1.0, np.abs(wanted).max())
        )
