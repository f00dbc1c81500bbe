"""Stacked experts of PEFT 0.17.1 to 0.21: what a release wrote and merged, and loads of ours."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt
from loratools_formats import read_adapter

RANGE = 8.0
"""Largest sum of products of two normal numbers, about."""
GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted((GOLDEN / "experts").iterdir())
WRITTEN = sorted((GOLDEN / "experts_written").iterdir())
sys.path.insert(0, str(GOLDEN))
from make_experts_loaded import READ_BY, base  # noqa: E402


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
    assert releases == {"0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.2"}
    for folder in FOLDERS:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config.get("peft_version") in (None, folder.name.partition("-")[0])


def parts(folder):
    layout, kind, inner = folder.name.split("-", 1)[0], folder.name[-8:-2], folder.name[-1]
    return layout, kind, int(inner)


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda folder: folder.name)
def test_what_releases_load_of_ours_is_the_change(folder):
    layout, kind, inner = parts(folder)
    wanted = load_file(GOLDEN / "experts" / f"0.21.2-{kind}-{inner}" / "delta.safetensors")
    readers = {release for (release, k), own in READ_BY.items() if (k, own) == (kind, layout)}
    loaded = {file.stem.removeprefix("loaded-"): file for file in folder.glob("loaded-*")}
    assert loaded.keys() == readers
    for file in loaded.values():
        merged = load_file(file)
        assert merged.keys() == wanted.keys()
        for name, delta in wanted.items():
            # PEFT computes ΔW in the type of the factors, float32, from sums of two products.
            np.testing.assert_allclose(merged[name], delta, rtol=0, atol=2.0**-22 * RANGE)


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda folder: folder.name)
@pytest.mark.parametrize("release", ["0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.2"])
def test_that_is_what_is_written_today(folder, release, tmp_path):
    """From a file of any release: the same names, shapes and fields; from 0.21.2 all bytes."""
    layout, kind, inner = parts(folder)
    model = base(tmp_path / "base", kind, inner)
    source = GOLDEN / "experts" / f"{release}-{kind}-{inner}"
    lt.convert(source, base=model, peft_layout=layout, output=tmp_path / "out")
    new, old = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", folder))
    assert {k: (v.dtype, v.shape) for k, v in new.items()} == {
        k: (v.dtype, v.shape) for k, v in old.items()
    }
    config, known = (
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "out", folder)
    )
    for key in ("r", "lora_alpha", "target_parameters", "rank_pattern", "use_rslora"):
        assert config[key] == known[key]
    for name, delta in both(tmp_path / "out").items():
        wanted = load_file(source / "delta.safetensors")[name]
        np.testing.assert_allclose(delta, wanted, rtol=0, atol=1e-14 * RANGE)
    if release == "0.21.2":
        assert all(np.array_equal(new[key], values) for key, values in old.items())
