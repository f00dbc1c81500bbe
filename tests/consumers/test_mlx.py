"""mlx-lm as the judge: adapters of its layers read by us, and ours loaded by it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from loratools.cli import cli
from loratools.lowrank.dense import effective_delta
from loratools_formats import find_format, read_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

KEYS = ["self_attn.q_proj", "mlp.down_proj", "experts.up_proj"]


@pytest.fixture
def make_model():
    """Return a function that makes a small model with linear layers, experts and an embedding."""
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.models.switch_layers import SwitchLinear

    class Layer(nn.Module):
        def __init__(self, with_experts):
            super().__init__()
            self.self_attn = nn.Module()
            self.self_attn.q_proj = nn.Linear(10, 12, bias=False)
            self.mlp = nn.Module()
            self.mlp.down_proj = nn.Linear(14, 10, bias=False)
            if with_experts:
                self.experts = nn.Module()
                self.experts.up_proj = SwitchLinear(10, 6, 3, bias=False)

    class Model(nn.Module):
        def __init__(self, with_experts):
            super().__init__()
            self.embed_tokens = nn.Embedding(20, 10)
            self.layers = [Layer(with_experts) for _ in range(2)]

    def make(*, with_experts=True):
        mx.random.seed(0)
        return Model(with_experts)

    return make


def weights(model):
    from mlx.utils import tree_flatten

    return {
        name.removesuffix(".weight"): np.array(value)
        for name, value in tree_flatten(model.parameters())
        if name.endswith(".weight")
    }


def fused(model):
    """Return the weights after every adapted layer is fused, as mlx-lm does it."""
    from mlx.utils import tree_unflatten

    done = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(done))
    return weights(model)


def saved(model, folder, *, use_dora, keys):
    """Give a model random adapters, save them as mlx-lm's trainer does, and fuse them."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    parameters = {"rank": 3, "scale": 5.5, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 1, parameters, use_dora=use_dora)
    mx.random.seed(1)
    noise = tree_map(
        lambda value: mx.random.normal(value.shape) * 0.3, model.trainable_parameters()
    )
    model.update(tree_map(lambda a, b: a + b, model.trainable_parameters(), noise))
    folder.mkdir()
    tensors = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {
        "fine_tune_type": "dora" if use_dora else "lora",
        "num_layers": 1,
        "lora_parameters": parameters,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return fused(model)


def change(name, delta, weight):
    """Return our change of a weight, of a DoRA from its definition."""
    added = effective_delta(name, delta, weight.shape)
    if not delta.is_dora:
        return added
    whole = weight + added
    magnitude = delta.magnitude.load(np.float64)[:, None]
    return magnitude / np.linalg.norm(whole, axis=1, keepdims=True) * whole - weight


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_our_change_is_what_mlx_fuses(make_model, tmp_path, use_dora):
    keys = KEYS[:2] if use_dora else [*KEYS, "embed_tokens"]
    before = weights(make_model())
    after = saved(make_model(), tmp_path / "mlx", use_dora=use_dora, keys=keys)
    assert find_format(tmp_path / "mlx").name == "mlx"
    adapter = read_adapter(tmp_path / "mlx")
    assert set(adapter.modules) == {n for n in before if (before[n] != after[n]).any()}
    for name, delta in adapter.modules.items():
        weight = before[name].astype(np.float64)
        np.testing.assert_allclose(change(name, delta, weight), after[name] - weight, atol=1e-5)


def run(*arguments):
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("operation", ["squeeze", "peft and back"])
def test_mlx_loads_what_we_write(make_model, tmp_path, operation):
    from mlx_lm.tuner.utils import load_adapters

    saved(make_model(), tmp_path / "mlx", use_dora=False, keys=KEYS[:2])
    if operation == "squeeze":
        run("squeeze", tmp_path / "mlx", "-o", tmp_path / "out", "--rank", "2")
    else:
        run("convert", tmp_path / "mlx", tmp_path / "peft", "--to", "peft")
        run("convert", tmp_path / "peft", tmp_path / "out", "--to", "mlx")
    adapter = read_adapter(tmp_path / "out", "mlx")
    model = make_model()
    before = weights(model)
    model.freeze()
    after = fused(load_adapters(model, str(tmp_path / "out")))
    for name, weight in before.items():
        delta = adapter.modules.get(name)
        expected = 0.0 if delta is None else effective_delta(name, delta, weight.shape)
        np.testing.assert_allclose(after[name] - weight, expected, atol=1e-6, err_msg=name)


def test_ranks_that_differ_are_refused_before_anything_is_written(make_model, tmp_path):
    saved(make_model(), tmp_path / "mlx", use_dora=False, keys=KEYS[:2])
    done = CliRunner().invoke(
        cli,
        [
            "squeeze",
            str(tmp_path / "mlx"),
            "-o",
            str(tmp_path / "out"),
            "--rank-pattern",
            "q_proj=1",
        ],
    )
    assert "the file needs one rank for these modules" in str(done.exception)
    assert not (tmp_path / "out").exists()
