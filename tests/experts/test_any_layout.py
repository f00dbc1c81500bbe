"""Any change in any layout, through any layouts, is the same change in the end; commands agree."""

import numpy as np
import pytest
from expert_files import (
    APART,
    LAYOUTS,
    SHARED,
    Change,
    base,
    fused_deltas,
    largest_error,
    read_deltas,
    save,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools_formats import read_adapter

pytestmark = pytest.mark.slow

TARGETS = {
    "as it is": {"to": "peft"}, "stacked": {"experts": "stacked"}, "each": {"experts": "each"},
    "3d": {"experts": "3d"}, "tinker": {"to": "tinker"}, "mlx": {"to": "mlx"},
    "0.18": {"experts": "stacked", "peft_layout": "0.18"}, "4": {"names_of": "4"},
    "5": {"names_of": "5"}, "vllm": {"for_": "vllm"}, "sglang": {"for_": "sglang"},
}  # fmt: skip
ROUNDING = 2.0**-21
"""Of scales that are folded into float32 factors, and of a base in float32."""


@st.composite
def cases(draw):
    """Return a change, the file of a layout, and ΔW; down may have a scale of its own."""
    shared = draw(st.booleans())
    same = shared or draw(st.booleans())
    change = Change(
        experts=draw(st.integers(2, 4)),
        rank=draw(st.integers(1, 3)),
        width=draw(st.sampled_from([4, 6, 8])),
        inner=draw(st.sampled_from([2, 3, 4, 8])),
        same_a=same,
        shared_outer=shared,
        alpha=draw(st.sampled_from([1.0, 2.0, 3.0])),
        rslora=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float16"])),
    )
    layout = draw(st.sampled_from(sorted(SHARED if shared else LAYOUTS if same else APART)))
    tensors, config = (SHARED if shared else LAYOUTS)[layout](change)
    wanted = change.deltas()
    if layout != "Tinker" and draw(st.booleans()):
        config = config | {"alpha_pattern": {"down_proj|w2": 5.0}}
        factor = 5.0 / change.alpha
        wanted = {k: d * factor if k[0] == "down" else d for k, d in wanted.items()}
    return change, (tensors, config), wanted


def given_cases(examples):
    checks = list(HealthCheck)
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks)


def read(folder):
    adapter = read_adapter(folder)
    if adapter.format != "mlx":
        return read_deltas(adapter)
    found = {}
    for name, change in adapter.modules.items():
        part, leaf = change.require_factors(), name.rpartition(".")[2]
        both = part.scale * part.b.load(np.float64) @ part.a.load(np.float64)
        found |= {(leaf.removesuffix("_proj"), e): delta for e, delta in enumerate(both)}
    return found


@given_cases(30)
@given(cases(), st.lists(st.sampled_from(sorted(TARGETS)), min_size=1, max_size=3), st.booleans())
def test_through_any_layouts(tmp_path_factory, case, targets, stacks):
    change, made, wanted = case
    folder = tmp_path_factory.mktemp("any")
    model = base(folder / "base", change, stacks=stacks)
    current = save(folder / "0", made)
    for number, target in enumerate(targets):
        out = folder / str(number + 1)
        lt.convert(current, base=model, output=out, **TARGETS[target])
        assert largest_error(read(out), wanted) <= ROUNDING, targets[: number + 1]
        current = out
    lt.fuse(model, current, output=folder / "fused")
    assert largest_error(fused_deltas(model, folder / "fused"), wanted) <= 16 * ROUNDING


@given_cases(20)
@given(cases(), st.integers(1, 2))
def test_what_squeeze_reports_is_the_error_of_the_file(tmp_path_factory, case, rank):
    _, made, wanted = case
    folder = tmp_path_factory.mktemp("any")
    result = lt.squeeze(save(folder / "a", made), rank=rank, dtype="f32", output=folder / "b")
    found = read(folder / "b")
    square = sum(((found[key] - delta) ** 2).sum() for key, delta in wanted.items())
    error = (square / sum((delta**2).sum() for delta in wanted.values())) ** 0.5
    assert result.relative_error == pytest.approx(error, rel=1e-5, abs=2.0**-22)


@given_cases(20)
@given(cases(), st.sampled_from(sorted(LAYOUTS)), st.booleans())
def test_two_layouts_are_merged(tmp_path_factory, case, other, stacks):
    change, made, wanted = case
    folder = tmp_path_factory.mktemp("any")
    model = base(folder / "base", change, stacks=stacks)
    second = Change(change.experts, 2, change.width, change.inner, seed=9)
    pair = [(save(folder / "a", made), 0.75), (save(folder / "b", LAYOUTS[other](second)), -0.5)]
    lt.merge(pair, base=model, dtype="f32", output=folder / "c")
    deltas = second.deltas()
    total = {key: 0.75 * delta - 0.5 * deltas[key] for key, delta in wanted.items()}
    assert largest_error(read(folder / "c"), total) <= 4 * ROUNDING
