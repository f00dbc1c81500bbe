"""Which of a module's parameters each of its changes is of, as far as ranks and rows tell."""

from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.peft.config import PeftConfig
from loratools_formats.formats.peft.parameters import settings

INNER, OUTER = "mlp.experts.base_layer", "mlp.experts"
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def config(**values):
    return PeftConfig({
        "peft_type": "LORA", "r": 2, "lora_alpha": 6,
        "target_parameters": ["gate_up_proj", "down_proj"], **values,
    })  # fmt: skip


def of_gate_up(rank, alpha=6):
    return {
        "rank_pattern": {r".*\.gate_up_proj": rank}, "alpha_pattern": {r".*\.gate_up_proj": alpha},
    }  # fmt: skip


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 128])
@pytest.mark.parametrize("rank", [1, 3, 4, 8])
def test_two_ranks_fit_one_number_of_experts(experts, rank):
    for up, down in ((INNER, OUTER), (OUTER, INNER)):
        rows = {up: experts * rank, down: experts * 2}
        found = settings(config(**of_gate_up(rank, 12)), rows, None)
        assert found == {up: ((UP,), 12, rank), down: ((DOWN,), 6, 2)}


def test_with_one_rank_the_order_of_declaration_tells():
    """PEFT wraps the parameter that the class declares first innermost."""
    found = settings(config(**of_gate_up(2, 12)), {INNER: 6, OUTER: 6}, None)
    assert found == {INNER: ((UP,), 12, 2), OUTER: ((DOWN,), 6, 2)}


def test_names_whose_order_is_not_known_stay_possible():
    values = config(target_parameters=["left", "right"])
    found = settings(values, {INNER: 6, OUTER: 6}, None)
    both = ("mlp.experts.left", "mlp.experts.right")
    assert {setting.names for setting in found.values()} == {both}


def test_one_rank_and_two_alphas_of_unknown_names_are_refused():
    values = config(target_parameters=["left", "right"], alpha_pattern={"left": 12})
    with pytest.raises(UnsupportedError, match="does not say which is which"):
        settings(values, {INNER: 6, OUTER: 6}, None)


def test_one_alone_of_one_rank_stays_either():
    assert settings(config(), {OUTER: 6}, None)[OUTER].names == (DOWN, UP)


def test_a_change_alone_that_could_be_of_two_ranks_is_refused():
    with pytest.raises(UnsupportedError, match="r = 4, r = 2"):
        settings(config(**of_gate_up(4)), {OUTER: 12}, None)
    assert settings(config(**of_gate_up(4)), {OUTER: 6}, None)[OUTER].names == (DOWN,)


@pytest.mark.parametrize("rows", [{INNER: 7, OUTER: 6}, {INNER: 6, OUTER: 7}, {OUTER: 0}])
def test_rows_that_no_rank_divides(rows):
    with pytest.raises(AdapterError, match="rank in the file and rank in the config differ"):
        settings(config(**of_gate_up(4)), rows, None)


def test_a_matrix_beside_a_stack_is_told_by_its_own_rows():
    """Biases of stacked experts are matrices: one number of experts does not hold for them."""
    values = {
        "target_parameters": ["down_proj", "down_proj_bias"],
        "rank_pattern": {"down_proj": 8, "down_proj_bias": 3},
    }
    found = settings(config(**values), {INNER: 64, OUTER: 3}, None)
    assert found[INNER].names == (DOWN,)
    assert found[OUTER].names == (f"{DOWN}_bias",)


def test_a_listed_module_is_no_parameter():
    """A bare `down_proj` of `target_parameters` is not `self_attn.q_proj.down_proj`."""
    listed = config(target_modules=["q_proj"])
    found = settings(listed, {"self_attn.q_proj": 2, "mlp.experts": 6}, None)
    assert found["self_attn.q_proj"].names == ()
    assert found["mlp.experts"].names == (DOWN, UP)


@given(
    st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=4),
    st.integers(1, 8),
    st.data(),
)
def test_what_is_told_is_the_only_reading(ranks, experts, data):
    names = [f"p{i}" for i in range(len(ranks))]
    values = config(target_parameters=names, rank_pattern=dict(zip(names, ranks, strict=True)))
    order = data.draw(st.permutations(ranks))
    rows = {"m" + ".base_layer" * i: experts * rank for i, rank in enumerate(order)}
    readings = {
        tried
        for tried in permutations(ranks)
        if len({r / t for r, t in zip(rows.values(), tried, strict=True)}) == 1
        and all(r % t == 0 for r, t in zip(rows.values(), tried, strict=True))
    }
    assert tuple(order) in readings
    if len(readings) == 1:
        found = settings(values, rows, None)
        assert [found[path].rank for path in rows] == order
        same = Counter(ranks)
        assert all(len(found[path].names) == same[found[path].rank] for path in rows)
    else:
        with pytest.raises(UnsupportedError):
            settings(values, rows, None)
