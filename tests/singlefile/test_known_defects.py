"""What other tools get wrong on these files, measured: here it comes out right.

Each test has the other tool's arithmetic beside ours, so that the difference is seen, not told.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from dialect_files import KOHYA, DialectFile, save
from test_dialects import dense, tensors_of

from loratools.cli import cli
from loratools_formats import read_adapter


def run(*arguments):
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def plain(seed, rank=16, alpha=16.0, size=48):
    """Return a file of one module with a decaying spectrum, its factors, and its ΔW."""
    rng = np.random.default_rng(seed)
    file = DialectFile("kohya", {"kohya"}, seed=seed)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    a, b = rng.standard_normal((rank, size)), rng.standard_normal((size, rank))
    b *= np.arange(1, rank + 1) ** -0.8
    file.tensors[f"{name}.lora_down.weight"] = a.astype(np.float32)
    file.tensors[f"{name}.lora_up.weight"] = b.astype(np.float32)
    file.tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    down, up = (file.tensors[f"{name}.lora_{k}.weight"].astype(np.float64) for k in ("down", "up"))
    return file, name, (down, up, alpha), alpha / rank * up @ down


def only(path):
    (delta,) = read_adapter(path).modules.values()
    return dense(delta)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("ranks", "alphas", "weights"),
    [((16, 16), (16.0, 16.0), (1.0, 1.0)), ((16, 32), (8.0, 32.0), (0.7, 0.4))],
)
def test_concatenation_has_full_strength(tmp_path, ranks, alphas, weights):
    """`merge_lora --concat` keeps the first alpha for the summed rank, and squares ratios."""
    made = [
        plain(i, rank, alpha) for i, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True))
    ]
    paths = [save(file, tmp_path / f"{i}.safetensors") for i, (file, *_) in enumerate(made)]
    expected = sum(w * delta for w, (*_, delta) in zip(weights, made, strict=True))
    run(
        "merge", *(f"{path}:{w}" for path, w in zip(paths, weights, strict=True)),
        "-o", tmp_path / "out.safetensors", "--method", "cat",
    )  # fmt: skip
    assert relative(only(tmp_path / "out.safetensors"), expected) < 1e-6
    theirs = (
        alphas[0]
        / sum(ranks)
        * sum(w * w * up @ down for w, (_, _, (down, up, _), _) in zip(weights, made, strict=True))
    )
    strength = np.vdot(theirs, expected) / np.linalg.norm(expected) ** 2
    assert strength == pytest.approx(0.5, abs=1e-9) or strength < 0.35


def test_merging_sums_products_not_factors(tmp_path):
    """`merge_lora` adds factors, each scaled by √(α/α₀)·ratio: cross terms, and ratio squared."""
    made = [plain(i) for i in (3, 4)]
    paths = [save(file, tmp_path / f"{i}.safetensors") for i, (file, *_) in enumerate(made)]
    expected = sum(delta for *_, delta in made)
    run("merge", *paths, "-o", tmp_path / "out.safetensors")
    assert relative(only(tmp_path / "out.safetensors"), expected) < 1e-6
    down = sum(down for _, _, (down, _, _), _ in made)
    up = sum(up for _, _, (_, up, _), _ in made)
    theirs = up @ down
    cosine = np.vdot(theirs, expected) / np.linalg.norm(theirs) / np.linalg.norm(expected)
    assert cosine < 0.8


def kept(sigma, rule, value):
    """Return what the definition of a dynamic rank keeps, and what sd-scripts before 0.11 kept."""
    if rule == "sv_ratio":
        right = int(np.sum(sigma >= sigma[0] / value))
        theirs = int(np.sum(sigma > sigma[0] / value))
    else:
        parts = sigma if rule == "sv_cumulative" else sigma**2
        share = value if rule == "sv_cumulative" else value**2
        cumulated = np.cumsum(parts) / parts.sum()
        right = int(np.searchsorted(cumulated, share)) + 1
        theirs = int(np.searchsorted(cumulated, share)) + 1
    return right, theirs + 1


@pytest.mark.parametrize(
    ("rule", "value"), [("sv_fro", 0.9), ("sv_cumulative", 0.8), ("sv_ratio", 3.0)]
)
def test_dynamic_ranks_are_those_of_their_definition(tmp_path, rule, value):
    """They came out one too high; in-between versions took them from a truncated spectrum."""
    file, _, _, delta = plain(5)
    source = save(file, tmp_path / "in.safetensors")
    run("squeeze", source, "-o", tmp_path / "out.safetensors", f"--{rule.replace('_', '-')}", value)
    right, theirs = kept(np.linalg.svd(delta, compute_uv=False)[:16], rule, value)
    (found,) = read_adapter(tmp_path / "out.safetensors").modules.values()
    assert found.rank == right != theirs


def test_retention_is_of_the_whole_spectrum(tmp_path):
    """With `--svd_lowrank_niter`, sd-scripts reports a share of the values that it computed.

    On a flat spectrum of rank 128 cut to 8 it says 0.81 where 0.41 is the most there is.
    """
    rng = np.random.default_rng(6)
    size, rank, cut = 256, 128, 8
    sigma = np.arange(1, rank + 1) ** -0.2
    u, v = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for _ in range(2))
    name = "lora_unet_mid_block_attentions_0_proj_in"
    file = DialectFile("kohya", {"kohya"})
    file.tensors = {
        f"{name}.lora_down.weight": (np.sqrt(sigma)[:, None] * v.T).astype(np.float32),
        f"{name}.lora_up.weight": (u * np.sqrt(sigma)).astype(np.float32),
        f"{name}.alpha": np.array(float(rank), np.float32),
    }
    source = save(file, tmp_path / "in.safetensors")
    report = json.loads(
        run("squeeze", source, "-o", tmp_path / "out.safetensors", "--rank", cut, "--json")
    )
    truth = np.sum(sigma[:cut] ** 2) / np.sum(sigma**2)
    assert report["modules"][0]["energy"] == pytest.approx(truth, rel=1e-5)
    theirs = np.sqrt(np.sum(sigma[:cut] ** 2) / np.sum(sigma[: 2 * cut] ** 2))
    assert theirs > 1.5 * np.sqrt(truth)
    error = relative(only(tmp_path / "out.safetensors"), only(source))
    assert report["relative_error"] == pytest.approx(error, rel=1e-5)
    assert error == pytest.approx(np.sqrt(1 - truth), rel=1e-5)


def tucker_file():
    file = DialectFile("kohya", {"kohya"}, seed=7)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, up, mid = file.draw(8, 10, 1, 1), file.draw(12, 8, 1, 1), file.draw(8, 8, 3, 3)
    file.tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.lora_mid.weight": mid,
        f"{name}.alpha": np.array(4.0, np.float32),
    }
    d, u, m = (t.astype(np.float64) for t in (down[:, :, 0, 0], up[:, :, 0, 0], mid))
    return file, name, 0.5 * np.einsum("om,mnkl,ni->oikl", u, m, d).reshape(12, -1)


def test_tucker_convolutions_are_folded_not_corrupted(tmp_path):
    """Resizing left `lora_mid` at the old rank between factors of the new one."""
    file, name, delta = tucker_file()
    source = save(file, tmp_path / "in.safetensors")
    run("squeeze", source, "-o", tmp_path / "out.safetensors", "--rank", 4, "--dtype", "f32")
    u, s, vt = np.linalg.svd(delta)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    assert relative(only(tmp_path / "out.safetensors"), best) < 1e-5
    tensors = tensors_of(tmp_path / "out.safetensors")
    assert f"{name}.lora_mid.weight" not in tensors
    assert list(tensors[f"{name}.lora_down.weight"][1]) == [4, 10, 3, 3]
    assert list(tensors[f"{name}.lora_up.weight"][1]) == [12, 4, 1, 1]


def test_what_cannot_be_squeezed_stays_and_says_so(tmp_path):
    """LoHa, LoKr and diff passed unchanged while metadata claimed a resize."""
    from dialect_files import GOLDEN

    source, out = GOLDEN / "wan_differences.safetensors", tmp_path / "out.safetensors"
    report = json.loads(run("squeeze", source, "-o", out, "--rank", 1, "--json"))
    whole = "diffusion_model.blocks.0.ffn.0"
    assert report["kept_whole"] == [whole]
    assert {module["rank_out"] for module in report["modules"]} == {1}
    before, after = tensors_of(source), tensors_of(out)
    untouched = [key for key in before if ".diff" in key]
    assert len(untouched) == 3
    assert {k: after[k] for k in untouched} == {k: before[k] for k in untouched}
    source, out = GOLDEN / "lycoris_on_the_weight.safetensors", tmp_path / "other.safetensors"
    done = CliRunner().invoke(cli, ["squeeze", str(source), "-o", str(out), "--rank", "1"])
    assert "; or leave it out with `exclude`" in str(done.exception)
    assert not out.exists()


def test_tiny_factors_with_a_large_alpha_keep_their_rank(tmp_path):
    """An absolute threshold on singular values before alpha reduced such layers to rank 1."""
    file, name, (down, up, _), _ = plain(8, alpha=1.0)
    for leaf, values in (("down", down), ("up", up)):
        file.tensors[f"{name}.lora_{leaf}.weight"] = (values * 1e-5).astype(np.float32)
    file.tensors[f"{name}.alpha"] = np.array(1e9, np.float32)
    source = save(file, tmp_path / "in.safetensors")
    run("squeeze", source, "-o", tmp_path / "out.safetensors", "--energy", "0.95")
    (found,) = read_adapter(tmp_path / "out.safetensors").modules.values()
    assert found.rank > 2
    assert relative(only(tmp_path / "out.safetensors"), only(source)) < 0.23


def test_ranks_above_what_a_module_has_are_not_an_index_error(tmp_path):
    """sd-scripts issue 325: more singular values were asked for than there are."""
    file = DialectFile("kohya", {"kohya"}, seed=9)
    file.pair("lora_unet_mid_block_attentions_0_proj_in", 8, 6, 4, KOHYA, alpha=4.0)
    source = save(file, tmp_path / "in.safetensors")
    run("squeeze", source, "-o", tmp_path / "out.safetensors", "--rank", 64)
    (found,) = read_adapter(tmp_path / "out.safetensors").modules.values()
    assert found.rank == 4
    assert relative(only(tmp_path / "out.safetensors"), only(source)) == 0.0


def test_every_spelling_shrinks(tmp_path):
    """Keys seen only by their last two parts were missed, and the output kept its size."""
    from dialect_files import GOLDEN

    for name in ("adapter_name_infix", "old_diffusers", "mochi", "xlabs", "mixture"):
        out = tmp_path / f"{name}.safetensors"
        run("squeeze", GOLDEN / f"{name}.safetensors", "-o", out, "--rank", 1)
        before, after = read_adapter(GOLDEN / f"{name}.safetensors"), read_adapter(out)
        assert {delta.rank for delta in after.modules.values()} == {1}
        assert {t.key for t in after.tensors()} == {t.key for t in before.tensors()}


def test_balanced_factors_in_the_type_of_the_input(tmp_path):
    """All of σ went into one factor, and files doubled in size by being written in float32."""
    file, name, (down, up, _), _ = plain(10)
    for leaf, values in (("down", down), ("up", up)):
        file.tensors[f"{name}.lora_{leaf}.weight"] = values.astype(np.float16)
    source = save(file, tmp_path / "in.safetensors")
    run("squeeze", source, "-o", tmp_path / "out.safetensors", "--rank", 8)
    tensors = read_adapter(tmp_path / "out.safetensors").modules[name].direction
    assert {tensors.a.dtype.code, tensors.b.dtype.code} == {"F16"}
    norms = [np.linalg.norm(t.load(np.float64)) for t in (tensors.a, tensors.b)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert tensors.alpha_tensor.dtype.code == "F32"


def test_negative_alpha_is_no_nan(tmp_path):
    """A converter takes √(α/r) of both factors."""
    file, _, _, delta = plain(11, alpha=-4.0)
    source = save(file, tmp_path / "in.safetensors")
    for options in ((), ("--fold-alpha",)):
        out = tmp_path / f"out{len(options)}.safetensors"
        run("convert", source, out, "--to", "diffusers", "--names", "sd1", *options)
        assert relative(only(out), delta) < 1e-6


def test_whole_lokr_is_not_scaled_by_alpha(tmp_path):
    """alpha/rank of 1e-5 destroys modules whose alpha means nothing (supermerger issue 459)."""
    from dialect_files import GOLDEN, lycoris

    adapter = read_adapter(GOLDEN / "lycoris.safetensors")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v"
    assert adapter.modules[name].kind_delta.settings["scale"] == 1.0
    np.testing.assert_allclose(dense(adapter.modules[name]), lycoris().deltas[name], atol=1e-12)
