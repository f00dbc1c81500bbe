"""Files that the lycoris-lora package saves: our ΔW is what its modules do in their forward pass.

Not what it merges: version 4.1.3 multiplies LoHa and Tucker LoKr by their scale twice on merging.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from dialect_files import KOHYA, DialectFile, save
from safetensors.numpy import load_file, save_file
from test_dialects import Known, dense, tensors_of
from test_resolution import run

import loratools as lt
from loratools_formats import find_format, read_adapter, write_adapter
from loratools_formats.disk.errors import AdapterError

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
    "glora": {"algo": "glora"},
    "glora with convolutions": {"algo": "glora", "conv_dim": 2},
    "oft": {"algo": "diag-oft"},
    "oft within a limit, rescaled": {"algo": "diag-oft", "constraint": 0.1, "rescaled": True},
    "boft": {"algo": "boft"},
    "boft within a limit, rescaled": {"algo": "boft", "constraint": 0.1, "rescaled": True},
    "ia3": {"algo": "ia3"},
    "ia3 of inputs": {"algo": "ia3", "train_on_input": True},
    "loha dora": {"algo": "loha", "dora_wd": True, "wd_on_output": True},
    "loha dora of inputs": {"algo": "loha", "dora_wd": True, "wd_on_output": False},
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
                if "rescale" in key:
                    parameter.data += 1.0
        path = tmp_path_factory.mktemp("lycoris") / "file.safetensors"
        network.save_weights(str(path), torch.float32, {})
        after = {name: effective(*layer) for name, layer in layers.items()}
        network.restore()
        before = {name: effective(*layer) for name, layer in layers.items()}
        change = {name: (after[name] - before[name], before[name]) for name in layers}
        return path, change

    return make


def moved(delta, weight):
    """Return the change of a weight by a module's magnitudes, from the definition."""
    whole = weight + dense(delta, Known(weight))
    magnitude = delta.magnitude.load(np.float64)
    if delta.axis == "output":
        norms = np.linalg.norm(whole, axis=1, keepdims=True)
        return magnitude.reshape(-1, 1) / norms * whole - weight
    by_input = whole.reshape(len(whole), magnitude.size, -1)
    norms = np.sqrt((by_input**2).sum(axis=(0, 2), keepdims=True))
    ratio = magnitude.reshape(1, -1, 1) / norms
    return (ratio * by_input).reshape(whole.shape) - weight


@pytest.mark.parametrize("name", ALGORITHMS)
def test_our_change_is_what_lycoris_applies(saved, name, tmp_path):
    path, change = saved(name)
    assert find_format(path).name == "kohya"
    adapter = read_adapter(path)
    assert set(adapter.modules) == set(change)
    for module, (expected, weight) in change.items():
        delta = adapter.modules[module]
        found = moved(delta, weight) if delta.is_dora else dense(delta, Known(weight))
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
        if delta.factors is None:
            known = zip(delta.shape, expected.shape, strict=True)
            assert all(side in (None, size) for side, size in known)
    write_adapter(adapter, tmp_path / "copy.safetensors", "kohya")
    copy = read_adapter(tmp_path / "copy.safetensors")
    assert {t.key: bytes(t.raw()) for t in copy.tensors()} == {
        t.key: bytes(t.raw()) for t in adapter.tensors()
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_base_gets_that_change(saved, name, tmp_path):
    """Fused into it, exactly; as a plain LoRA of full rank; and found in it again."""
    path, change = saved(name)
    base, fused, plain = (tmp_path / f"{n}.safetensors" for n in ("base", "fused", "plain"))
    tensors = {}
    for module, (_, weight) in change.items():
        shape = (8, 6, 3, 3) if module == "lycoris_conv" else weight.shape
        key = module.removeprefix("lycoris_").replace("_", ".")
        tensors[f"{key}.weight"] = np.array(weight.reshape(shape), np.float32, order="C")
        tensors[f"{key}.bias"] = np.ones(len(weight), np.float32)
    save_file(tensors, base)
    run("fuse", base, path, "-o", fused)
    found = load_file(fused)
    run("to-lora", path, "--base", base, "-o", plain, "--rank", "16", "--dtype", "f32")
    factors = read_adapter(plain).modules
    for module, (expected, _) in change.items():
        key = module.removeprefix("lycoris_").replace("_", ".") + ".weight"
        got = (found.pop(key).astype(np.float64) - tensors[key]).reshape(expected.shape)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=5e-6 * largest)
        np.testing.assert_allclose(dense(factors[module]), expected, rtol=0, atol=5e-6 * largest)
    has_biases = bool(read_adapter(path).additions)
    assert has_biases == any((bias != 1.0).any() for bias in found.values())
    run("verify", fused, "--base", base, "--adapter", path)


def kronecker_file(path):
    """Return a file of one plain and one LoKr module, and the ΔW of the second."""
    file = DialectFile("kohya", {"kohya", "LyCORIS"}, seed=1)
    plain, name = (f"lora_unet_blocks_0_self_attn_{n}" for n in "qk")
    file.pair(plain, 8, 8, 4, KOHYA, alpha=4.0)
    left, right = file.draw(8, 6, dtype=np.float32), file.draw(12, 10, dtype=np.float32)
    file.tensors |= {f"{name}.lokr_w1": left, f"{name}.lokr_w2": right}
    return save(file, path), plain, name, np.kron(left.astype(np.float64), right)


@pytest.mark.parametrize("rank", [5, 100])
def test_a_kronecker_product_is_squeezed_from_its_sides(tmp_path, rank):
    source, _, name, delta = kronecker_file(tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    told = json.loads(run("squeeze", source, "-o", out, "--rank", rank, "--json", "-q"))
    u, s, vt = np.linalg.svd(delta)
    kept = min(rank, 60)
    found = read_adapter(out).modules[name]
    assert found.rank == kept
    np.testing.assert_allclose(dense(found), (u[:, :kept] * s[:kept]) @ vt[:kept], atol=1e-5)
    (module,) = [module for module in told["modules"] if module["name"] == name]
    assert module["rank_in"] == 60
    error = np.linalg.norm(dense(found) - delta) / np.linalg.norm(delta)
    assert module["relative_error"] == pytest.approx(error, rel=1e-5)
    by_budget = tmp_path / "budget.safetensors"
    run("squeeze", source, "-o", by_budget, "--budget", "6kB")
    assert 3000 < by_budget.stat().st_size <= 6000


def test_what_is_left_out_of_a_squeeze_keeps_its_kind_and_bits(tmp_path):
    source, plain, name, _ = kronecker_file(tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    run("squeeze", source, "-o", out, "--rank", "2", "--exclude", f"{name}$")
    before, after = tensors_of(source), tensors_of(out)
    assert {k: v for k, v in after.items() if k.startswith(name)} == {
        k: v for k, v in before.items() if k.startswith(name)
    }
    assert read_adapter(out).modules[plain].rank == 2


@pytest.mark.parametrize("kind", ["lokr", "loha"])
@pytest.mark.parametrize("command", ["to-lora", "merge"])
def test_convolutions_without_a_core_keep_their_kernel(tmp_path, kind, command):
    """LyCORIS flattens the kernel into the columns; the tables of names know it."""
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    generator = np.random.default_rng(0)
    shapes = {
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 36)},
        "loha": {f"hada_w{n}_{end}": s for n in "12" for end, s in (("a", (8, 2)), ("b", (2, 72)))},
    }[kind]
    parts = {k: generator.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    save_file({f"{module}.{k}": v for k, v in parts.items()}, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    run(command, tmp_path / "in.safetensors", "-o", out)
    tensors = load_file(out)
    down, up = (tensors[f"{module}.lora_{end}.weight"] for end in ("down", "up"))
    assert down.shape[1:] == (8, 3, 3)
    assert up.shape == (8, down.shape[0], 1, 1)
    if kind == "lokr":
        expected = np.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    else:
        products = [parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in "12"]
        expected = products[0] * products[1]
    scale = float(tensors.get(f"{module}.alpha", down.shape[0])) / down.shape[0]
    found = scale * up[:, :, 0, 0].astype(np.float64) @ down.reshape(len(down), -1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


M = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lokr_w1": (3, 2), "lokr_w2": (4, 4), "lokr_t2": (2, 2, 3, 3)}, "beside a Tucker core"),
        (
            {
                "lokr_w1_a": (3, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4),
                "alpha": (),
            },
            "different ranks",
        ),
        ({"weight": (12, 1), "on_input": ()}, "neither 0 nor 1"),
    ],
)  # fmt: skip
def test_parts_on_which_loaders_disagree_are_refused(tmp_path, shapes, message):
    path = tmp_path / "x.safetensors"
    save_file({f"{M}.{leaf}": np.full(s, 0.5, np.float32) for leaf, s in shapes.items()}, path)
    with pytest.raises(AdapterError, match=message):
        read_adapter(path)


def test_sides_of_lokr_may_have_their_own_ranks_without_alpha(tmp_path):
    shapes = {"w1_a": (3, 1), "w1_b": (1, 2), "w2_a": (4, 2), "w2_b": (2, 4)}
    rng = np.random.default_rng(0)
    parts = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    path = tmp_path / "x.safetensors"
    save_file({f"{M}.lokr_{name}": values for name, values in parts.items()}, path)
    want = np.kron(parts["w1_a"] @ parts["w1_b"], parts["w2_a"] @ parts["w2_b"])
    got = lt.delta(lt.read(path), M)
    assert np.linalg.norm(got - want) <= 1e-12 * np.linalg.norm(want)
