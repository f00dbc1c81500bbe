"""Measures that tell outputs from inputs are those of ΔW (out, in), on whichever side A is."""

import numpy as np
import pytest
from expert_files import LAYOUTS, Change, base, read_deltas, save
from safetensors.numpy import load_file

import loratools as lt
from loratools.lowrank.moments import write_moments
from loratools_formats import read_adapter
from loratools_formats.disk.errors import UnsupportedError

INNER = "model.layers.0.mlp.experts.base_layer"


def both(tmp_path, change):
    """Write one change with A on the inputs and on the outputs; returns the folders."""
    return [save(tmp_path / name, LAYOUTS[name](change)) for name in ("PEFT 0.21", "PEFT 0.18")]


@pytest.mark.parametrize(("width", "inner"), [(8, 6), (8, 4)])
@pytest.mark.parametrize("with_base", [False, True])
def test_a_spectrum_is_of_the_change(width, inner, with_base, tmp_path):
    """Rows and columns were exchanged, and so were the shapes."""
    change = Change(width=width, inner=inner)
    more = {"base": base(tmp_path / "base", change, stacks=True)} if with_base else {}
    one, other = (lt.spectrum(folder, **more).matrices for folder in both(tmp_path, change))
    deltas = change.deltas()
    for left, right in zip(one, other, strict=True):
        assert left.shape == right.shape
        for name in ("row_concentration", "column_concentration", "balance"):
            assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-9)
        if left.name == INNER:
            whole = np.concatenate([deltas[name, left.expert] for name in ("gate", "up")])
            assert left.shape == whole.shape
        if with_base:
            np.testing.assert_allclose(left.base.cosines, right.base.cosines, atol=1e-9)


@pytest.mark.parametrize(("width", "inner"), [(8, 6), (8, 8)])
def test_a_repair_shrinks_what_writes_to_strange_outputs(width, inner, tmp_path):
    """Of a change with A on the outputs it looked at the inputs; the file keeps its side."""
    change = Change(width=width, inner=inner, alpha=40.0)
    model = base(tmp_path / "base", change, stacks=True)
    one, other = both(tmp_path, change)
    asked = {"base": model, "dtype": "f32", "keep_every_rank": True}
    made = [lt.repair(f, output=tmp_path / f"{f.name} out", **asked) for f in (one, other)]
    assert sum(module.intruders for module in made[0].modules) > 0
    assert [m.intruders for m in made[0].modules] == [m.intruders for m in made[1].modules]
    left, right = (read_deltas(read_adapter(tmp_path / f"{f.name} out")) for f in (one, other))
    for key, delta in left.items():
        np.testing.assert_allclose(right[key], delta, atol=2.0**-18 * np.abs(delta).max())
    stored = [
        load_file(f / "adapter_model.safetensors") for f in (other, tmp_path / "PEFT 0.18 out")
    ]
    assert {k: v.shape[1] for k, v in stored[0].items() if "lora_A" in k} == {
        k: v.shape[1] for k, v in stored[1].items() if "lora_A" in k
    }


def test_an_index_finds_the_same_change_on_the_other_side(tmp_path):
    change = Change()
    one, other = both(tmp_path, change)
    index = tmp_path / "shelf.index"
    lt.fleet_index([one], output=index)
    (found,) = lt.fleet_similar(other, index).neighbours
    assert found.cosine == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("inner", [4, 6])
def test_moments_are_of_inputs(inner, tmp_path):
    """Those of a square fitted its outputs."""
    change = Change(width=8, inner=inner)
    one, other = both(tmp_path, change)
    draw = np.random.default_rng(0).normal
    moments = {INNER: (x := draw(size=(8, 20))) @ x.T, INNER.removesuffix(".base_layer"): (
        y := draw(size=(inner, 20))) @ y.T}  # fmt: skip
    write_moments(tmp_path / "stats", moments, dict.fromkeys(moments, 20))
    lt.squeeze(one, rank=1, stats=tmp_path / "stats", output=tmp_path / "small")
    with pytest.raises(UnsupportedError, match="second moments are of inputs") as told:
        lt.squeeze(other, rank=1, stats=tmp_path / "stats", output=tmp_path / "no")
    assert "loratools convert" in told.value.hint
    lt.convert(other, to="peft", output=tmp_path / "turned")
    lt.squeeze(tmp_path / "turned", rank=1, stats=tmp_path / "stats", output=tmp_path / "other")
    same = [read_deltas(read_adapter(tmp_path / name)) for name in ("small", "other")]
    for key, delta in same[0].items():
        np.testing.assert_allclose(same[1][key], delta, atol=2.0**-18 * np.abs(delta).max())
