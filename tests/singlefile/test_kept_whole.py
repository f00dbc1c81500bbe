"""`to-lora --exact`: what is of full rank becomes `.diff`, which LyCORIS loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_lycoris import effective

from loratools.cli import cli
from loratools_formats import read_adapter
from loratools_formats.disk.errors import UnsupportedError


def build():
    """Return a model with linear layers and a convolution, and the shapes of their inputs."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(12, 16), torch.nn.Linear(16, 16)])
    model.conv = torch.nn.Conv2d(6, 8, 3)
    return model, {"blocks.0": (12,), "blocks.1": (16,), "conv": (6, 3, 3)}


def layers(model, shapes):
    return {name: effective(model.get_submodule(name), shapes[name]) for name in shapes}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base, a DoRA that LyCORIS saved, and what its layers compute before and with it."""
    import torch
    from lycoris import LycorisNetwork, create_lycoris
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("kept-whole")
    model, shapes = build()
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    save_file(state, folder / "base.safetensors")
    before = layers(model, shapes)
    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"], "unet_target_module": []})
    network = create_lycoris(
        model, 1.0, linear_dim=2, linear_alpha=1, warn_on_unmatched=False,
        algo="lora", dora_wd=True, wd_on_output=True,
    )  # fmt: skip
    network.apply_to()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    network.save_weights(str(folder / "dora.safetensors"), torch.float32, {})
    return folder, before, layers(model, shapes)


def run(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), standalone_mode=False)


def test_lycoris_computes_with_the_file_what_the_dora_does(trained, tmp_path):
    from lycoris import create_lycoris_from_weights

    folder, before, want = trained
    arguments = [folder / "dora.safetensors", "--base", folder / "base.safetensors", "--exact"]
    out = tmp_path / "whole.safetensors"
    done = run("to-lora", *arguments, "-o", out, "--json")
    assert done.return_value == 0, done.output
    report = json.loads(done.stdout)
    assert [module["rank"] for module in report["modules"]] == [None, None, None]
    assert report["relative_error"] < 1e-6
    assert report["bytes_out"] == out.stat().st_size

    adapter = read_adapter(out)
    assert adapter.format == "kohya"
    assert {d.kind for d in adapter.modules.values() if d.factors is None} == {"full"}
    assert sorted(tensor.key for tensor in adapter.tensors()) == [
        f"lycoris_{name}.diff" for name in ("blocks_0", "blocks_1", "conv")
    ]
    model, shapes = build()
    network, _ = create_lycoris_from_weights(1.0, str(out), model)
    network.apply_to()
    for name, got in layers(model, shapes).items():
        change = np.abs(want[name] - before[name]).max()
        assert change > 1e-2
        np.testing.assert_allclose(got, want[name], rtol=0, atol=3e-6 * change)


def test_an_mlx_dora_cannot_be_kept_whole_either(tmp_path):
    tiny = Path(__file__).parents[2] / "examples" / "tiny-llama"
    assert not run("convert", tiny / "dora", tmp_path / "mlx", "--to", "mlx", "-q").return_value
    arguments = [tmp_path / "mlx", "--base", tiny / "model", "--exact", "-o", tmp_path / "out"]
    done = run("to-lora", *arguments)
    assert isinstance(done.exception, UnsupportedError)
    assert "MLX has no full differences" in str(done.exception)
    assert "loratools fuse" in str(done.exception)
    assert not (tmp_path / "out").exists()
