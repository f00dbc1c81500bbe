"""Files that PEFT 0.18.1 to 0.21 wrote, against the change that the same release merged."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt
from loratools_formats import read_adapter

RANGE = 8.0
"""Largest sum of products of two normal numbers, about."""
FOLDERS = sorted((Path(__file__).parents[1] / "golden" / "experts").iterdir())


def both(folder):
    """Return ΔW (E, out, in) by parameter: as it is read, and as PEFT merged it."""
    found = {}
    for change in read_adapter(folder).modules.values():
        part = change.require_factors()
        delta = part.scale * part.b.load(np.float64) @ part.a.load(np.float64)
        (name,) = part.layer.parameters
        assert part.layer.swapped is not None
        found[name] = delta.transpose(0, 2, 1) if part.layer.swapped else delta
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_releases_file_is_read_as_that_release_merges_it(folder):
    found, wanted = both(folder), load_file(folder / "delta.safetensors")
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        # The merged weight is of size 1 and float64; the factors are of size 1.
        np.testing.assert_allclose(found[name], delta, rtol=0, atol=1e-14 * RANGE)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_and_written_for_every_release_it_is_the_same(folder, tmp_path):
    wanted = load_file(folder / "delta.safetensors")
    for asked in ({"to": "peft"}, {"experts": "stacked"}, {"experts": "3d"}):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        lt.convert(folder, output=out, **asked)
        for name, delta in both(out).items():
            np.testing.assert_allclose(delta, wanted[name], rtol=0, atol=1e-14 * RANGE)


def test_there_is_a_folder_of_each_release():
    releases = {folder.name.partition("-")[0] for folder in FOLDERS}
    assert {"0.18.1", "0.19.0", "0.19.1", "0.21.2"} <= releases
    for folder in FOLDERS:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config.get("peft_version") in (None, folder.name.partition("-")[0])
