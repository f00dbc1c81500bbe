"""Numbers at their edges through the commands, as properties against NumPy in float64.

Whatever the numbers, an operation refuses in words or writes finite tensors whose distance to the
true change is the error that it reports. Inputs are written here, not by loratools.
`robustness/test_odd_numbers.py` has files that are odd in themselves, `test_cancelling.py` the
arithmetic of factors that cancel.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.algebra.joint import Triplets
from loratools.operations.shared.survey import survey

TYPES = {"f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype("f4")}
NAMES = [
    "layers.0.q", "q", "layers.0.a.b.c.d", "layers.0.q+", "layers.0.(q|k)$", "layers.0.[qk]*",
    r"layers.0.\d", "layers.0.q^", "слой.0.запрос", "層.0.q", "layers.0.q-proj_1", "layers.0.{q}",
]  # fmt: skip
EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True)


def factors(rng, out, in_, rank, shape):
    """Return b and a of one module, by what is odd about it."""
    b, a = rng.standard_normal((out, rank)), rng.standard_normal((rank, in_))
    if shape == "zero":
        return b * 0.0, a
    if shape == "deficient":
        b[:, -1], a[-1] = b[:, 0], a[0]
    if shape == "repeated":
        b, a = np.eye(out, rank), np.eye(rank, in_)
    return b, a


@st.composite
def modules(draw, dtype):
    """Return factors by name as they are stored, sizes from denormal to beyond float16."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = {}
    rank = draw(st.integers(1, 4))
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)):
        out, in_ = draw(st.sampled_from([(1, 1), (1, 7), (5, 1), (6, 7), (3, 2)]))
        shape = draw(st.sampled_from(["any", "zero", "deficient", "repeated"]))
        sizes = [10.0 ** draw(st.integers(-8, 4)) for _ in "ba"]
        pair = factors(rng, out, in_, rank, shape)
        found[name] = [(f * s).astype(dtype) for f, s in zip(pair, sizes, strict=True)]
    return found


def write(folder, parts, alpha):
    """Write a PEFT folder and return it with its true changes."""
    rank = len(next(iter(parts.values()))[1])
    prefix, tensors = "base_model.model.", {}
    for name, (b, a) in parts.items():
        tensors[f"{prefix}{name}.lora_B.weight"] = np.ascontiguousarray(b)
        tensors[f"{prefix}{name}.lora_A.weight"] = np.ascontiguousarray(a)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(parts)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, {
        name: alpha / rank * (b.astype(np.float64) @ a.astype(np.float64))
        for name, (b, a) in parts.items()
    }


def stored(folder):
    """Return the changes that a PEFT folder holds, in float64; no code of ours."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, a in tensors.items():
        assert np.isfinite(a.astype(np.float64)).all(), key
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
        patterns = config.get("alpha_pattern") or {}
        fits = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name))  # as PEFT does
        alpha = next(fits, config["lora_alpha"])
        root = math.sqrt(len(a)) if config.get("use_rslora") else len(a)
        found[name] = alpha / root * (b @ a.astype(np.float64))
    return found


def norm(changes):
    """‖·‖_F of all modules together; nothing overflows."""
    top = max((np.abs(m).max(initial=0.0) for m in changes.values()), default=0.0)
    if top == 0.0:
        return 0.0
    return float(top * np.sqrt(sum(np.sum(np.square(m / top)) for m in changes.values())))


def assert_as_reported(truth, folder, reported):
    """The distance of what a folder stores to the truth is the reported share of its norm."""
    assert_distance(truth, stored(folder), reported)


def assert_distance(truth, found, reported):
    assert set(found) <= set(truth)
    lost = norm({name: found.get(name, 0.0) - truth[name] for name in truth})
    size = norm(truth)
    if size == 0.0:
        assert lost == 0.0
        return
    assert lost / size == pytest.approx(reported, rel=1e-3, abs=1e-6)


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def outcome(work):
    """Return the result, or None if it is refused by an error of ours."""
    try:
        return work()
    except lt.LoratoolsError:
        return None


TYPE = st.sampled_from(sorted(TYPES))
ALPHA = st.sampled_from([16.0, 1.0, 3.0, 1e30, 1e-30, 0.0, -8.0, -3.0])


@EXAMPLES
@given(st.data(), TYPE, st.sampled_from([None, *TYPES]), ALPHA, st.integers(1, 6))
def test_squeeze_writes_what_it_reports_or_refuses(data, given_type, dtype, alpha, rank):
    with folder() as here:
        source, truth = write(here / "in", data.draw(modules(TYPES[given_type])), alpha)
        made = outcome(lambda: lt.squeeze(source, rank=rank, dtype=dtype, output=here / "out"))
        if made is not None:
            assert_as_reported(truth, here / "out", made.relative_error)


@EXAMPLES
@given(
    st.data(), TYPE, ALPHA, st.sampled_from([0.0, -1.0, 1e30, 1e-30]),
    st.sampled_from([None, *TYPES]), st.sampled_from([None, 2]),
)  # fmt: skip
def test_merge_writes_what_it_reports_or_refuses(data, given_type, alpha, weight, dtype, rank):
    with folder() as here:
        dtype_in = TYPES[given_type]
        first = data.draw(modules(dtype_in))
        one, of_one = write(here / "one", first, alpha)
        other, of_other = write(here / "other", {n: (b[::-1], a) for n, (b, a) in first.items()}, 4)
        truth = {name: weight * of_one[name] + of_other[name] for name in of_one}
        made = outcome(
            lambda: lt.merge([(one, weight), other], rank=rank, dtype=dtype, output=here / "out")
        )
        if made is not None:
            assert_as_reported(truth, here / "out", made.relative_error)


@EXAMPLES
@given(st.data(), TYPE, TYPE, st.integers(1, 3), st.booleans())
def test_an_adapter_and_its_negative_cancel(data, one_type, other_type, rank, as_weight):
    with folder() as here:
        parts = data.draw(modules(TYPES[one_type]))
        one, truth = write(here / "one", parts, 2.0)
        for b, _ in parts.values():
            np.negative(b, out=b, where=not as_weight)
        other, _ = write(here / "other", parts, 2.0)
        pair = [(one, 1.0), (other, -1.0 if as_weight else 1.0)]
        made = outcome(lambda: lt.merge(pair, rank=rank, dtype=other_type, output=here / "out"))
        if made is not None:
            left = norm(stored(here / "out"))
            assert left <= 1e-7 * norm(truth)


@pytest.mark.slow
@EXAMPLES
@given(st.data(), TYPE, TYPE, st.sampled_from([1e-30, 1e-3, 1.0, 1e30, 0.0, -8.0, -3.0]))
def test_convert_writes_what_it_reads_or_refuses(data, given_type, dtype, alpha):
    with folder() as here:
        source, truth = write(here / "in", data.draw(modules(TYPES[given_type])), alpha)
        made = outcome(lambda: lt.convert(source, to="mlx", dtype=dtype, output=here / "mlx"))
        if made is None:
            return
        back = lt.convert(here / "mlx", to="peft", output=here / "out")
        size = norm(truth)
        lost = norm({n: m - truth[n] for n, m in stored(here / "out").items()})
        told = (made.relative_error or 0.0) + (back.relative_error or 0.0)
        assert lost <= (told * 1.001 + 1e-6) * size


@pytest.mark.parametrize("alpha", [0.0, -8.0, 1e30, 1e-30, 65504.0])
@pytest.mark.parametrize("dtype", TYPES)
def test_alpha_of_a_kohya_file(alpha, dtype, tmp_path):
    rng, name = np.random.default_rng(0), "lora_unet_mid_block_attentions_0_proj_in"
    down, up = (rng.standard_normal(s).astype(TYPES[dtype]) for s in ((2, 6), (5, 2)))
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    truth = alpha / 2 * (up.astype(np.float64) @ down.astype(np.float64))
    made = outcome(lambda: lt.squeeze(path, rank=1, output=tmp_path / "y.safetensors"))
    if made is None:
        assert dtype == "f16"  # the scale goes into the factors, which do not fit then
        assert alpha in (1e30, 1e-30)
        return
    found = load_file(tmp_path / "y.safetensors")
    up, down = (found[f"{name}.lora_{n}.weight"].astype(np.float64) for n in ("up", "down"))
    change = float(found.get(f"{name}.alpha", len(down))) / len(down) * (up @ down)
    assert_distance({name: truth}, {name: change}, made.relative_error)


@pytest.mark.slow
@EXAMPLES
@given(
    st.sampled_from(sorted(TYPES)), TYPE, st.integers(-9, 4), st.integers(-6, 4),
    st.sampled_from([1.0, -3.0, 1e30, 1e-30]), st.integers(0, 2**32),
)  # fmt: skip
def test_what_was_fused_comes_out_again_within_rounding(
    base_type, given_type, base_size, size, alpha, seed
):
    with folder() as here:
        rng, name = np.random.default_rng(seed), "model.layers.0.self_attn.q_proj"
        dtype, given = TYPES[base_type], TYPES[given_type]
        weight = (rng.standard_normal((6, 7)) * 10.0**base_size).astype(dtype)
        (here / "base").mkdir()
        save_file({f"{name}.weight": weight}, here / "base" / "model.safetensors")
        (here / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
        parts = {name: [(f * 10.0**size).astype(given) for f in factors(rng, 6, 7, 2, "any")]}
        source, truth = write(here / "in", parts, abs(alpha))
        sign = math.copysign(1.0, alpha)
        work = {"allow_lossy": True}
        done = outcome(lambda: lt.fuse(here / "base", [(source, sign)], output=here / "up", **work))
        exact = weight.astype(np.float64) + sign * truth[name]
        top = float(ml_dtypes.finfo(dtype).max)
        if done is None:
            assert np.abs(exact).max() > top
            return
        fused = load_file(here / "up" / "model.safetensors")[f"{name}.weight"].astype(np.float64)
        unit = float(ml_dtypes.finfo(dtype).eps) / 2
        least = float(ml_dtypes.finfo(dtype).smallest_subnormal)
        assert (np.abs(fused - exact) <= 1.01 * unit * np.abs(exact) + least).all()
        lt.fuse(here / "up", [(source, -sign)], output=here / "down", **work)
        back = load_file(here / "down" / "model.safetensors")[f"{name}.weight"].astype(np.float64)
        want = weight.astype(np.float64)
        room = 1.01 * unit * (np.abs(exact) + np.abs(back)) + 2 * least
        assert (np.abs(back - want) <= room).all()


@EXAMPLES
@given(
    TYPE, st.sampled_from([None, *TYPES]), st.integers(-30, 30), st.integers(-30, 30),
    st.sampled_from(["any", "deficient", "repeated"]), st.integers(1, 9), st.integers(0, 2**32),
)  # fmt: skip
def test_extract_writes_what_it_reports_or_refuses(
    given_type, dtype, size, change, shape, rank, seed
):
    with folder() as here:
        rng, name = np.random.default_rng(seed), "model.layers.0.self_attn.q_proj"
        stored_as = TYPES[given_type]
        least, top = (-6, 3) if given_type == "f16" else (-30, 30)
        size, change = (min(max(each, least), top) for each in (size, change))
        weight = rng.standard_normal((6, 7)) * 10.0**size
        b, a = factors(rng, 6, 7, 3, shape)
        weights = [weight.astype(stored_as), (weight + b @ a * 10.0**change).astype(stored_as)]
        for place, values in zip(("base", "tuned"), weights, strict=True):
            (here / place).mkdir()
            save_file({f"{name}.weight": values}, here / place / "model.safetensors")
            (here / place / "config.json").write_text(json.dumps({"model_type": "llama"}))
        made = outcome(
            lambda: lt.extract(
                here / "base", here / "tuned", rank=rank, dtype=dtype, output=here / "out"
            )
        )
        if made is not None:
            before, after = (values.astype(np.float64) for values in weights)
            assert_as_reported({name: after - before}, here / "out", made.relative_error)


@pytest.mark.slow
@EXAMPLES
@given(
    TYPE, TYPE, st.sampled_from([None, *TYPES]), st.integers(-20, 20), st.integers(-20, 20),
    st.sampled_from(["any", "zero", "deficient", "repeated"]), st.integers(0, 2**32),
)  # fmt: skip
def test_dora_and_back_is_the_change_or_refused(
    given_type, base_type, dtype, size, change, shape, seed
):
    with folder() as here:
        rng, name = np.random.default_rng(seed), "model.layers.0.self_attn.q_proj"
        least, top = (-6, 3) if "f16" in (given_type, base_type) else (-20, 20)
        size, change = (min(max(each, least), top) for each in (size, change))
        weight = (rng.standard_normal((6, 7)) * 10.0**size).astype(TYPES[base_type])
        (here / "base").mkdir()
        save_file({f"{name}.weight": weight}, here / "base" / "model.safetensors")
        (here / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
        b, a = factors(rng, 6, 7, 2, shape)
        parts = {name: [(b * 10.0**change).astype(TYPES[given_type]), a.astype(TYPES[given_type])]}
        source, truth = write(here / "in", parts, 2.0)
        made = outcome(lambda: lt.to_dora(source, base=here / "base", output=here / "dora"))
        if made is None:
            return
        whole = weight.astype(np.longdouble) + truth[name]
        norms = np.sqrt((whole**2).sum(axis=1))
        tensors = load_file(here / "dora" / "adapter_model.safetensors")
        (magnitude,) = (t for key, t in tensors.items() if "magnitude" in key)
        lost = (magnitude / norms - 1.0)[:, None] * whole
        if norm(truth) == 0.0:
            assert made.relative_error is None
        else:
            room = 1e-15 * norm({name: np.float64(whole)}) / norm(truth)  # of sums in float64
            want = norm({name: np.float64(lost)}) / norm(truth)
            assert made.relative_error == pytest.approx(want, rel=1e-3, abs=room)
        back = outcome(
            lambda: lt.to_lora(
                here / "dora", base=here / "base", rank=7, dtype=dtype, output=here / "out"
            )
        )
        if back is not None:
            lost = norm({n: m - truth[n] for n, m in stored(here / "out").items()})
            whole = {name: weight.astype(np.float64) + truth[name]}
            rounding = 1.01 * 2.0**-24 * norm(whole)  # of magnitudes, to float32
            assert lost <= (back.relative_error + 1e-6) * (norm(truth) + rounding) + rounding


@pytest.mark.parametrize(("size", "fits"), [(3e38, False), (1e38, True), (1e-44, True)])
def test_a_magnitude_that_float32_does_not_hold_is_refused(size, fits, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    (tmp_path / "base").mkdir()
    weight = np.full((3, 4), size, np.float32)
    save_file({f"{name}.weight": weight}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    parts = {name: (np.ones((3, 1), np.float32), np.full((1, 4), 1e-6, np.float32))}
    source, _ = write(tmp_path / "in", parts, 1.0)
    if fits:
        lt.to_dora(source, base=tmp_path / "base", output=tmp_path / "out")
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        (magnitude,) = (t for key, t in tensors.items() if "magnitude" in key)
        assert np.isfinite(magnitude).all()
        assert (magnitude > 0.0).all()
    else:
        with pytest.raises(lt.LoratoolsError, match="float32"):
            lt.to_dora(source, base=tmp_path / "base")


def test_a_bias_that_float32_does_not_hold_is_refused(tmp_path):
    """The bias of B, of a DoRA that is folded: its scale goes into the bias."""
    rng, name = np.random.default_rng(0), "model.layers.0.self_attn.q_proj"
    (tmp_path / "base").mkdir()
    base = {f"{name}.weight": rng.standard_normal((4, 5)).astype("f4")}
    base[f"{name}.bias"] = np.ones(4, "f4")
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "in").mkdir()
    prefix = f"base_model.model.{name}"
    tensors = {
        f"{prefix}.lora_A.weight": rng.standard_normal((2, 5)).astype("f4") * 1e-20,
        f"{prefix}.lora_B.weight": rng.standard_normal((4, 2)).astype("f4") * 1e-20,
        f"{prefix}.lora_B.bias": np.full(4, 1e10, "f4"),
        f"{prefix}.lora_magnitude_vector": np.ones(4, "f4"),
    }
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1e30, "target_modules": ["q_proj"]}
    config |= {"lora_bias": True, "use_dora": True}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lt.LoratoolsError, match=r"4 values do not fit dtype F32.*lora_B\.bias"):
        lt.to_lora(tmp_path / "in", base=tmp_path / "base", rank=2)


@EXAMPLES
@given(st.data(), TYPE, ALPHA, st.integers(1, 3))
def test_what_is_shared_is_as_far_from_the_changes_as_it_says(data, given_type, alpha, rank):
    with folder() as here:
        dtype_in = TYPES[given_type]
        first = data.draw(modules(dtype_in))
        one, of_one = write(here / "one", first, alpha)
        two, of_two = write(here / "two", {n: (b[::-1], a) for n, (b, a) in first.items()}, 1e-20)
        place = here / "set.safetensors"
        made = outcome(lambda: lt.fleet_share([one, two], rank=rank, workers=1, output=place))
        if made is None:
            return
        for member in made.adapters:
            truth = of_one if member.name == "one" else of_two
            fellows = [each.name for each in made.adapters if each.group == member.group]
            found = shared(place, member.group, fellows.index(member.name))
            assert_distance(truth, found, member.relative_error)


def shared(place, group, index):
    """Return the changes of a member of a group of a set, in float64; no code of ours."""
    tensors = {key: value.astype(np.float64) for key, value in load_file(place).items()}
    found = {}
    for key, cores in tensors.items():
        if key.startswith(f"cores.{group}."):
            name = key.removeprefix(f"cores.{group}.")
            u, v = tensors[f"basis.{group}.u.{name}"], tensors[f"basis.{group}.v.{name}"]
            found[name] = u @ cores[index] @ v
    return found


@pytest.mark.parametrize("size", [1e-90, 1e-70, 1.0, 1e70, 1e80])
def test_spaces_are_compared_where_the_fourth_power_of_a_norm_is_no_number(size):
    one = Triplets(np.eye(4, 2), np.ones(2), np.eye(5, 2))
    same = Triplets(one.u, np.full(2, size), one.v)
    other = Triplets(np.eye(4)[:, 2:], np.full(2, size), np.eye(5)[:, 2:4])
    found = survey("m", lambda _: [[one], [same], [other]], 1, with_overlaps=True).overlaps
    assert found is not None
    assert np.isfinite(found).all()
    alike = 1.0 if 1e-80 < size < 1e76 else 0.0
    np.testing.assert_allclose(found[0], [1.0, alike, 0.0], atol=1e-12)
