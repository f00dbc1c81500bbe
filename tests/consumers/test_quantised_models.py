"""Models that GPTQ's, AWQ's and ModelOpt's own tools quantised: fused, and loaded by those tools.

The tools do not live beside the other libraries here. `tests/golden/make_quantised_models.py` kept
what they quantised, what they made of the outputs of `fuse --requantize`, and what a model computes
that has their values of the weights plus ΔW.
"""

import shutil
from pathlib import Path

import numpy as np
import peft_oracle as oracle
import pytest

from loratools import delta, dequantize, extract, fuse, read, verify
from loratools.base.dequantised import dequantised
from loratools_formats.checkpoints.checkpoint import read_checkpoint

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

FOLDER = Path(__file__).parents[1] / "golden" / "quantised_models"
IDS = [[1, 7, 9, 30, 2, 100]]
TOLD = {
    "awq": "AWQ gemm, 4 bits, groups of 64",
    "gptq": "GPTQ, 4 bits, groups of 32",
    "gptq-order": "GPTQ, 4 bits, groups of 32",
    "nvfp4": "NVFP4, 4 bits, groups of 16",
    "fp8": "FP8 (E4M3), 8 bits",
}
FLOAT32 = 1e-5
"""Relative error of what a tiny model computes in float32."""
KERNELS = 0.01
"""The same in the 16 bits of the tools' kernels."""


@pytest.fixture(params=TOLD)
def case(request):
    return request.param


@pytest.fixture
def base(case):
    return FOLDER / case / "base"


@pytest.fixture
def kept(case):
    with np.load(FOLDER / case / "logits.npz") as file:
        return dict(file)


@pytest.fixture
def changes(case):
    adapter = read(FOLDER / case / "adapter")
    return {module: delta(adapter, module) for module in adapter.modules}


def logits(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor(IDS)).logits.numpy()


def values(folder, module):
    """Return what we read of a weight, in the type that it is dequantised to, as float32."""
    view = dequantised(read_checkpoint(folder))
    key = f"{module}.weight"
    return view.weights[key].tensor(view.stored[key]).load(np.float32)


def apart(got, want, beside):
    return np.linalg.norm(got - want) / np.linalg.norm(want - beside)


def test_weights_are_what_the_tool_acts_with(case, base, kept, changes):
    weights = dequantised(read_checkpoint(base)).weights
    assert {str(weight.scheme) for weight in weights.values()} == {TOLD[case]}
    assert len(weights) == 14
    for module in changes:
        np.testing.assert_array_equal(values(base, module), kept[f"before {module}"])


def test_a_fused_model_in_16_bits(case, base, kept, tmp_path):
    """transformers makes of it what the tool's values plus ΔW compute, up to one rounding."""
    result = fuse(base, FOLDER / case / "adapter", output=tmp_path / "fused")
    got = logits(tmp_path / "fused")
    assert apart(got, kept["changed"], kept["base"]) < 2 * result.lost_to_rounding < 0.01


def test_a_fused_model_that_keeps_its_format(case, base, kept, changes, tmp_path):
    """The tool finds in it what the report says, and computes with it what its values do."""
    result = fuse(
        base,
        FOLDER / case / "adapter",
        requantize=True,
        allow_lossy=True,
        output=tmp_path / "fused",
    )
    moved = np.concatenate(
        [(kept[f"after {m}"].astype(np.float64) - kept[f"before {m}"]).ravel() for m in changes]
    )
    wanted = np.concatenate([change.ravel() for change in changes.values()])
    share = moved @ wanted / (wanted @ wanted)
    error = np.linalg.norm(moved - wanted) / np.linalg.norm(wanted)
    # Where products are float32 the tool's values are rounded once more.
    assert result.surviving == pytest.approx(share, rel=2e-3)
    assert result.quantising_error == pytest.approx(error, rel=2e-3)
    for module in changes:
        same = values(tmp_path / "fused", module) == kept[f"after {module}"]
        assert same.mean() > 0.999  # a sum of another order may round to another code
    dtype = "bf16" if case == "fp8" else "f32"  # FP8's unpacked products were kept in 16 bits
    dequantize(tmp_path / "fused", dtype=dtype, output=tmp_path / "plain")
    got, want = logits(tmp_path / "plain"), kept["fused"]
    size = np.linalg.norm(want)
    assert np.linalg.norm(got - want) < FLOAT32 * size
    assert np.linalg.norm(kept["by kernels"] - want) < KERNELS * size
    assert apart(want, kept["changed"], kept["base"]) < 2 * result.quantising_error


def test_verify_and_extract_leave_alone_what_nothing_changed(case, base, changes, tmp_path):
    """Of 14 quantised weights two change: the others are exact, and no part of an adapter."""
    adapter = FOLDER / case / "adapter"
    for options in ({}, {"requantize": True, "allow_lossy": True}):
        fused = tmp_path / f"fused{len(options)}"
        fuse(base, adapter, output=fused, **options)
        found = verify(fused, base=base, adapters=adapter)
        untouched = [each for each in found.tensors if not each.touched]
        assert {each.verdict for each in untouched} == {"exact"}
        assert len(untouched) == 19
        got = tmp_path / f"extracted{len(options)}"
        extract(base, fused, output=got, rank=4)
        assert set(read(got).modules) == set(changes)


def test_what_the_tool_loaded_is_read_as_the_tool_does(case, base, kept, changes, tmp_path):
    """The tensors that were loaded are kept, and their values equal bit for bit."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "loaded")
    tensors = {}
    for path in (*sorted(base.glob("*.safetensors")), FOLDER / case / "fused.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, tmp_path / "loaded" / "model.safetensors")
    for module in changes:
        np.testing.assert_array_equal(values(tmp_path / "loaded", module), kept[f"after {module}"])
