"""Full differences and differences of bare parameters: merged, scaled and fused as they stand."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.cli import cli
from loratools_formats.disk.errors import AdapterError, LossyError, UnsupportedError

_Q, _PATCH = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.patch_embedding"
_SHAPE = (8, 4, 1, 2, 2)


def run(*words):
    done = CliRunner().invoke(cli, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.output


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pair(seed=0):
    return {
        f"{_Q}.lora_down.weight": draw(2, 8, seed=seed),
        f"{_Q}.lora_up.weight": draw(8, 2, seed=seed + 1),
    }


def saved(path, tensors):
    save_file(tensors, path)
    return path


@pytest.fixture
def patches(tmp_path):
    return [
        saved(
            tmp_path / f"{n}.safetensors", pair(n) | {f"{_PATCH}.diff": draw(*_SHAPE, seed=9 + n)}
        )
        for n in (0, 1)
    ]


def test_linear_merges_add_differences_up(tmp_path, patches):
    run("merge", f"{patches[0]}:0.5", f"{patches[1]}:0.25", "-o", tmp_path / "m.safetensors")
    merged = load_file(tmp_path / "m.safetensors")
    first, second = (load_file(path)[f"{_PATCH}.diff"].astype(np.float64) for path in patches)
    expected = (0.5 * first + 0.25 * second).astype(np.float32)
    assert merged[f"{_PATCH}.diff"].shape == _SHAPE
    assert np.array_equal(merged[f"{_PATCH}.diff"], expected)
    q = lt.delta(lt.read(tmp_path / "m.safetensors"), _Q)
    wanted = sum(w * lt.delta(lt.read(p), _Q) for w, p in zip((0.5, 0.25), patches, strict=True))
    np.testing.assert_allclose(q, wanted, atol=1e-6)


def test_scaling_by_a_power_of_two_keeps_every_bit(tmp_path, patches):
    result = lt.merge({patches[0]: 0.5}, output=tmp_path / "m.safetensors")
    diff = load_file(tmp_path / "m.safetensors")[f"{_PATCH}.diff"]
    assert np.array_equal(diff, 0.5 * load_file(patches[0])[f"{_PATCH}.diff"])
    whole = next(module for module in result.modules if module.name == _PATCH)
    assert (whole.rank_out, whole.relative_error, whole.energy) == (None, 0.0, 1.0)


def test_a_difference_and_factors_of_one_module_become_a_difference(tmp_path, patches):
    factors = pair() | {
        f"{_PATCH}.lora_down.weight": draw(2, 4, 1, 2, 2),
        f"{_PATCH}.lora_up.weight": draw(8, 2, 1, 1, 1),
    }
    other = saved(tmp_path / "factors.safetensors", factors)
    lt.merge({other: 2.0, patches[0]: -1.0}, output=tmp_path / "m.safetensors")
    diff = load_file(tmp_path / "m.safetensors")[f"{_PATCH}.diff"].reshape(8, -1)
    up, down = (factors[f"{_PATCH}.lora_{k}.weight"] for k in ("up", "down"))
    wanted = 2.0 * up.reshape(8, 2).astype(np.float64) @ down.reshape(2, -1)
    wanted -= load_file(patches[0])[f"{_PATCH}.diff"].reshape(8, -1)
    np.testing.assert_allclose(diff, wanted, atol=1e-6)


def test_a_file_of_differences_alone_is_merged(tmp_path):
    only = saved(tmp_path / "only.safetensors", {f"{_PATCH}.diff": draw(*_SHAPE)})
    lt.merge({only: 3.0}, output=tmp_path / "m.safetensors", rank=4)
    wanted = 3.0 * load_file(only)[f"{_PATCH}.diff"]
    np.testing.assert_allclose(load_file(tmp_path / "m.safetensors")[f"{_PATCH}.diff"], wanted)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "knots", "tsv"])
def test_methods_of_signs_and_drops_take_them_linearly_on_request(tmp_path, patches, method):
    with pytest.raises(UnsupportedError, match="weighted sum") as caught:
        lt.merge(patches, method=method, rank=2)
    assert "linear_differences=True" in caught.value.hint
    output = tmp_path / "m.safetensors"
    lt.merge(
        {patches[0]: 0.5, patches[1]: 0.25}, method=method, rank=2, linear_differences=True,
        output=output,
    )  # fmt: skip
    first, second = (load_file(path)[f"{_PATCH}.diff"].astype(np.float64) for path in patches)
    expected = (0.5 * first + 0.25 * second).astype(np.float32)
    assert np.array_equal(load_file(output)[f"{_PATCH}.diff"], expected)


def test_shapes_that_differ_are_named(tmp_path, patches):
    other = saved(tmp_path / "o.safetensors", pair() | {f"{_PATCH}.diff": draw(8, 8, 1, 2, 2)})
    with pytest.raises(AdapterError, match="a module differs between the adapters") as caught:
        lt.merge([patches[0], other])
    assert caught.value.tensor == _PATCH


@pytest.mark.parametrize(
    ("key", "target", "shape"),
    [
        ("blocks.0.modulation.diff", "blocks.0.modulation", (1, 6, 8)),
        ("blocks.0.diff_m", "blocks.0.modulation", (1, 6, 8)),
        ("scale_shift_table.diff", "scale_shift_table", (2, 8)),
        ("latents.diff", "latents", (16, 8)),
        ("norm.gamma.diff", "norm.gamma", (8,)),
        ("patch_embedding.diff", "patch_embedding.weight", _SHAPE),
        ("patch_embedding.diff_b", "patch_embedding.bias", (8,)),
        ("norm.diff", "norm.weight", (8,)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_differences_are_added_where_they_belong(tmp_path, key, target, shape, prefix):
    base = {
        f"{prefix}{target}": draw(*shape, seed=5),
        f"{prefix}blocks.0.self_attn.q.weight": draw(8, 8),
    }
    diff = draw(*shape, seed=6)
    base_file = saved(tmp_path / "base.safetensors", base)
    adapter = saved(tmp_path / "a.safetensors", pair() | {f"diffusion_model.{key}": diff})
    lt.fuse(base_file, {adapter: 0.5}, output=tmp_path / "fused")
    fused = load_file(tmp_path / "fused")[f"{prefix}{target}"]
    np.testing.assert_allclose(fused, base[f"{prefix}{target}"] + 0.5 * diff, atol=1e-6)


def test_weights_of_0_take_differences_out(tmp_path, patches):
    text = run("merge", patches[0], "-o", tmp_path / "m.safetensors", "--weight-pattern", "patch=0")
    assert "left out" in text
    assert not any("patch" in name for name in load_file(tmp_path / "m.safetensors"))


def test_a_file_of_zeros_that_we_wrote_is_read_again(tmp_path):
    name = "lora_unet_blocks_0_self_attn_q"
    zero = {key.replace(_Q, name): tensor for key, tensor in pair().items()}
    zero[f"{name}.alpha"] = np.float32(0.0)
    source = saved(tmp_path / "zero.safetensors", {n: np.asarray(t) for n, t in zero.items()})
    run("convert", source, "-o", tmp_path / "one.safetensors", "--to", "diffusers")
    for target in ("kohya", "comfyui", "diffusers"):
        output = tmp_path / f"{target}.safetensors"
        run("convert", tmp_path / "one.safetensors", "-o", output, "--to", target)
        run("info", output)
        run("merge", output, output, "-o", tmp_path / f"{target}-m.safetensors")
        run("squeeze", output, "--rank", "1", "-o", tmp_path / f"{target}-s.safetensors")


def test_formats_without_differences_say_so(patches):
    with pytest.raises(LossyError):
        lt.convert(patches[0], to="diffusers")


@pytest.mark.parametrize("target", ["kohya", "comfyui"])
def test_a_file_of_differences_alone_is_converted_to_keys_that_comfyui_reads(tmp_path, target):
    """ComfyUI's `load_lora` asks for `b_norm` only where there is a `w_norm`."""
    norm, bias = "lora_unet_img_in_norm", "lora_unet_img_in"
    tensors = {
        f"{norm}.diff": draw(8),
        f"{norm}.diff_b": draw(8, seed=1),
        f"{bias}.diff_b": draw(8, seed=2),
    }
    if target == "comfyui":
        tensors = {k.replace("lora_unet_", "diffusion_model."): v for k, v in tensors.items()}
    source = saved(tmp_path / "source.safetensors", tensors)
    out = tmp_path / "out.safetensors"
    lt.convert(source, to=target, output=out)
    written = load_file(out)
    assert {key.rpartition(".")[2] for key in written} == {"w_norm", "b_norm", "diff_b"}
    for key, values in tensors.items():
        module, _, leaf = key.rpartition(".")
        new = {"diff": "w_norm", "diff_b": "b_norm" if "norm" in module else "diff_b"}[leaf]
        assert np.array_equal(written[f"{module}.{new}"], values)


@pytest.mark.parametrize(
    ("leaf", "values", "message"),
    [
        ("diff_b", draw(7), "does not fit its module"),
        ("diff_b", draw(8, 8), "does not fit its module"),
        ("diff_b", np.ones(8, np.int32), "floating-point"),
        ("w_norm", np.ones(8, bool), "floating-point"),
    ],
)
def test_differences_that_fit_nothing_are_refused_when_read(tmp_path, leaf, values, message):
    path = saved(tmp_path / "x.safetensors", pair() | {f"{_Q}.{leaf}": values})
    with pytest.raises(AdapterError, match=message):
        lt.read(path)


def test_parameters_have_no_name_in_kohyas_files(tmp_path):
    """ComfyUI maps flattened names to weights of layers only; LightX2V has both for Wan."""
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    start = "diffusion_model.blocks.0"
    tensors = {
        f"{start}.self_attn.q.diff": np.ones((8, 8), np.float32),
        f"{start}.norm3.diff": np.ones(8, np.float32),
        f"{start}.modulation.diff": np.ones((1, 6, 8), np.float32),
    }
    save_file(tensors, source)
    with pytest.raises(LossyError, match="blocks_0_modulation"):
        lt.convert(source, to="kohya", output=out)
    lt.convert(source, to="kohya", output=out, allow_lossy=True)
    kept = ("lora_unet_blocks_0_self_attn_q.diff", "lora_unet_blocks_0_norm3.w_norm")
    assert set(load_file(out)) == set(kept)
