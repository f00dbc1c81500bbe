"""What is written back: the nearest value there is, in the bytes that mean it."""

import numpy as np
import pytest
from encoder_cases import CASES, weight_of
from quantised_cases import only

from loratools.base.codecs.convrot import rotated
from loratools.base.codecs.levels import float_codes
from loratools_formats.core.dtypes import DTYPES

SEED = 3


def matrix(weight):
    return weight.tensor().load(np.float32).reshape(-1, weight.shape[-1])


def stored_bytes(tensors):
    found = {}
    for key, value in tensors.items():
        values, code = value if isinstance(value, tuple) else (value, None)
        found[key] = (np.ascontiguousarray(values), code)
    return found


def written(weight, tensors, wanted):
    """Return the tensors with new values in them, written a few rows at a time, and the values."""
    encoder = weight.encoder()
    new = stored_bytes(tensors)
    data = {b.key: bytearray(b"\xaa" * b.nbytes) for b in encoder.blanks}
    counts = dict.fromkeys(data, 0)
    plane = weight.shape[-2]
    height = max(encoder.step, 16 // encoder.step * encoder.step)
    values = np.empty_like(wanted)
    for first in range(0, len(wanted), plane):
        for top in range(first, first + plane, height):
            stop = min(top + height, first + plane)
            encoded = encoder.encode(top, wanted[top:stop].copy())
            values[top:stop] = encoded.values
            for key, at, piece in encoded.pieces:
                raw = bytes(memoryview(piece).cast("B"))
                data[key][at : at + len(raw)] = raw
                counts[key] += len(raw)
    for blank in encoder.blanks:
        assert counts[blank.key] == blank.nbytes
        old, code = new[blank.key]
        assert (old.shape, old.nbytes) == (blank.shape, blank.nbytes)
        new[blank.key] = (np.frombuffer(bytes(data[blank.key]), old.dtype).reshape(old.shape), code)
    return {key: value if value[1] else value[0] for key, value in new.items()}, values


def changed(weight, share):
    base = matrix(weight)
    noise = np.random.default_rng(SEED).standard_normal(base.shape).astype(np.float32)
    return base + share * np.float32(np.abs(base).mean()) * noise


@pytest.mark.parametrize("name", CASES)
def test_values_that_the_format_holds_stay_as_they_are(name):
    weight, tensors, _ = weight_of(name)
    base = matrix(weight)
    new, values = written(weight, tensors, base)
    np.testing.assert_array_equal(values, base)
    for key, value in stored_bytes(tensors).items():
        again = stored_bytes(new)[key]
        codes = weight.parts[0].key == key
        # Zero has two codes, and what a scale of zero means has all.
        if codes and not np.array_equal(again[0].view(np.uint8), value[0].view(np.uint8)):
            assert "FP" in name or "fp" in name or "oss" in name
        elif not codes:
            assert again[0].tobytes() == value[0].tobytes()


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_bytes_mean_what_is_said_of_them(name, share):
    weight, tensors, told = weight_of(name)
    new, values = written(weight, tensors, changed(weight, share))
    np.testing.assert_array_equal(matrix(only(new, **told)), values)


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("ConvRot")])
def test_no_code_is_nearer_where_inputs_are_rotated(name, share):
    """A rotation keeps distances: a code is the nearest for what is rotated, not for one value."""
    weight, tensors, _ = weight_of(name)
    wanted = changed(weight, share)
    _, values = written(weight, tensors, wanted)
    off = rotated(values - wanted, 16)
    scales = tensors["x.weight_scale"].reshape(-1, 1)
    half = 1 << (weight.scheme.bits - 1)
    place = rotated(wanted, 16) / scales
    beyond = np.maximum(np.maximum(place - (half - 1), -half - place), 0)
    assert (np.abs(off) <= scales * (0.5 + beyond) * (1 + 1e-4)).all()


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("ConvRot")])
def test_no_code_of_the_old_scales_is_nearer(name, share):
    """Every code is tried for every value; where scales may be new, a group's error counts."""
    weight, tensors, told = weight_of(name)
    wanted = changed(weight, share)
    _, values = written(weight, tensors, wanted)
    best, nearest = np.full(wanted.shape, np.inf, np.float32), wanted
    key = weight.parts[0].key
    for code in range(1 << weight.scheme.bits):
        meant = matrix(only({**tensors, key: filled(tensors[key], code, weight)}, **told))
        apart = np.nan_to_num(np.abs(meant - wanted), nan=np.inf)
        nearest = np.where(apart < best, meant, nearest)
        best = np.minimum(best, apart)
    best += roundings(weight) * (np.abs(values) + np.abs(nearest))
    off = np.abs(values - wanted)
    if len(weight.encoder().blanks) == 1:
        assert (off <= best + 2.0**-20 * np.abs(wanted)).all()
        return
    size = weight.scheme.group or weight.shape[-1]
    groups = [np.square(d, dtype=np.float64).reshape(-1, size).sum(1) for d in (off, best)]
    assert (groups[0] <= groups[1] + 2.0**-18 * size * np.square(wanted).max()).all()


def roundings(weight):
    """Return how far a value may be from what is rounded: a code is nearest before rounding."""
    return {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-23}[weight.dtype.code]


def filled(stored, code, weight):
    """Return codes that are all the same."""
    values, kind = stored if isinstance(stored, tuple) else (stored, None)
    bits = weight.scheme.bits
    shape = values.shape
    if "torchao INT" in weight.scheme.name:
        new = np.full(shape, code - (1 << (bits - 1)), np.int8)
    elif bits in (2, 4, 8):
        byte = sum(code << (bits * i) for i in range(8 // bits))
        new = np.full(values.nbytes, byte, np.uint8).view(values.dtype).reshape(shape)
    else:
        stream = np.unpackbits(np.array([code], np.uint8), bitorder="little")[:bits]
        down = "qweight" in weight.parts[0].key
        each = (
            32 // bits if weight.shape[-1] * bits // 32 < (shape[0] if down else shape[-1]) else 0
        )
        words = shape[0] if down else shape[-1]
        if each:
            row = np.tile(
                np.concatenate([np.tile(stream, each), np.zeros(32 - each * bits, int)]), words
            )
        else:
            row = np.tile(stream, words * 32 // bits + 1)[: words * 32]
        word = np.packbits(row.astype(np.uint8), bitorder="little").view(np.uint32)
        new = np.broadcast_to(word[:, None] if down else word, shape).astype(np.uint32)
        new = np.ascontiguousarray(new).view(values.dtype)
    return (new, kind) if kind else new


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_small_floats_are_rounded_as_ml_dtypes_does(kind):
    rng = np.random.default_rng(1)
    dtype = DTYPES[kind].numpy_dtype()
    codes = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    finite = np.sort(codes[np.isfinite(codes)])
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(ties, np.float32(s)) for s in (-np.inf, np.inf)]
    values = np.concatenate([finite, ties, *around, rng.standard_normal(4096).astype(np.float32)])
    assert float_codes(values, kind).tobytes() == values.astype(dtype).tobytes()
    beyond = np.array([1e9, -1e9, np.inf, np.nan], np.float32)
    top = finite[-1]
    got = float_codes(beyond, kind).view(dtype).astype(np.float32)
    np.testing.assert_array_equal(got, [top, -top, top, 0])


def test_e2m1_ties_go_to_even_codes():
    values = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, 0.26, 2.4, -0.1, -5.1], np.float32)
    want = [0, 2, 2, 4, 4, 6, 6, 7, 1, 4, 8, 15]
    np.testing.assert_array_equal(float_codes(values, "F4_E2M1"), want)
