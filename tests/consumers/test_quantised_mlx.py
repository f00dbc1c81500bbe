"""Bases that mlx-lm quantised: its own values, and what it makes of our outputs."""

import json

import numpy as np
import peft_oracle as oracle
import pytest

from loratools import dequantize, fuse, quantize, verify
from loratools.base.dequantised import dequantised
from loratools_formats.checkpoints.checkpoint import read_checkpoint

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]
mx = pytest.importorskip("mlx.core")

WEIGHT = 0.04  # with which ΔW is as large as W

MODES = {
    "affine-2": (2, 32, "affine"), "affine-3": (3, 64, "affine"), "affine-4": (4, 64, "affine"),
    "affine-5": (5, 32, "affine"), "affine-6": (6, 64, "affine"), "affine-8": (8, 128, "affine"),
    "mxfp4": (4, 32, "mxfp4"), "mxfp8": (8, 32, "mxfp8"), "nvfp4": (4, 16, "nvfp4"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama of transformers, in BF16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("mlx") / "model"
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=128, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, initializer_range=0.1, tie_word_embeddings=False,
        dtype="bfloat16", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def converted(model, folder, bits, group, mode):
    """Quantise as `mlx_lm convert` does, without a tokenizer, which the model has not."""
    from mlx_lm import utils

    loaded, config = utils.load_model(model)
    loaded, config = utils.quantize_model(loaded, config, group, bits, mode=mode)
    folder.mkdir()
    utils.save_model(folder, loaded, donate_model=False)
    utils.save_config(config, folder / "config.json")
    return folder


def values_by_mlx(folder):
    """Return every plain weight as MLX dequantises it, in float32."""
    stored = mx.load(str(folder / "model.safetensors"))
    stated = json.loads((folder / "config.json").read_text())["quantization"]
    found = {}
    for key, tensor in stored.items():
        module = key.removesuffix(".weight")
        if key.endswith((".scales", ".biases")):
            continue
        if f"{module}.scales" in stored:
            tensor = mx.dequantize(  # noqa: PLW2901
                tensor, stored[f"{module}.scales"], stored.get(f"{module}.biases"),
                stated["group_size"], stated["bits"], stated.get("mode", "affine"),
            )  # fmt: skip
        found[key] = np.array(tensor.astype(mx.float32))
    return found


@pytest.fixture(params=MODES)
def base(request, model, tmp_path):
    return converted(model, tmp_path / "base", *MODES[request.param])


@pytest.fixture
def adapter(make_folder):
    return make_folder(
        modules={
            "model.layers.0.self_attn.q_proj": (128, 128, 8),
            "model.layers.1.mlp.down_proj": (128, 256, 8),
        },
        dtype="f32",
    )


def as_floats(folder):
    tensors = read_checkpoint(folder).tensors
    return {key: tensor.load(np.float32) for key, tensor in tensors.items()}


def logits(folder):
    from mlx_lm import utils

    loaded, _ = utils.load_model(folder)
    loaded.set_dtype(mx.float32)
    return np.array(loaded(mx.array([[1, 7, 9, 30, 2]])).astype(mx.float32))


def test_values_are_those_of_mlx(base, tmp_path):
    want = values_by_mlx(base)
    result = dequantize(base, output=tmp_path / "plain")
    got = as_floats(tmp_path / "plain")
    assert set(got) == set(want)
    for key, values in want.items():
        assert got[key].tobytes() == values.tobytes(), key
    assert len(result.tensors) == 16
    assert result.relative_error == 0.0
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & set(config)


def test_fused_is_what_mlx_dequantises_and_the_change(base, adapter, tmp_path):
    """Each touched weight is dq(q(W)) + ΔW, rounded once; mlx-lm loads what is written."""
    fuse(base, adapter, output=tmp_path / "fused")
    values, view = values_by_mlx(base), dequantised(read_checkpoint(tmp_path / "fused")).checkpoint
    changes = {f"{name}.weight": d for name, d in oracle_changes(adapter).items()}
    for key, value in values.items():
        wanted = value.astype(np.float64) + changes.get(key, 0.0)
        got = view.tensors[key].load(np.float64)
        tolerance = 2.0**-8 * np.abs(wanted) if key in changes else 0.0
        assert (np.abs(got - wanted) <= tolerance).all(), key
    assert verify(tmp_path / "fused", base=base, adapters=[adapter]).contained
    assert np.isfinite(logits(tmp_path / "fused")).all()


def test_what_no_adapter_changes_stays_quantised(base, adapter, tmp_path):
    """Changed modules become plain, with an entry that says so; every other byte is the base's."""
    result = fuse(base, adapter, output=tmp_path / "fused")
    before, after = load_file_bytes(base), load_file_bytes(tmp_path / "fused")
    changed = set(oracle_changes(adapter))
    assert {key.rpartition(".")[0] for key in before if before[key] != after.get(key)} == changed
    assert {key.rpartition(".")[0] for key in set(before) - set(after)} == changed
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert {k for k, v in config["quantization"].items() if v is False} == changed
    assert config["quantization_config"] == config["quantization"]
    assert any("14 others stay quantised" in note for note in result.notes)
    fuse(base, adapter, dtype="bf16", output=tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization" not in config
    one, other = logits(tmp_path / "fused"), logits(tmp_path / "plain")
    apart = float(np.abs(one - other).max() / np.abs(other).max())
    # Run in float32, MLX does not round affine weights to BF16, as it does when dequantising.
    assert apart < (0.2 if is_affine(base) else 1e-4)


def test_written_back_as_mlx_quantises(base, adapter, tmp_path):
    """The format stays, mlx-lm loads it, and what MLX dequantises is what the report says."""
    result = fuse(base, {adapter: WEIGHT}, requantize=True, allow_lossy=True, output=tmp_path / "f")
    before, after = load_file_bytes(base), load_file_bytes(tmp_path / "f")
    changes = oracle_changes(adapter)
    assert set(before) == set(after)
    assert {key.rpartition(".")[0] for key in before if before[key] != after[key]} == set(changes)
    assert (tmp_path / "f" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    old, new = values_by_mlx(base), values_by_mlx(tmp_path / "f")
    along = squared = off = 0.0
    for module, delta in changes.items():
        change = WEIGHT * delta
        moved = new[f"{module}.weight"].astype(np.float64) - old[f"{module}.weight"]
        along += np.vdot(moved, change)
        squared += np.vdot(change, change)
        off += np.square(moved - change).sum()
    assert result.surviving == pytest.approx(along / squared, rel=1e-4)
    assert result.quantising_error == pytest.approx(np.sqrt(off / squared), rel=1e-4)
    assert result.quantising_error < 1.2
    assert np.isfinite(logits(tmp_path / "f")).all()


def test_fresh_scales_are_those_of_mlx(model, base, tmp_path):
    """Where no old scale is nearer, bytes are those of `mx.quantize` in float32."""
    from loratools.base.codecs.mlx_encode import AffineEncoder
    from loratools_formats.core.dtypes import DTYPES

    stated = json.loads((base / "config.json").read_text())["quantization"]
    if stated.get("mode", "affine") != "affine":
        pytest.skip("has no encoder without old scales")
    bits, group = stated["bits"], stated["group_size"]
    weight = as_floats(model)["model.layers.0.self_attn.q_proj.weight"]
    encoder = AffineEncoder("x.weight", weight.shape, DTYPES["F32"], bits, group)
    want = mx.quantize(mx.array(weight), group, bits)
    for (_, _, data), tensor in zip(encoder.encode(0, weight).pieces, want, strict=True):
        assert data.tobytes() == np.array(tensor).tobytes()


def test_changed_modules_in_eight_bits(base, adapter, tmp_path):
    """mlx-lm loads the entries; the fused model is the plain one to eight bits' rounding."""
    stated = json.loads((base / "config.json").read_text())["quantization"]
    if stated["bits"] == 8:
        pytest.skip("all is in eight bits")
    result = fuse(base, {adapter: WEIGHT}, changed_bits=8, output=tmp_path / "eight")
    fuse(base, {adapter: WEIGHT}, output=tmp_path / "mixed")
    assert result.quantising_error < 0.1
    section = json.loads((tmp_path / "eight" / "config.json").read_text())["quantization"]
    entries = {k for k, v in section.items() if isinstance(v, dict)}
    assert entries == set(oracle_changes(adapter))
    one, other, base_ones = (logits(f) for f in (tmp_path / "eight", tmp_path / "mixed", base))
    apart = np.abs(one - other).max() / np.abs(other).max()
    moved = np.abs(base_ones - other).max() / np.abs(other).max()
    assert apart < 0.1 < moved


def is_affine(folder):
    stated = json.loads((folder / "config.json").read_text())["quantization"]
    return stated.get("mode", "affine") == "affine"


def oracle_changes(adapter):
    from loratools_formats import read_adapter

    found = {}
    for name, change in read_adapter(adapter).modules.items():
        delta = change.direction
        found[name] = delta.scale * (delta.b.load(np.float64) @ delta.a.load(np.float64))
    return found


def test_quantised_again_to_nf4(model, tmp_path):
    base = converted(model, tmp_path / "base", 4, 64, "affine")
    result = quantize(base, output=tmp_path / "nf4")
    dequantize(base, output=tmp_path / "plain")
    quantize(tmp_path / "plain", output=tmp_path / "again")
    assert len(result.tensors) == 14
    one, other = (load_file_bytes(tmp_path / name) for name in ("nf4", "again"))
    assert one == other


def load_file_bytes(folder):
    return {k: bytes(t.raw()) for k, t in read_checkpoint(folder).tensors.items()}
