"""What earlier versions wrote reads as they read it, and what they did can be done again."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from loratools.cli import cli
from loratools_formats import read_adapter

GOLDEN = Path(__file__).parent / "golden"
MAKER = runpy.run_path(str(GOLDEN / "make_outputs.py"))
VERSIONS = sorted(folder.name for folder in (GOLDEN / "outputs").iterdir())
EXPECTED = {
    version: json.loads((GOLDEN / "outputs" / version / "expected.json").read_text())
    for version in VERSIONS
}
UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}

ADAPTERS = [(version, name) for version in VERSIONS for name in EXPECTED[version]["adapters"]]
COMMANDS = [(version, name) for version in VERSIONS for name in EXPECTED[version]["commands"]]


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


def run(*arguments):
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def weights(path):
    """Return all stored tensors of an adapter or a model."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    if path.suffix == ".gguf":
        return {tensor.key: tensor.load(np.float32) for tensor in read_adapter(path).tensors()}
    return {key: value for file in files for key, value in load_file(file).items()}


def bits(tensors):
    return {key: (value.dtype, value.shape, value.tobytes()) for key, value in tensors.items()}


def changes(path):
    """Return each module's change in float64, and the most that rounding its factors moves it."""
    found = {}
    for name, delta in read_adapter(path).modules.items():
        direction = getattr(delta, "direction", delta)
        b, a = (factor.load(np.float64) for factor in (direction.b, direction.a))
        roundoff = max(UNIT_ROUNDOFF[tensor.dtype.code] for tensor in (direction.b, direction.a))
        size = abs(direction.scale) * np.linalg.norm(b) * np.linalg.norm(a)
        found[name] = MAKER["product"](b, a, direction.scale), 2 * roundoff * size
    return found


def test_fixtures_are_small():
    sizes = [file.stat().st_size for file in (GOLDEN / "outputs").rglob("*") if file.is_file()]
    assert 0 < sum(sizes) < 300_000


@pytest.mark.parametrize(("version", "name"), ADAPTERS)
def test_every_change_has_the_bits_that_the_version_found(version, name):
    expected = EXPECTED[version]["adapters"][name]["modules"]
    found = MAKER["changes"](GOLDEN / "outputs" / version / name)
    for module, change in found.items():
        assert change.pop("norm") == pytest.approx(expected[module].pop("norm"), rel=1e-12)
        assert change == expected[module], module
    assert set(found) == set(expected)


@pytest.mark.parametrize(("version", "name"), ADAPTERS)
def test_info_still_tells_what_it_told_and_how_the_file_was_made(version, name):
    told = json.loads(run("info", str(GOLDEN / "outputs" / version / name), "--json"))
    expected = EXPECTED[version]["adapters"][name]["info"]
    assert {key: told[key] for key in expected} == expected
    if not name.startswith("inputs/"):
        assert told["provenance"]["loratools.version"] == version
        shown = run("info", str(GOLDEN / "outputs" / version / name))
        assert expected["provenance"]["loratools.operation"] in shown
        assert version in shown


def test_a_fused_model_of_the_version_verifies(version):
    folder = GOLDEN / "outputs" / version
    arguments = ["--base", folder / "inputs" / "model", "--adapter", folder / "inputs" / "lora"]
    run("verify", *map(str, [folder / "fused", *arguments]))


def test_models_have_the_digests_that_were_recorded(version):
    for name, digest in EXPECTED[version]["models"].items():
        file = GOLDEN / "outputs" / version / name / "model.safetensors"
        assert MAKER["sha256"](file) == digest


# Of these, every operation is exact or rounded on its own, so that no order of sums decides a bit.
KEEPING_BITS = {
    "linear", "adapter.gguf", "mlx", "peft-of-gguf", "kohya.safetensors", "four-bit", "dequantized",
}  # fmt: skip


# The toy has names of FLUX.1 on matrices of proportions that FLUX.1 has nowhere.
REFUSED_NOW = {
    "kohya.safetensors": "does not have the proportions that it has in the table of FLUX.1"
}


@pytest.mark.parametrize(("version", "name"), COMMANDS)
def test_commands_as_they_were_spelled_give_what_they_gave(version, name, tmp_path, monkeypatch):
    kept = GOLDEN / "outputs" / version
    words, beside = EXPECTED[version]["commands"][name].split(), f"{name}.provenance.json"
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True, ignore=lambda *_: {name, beside})
    monkeypatch.chdir(tmp_path)
    if name in REFUSED_NOW:
        done = CliRunner().invoke(cli, [*words, "--names", "flux1"])
        assert REFUSED_NOW[name] in str(done.exception)
        return
    run(*words)
    assert_alike(tmp_path / name, kept / name, exactly=name in KEEPING_BITS)


@pytest.mark.parametrize("name", ["linear", "ties", "dora-merged"])
def test_recipes_repeat(version, name, tmp_path):
    folder = GOLDEN / "outputs" / version
    run("merge", "--recipe", str(folder / name / "recipe.yaml"), "-o", str(tmp_path / "again"))
    assert_alike(tmp_path / "again", folder / name, exactly=name in KEEPING_BITS)
    assert (tmp_path / "again" / "recipe.yaml").exists()


def assert_alike(again, before, *, exactly):
    """Tensors have equal bits, or every change is equal but for the rounding of its factors."""
    if exactly:
        assert bits(weights(again)) == bits(weights(before))
        return
    if (before / "adapter_config.json").exists() or before.is_file():
        found, expected = changes(again), changes(before)
    else:
        found, expected = (
            {
                k: (v.astype(np.float64), UNIT_ROUNDOFF["F32"] * np.linalg.norm(v))
                for k, v in w.items()
            }
            for w in (weights(again), weights(before))
        )
    assert set(found) == set(expected)
    for module, (change, rounding) in expected.items():
        again_change, again_rounding = found[module]
        # A value beside the middle of two may be rounded either way, in each of the two files.
        assert np.linalg.norm(again_change - change) <= rounding + again_rounding, module
