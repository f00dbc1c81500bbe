"""Files that the lycoris-lora package saves: our ΔW is what its modules do in their forward pass.

Not what it merges: version 4.1.3 multiplies LoHa and Tucker LoKr by their scale twice on merging.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_dialects import dense

from loratools_formats import find_format, read_adapter, write_adapter
from loratools_formats.adapter import Dora, OtherDelta

ALGORITHMS = {
    "lora": {"algo": "lora"},
    "lora with convolutions": {"algo": "lora", "conv_dim": 3, "conv_alpha": 2},
    "tucker": {"algo": "lora", "conv_dim": 3, "conv_alpha": 2, "use_tucker": True},
    "rslora": {"algo": "lora", "rs_lora": True},
    "loha": {"algo": "loha"},
    "loha with tucker": {"algo": "loha", "conv_dim": 3, "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr with both sides in factors": {"algo": "lokr", "factor": 4, "decompose_both": True},
    "lokr whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr with tucker": {"algo": "lokr", "factor": 2, "conv_dim": 2, "use_tucker": True},
    "full": {"algo": "full"},
    "dora": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "dora of inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
}


def effective(layer, shape):
    """Return the matrix that a layer multiplies by, from its outputs for unit inputs."""
    import torch

    units = torch.eye(int(np.prod(shape)))
    with torch.no_grad():
        outputs = layer(units.reshape(-1, *shape)) - layer(torch.zeros(1, *shape))
    return outputs.reshape(len(units), -1).T.double().numpy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function: a file that LyCORIS saved, and by how much each weight changes."""
    import torch
    from lycoris import LycorisNetwork, create_lycoris

    torch.set_num_threads(1)

    def make(name):
        torch.manual_seed(0)
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleList([torch.nn.Linear(12, 16), torch.nn.Linear(16, 8)])
        model.conv = torch.nn.Conv2d(6, 8, 3)
        layers = {
            "lycoris_blocks_0": (model.blocks[0], (12,)),
            "lycoris_blocks_1": (model.blocks[1], (16,)),
            "lycoris_conv": (model.conv, (6, 3, 3)),
        }
        LycorisNetwork.apply_preset(
            {"target_module": ["Linear", "Conv2d"], "unet_target_module": []}
        )
        network = create_lycoris(
            model, 1.0, linear_dim=2, linear_alpha=1, warn_on_unmatched=False, **ALGORITHMS[name]
        )
        network.apply_to()
        for key, parameter in network.named_parameters():
            if "dora" not in key:
                torch.nn.init.normal_(parameter, std=0.5)
        path = tmp_path_factory.mktemp("lycoris") / "file.safetensors"
        network.save_weights(str(path), torch.float32, {})
        after = {name: effective(*layer) for name, layer in layers.items()}
        network.restore()
        before = {name: effective(*layer) for name, layer in layers.items()}
        change = {name: (after[name] - before[name], before[name]) for name in layers}
        return path, change

    return make


def moved(delta, weight, inputs):
    """Return the change of a weight by a DoRA, from its definition."""
    whole = weight + dense(delta)
    magnitude = delta.magnitude.load(np.float64)
    if delta.axis == "output":
        norms = np.linalg.norm(whole, axis=1, keepdims=True)
        return magnitude.reshape(-1, 1) / norms * whole - weight
    by_input = whole.reshape(len(whole), inputs, -1)
    norms = np.sqrt((by_input**2).sum(axis=(0, 2), keepdims=True))
    ratio = magnitude.reshape(1, inputs, 1) / norms
    return (ratio * by_input).reshape(whole.shape) - weight


@pytest.mark.parametrize("name", ALGORITHMS)
def test_our_change_is_what_lycoris_applies(saved, name, tmp_path):
    path, change = saved(name)
    assert find_format(path).name == "kohya"
    adapter = read_adapter(path)
    assert set(adapter.modules) == set(change)
    for module, (expected, weight) in change.items():
        delta = adapter.modules[module]
        if isinstance(delta, Dora):
            found = moved(delta, weight, 6 if module == "lycoris_conv" else weight.shape[1])
        else:
            found = dense(delta)
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
        if isinstance(delta, OtherDelta):
            assert delta.shape == expected.shape
    write_adapter(adapter, tmp_path / "copy.safetensors", "kohya")
    copy = read_adapter(tmp_path / "copy.safetensors")
    assert {t.key: bytes(t.raw()) for t in copy.tensors()} == {
        t.key: bytes(t.raw()) for t in adapter.tensors()
    }
