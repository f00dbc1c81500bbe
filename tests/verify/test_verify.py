"""`verify` tells fused checkpoints from others, whoever made them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loratools.cli import cli
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools.operations.verify import verify
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SHAPE = (24, 20)


@pytest.fixture
def make_base(tmp_path):
    """Return a function that writes a base with one adapted and one other weight."""

    def made(name="base", dtype="BF16", change=None, **more):
        rng = np.random.default_rng(1)
        weight = rng.standard_normal(SHAPE)
        if change is not None:
            weight = weight.astype(DTYPES[dtype]).astype(np.float64) + change
        tensors = {"layers.0.q.weight": weight.astype(DTYPES[dtype])}
        tensors["norm.weight"] = np.ones(20, DTYPES[dtype])
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return folder

    return made


def delta_of(folder, weight=1.0):
    delta = read_adapter(folder).modules["layers.0.q"].direction
    return weight * delta.scale * (delta.b.load(np.float64) @ delta.a.load(np.float64))


def verdicts(fused, base, *adapters):
    inputs = [FuseInput(read_adapter(path), weight, path.name) for path, weight in adapters]
    result = verify(read_checkpoint(fused), read_checkpoint(base), inputs)
    return {tensor.name: tensor for tensor in result.tensors}, result.contained


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_what_fuse_wrote_is_exact(make_base, make_folder, tmp_path, dtype, weight):
    base, adapter = make_base(dtype=dtype), make_folder(dtype="f32")
    inputs = [FuseInput(read_adapter(adapter), weight, "a")]
    Fusion(read_checkpoint(base), inputs, FuseOptions()).write(tmp_path / "fused")
    found, contained = verdicts(tmp_path / "fused", base, (adapter, weight))
    assert {t.verdict for t in found.values()} == {"exact"}
    assert contained is True
    tensor = found["layers.0.q.weight"]
    assert tensor.found == pytest.approx(1.0, abs=1e-2)
    stored = load_file(tmp_path / "fused" / "model.safetensors")["layers.0.q.weight"]
    old = load_file(base / "model.safetensors")["layers.0.q.weight"]
    delta = delta_of(adapter, weight)
    off = np.linalg.norm(stored.astype(float) - old.astype(float) - delta) / np.linalg.norm(delta)
    assert tensor.error == pytest.approx(off, rel=1e-4)  # W + ΔW was computed in float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_rounded_before_it_was_added_is_within_rounding(make_base, make_folder, dtype):
    """As PEFT's safe merge does."""
    adapter = make_folder(dtype="f32")
    rounded = delta_of(adapter).astype(DTYPES[dtype]).astype(np.float64)
    base, fused = make_base(dtype=dtype), make_base("fused", dtype=dtype, change=rounded)
    found, contained = verdicts(fused, base, (adapter, 1.0))
    assert found["layers.0.q.weight"].verdict == "within rounding"
    assert contained is True


@pytest.mark.parametrize("change", [0.0, 0.9, 1.1, -1.0])
def test_another_strength_is_not_contained(make_base, make_folder, change):
    adapter = make_folder(dtype="f32")
    base, fused = make_base(), make_base("fused", change=change * delta_of(adapter))
    found, contained = verdicts(fused, base, (adapter, 1.0))
    assert found["layers.0.q.weight"].verdict == "not contained"
    assert found["layers.0.q.weight"].found == pytest.approx(change, abs=0.01)
    assert contained is False


def test_one_wrong_element_is_not_contained(make_base, make_folder):
    adapter = make_folder(dtype="f32")
    change = delta_of(adapter)
    change[3, 4] += 0.5
    found, contained = verdicts(make_base("fused", change=change), make_base(), (adapter, 1.0))
    assert found["layers.0.q.weight"].verdict == "not contained"
    assert contained is False


@pytest.mark.parametrize(("dtype", "spacing"), [("F16", 2**-10), ("BF16", 2**-7)])
@pytest.mark.parametrize(("units", "verdict"), [(0.6, "within rounding"), (4, "not contained")])
def test_an_element_may_be_off_by_a_unit_and_no_more(
    make_base, make_folder, dtype, spacing, units, verdict
):
    adapter, base = make_folder(dtype="f32"), make_base(dtype=dtype)
    change = delta_of(adapter)
    total = load_file(base / "model.safetensors")["layers.0.q.weight"].astype(float) + change
    place = np.unravel_index(np.argmax(np.abs(total / change)), SHAPE)
    change[place] += units * spacing * abs(total[place])
    fused = make_base("fused", dtype=dtype, change=change)
    found, _ = verdicts(fused, base, (adapter, 1.0))
    assert found["layers.0.q.weight"].verdict == verdict


def test_a_changed_weight_that_the_adapter_does_not_touch(make_base, make_folder):
    adapter = make_folder(dtype="f32")
    fused = make_base("fused", change=delta_of(adapter), **{"norm.weight": np.zeros(20, "f4")})
    found, contained = verdicts(fused, make_base(), (adapter, 1.0))
    assert found["norm.weight"].verdict == "not contained"
    assert "no adapter changes it" in found["norm.weight"].reason
    assert contained is False


def test_a_change_below_rounding_cannot_be_seen(make_base, make_folder):
    adapter = make_folder(dtype="f32")
    base, fused = make_base(), make_base("fused")
    tensors = load_file(base / "model.safetensors")
    tensors["layers.0.q.weight"].view(np.uint16)[0, 0] += 1  # the next number
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    found, contained = verdicts(fused, base, (adapter, 1e-6))
    assert found["layers.0.q.weight"].verdict == "not checked"
    assert "below the rounding" in found["layers.0.q.weight"].reason
    assert contained is None


def test_missing_extra_and_misshapen_tensors(make_base, make_folder):
    adapter = make_folder(dtype="f32")
    base = make_base()
    fused = make_base("fused", change=delta_of(adapter), **{"extra.weight": np.ones(3, "f4")})
    tensors = load_file(fused / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    found, contained = verdicts(fused, base, (adapter, 1.0))
    assert found["norm.weight"].verdict == "not checked"
    assert found["extra.weight"].verdict == "not checked"
    assert contained is None
    tensors["layers.0.q.weight"] = np.ones((20, 24), "f4")
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    found, contained = verdicts(fused, base, (adapter, 1.0))
    assert "shape" in found["layers.0.q.weight"].reason
    assert contained is False


@pytest.mark.parametrize(
    ("change", "code", "answer"), [(1.0, 0, "contained"), (0.5, 1, "not contained")]
)
def test_command(make_base, make_folder, change, code, answer):
    from click.testing import CliRunner

    adapter = make_folder(dtype="f32")
    base, fused = make_base(), make_base("fused", change=change * delta_of(adapter))
    arguments = ["verify", str(fused), "--base", str(base), "--adapter", str(adapter)]
    run = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert run.return_value == code
    assert f"adapter: {answer}" in run.output
    run = CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False)
    report = json.loads(run.stdout)
    assert report["schema"] == 1
    assert report["contained"] is (code == 0)
    assert {t["name"] for t in report["tensors"]} == {"layers.0.q.weight", "norm.weight"}


def test_what_cannot_be_checked_exits_with_3(make_base, make_folder):
    from click.testing import CliRunner

    adapter = make_folder(dtype="f32")
    fused = make_base("fused", change=delta_of(adapter), **{"extra.weight": np.ones(3, "f4")})
    arguments = ["verify", str(fused), "--base", str(make_base()), "--adapter", str(adapter)]
    run = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert run.return_value == 3
    assert "not in the base" in run.output


@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite(make_base, make_folder):
    from click.testing import CliRunner

    adapter = make_folder(dtype="f32")
    mask = {"mask": np.array([-np.inf, np.nan, 0], "f4")}
    base = make_base(**mask)
    fused = make_base("fused", change=delta_of(adapter), **mask)
    found, contained = verdicts(fused, base, (adapter, 1.0))
    assert found["mask"].verdict == "exact"
    assert contained is True

    tensors = load_file(fused / "model.safetensors")
    save_file(tensors | {"mask": mask["mask"][::-1].copy()}, fused / "model.safetensors")
    found, contained = verdicts(fused, base, (adapter, 1.0))
    assert found["mask"].verdict == "not checked"
    assert contained is None

    tensors["layers.0.q.weight"][3, 4] = np.nan
    save_file(tensors, fused / "model.safetensors")
    arguments = ["verify", str(fused), "--base", str(base), "--adapter", str(adapter), "--json"]
    run = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert run.return_value == 1
    (tensor,) = [t for t in json.loads(run.stdout)["tensors"] if t["verdict"] == "not contained"]
    assert (tensor["name"], tensor["error"]) == ("layers.0.q.weight", None)
    assert "NaN" in tensor["reason"]


def test_an_adapter_that_changes_nothing_cannot_be_told(make_base, make_folder):
    """By its weight, or by an alpha of 0, which PEFT takes."""
    base = make_base()
    still = make_folder("still", lora_alpha=0)
    for path, weight in ((make_folder(), 0.0), (still, 1.0)):
        inputs = [FuseInput(read_adapter(path), weight, path.name)]
        found = verify(read_checkpoint(base), read_checkpoint(base), inputs)
        assert (found.contained, found.told) == (None, 0.0)
