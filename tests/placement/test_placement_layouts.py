"""Fused projections and stacked experts: which outputs go where, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placed_headers import adapter, checkpoint, experts, header, linear, placed, replacing

from loratools.base.placement import place
from loratools_formats.core.adapter import Replacement
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import AdapterError, UnsupportedError

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
MOE = "model.layers.0.mlp.experts"


def spans(result):
    return {p.module.rpartition(".")[2]: p.outputs for p in result.deltas}


def split(q, k, v, in_=8):
    sizes = {"q_proj": q, "k_proj": k, "v_proj": v}
    return {f"attn.{name}": linear(size, in_) for name, size in sizes.items()}


def test_split_projections_on_a_joined_one():
    base = checkpoint({"attn.qkv_proj.weight": (16, 8)}, model_type="phi3", **GQA)
    result = placed(split(8, 4, 4), base)
    assert spans(result) == {"q_proj": ((0, 8),), "k_proj": ((8, 12),), "v_proj": ((12, 16),)}
    assert {p.transposed for p in result.deltas} == {False}


def test_split_projections_on_a_conv1d_are_columns():
    base = checkpoint({"h.0.attn.c_attn.weight": (8, 24)}, model_type="gpt2", n_head=4)
    modules = {f"h.0.{path}": delta for path, delta in split(8, 8, 8).items()}
    result = placed(modules, base)
    assert spans(result) == {"q_proj": ((0, 8),), "k_proj": ((8, 16),), "v_proj": ((16, 24),)}
    assert {p.transposed for p in result.deltas} == {True}


def test_split_projections_on_a_grouped_one():
    base = checkpoint(
        {"attn.query_key_value.weight": (16, 8)}, model_type="falcon", num_attention_heads=4,
        num_kv_heads=2, new_decoder_architecture=True, multi_query=True, hidden_size=8,
    )  # fmt: skip
    assert spans(placed(split(8, 4, 4), base)) == {
        "q_proj": ((0, 4), (8, 12)),
        "k_proj": ((4, 6), (12, 14)),
        "v_proj": ((6, 8), (14, 16)),
    }


def test_in_proj_weight_needs_no_config():
    base = checkpoint({"attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,)})
    modules = {"attn.v_proj": linear(8, 8, bias=True)}
    result = placed(modules, base)
    assert result.deltas[0].key == "attn.in_proj_weight"
    assert result.deltas[0].outputs == result.biases[0].outputs == ((16, 24),)
    assert result.biases[0].key == "attn.in_proj_bias"


@pytest.mark.parametrize(
    ("key", "shape", "config", "error"),
    [
        ("attn.qkv_proj.weight", (16, 8), {"model_type": "codegen", **GQA}, UnsupportedError),
        ("attn.qkv_proj.weight", (16, 8), {}, UnsupportedError),
        ("attn.qkv_proj.weight", (16, 8), {"model_type": "phi3"}, UnsupportedError),
        (
            "attn.query_key_value.weight",
            (16, 8),
            {"model_type": "falcon", "num_attention_heads": 4},
            UnsupportedError,
        ),
        ("attn.qkv_proj.weight", (18, 8), {"model_type": "phi3", **GQA}, AdapterError),
        ("attn.qkv_proj.weight", (24, 8), {"model_type": "phi3", **GQA}, AdapterError),
        ("attn.qkv_proj.weight", (16, 7), {"model_type": "phi3", **GQA}, AdapterError),
        ("attn.qkv_proj.weight", (16, 8, 1), {"model_type": "phi3", **GQA}, AdapterError),
    ],
)
def test_unknown_orders_and_misfits_are_refused(key, shape, config, error):
    with pytest.raises(error):
        placed(split(8, 4, 4), checkpoint({key: shape}, **config))


def test_a_fused_adapter_on_separate_projections():
    base = checkpoint(
        {"attn.q_proj.weight": (8, 8), "attn.k_proj.weight": (4, 8), "attn.v_proj.weight": (4, 8),
         "mlp.gate_proj.weight": (6, 8), "mlp.up_proj.weight": (6, 8)},
        model_type="llama", **GQA,
    )  # fmt: skip
    modules = {"attn.qkv_proj": linear(16, 8), "mlp.gate_up_proj": linear(12, 8)}
    result = placed(modules, base)
    assert {p.key: p.rows for p in result.deltas} == {
        "attn.q_proj.weight": ((0, 8),), "attn.k_proj.weight": ((8, 12),),
        "attn.v_proj.weight": ((12, 16),), "mlp.gate_proj.weight": ((0, 6),),
        "mlp.up_proj.weight": ((6, 12),),
    }  # fmt: skip
    with pytest.raises(AdapterError, match="does not fit"):
        placed({"attn.qkv_proj": linear(17, 8)}, base)
    with pytest.raises(AdapterError, match="no base tensor fits"):
        placed({"attn.query_key_value": linear(16, 8)}, base)


def test_replaced_biases_are_cut_and_joined_like_deltas():
    joined = checkpoint({"attn.qkv_proj.bias": (16,)}, model_type="phi3", **GQA)
    result = place(adapter({}, k=replacing("bias", "attn.k_proj.bias", (4,))), joined)
    ((key, replacement),) = result.replacements
    assert (key, replacement.rows) == ("attn.qkv_proj.bias", (8, 9, 10, 11))

    values = np.arange(16, dtype=np.float32)
    whole = Replacement("bias", "attn.qkv_proj.bias", in_memory("x", values))
    separate = {f"attn.{n}_proj.bias": (s,) for n, s in {"q": 8, "k": 4, "v": 4}.items()}
    result = place(adapter({}, x=whole), checkpoint(separate, model_type="llama", **GQA))
    found = {key: r.tensor.load() for key, r in result.replacements}
    np.testing.assert_array_equal(found["attn.k_proj.bias"], values[8:12])
    np.testing.assert_array_equal(np.concatenate([*found.values()]), values)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_changes_on_stacks(model_type, transposed):
    shapes = {f"{MOE}.gate_up_proj": (3, 10, 8), f"{MOE}.down_proj": (3, 8, 5)}
    if transposed:
        shapes = {key: (e, i, o) for key, (e, o, i) in shapes.items()}
    names = tuple(shapes)
    modules = {
        f"{MOE}.base_layer".removeprefix("model."): experts(3, 10, 8, *names),
        MOE.removeprefix("model."): experts(3, 8, 5, *names),
    }
    result = placed(modules, checkpoint(shapes, model_type=model_type))
    assert [(p.key, p.transposed, p.expert, p.plane) for p in result.deltas] == [
        (f"{MOE}.{leaf}", transposed, None, None) for leaf in ("gate_up_proj", "down_proj")
    ]


def per_expert(count=3, leaves=("gate_proj", "up_proj", "down_proj"), stack=MOE):
    shapes = ((5, 8), (5, 8), (8, 5))
    return {
        f"{stack}.{e}.{leaf}.weight": shape
        for e in range(count)
        for leaf, shape in zip(leaves, shapes, strict=True)
    }


@pytest.mark.parametrize(
    ("model_type", "leaves", "stack"),
    [
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"), MOE),
        ("mixtral", ("w1", "w3", "w2"), "model.layers.0.block_sparse_moe.experts"),
    ],
)
def test_stacked_changes_on_a_tensor_for_each_expert(model_type, leaves, stack):
    names = (f"{MOE}.gate_up_proj", f"{MOE}.down_proj")
    base = checkpoint(per_expert(leaves=leaves, stack=stack), model_type=model_type)
    result = placed({MOE: experts(3, 10, 8, *names)}, base)
    assert [(p.key, p.expert, p.rows) for p in result.deltas] == [
        (f"{stack}.{e}.{leaf}.weight", e, (rows,))
        for e in range(3)
        for leaf, rows in ((leaves[0], (0, 5)), (leaves[1], (5, 10)))
    ]
    result = placed({MOE: experts(3, 8, 5, *names)}, base)
    assert [(p.key, p.expert, p.rows) for p in result.deltas] == [
        (f"{stack}.{e}.{leaves[2]}.weight", e, ()) for e in range(3)
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_numbers_of_experts_must_agree(count):
    base = checkpoint(per_expert(3), model_type="qwen3_moe")
    with pytest.raises(AdapterError, match="different numbers of experts"):
        placed({MOE: experts(count, 8, 5, f"{MOE}.down_proj")}, base)


def test_a_stack_of_one_expert():
    delta = linear(10, 8, parameters=(f"{MOE}.down_proj", f"{MOE}.gate_up_proj"))
    stacked = checkpoint(
        {f"{MOE}.gate_up_proj": (1, 10, 8), f"{MOE}.down_proj": (1, 8, 5)}, model_type="mixtral"
    )
    (placement,) = placed({MOE: delta}, stacked).deltas
    assert (placement.key, placement.expert, placement.plane) == (f"{MOE}.gate_up_proj", None, 0)
    result = placed({MOE: delta}, checkpoint(per_expert(1), model_type="mixtral"))
    assert [p.rows for p in result.deltas] == [((0, 5),), ((5, 10),)]
    assert {p.expert for p in result.deltas} == {None}


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_of_its_own_on_a_stack(transposed):
    shapes = {f"{MOE}.gate_up_proj": (3, 10, 8), f"{MOE}.down_proj": (3, 8, 5)}
    if transposed:
        shapes = {key: (e, i, o) for key, (e, o, i) in shapes.items()}
    modules = {
        "layers.0.block_sparse_moe.experts.1.w1": linear(5, 8),
        "layers.0.block_sparse_moe.experts.1.w3": linear(5, 8),
        "layers.0.block_sparse_moe.experts.2.w2": linear(8, 5),
    }
    result = placed(modules, checkpoint(shapes, model_type="mixtral"))
    assert [(p.key, p.plane, p.outputs, p.transposed) for p in result.deltas] == [
        (f"{MOE}.gate_up_proj", 1, ((0, 5),), transposed),
        (f"{MOE}.gate_up_proj", 1, ((5, 10),), transposed),
        (f"{MOE}.down_proj", 2, (), transposed),
    ]
    with pytest.raises(AdapterError, match="fewer experts"):
        placed({f"{MOE}.3.down_proj": linear(8, 5)}, checkpoint(shapes, model_type="mixtral"))


def test_gate_and_up_alternate_in_gpt_oss():
    def deltas(modules, base):
        return placed(modules, base).deltas

    base = checkpoint({f"{MOE}.gate_up_proj": (3, 8, 10)}, model_type="gpt_oss")
    (gate,) = deltas({f"{MOE}.1.gate_proj": linear(5, 8)}, base)
    (up,) = deltas({f"{MOE}.1.up_proj": linear(5, 8)}, base)
    assert gate.outputs == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
    assert up.outputs == ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10))
    assert gate.plane == up.plane == 1
    # mcore_bridge stores both as one, all of gate's outputs first.
    (both,) = deltas({f"{MOE}.1.gate_up_proj": linear(10, 8)}, base)
    assert both.outputs == ()
    assert [row for row, _ in both.rows] == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]


def test_the_order_of_gate_and_up_in_an_unknown_model_is_refused():
    base = checkpoint({f"{MOE}.gate_up_proj": (3, 10, 8)}, model_type="novel")
    for module, delta in (("gate_proj", linear(5, 8)), ("gate_up_proj", linear(10, 8))):
        with pytest.raises(UnsupportedError, match="order of outputs"):
            placed({f"{MOE}.0.{module}": delta}, base)


@pytest.mark.parametrize(
    ("model_type", "square", "expected"),
    [
        ("gpt_oss", None, True), ("mixtral", None, False), ("llama4", None, False),
        ("mixtral", True, True), ("novel", None, None),
    ],
)  # fmt: skip
def test_square_experts_follow_the_architecture_or_are_refused(model_type, square, expected):
    base = checkpoint({f"{MOE}.down_proj": (3, 8, 8)}, model_type=model_type)
    modules = {MOE: experts(3, 8, 8, f"{MOE}.down_proj", square=square)}
    if expected is None:
        with pytest.raises(UnsupportedError, match="square"):
            placed(modules, base)
    else:
        assert placed(modules, base).deltas[0].transposed is expected


def test_a_change_that_fits_several_parameters_is_refused():
    shapes = {f"{MOE}.gate_proj": (3, 5, 8), f"{MOE}.up_proj": (3, 5, 8)}
    with pytest.raises(UnsupportedError, match="several parameters"):
        placed({MOE: experts(3, 5, 8, *shapes)}, checkpoint(shapes, model_type="mixtral"))


def test_the_exchanged_axes_of_old_peft_are_exchanged_back():
    base = checkpoint(per_expert(), model_type="qwen3_moe")
    for (out, in_), leaf in (((8, 10), "gate_up_proj"), ((5, 8), "down_proj")):
        found = placed({MOE: experts(3, out, in_, f"{MOE}.{leaf}", square=True)}, base).deltas
        assert {placement.delta.shape for placement in found} == {(in_, out)}
        assert not any(placement.transposed for placement in found)


@pytest.mark.parametrize(("width", "inner"), [(8, 5), (8, 8)])
def test_experts_as_lists_of_layers_go_into_their_plane(width, inner):
    """Unsloth's gpt-oss: `gate_up_projs.N` is (2·I, H), its outputs in the order of the base's."""
    stack = "model.layers.0.mlp.experts"
    shapes = {
        f"{stack}.gate_up_proj": (3, width, 2 * inner), f"{stack}.down_proj": (3, inner, width),
    }  # fmt: skip
    base = checkpoint(shapes, model_type="gpt_oss")
    modules = {
        f"{stack}.gate_up_projs.1": linear(2 * inner, width),
        f"{stack}.down_projs.2": linear(width, inner),
    }
    into, out = placed(modules, base).deltas
    assert (into.key, into.plane, into.transposed) == (f"{stack}.gate_up_proj", 1, True)
    assert (out.key, out.plane, out.transposed) == (f"{stack}.down_proj", 2, True)


def covered(spans_, size):
    rows = [row for span in spans_ or ((0, size),) for row in range(*span)]
    assert sorted(rows) == list(range(size)), "every output once"


@settings(max_examples=60, deadline=None)
@given(
    key_values=st.integers(1, 4), group=st.integers(1, 4), size=st.integers(1, 5),
    layout=st.sampled_from(["phi3", "falcon"]), width=st.integers(1, 9),
)  # fmt: skip
def test_every_output_of_a_fused_projection_is_used_exactly_once(
    key_values, group, size, layout, width
):
    heads = key_values * group
    total = (heads + 2 * key_values) * size
    fused = {"phi3": "qkv_proj", "falcon": "query_key_value"}[layout]
    base = checkpoint(
        {f"attn.{fused}.weight": (total, width)}, model_type=layout, num_attention_heads=heads,
        num_key_value_heads=key_values, num_kv_heads=key_values, new_decoder_architecture=True,
    )  # fmt: skip
    modules = split(heads * size, key_values * size, key_values * size, width)
    if total == width:
        return
    result = placed(modules, base)
    covered([span for p in result.deltas for span in p.outputs], total)
    separate = {f"{module}.weight": delta.shape for module, delta in modules.items()}
    if layout == "phi3" and heads * size != width and key_values * size != width:
        back = placed({f"attn.{fused}": linear(total, width)}, checkpoint(separate)).deltas
        covered([span for p in back for span in p.rows], total)
        assert len(back) == 3


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 5), inner=st.integers(1, 6), hidden=st.integers(7, 9))
def test_every_module_appears_once_for_each_piece(count, inner, hidden):
    base = checkpoint(
        {
            f"{MOE}.{e}.{leaf}.weight": shape
            for e in range(count)
            for leaf, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)))
        },
        model_type="olmoe",
    )
    result = placed({MOE: experts(count, 2 * inner, hidden, f"{MOE}.gate_up_proj")}, base)
    assert len({p.key for p in result.deltas}) == len(result.deltas) == 2 * count
    for expert in range(count):
        covered([s for p in result.deltas if p.expert == expert for s in p.rows], 2 * inner)


def test_headers_cannot_be_read():
    with pytest.raises(AssertionError, match="was read"):
        header("w", (2, 2)).load()


def test_biases_of_the_factors_follow_their_weights():
    joined = checkpoint(
        {"attn.qkv_proj.weight": (16, 8), "attn.qkv_proj.bias": (16,)}, model_type="phi3", **GQA
    )
    result = placed({"attn.k_proj": linear(4, 8, bias=True)}, joined)
    assert [(p.key, p.outputs, p.rows) for p in result.biases] == [
        ("attn.qkv_proj.bias", ((8, 12),), ())
    ]
    separate = checkpoint(
        {
            f"attn.{name}_proj.{leaf}": shape
            for name, size in (("q", 8), ("k", 4), ("v", 4))
            for leaf, shape in (("weight", (size, 8)), ("bias", (size,)))
        }
    )
    result = placed({"attn.qkv_proj": linear(16, 8, bias=True)}, separate)
    assert [(p.key, p.rows) for p in result.biases] == [
        ("attn.q_proj.bias", ((0, 8),)),
        ("attn.k_proj.bias", ((8, 12),)),
        ("attn.v_proj.bias", ((12, 16),)),
    ]


def test_replaced_weights_do_not_go_into_columns():
    base = checkpoint({"h.0.attn.c_attn.weight": (8, 24)}, model_type="gpt2", n_head=4)
    with pytest.raises(AdapterError):
        place(adapter({}, k=replacing("module", "h.0.attn.k_proj.weight", (8, 8))), base)
    stack = checkpoint({f"{MOE}.down_proj": (3, 8, 5)}, model_type="mixtral")
    with pytest.raises(UnsupportedError, match="one expert"):
        place(adapter({}, k=replacing("module", f"{MOE}.0.down_proj.weight", (8, 5))), stack)


def test_whole_and_parts_of_one_weight_are_not_mixed():
    base = checkpoint({"attn.qkv_proj.weight": (16, 8)}, model_type="phi3", **GQA)
    modules = split(8, 4, 4) | {"attn.qkv_proj": linear(16, 8)}
    with pytest.raises(AdapterError, match="two modules"):
        placed(modules, base)
