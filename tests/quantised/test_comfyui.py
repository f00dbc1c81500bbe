"""ComfyUI's quantised layers: their values, element by element, and those that are refused."""

import json

import numpy as np
import pytest
from quantised_cases import check, e2m1, only, stored
from test_written_back import CHANGED, KEPT, raw, save

import loratools as lt
from loratools.base.codecs import coded_weights
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import AdapterError, UnsupportedError

RNG = np.random.default_rng(8)
F8 = DTYPES["F8_E4M3"].numpy_dtype()


def in_tiles(grid):
    """Put scales into cuBLAS' order, one by one: 128 rows and 4 columns are a tile."""
    rows, columns = grid.shape
    down, across = -(-rows // 128), -(-columns // 4)
    out = np.zeros(down * across * 512, grid.dtype)
    for r in range(rows):
        for c in range(columns):
            tile = r // 128 * across + c // 4
            out[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = grid[r, c]
    return out.reshape(down * 128, across * 4)


def nvfp4(out, width):
    codes = RNG.integers(0, 16, (out, width))
    scales = RNG.uniform(1, 400, (out, width // 16)).astype(F8)
    number = np.float32(0.013)
    tensors = {
        "x.weight": (codes[:, ::2] << 4 | codes[:, 1::2]).astype(np.uint8),
        "x.weight_scale": (in_tiles(scales), "F8_E4M3"),
        "x.weight_scale_2": number.reshape(()),
    }
    spread = np.repeat(scales.astype(np.float32) * number, 16, axis=1)
    return tensors, e2m1(codes) * spread


def mxfp8(out, width):
    codes = (RNG.standard_normal((out, width)) * 20).astype(np.float32).astype(F8)
    scales = RNG.integers(110, 135, (out, width // 32)).astype(np.uint8)
    tensors = {"x.weight": (codes, "F8_E4M3"), "x.weight_scale": in_tiles(scales)}
    spread = np.repeat(np.exp2(scales - 127.0), 32, axis=1)
    return tensors, codes.astype(np.float32) * spread


def mark(**said):
    return np.frombuffer(json.dumps(said).encode(), np.uint8)


def of_file(**said):
    return {"_quantization_metadata": json.dumps({"layers": {"x": said}})}


@pytest.mark.parametrize("shape", [(16, 32), (128, 64), (160, 96), (300, 160)])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp8"])
def test_values(form, shape):
    """Codes of NVFP4 begin in the high half, and scales are in tiles: unlike ModelOpt's."""
    tensors, want = (nvfp4 if form == "nvfp4" else mxfp8)(*shape)
    weight = only(tensors, metadata=of_file(format=form))
    check(weight, want, "BF16")
    assert weight.scheme.name.endswith("of ComfyUI")
    marked = tensors | {"x.comfy_quant": mark(format=form)}
    ((_, again),) = coded_weights(stored(marked)).items()
    check(again, want, "BF16")


def test_scales_whose_type_is_lost():
    """Older files have E4M3 as bytes, and E8M0 in its own type; ComfyUI takes them for the same."""
    tensors, want = nvfp4(16, 32)
    tensors["x.weight_scale"] = tensors["x.weight_scale"][0].view(np.uint8)
    check(only(tensors, metadata=of_file(format="nvfp4")), want, "BF16")
    tensors, want = mxfp8(16, 32)
    tensors["x.weight_scale"] = (tensors["x.weight_scale"], "F8_E8M0")
    check(only(tensors, metadata=of_file(format="mxfp8")), want, "BF16")


@pytest.mark.parametrize("scale", [(), (24,), (24, 1)])
def test_integers_with_a_scale(scale):
    codes = RNG.integers(-127, 128, (24, 32)).astype(np.int8)
    scales = RNG.uniform(0.01, 0.1, scale).astype(np.float32)
    tensors = {"x.weight": codes, "x.weight_scale": np.asarray(scales)}
    weight = only(tensors, metadata=of_file(format="int8_tensorwise"))
    check(weight, codes * scales.reshape(-1, 1), "F32")


def hadamard(size):
    four = np.ones((4, 4)) - 2 * np.fliplr(np.eye(4))
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, four)
    return matrix / np.sqrt(size)


@pytest.mark.parametrize("group", [4, 16, 64, None])
@pytest.mark.parametrize("form", ["int8_tensorwise", "convrot_w4a4"])
def test_rotated_layers(form, group):
    """The weight that acts is code · scale times the Hadamard matrix of each group of inputs."""
    width = 512 if group is None else 192
    half = 128 if form.startswith("int8") else 8
    codes = RNG.integers(-half, half, (24, width)).astype(np.int8)
    scales = RNG.uniform(0.01, 0.1, (24, 1)).astype(np.float32)
    stored_codes = codes
    if half == 8:
        stored_codes = ((codes[:, ::2] & 15) | (codes[:, 1::2] & 15) << 4).astype(np.int8)
    tensors = {"x.weight": stored_codes, "x.weight_scale": scales}
    size = group or 256
    meant = (codes * scales.astype(np.float64)).reshape(24, -1, size) @ hadamard(size)
    said = {} if group is None else {"convrot_groupsize": group}
    rotated = {} if half == 8 else {"convrot": True}
    for inner in ({**rotated, **said}, {"params": {**rotated, **said}}):
        weight = only(tensors, metadata=of_file(format=form, **inner))
        values = weight.tensor().load(np.float64)
        bound = 2.0**-20 * np.abs(meant).max()
        np.testing.assert_allclose(values, meant.reshape(24, width), rtol=0, atol=bound)
        assert weight.elements(5, 1111).tobytes() == values.astype("f4").ravel()[5:1111].tobytes()
    ((_, again),) = coded_weights(
        stored(tensors | {"x.comfy_quant": mark(format=form, **rotated, **said)})
    ).items()
    np.testing.assert_array_equal(again.tensor().load(np.float64), values)


def test_rotations_that_do_not_fit_are_refused():
    tensors = {"x.weight": np.ones((24, 32), np.int8), "x.weight_scale": np.ones(24, np.float32)}
    for group in (8, 64, "16", 0):
        said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
        with pytest.raises(
            AdapterError, match=r"groups that a weight is rotated in.*power of four"
        ):
            coded_weights(stored(tensors, metadata=of_file(**said)))
    with pytest.raises(UnsupportedError, match=r"got float8_e4m3fn, rotated \(convrot\)"):
        coded_weights(stored(tensors, metadata=of_file(format="float8_e4m3fn", convrot=True)))


def test_other_formats_and_layers_without_a_description_are_refused():
    tensors, _ = nvfp4(16, 32)
    with pytest.raises(UnsupportedError, match=r"x.weight.*got asym_w4a8_int8.*nvfp4, mxfp8"):
        coded_weights(stored(tensors, metadata=of_file(format="asym_w4a8_int8")))
    other = {"_quantization_metadata": json.dumps({"layers": {"y": {"format": "nvfp4"}}})}
    with pytest.raises(UnsupportedError, match=r"no description.*x.weight.*x.comfy_quant"):
        coded_weights(stored(tensors, metadata=other))


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8"])
def test_padded_layers(form):
    """A layer of 150 outputs and 90 inputs is stored with more, of zeros."""
    unit = 16 if form == "nvfp4" else 32
    shape = [-(-size // unit) * unit for size in (150, 90)]
    tensors, want = (nvfp4 if form == "nvfp4" else mxfp8)(*shape)
    raw_codes = tensors["x.weight"]
    codes = raw_codes if form == "nvfp4" else raw_codes[0].view(np.uint8)
    codes[150:], codes[:, 90 // (2 if form == "nvfp4" else 1) :] = 0, 0
    told = of_file(format=form, orig_shape=[150, 90])
    check(only(tensors, metadata=told), want[:150, :90], "BF16")
    assert only(tensors, metadata=told).encoder() is None
    with pytest.raises(AdapterError, match=r"may have padded.*orig_shape in its description"):
        coded_weights(stored(tensors, metadata=of_file(format=form)))
    for wrong in ([150], [150, shape[1] + 1], [shape[0] - unit, 90], [150.0, 90]):
        with pytest.raises(AdapterError, match=r"not stored in the shape"):
            coded_weights(stored(tensors, metadata=of_file(format=form, orig_shape=wrong)))


def test_a_bias_tells_how_many_rows_are_padding():
    tensors, want = nvfp4(16, 32)
    tensors["x.weight"][10:] = 0
    biased = {"x.bias": np.ones(10, np.float16)}
    found = coded_weights(stored(tensors | biased, metadata=of_file(format="nvfp4")))
    check(found["x.weight"], want[:10], "BF16")
    with pytest.raises(AdapterError, match=r"may have padded"):
        coded_weights(stored(tensors, metadata=of_file(format="nvfp4")))
    for other in (np.ones(17, np.float16), np.ones((10, 1), np.float16)):
        with pytest.raises(AdapterError, match=r"not stored in the shape.*expected \[1"):
            coded_weights(stored(tensors | {"x.bias": other}, metadata=of_file(format="nvfp4")))


def test_scales_that_fill_no_tiles_are_refused():
    tensors, _ = nvfp4(16, 32)
    tensors["x.weight_scale"] = (np.ones((16, 2), F8), "F8_E4M3")
    with pytest.raises(AdapterError, match=r"wrong shape.*x.weight_scale.*expected \[128, 4\]"):
        coded_weights(stored(tensors, metadata=of_file(format="nvfp4")))


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8", "int8_tensorwise", "float8_e4m3fn"])
def test_a_file_that_is_fused_loses_its_marks_or_keeps_them(form, tmp_path, make_folder):
    """In 16 bits no layer is marked; with the format kept every mark and every other byte stays."""
    tensors = {}
    for module in (CHANGED, KEPT):
        if form in ("nvfp4", "mxfp8"):
            made, _ = (nvfp4 if form == "nvfp4" else mxfp8)(64, 128)
        else:
            codes = RNG.integers(-100, 100, (64, 128)).astype(np.int8)
            values = (codes.astype(np.float32).astype(F8), "F8_E4M3")
            made = {"x.weight": codes if form.startswith("int8") else values}
            made["x.weight_scale"] = np.float32(0.02).reshape(())
        made["x.comfy_quant"] = mark(format=form)
        tensors |= {key.replace("x.", f"{module}.", 1): value for key, value in made.items()}
    base = save(tmp_path / "base", tensors, {"model_type": "llama"})
    adapter = make_folder(modules={CHANGED: (64, 128, 8)}, dtype="f32")
    change = lt.delta(lt.read(adapter), CHANGED)
    lt.dequantize(base, dtype="f32", output=tmp_path / "plain")
    weight = 0.5 * values_of(tmp_path / "plain").std() / change.std()
    lt.fuse(base, {adapter: weight}, output=tmp_path / "fused")
    assert set(raw(tmp_path / "fused")) == {f"{CHANGED}.weight", f"{KEPT}.weight"}
    want = values_of(tmp_path / "plain") + weight * change
    got = values_of(tmp_path / "fused")
    assert (np.abs(got - want) <= 2.0**-8 * np.abs(want) + 2.0**-24).all()
    result = lt.fuse(
        base, {adapter: weight}, requantize=True, allow_lossy=True, output=tmp_path / "kept"
    )
    old, new = raw(base), raw(tmp_path / "kept")
    assert set(old) == set(new)
    assert {key for key in old if old[key] != new[key]} == {f"{CHANGED}.weight"}
    lt.dequantize(tmp_path / "kept", dtype="f32", output=tmp_path / "back")
    moved = values_of(tmp_path / "back") - values_of(tmp_path / "plain")
    share = np.vdot(moved, weight * change) / np.vdot(weight * change, weight * change)
    assert result.surviving == pytest.approx(share, abs=1e-4)
    assert share > 0.1


def values_of(folder):
    return read_checkpoint(folder).tensors[f"{CHANGED}.weight"].load(np.float64)
