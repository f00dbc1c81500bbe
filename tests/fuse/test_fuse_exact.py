"""What is stored against the exact sum rounded once, in every type, down to bad cancellation.

The exact sum is in float64, rounded by tests/rounding.py; what has 16 bits in large tensors is
computed in float32 with a repair, which these tests force on small ones.
"""

from __future__ import annotations

import json

import fuse_cases as cases
import numpy as np
import pytest
import rounding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratools.algebra.device import Device
from loratools.operations.fuse import blocks
from loratools.operations.fuse.blocks import Patch, fused_blocks
from loratools.operations.fuse.terms import DoraTerm, Term, View
from loratools_formats.core.dtypes import SPACINGS
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import AdapterError


def summed(w, terms, *, single, patches=(), planes=1):
    """Return what `fused_blocks` makes of a matrix or a stack, rounded to its type."""
    shape = w.shape if planes > 1 else (1, *w.shape)
    view = View(*shape)
    by_plane = [[t for t in terms if t.plane == plane] for plane in range(planes)]
    out = np.empty(w.size, w.dtype)
    tensor = in_memory("w", w)
    spacing = SPACINGS[tensor.dtype.code] if single else None
    after = 0
    for block in fused_blocks(
        tensor, view, by_plane, patches, single=spacing, device=Device("cpu")
    ):
        assert block.start == after
        after += block.total.size
        out[block.start : after] = block.total.reshape(-1)
    assert after == w.size
    return out.reshape(w.shape)


def term(left, right, *, weight=1.0, rows=None, columns=None, plane=0, dora=None):
    rows, columns = rows or (0, left.shape[0]), columns or (0, right.shape[1])
    return Term("m", plane, rows, columns, left, right, weight, dora)


def drawn(rng, rows, columns, rank, ratio, kind):
    """Return a base and factors with ‖ΔW‖/‖W‖ near `ratio`."""
    left, right = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    left *= ratio / np.sqrt(rank)
    return rng.standard_normal((rows, columns)).astype(kind), left, right


@pytest.mark.parametrize("name", rounding.TYPES)
@pytest.mark.parametrize("ratio", [1e-3, 0.1, 1, 30])
def test_sums_are_rounded_once(name, ratio):
    """Of many draws, since of one the number next to a tie is a matter of chance."""
    found, exact = [], []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        w, left, right = drawn(rng, 400, 300, 16, ratio, rounding.TYPES[name])
        found.append(summed(w, [term(left, right)], single=name != "f32").copy())
        exact.append(w.astype(np.float64) + left @ right)
    rounding.assert_rounded_once(np.stack(found), np.stack(exact))


@pytest.mark.parametrize("name", rounding.TYPES)
@pytest.mark.parametrize("rank", [1, 16, 128])
@pytest.mark.parametrize("outlier", [1, 30])
def test_sums_that_cancel_are_right_to_the_last_place(name, rank, outlier):
    """W is −ΔW as near as its type can be, in places, so that next to nothing is left."""
    rng = np.random.default_rng(rank)
    w, left, right = drawn(rng, 128, 300, rank, 1, rounding.TYPES[name])
    left[7] *= outlier
    right[:, 11] *= outlier
    cancelled = rng.random(w.shape) < 0.5
    w[cancelled] = (-(left @ right))[cancelled].astype(w.dtype)
    got = summed(w, [term(left, right)], single=name != "f32")
    exact = w.astype(np.float64) + left @ right
    assert rounding.distances(got, exact).max() <= (1 if name != "f32" else 2)
    if name != "f32":  # of float32, float64 itself is only good for some digits of what is left
        rounding.assert_rounded_once(got, exact)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("size", [1e25, 1e50, 1e300])
def test_factors_at_both_ends_of_the_range_cancel_as_others_do(kind, size):
    """Squares of one side vanish and of the other overflow: the bound of errors was 0 times inf."""
    rng = np.random.default_rng(5)
    factors = np.float32 if size < 1e38 else np.float64
    left = (rng.standard_normal((200, 8)) / size).astype(factors)
    right = (rng.standard_normal((8, 150)) * size).astype(factors)
    exact = left.astype(np.float64) @ right.astype(np.float64)
    w = (-exact).astype(np.float32).astype(rounding.TYPES[kind])
    with np.errstate(over="ignore", invalid="ignore"):  # as fusing has it
        got = summed(w, [term(left, right)], single=True)
    rounding.assert_rounded_once(got, w.astype(np.float64) + exact)


def test_what_cancels_altogether_is_left_to_double_precision():
    """Without the repair a float32 sum would be all rounding error here."""
    rng = np.random.default_rng(3)
    left = rng.integers(-8, 8, (64, 16)) / 8.0
    right = rng.integers(-8, 8, (16, 64)) / 8.0
    left[:, 0], right[0] = 1000.0, 1.0  # products of about 1000 ± 4, to be cancelled
    w = np.full((64, 64), -1000.0, rounding.TYPES["bf16"])
    got = summed(w, [term(left, right * (1 + 2.0**-30))], single=True)
    rounding.assert_rounded_once(got, w.astype(np.float64) + left @ (right * (1 + 2.0**-30)))


SIZES = st.integers(1, 24)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    rows=SIZES,
    columns=SIZES,
    rank=st.integers(1, 9),
    name=st.sampled_from(list(rounding.TYPES)),
    ratio=st.sampled_from([1e-4, 0.3, 1.0, 100.0]),
    weight=st.sampled_from([1.0, -1.0, 0.37, -3.0]),
    block=st.sampled_from([1, 7, 64, 1 << 17]),
    seed=st.integers(0, 1 << 32),
)
def test_any_sum_of_rectangles_is_rounded_once(
    data, rows, columns, rank, name, ratio, weight, block, seed
):
    rng = np.random.default_rng(seed)
    w, left, right = drawn(rng, rows, columns, rank, ratio, rounding.TYPES[name])
    top, bottom = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    side, end = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
    terms = [term(left, right)]
    exact = w.astype(np.float64) + left @ right
    if bottom > top and end > side:
        part = rng.standard_normal((bottom - top, rank)), rng.standard_normal((rank, end - side))
        terms.append(term(*part, weight=weight, rows=(top, bottom), columns=(side, end)))
        exact[top:bottom, side:end] += weight * (part[0] @ part[1])
    before, blocks._BLOCK_ELEMENTS = blocks._BLOCK_ELEMENTS, block
    try:
        got = summed(w, terms, single=name != "f32")
    finally:
        blocks._BLOCK_ELEMENTS = before
    off = rounding.distances(got, exact)
    scale = np.abs(exact).max(initial=0)
    whole = (
        np.abs(exact) > 1e-12 * scale if name == "f32" else np.full(exact.shape, fill_value=True)
    )
    assert off[whole].max(initial=0) <= 1
    assert (off > 0).sum() <= 1


@pytest.mark.parametrize("along_columns", [False, True])
@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("block", [1, 40, 1 << 17])
def test_dora_by_its_definition(monkeypatch, along_columns, weight, block):
    """m/‖V‖ · V per output, outputs being rows or columns; beside it a plain delta."""
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(5)
    w, left, right = drawn(rng, 30, 20, 4, 0.5, "f4")
    magnitude = rng.uniform(0.5, 2, 20 if along_columns else 30)
    plain = rng.standard_normal((30, 2)), rng.standard_normal((2, 20))
    dora = DoraTerm(magnitude, along_columns)
    got = summed(w, [term(*plain), term(left, right, weight=weight, dora=dora)], single=False)
    v = w.astype(np.float64) + left @ right
    norm = np.linalg.norm(v, axis=0 if along_columns else 1)
    factor = magnitude / norm if along_columns else (magnitude / norm)[:, None]
    change = weight * (factor * v - w)
    rounding.assert_rounded_once(got, w + plain[0] @ plain[1] + change, unequal=0)


@pytest.mark.parametrize("along_columns", [False, True])
def test_a_dora_without_a_direction_is_an_error(along_columns):
    w = np.ones((4, 3), "f4")
    if along_columns:
        w[:, 1] = 0
    else:
        w[2] = 0
    left, right = np.zeros((4, 1)), np.ones((1, 3))
    dora = DoraTerm(np.ones(3 if along_columns else 4), along_columns)
    with pytest.raises(AdapterError, match="no direction"):
        summed(w, [term(left, right, dora=dora)], single=False)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("block", [16, 1 << 17])
def test_rows_are_replaced_before_anything_is_added(monkeypatch, single, block):
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(6)
    w, left, right = drawn(rng, 20, 8, 3, 0.5, rounding.TYPES["bf16"])
    new = rng.standard_normal((2, 8)).astype("f4")
    got = summed(
        w, [term(left, right)], single=single, patches=[Patch((17, 2), in_memory("rows", new))]
    )
    exact = w.astype(np.float64)
    exact[[17, 2]] = new
    rounding.assert_rounded_once(got, exact + left @ right)


@pytest.mark.parametrize("single", [False, True])
def test_each_plane_of_a_stack_has_its_own_terms(single):
    rng = np.random.default_rng(7)
    w = rng.standard_normal((3, 10, 6)).astype(rounding.TYPES["bf16"])
    left, right = rng.standard_normal((10, 2)), rng.standard_normal((2, 6))
    got = summed(w, [term(left, right, plane=1)], single=single, planes=3)
    exact = w.astype(np.float64)
    exact[1] += left @ right
    rounding.assert_rounded_once(got, exact)
    np.testing.assert_array_equal(got[[0, 2]], w[[0, 2]])


@pytest.fixture(scope="module", params=["bf16", "f16"])
def given_pair(tmp_path_factory, request):
    """A base of 16 bits whose matrix is large enough for float32, and an adapter."""
    root = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(8)
    kind = rounding.TYPES[request.param]
    w = {
        "model.layers.0.mlp.up_proj.weight": rng.standard_normal((1024, 1100)).astype(kind),
        "model.layers.0.mlp.down_proj.weight": rng.standard_normal((300, 200)).astype(kind),
        "model.norm.weight": rng.standard_normal(300).astype(kind),
    }
    modules = {
        "model.layers.0.mlp.up_proj": cases.factors(rng, 1024, 1100, 4),
        "model.layers.0.mlp.down_proj": cases.factors(rng, 300, 200, 4),
    }
    return cases.base(root / "base", w), cases.adapter(root / "adapter", modules), w, modules


def test_bytes_do_not_depend_on_workers(given_pair, tmp_path):
    base, adapter, _, _ = given_pair
    found = set()
    for workers in (1, 2, 3):
        cases.fused(tmp_path / str(workers), base, adapter, workers=workers)
        found.add(tuple(p.read_bytes() for p in sorted((tmp_path / str(workers)).iterdir())))
    assert len(found) == 1


@pytest.mark.parametrize("block", [1, 5000, 1 << 19])
def test_what_is_stored_does_not_depend_on_blocks(given_pair, tmp_path, monkeypatch, block):
    base, adapter, w, modules = given_pair
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", block)
    result, stored = cases.fused(tmp_path / "out", base, adapter)
    for path, (b, a) in modules.items():
        key = f"{path}.weight"
        rounding.assert_rounded_once(stored[key], cases.exact(w[key], b, a, 0.5))
    np.testing.assert_array_equal(stored["model.norm.weight"], w["model.norm.weight"])
    assert (len(result.tensors), result.copied, result.converted) == (2, 1, 0)


@pytest.mark.parametrize("dtype", [None, "f32", "f16", "bf16"])
@pytest.mark.parametrize("stored_as", ["bf16", "f16", "f32"])
def test_the_report_is_that_of_dense_arithmetic(tmp_path, stored_as, dtype):
    """‖ΔW‖/‖W‖ and the share lost to rounding, per tensor and overall, against whole matrices."""
    rng = np.random.default_rng(9)
    w = {
        f"model.layers.{i}.mlp.up_proj.weight": (0.1 * rng.standard_normal((90, 70))).astype(
            rounding.TYPES[stored_as]
        )
        for i in range(2)
    }
    first = {f"model.layers.{i}.mlp.up_proj": cases.factors(rng, 90, 70, 3) for i in range(2)}
    other = {"model.layers.1.mlp.up_proj": cases.factors(rng, 90, 70, 5)}
    folder = cases.base(tmp_path / "base", w, dtype=stored_as)
    one = cases.adapter(tmp_path / "one", first)
    two = cases.adapter(tmp_path / "two", other)
    result, stored = cases.fused(tmp_path / "out", folder, (one, 0.01), (two, -0.02), dtype=dtype)
    totals = np.zeros(3)
    for report in result.tensors:
        i = int(report.key.split(".")[2])
        b, a = first[f"model.layers.{i}.mlp.up_proj"]
        delta = 0.01 * cases.exact(np.zeros((90, 70)), b, a, 2 / 3)
        if i == 1:
            b, a = other["model.layers.1.mlp.up_proj"]
            delta -= 0.02 * cases.exact(np.zeros((90, 70)), b, a, 2 / 5)
        old, new = w[report.key].astype(np.float64), stored[report.key]
        assert new.dtype == rounding.TYPES[dtype or stored_as]
        assert report.dtype == (dtype or stored_as).upper()
        lost = np.linalg.norm(new.astype(np.float64) - (old + delta))
        norms = np.linalg.norm(old), np.linalg.norm(delta), lost
        assert report.relative_change == pytest.approx(norms[1] / norms[0], rel=1e-9)
        assert report.lost == pytest.approx(norms[2] / norms[1], rel=1e-6)
        totals += np.square(norms)
    assert result.relative_change == pytest.approx(np.sqrt(totals[1] / totals[0]), rel=1e-9)
    assert result.lost == pytest.approx(np.sqrt(totals[2] / totals[1]), rel=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    assert config["dtype"] == (stored_as if dtype is None else names[dtype])


def test_the_report_in_float32_is_right_to_some_digits(given_pair, tmp_path):
    base, adapter, w, modules = given_pair
    result, stored = cases.fused(tmp_path / "out", base, adapter)
    by_key = {report.key: report for report in result.tensors}
    for path, (b, a) in modules.items():
        key = f"{path}.weight"
        exact = cases.exact(w[key], b, a, 0.5)
        delta = np.linalg.norm(exact - w[key].astype(np.float64))
        lost = np.linalg.norm(stored[key].astype(np.float64) - exact)
        base_norm = np.linalg.norm(w[key].astype(np.float64))
        assert by_key[key].relative_change == pytest.approx(delta / base_norm, rel=1e-5)
        assert by_key[key].lost == pytest.approx(lost / delta, rel=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_large_and_small_values_are_no_overflow(tmp_path, size):
    """Squares of such values are none of float32; the sums are of bfloat16."""
    rng = np.random.default_rng(10)
    key = "model.layers.0.mlp.up_proj"
    w = (size * rng.standard_normal((1024, 1100))).astype(rounding.TYPES["bf16"])
    b, a = cases.factors(rng, 1024, 1100, 4)
    base = cases.base(tmp_path / "base", {f"{key}.weight": w})
    adapter = cases.adapter(tmp_path / "adapter", {key: (b, a)})
    weight = float(size)
    result, stored = cases.fused(tmp_path / "out", base, (adapter, weight))
    exact = w.astype(np.float64) + weight * 0.5 * (b.astype(np.float64) @ a.astype(np.float64))
    rounding.assert_rounded_once(stored[f"{key}.weight"], exact)
    norms = [np.linalg.norm(x) for x in (w.astype(np.float64), exact - w.astype(np.float64))]
    assert result.relative_change == pytest.approx(norms[1] / norms[0], rel=1e-5)
