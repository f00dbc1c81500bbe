"""Every command on stacked experts of PEFT 0.17.1 to 0.21, against what each release merged."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loratools as lt

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from make_experts_loaded import base  # noqa: E402

RELEASES = ["0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.2"]
MODELS = [(kind, inner) for kind in ("out-in", "in-out") for inner in (2, 3, 4)]
ROUNDING = 2.0**-20
"""Of a base in float32, relative to the largest entry of ΔW."""


def golden(release, kind, inner):
    folder = GOLDEN / "experts" / f"{release}-{kind}-{inner}"
    return folder, load_file(folder / "delta.safetensors")


def fused(model, adapter, kind, out):
    """Return what fusing adds to the parameters, (E, out, in); the base is of zeros."""
    lt.fuse(model, adapter, output=out, overwrite=True)
    turned = (0, 2, 1) if kind == "in-out" else (0, 1, 2)
    values = load_file(out / "model.safetensors")
    return {name: value.astype(np.float64).transpose(turned) for name, value in values.items()}


def off(found, wanted):
    assert found.keys() == wanted.keys()
    largest = max(np.abs(delta).max() for delta in wanted.values())
    return max(np.abs(found[name] - wanted[name]).max() for name in wanted) / largest


def norm(deltas):
    return sum((delta**2).sum() for delta in deltas.values()) ** 0.5


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("kind", "inner"), MODELS)
def test_every_command_takes_it_as_its_release_merges_it(kind, inner, release, tmp_path):
    folder, wanted = golden(release, kind, inner)
    model = base(tmp_path / "base", kind, inner)
    assert off(fused(model, folder, kind, tmp_path / "fused"), wanted) <= ROUNDING
    assert lt.verify(tmp_path / "fused", base=model, adapters=folder).contained
    lt.extract(model, tmp_path / "fused", rank=2, output=tmp_path / "extracted")
    found = fused(model, tmp_path / "extracted", kind, tmp_path / "again")
    assert off(found, wanted) <= 8 * ROUNDING
    assert lt.spectrum(folder, base=model).frobenius == pytest.approx(norm(wanted), rel=1e-9)
    (row, _) = lt.compare([folder, tmp_path / "extracted"], base=model).cosines
    assert row[1] == pytest.approx(1.0, abs=1e-9)
    for name, made in {"squeezed": lt.squeeze, "plain": lt.to_lora}.items():
        result = made(folder, rank=1, output=tmp_path / name)
        found = fused(model, tmp_path / name, kind, tmp_path / "again")
        error = norm({key: found[key] - delta for key, delta in wanted.items()}) / norm(wanted)
        assert error == pytest.approx(result.relative_error, rel=1e-5)
        best = [np.linalg.svd(delta, compute_uv=False)[:, 1:] for delta in wanted.values()]
        least = sum((values**2).sum() for values in best) ** 0.5 / norm(wanted)
        assert error == pytest.approx(least, rel=1e-5)
    for number, asked in enumerate(({"experts": "each"}, {"experts": "3d"}, {"to": "tinker"})):
        lt.convert(folder, base=model, output=tmp_path / f"c{number}", **asked)
        found = fused(model, tmp_path / f"c{number}", kind, tmp_path / "again")
        assert off(found, wanted) <= ROUNDING


@pytest.mark.parametrize("other", RELEASES)
@pytest.mark.parametrize("release", ["0.18.1", "0.21.2"])
@pytest.mark.parametrize(("kind", "inner"), MODELS)
def test_files_of_two_releases_are_merged(kind, inner, release, other, tmp_path):
    (one, first), (two, second) = (golden(each, kind, inner) for each in (release, other))
    if release == other:
        two = tmp_path / "copy"
        lt.convert(one, to="peft", experts="3d", output=two)
    model = base(tmp_path / "base", kind, inner)
    wanted = {key: 0.75 * delta - 0.5 * second[key] for key, delta in first.items()}
    for number, more in enumerate(({}, {"base": model})):
        out = tmp_path / f"merged{number}"
        lt.merge([(one, 0.75), (two, -0.5)], output=out, **more)
        assert off(fused(model, out, kind, tmp_path / "fused"), wanted) <= 4 * ROUNDING
