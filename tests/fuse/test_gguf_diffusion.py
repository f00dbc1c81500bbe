"""Single files fused into GGUF models of diffusion programs, held to gguf-py's own values."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

import loratools as lt

WIDE = 64
SHAPES = {
    "double_blocks.0.img_attn.qkv": (3 * WIDE, WIDE),
    "double_blocks.0.img_attn.proj": (WIDE, WIDE),
    "single_blocks.0.linear1": (7 * WIDE, WIDE),
    "final_layer.adaLN_modulation.1": (2 * WIDE, WIDE),
}


def model(path, kind):
    """Write a small FLUX as ComfyUI-GGUF does, without `general.type`; return its values."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "flux")
    values = {}
    for name, shape in SHAPES.items():
        stored = gguf.quants.quantize(generator.standard_normal(shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
        values[name] = gguf.quants.dequantize(stored, kind).astype(float)
        writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def adapter(path):
    """Write ComfyUI's names; return ΔW of each module."""
    generator = np.random.default_rng(1)
    tensors, changes = {}, {}
    for name, (rows, columns) in SHAPES.items():
        a = generator.standard_normal((2, columns)).astype(np.float32)
        b = generator.standard_normal((rows, 2)).astype(np.float32)
        tensors[f"diffusion_model.{name}.lora_A.weight"] = a
        tensors[f"diffusion_model.{name}.lora_B.weight"] = b
        changes[name] = b.astype(float) @ a.astype(float)
    save_file(tensors, path)
    return changes


def read(path):
    found = {}
    for tensor in gguf.GGUFReader(str(path)).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = tensor.tensor_type, values.astype(float)
    return found


@pytest.mark.parametrize("naming", ["comfyui", "diffusers", "kohya"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_each_naming_is_fused(tmp_path, naming, kind):
    """Diffusers splits queries, keys and values, and swaps the halves of the last modulation."""
    base, source, out = tmp_path / "m.gguf", tmp_path / "a.safetensors", tmp_path / "out.gguf"
    values, changes = model(base, kind), adapter(source)
    if naming != "comfyui":
        given = tmp_path / "given.safetensors"
        lt.convert(source, to=naming, names="flux1", output=given)
        source = given
    lt.fuse(base, [source], output=out)
    found = read(out)
    for name, change in changes.items():
        stored, fused = found[f"{name}.weight"]
        wanted = values[name] + change
        assert stored == kind
        if kind == Kind.F32:
            np.testing.assert_allclose(fused, wanted, atol=1e-5)
        else:
            again = gguf.quants.dequantize(
                gguf.quants.quantize(wanted.astype(np.float32), kind), kind
            )
            step = np.abs(wanted).reshape(-1, 32).max(axis=1).repeat(32).reshape(wanted.shape) / 127
            assert np.all(np.abs(fused - again) <= 1.01 * step)  # a tie may go to either side
            assert np.mean(fused == again) > 0.99


def test_a_module_that_the_model_lacks_is_named(tmp_path):
    base, source = tmp_path / "m.gguf", tmp_path / "a.safetensors"
    model(base, Kind.F32)
    tensors = {
        "diffusion_model.double_blocks.7.img_attn.proj.lora_A.weight": np.ones((1, WIDE), "f4"),
        "diffusion_model.double_blocks.7.img_attn.proj.lora_B.weight": np.ones((WIDE, 1), "f4"),
    }
    save_file(tensors, source)
    with pytest.raises(lt.LoratoolsError, match=r"double_blocks\.7\.img_attn\.proj"):
        lt.fuse(base, [source], output=tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_an_adapter_of_another_format_leads_to_no_circle(tmp_path):
    """The hint named the very command that was refused."""
    base = tmp_path / "m.gguf"
    model(base, Kind.F32)
    with pytest.raises(lt.LoratoolsError) as caught:
        lt.fuse(base, ["examples/tiny-llama/lora"], output=tmp_path / "out.gguf")
    assert str(base) not in str(caught.value.hint)


def test_info_tells_how_its_weights_are_stored(tmp_path):
    base = tmp_path / "m.gguf"
    model(base, Kind.Q8_0)
    found = lt.info_base(base)
    (scheme,) = found.quantised
    weights = sum(rows * columns for rows, columns in SHAPES.values())
    assert (found.model, scheme.format, scheme.bits, scheme.group) == ("flux", "Q8_0", 8, 32)
    assert (scheme.weights, scheme.parameters) == (len(SHAPES), weights)
    assert scheme.nbytes == weights // 32 * 34
    assert found.dtypes == {"F32": len(SHAPES)}
