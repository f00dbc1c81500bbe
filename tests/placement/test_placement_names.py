"""Names: which tensor a module means, and what is refused rather than guessed."""

import pytest
from placed_headers import adapter, checkpoint, dora, keys, linear, placed, replacing

from loratools.base.placement import place
from loratools_formats.disk.errors import AdapterError, UnsupportedError

Q = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("module", "key", "model_type"),
    [
        (f"model.{Q}", f"model.{Q}.weight", "llama"),
        (Q, f"model.{Q}.weight", "llama"),
        (f"model.{Q}", f"{Q}.weight", "llama"),
        (f"model.language_model.{Q}", f"language_model.model.{Q}.weight", "llava"),
        (f"language_model.model.{Q}", f"model.language_model.{Q}.weight", "llava"),
        (f"model.language_model.{Q}", f"model.{Q}.weight", "qwen2_vl"),
        (f"base_model.model.model.{Q}", f"model.{Q}.weight", "llama"),
        (f"module.{Q}", f"{Q}.weight", "llama"),
        ("model.visual.blocks.0.attn.proj", "visual.blocks.0.attn.proj.weight", "qwen2_vl"),
        ("transformer.h.0.mlp.c_fc", "h.0.mlp.c_fc.weight", "gpt2"),
        ("h.0.mlp.c_fc", "transformer.h.0.mlp.c_fc.weight", "gpt2"),
        ("bert.encoder.layer.0.output.dense", "encoder.layer.0.output.dense.weight", "bert"),
        ("roberta.pooler.dense", "pooler.dense.weight", "xlm-roberta"),
        ("vision_tower.encoder.fc1", "model.vision_tower.vision_model.encoder.fc1.weight", "llava"),
        ("text_model.encoder.fc1", "encoder.fc1.weight", "clip_text_model"),
        ("vision_model.encoder.fc1", "encoder.fc1.weight", "clip_vision_model"),
        ("model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate.weight", "mixtral"),
        (
            "model.layers.0.mlp.experts.1.up_proj",
            "model.layers.0.block_sparse_moe.experts.1.w3.weight",
            "mixtral",
        ),
        (
            "vit.layers.3.attention.q_proj",
            "vit.encoder.layer.3.attention.attention.query.weight",
            "vit",
        ),
        ("vit.layers.3.mlp.fc2", "encoder.layer.3.output.dense.weight", "vit"),
    ],
)
def test_wrappers_and_renames_are_seen_through(module, key, model_type):
    shape = (4, 6) if model_type == "gpt2" else (6, 4)
    base = checkpoint({key: shape, "other.weight": (6, 4)}, model_type=model_type)
    assert keys({module: linear(6, 4)}, base) == [key]


@pytest.mark.parametrize(
    ("module", "key", "model_type"),
    [
        ("vision_tower.encoder.layers.0.q_proj", "model.layers.0.q_proj.weight", "llava"),
        ("vision_tower.encoder.layers.0.q_proj", "encoder.layers.0.q_proj.weight", "llava"),
        ("encoder.layers.0.q_proj", "vision_tower.encoder.layers.0.q_proj.weight", "llava"),
        ("layers.0.q_proj", "model.layers.10.q_proj.weight", "llama"),
        ("q_proj", "model.layers.0.q_proj.weight", "llama"),
        ("model.layers.0.q_proj", "model.layers.0.self_attn.q_proj.weight", "llama"),
        ("model.decoder.layers.0.fc1", "model.encoder.layers.0.fc1.weight", "bart"),
        ("experts.0.w3", "experts.0.up_proj.weight", "llama"),
    ],
)
def test_other_parts_are_never_taken_for_the_module(module, key, model_type):
    with pytest.raises(AdapterError, match="no base tensor fits 1 of"):
        keys({module: linear(6, 4)}, checkpoint({key: (6, 4)}, model_type=model_type))


def test_of_two_towers_the_text_model_is_not_neutral():
    tensors = {f"{t}_model.encoder.layers.0.q_proj.weight": (6, 4) for t in ("text", "vision")}
    base = checkpoint(tensors, model_type="clip")
    for tower in ("text", "vision"):
        module = f"{tower}_model.encoder.layers.0.q_proj"
        assert keys({module: linear(6, 4)}, base) == [f"{module}.weight"]
    with pytest.raises(AdapterError, match="no base tensor fits"):
        keys({"encoder.layers.0.q_proj": linear(6, 4)}, base)


def test_an_exact_name_wins_and_several_others_are_refused():
    tensors = {"model.layers.0.fc.weight": (6, 4), "language_model.layers.0.fc.weight": (6, 4)}
    base = checkpoint(tensors, model_type="llama")
    assert keys({"model.layers.0.fc": linear(6, 4)}, base) == ["model.layers.0.fc.weight"]
    with pytest.raises(AdapterError, match="several base tensors fit one name"):
        keys({"layers.0.fc": linear(6, 4)}, base)


@pytest.mark.parametrize("before", ["model.language_model.", "model."])
def test_one_parameter_under_two_namings_is_refused(before):
    """transformers loads one of the two in silence; the other would be changed to no effect."""
    tensors = {
        f"model.{inner}layers.{number}.self_attn.q_proj.weight": (6, 4)
        for inner, number in (("language_model.", 0), ("", 0), ("language_model.", 1))
    }
    base = checkpoint(
        tensors, model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"]
    )
    with pytest.raises(AdapterError, match="two base tensors are one parameter") as caught:
        keys({f"{before}layers.0.self_attn.q_proj": linear(6, 4)}, base)
    assert all(key in str(caught.value) for key in list(tensors)[:2])
    other = f"{before}layers.1.self_attn.q_proj"
    assert keys({other: linear(6, 4)}, base) == [list(tensors)[2]]


def test_a_fused_parameter_of_the_files_goes_to_the_parts_of_the_class():
    """Files of Tipsv2 have `in_proj_weight`, the class a layer for each of its thirds."""
    after = {f"encoder.layers.0.self_attn.{p}_proj.weight": (4, 6) for p in "qkv"}
    base = checkpoint(after, model_type="tipsv2_text_model", architectures=["Tipsv2TextModel"])
    module = "transformer.resblocks.0.attn"
    changed = linear(12, 6, parameters=(f"{module}.in_proj_weight",))
    deltas = placed({module: changed}, base).deltas
    assert [(p.key, p.rows) for p in deltas] == [
        (key, ((4 * i, 4 * i + 4),)) for i, key in enumerate(after)
    ]


def test_everything_unmatched_is_listed_with_the_nearest_names():
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": (6, 4) for i in range(7)}
    modules = {f"model.layers.{i}.mlp.up_porj": linear(6, 4) for i in range(7)}
    modules |= {"model.layers.0.mlp.up_proj": linear(6, 4)}
    with pytest.raises(AdapterError) as caught:
        place(
            adapter(modules, n=replacing("other", "model.norm.weight", (4,))),
            checkpoint(tensors, model_type="llama"),
        )
    text = str(caught.value)
    assert "fits 8 of" in text
    assert "model.norm.weight" in text
    assert "nearest: model.layers.0.mlp.up_proj.weight" in text
    assert "and 4 more" in text
    assert len(text) < 1500
    assert "\n" not in text


def test_two_modules_on_one_tensor_are_refused():
    base = checkpoint({"model.layers.0.fc.weight": (6, 4)}, model_type="llama")
    with pytest.raises(AdapterError, match="two modules of the adapter fit the same"):
        keys({"layers.0.fc": linear(6, 4), "model.layers.0.fc": linear(6, 4)}, base)


@pytest.mark.parametrize(
    ("kind", "shape", "kernel"),
    [
        ("conv", (6, 4, 3), (3,)),
        ("conv", (6, 4, 3, 2), (3, 2)),
        ("conv", (6, 4, 1, 2, 3), (1, 2, 3)),
    ],
)
def test_convolutions_are_flattened(kind, shape, kernel):
    base = checkpoint({"conv.weight": shape})
    width = 4
    for size in kernel:
        width *= size
    (placement,) = placed({"conv": linear(6, width, kind=kind, kernel=kernel)}, base).deltas
    assert placement.transposed is False
    with pytest.raises(AdapterError, match="does not fit"):
        placed({"conv": linear(6, width + 1, kind=kind, kernel=kernel)}, base)


def test_embeddings_are_stored_transposed_even_if_square():
    base = checkpoint({"embed.weight": (9, 9)})
    (placement,) = placed({"embed": linear(9, 9, kind="embedding")}, base).deltas
    assert placement.transposed is True


@pytest.mark.parametrize(
    ("model_type", "leaf", "expected"),
    [
        ("gpt2", "c_proj", True), ("gpt2", "lm_head", False), ("gpt_bigcode", "c_proj", False),
        ("starcoder2", "c_proj", False), ("novel", "c_proj", None), (None, "c_proj", None),
    ],
)  # fmt: skip
def test_square_weights_follow_the_architecture_or_are_refused(model_type, leaf, expected):
    config = {"model_type": model_type} if model_type else {}
    base = checkpoint({f"h.0.{leaf}.weight": (8, 8)}, **config)
    modules = {f"h.0.{leaf}": linear(8, 8, transposed_if_square=None)}
    if expected is None:
        with pytest.raises(UnsupportedError, match="square"):
            placed(modules, base)
    else:
        (placement,) = placed(modules, base).deltas
        assert placement.transposed is expected


@pytest.mark.parametrize(
    ("model_type", "leaf", "is_in_out"),
    [
        ("llama", "q_proj", False), ("gpt2", "c_fc", True), ("gpt2", "lm_head", False),
        ("novel", "q_proj", None),
    ],
)  # fmt: skip
def test_a_weight_stored_as_the_architecture_does_not_is_refused(model_type, leaf, is_in_out):
    for shape in ((6, 4), (4, 6)):
        base = checkpoint({f"h.0.{leaf}.weight": shape}, model_type=model_type)
        if is_in_out in (None, shape == (4, 6)):
            (placement,) = placed({f"h.0.{leaf}": linear(6, 4)}, base).deltas
            assert placement.transposed is (shape == (4, 6))
        else:
            with pytest.raises(AdapterError, match="only the other way round"):
                placed({f"h.0.{leaf}": linear(6, 4)}, base)


def test_a_bias_of_the_factors_goes_to_the_bias_of_the_layer():
    base = checkpoint({"model.fc.weight": (6, 4), "model.fc.bias": (6,)}, model_type="llama")
    (placement,) = placed({"fc": linear(6, 4, bias=True)}, base).biases
    assert (placement.key, placement.outputs, placement.rows) == ("model.fc.bias", (), ())
    with pytest.raises(AdapterError, match="bias that the base does not have"):
        placed({"fc": linear(6, 4, bias=True)}, checkpoint({"fc.weight": (6, 4)}))


def test_replacements_follow_the_same_rules():
    base = checkpoint(
        {"encoder.norm.weight": (4,), "encoder.norm.bias": (4,), "encoder.emb.weight": (9, 4)},
        model_type="bert",
    )
    result = place(
        adapter(
            {},
            a=replacing("module", "bert.encoder.norm.weight", (4,)),
            b=replacing("bias", "bert.encoder.norm.bias", (4,)),
            c=replacing("module", "classifier.weight", (3, 4)),
            d=replacing("token_rows", "bert.encoder.emb.weight", (2, 4), (1, 8)),
        ),
        base,
    )
    assert [key for key, _ in result.replacements] == [
        "encoder.norm.weight", "encoder.norm.bias", "classifier.weight", "encoder.emb.weight",
    ]  # fmt: skip
    (finding,) = result.findings
    assert finding.message == "classifier.weight: not in the base, added"


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (replacing("module", "norm.weight", (5,)), "does not fit the base tensor"),
        (replacing("token_rows", "emb.weight", (2, 4), (1, 9)), "rows do not fit"),
        (replacing("token_rows", "emb.weight", (2, 5), (1, 2)), "rows do not fit"),
        (replacing("embedding", "emb.weight", (9, 5)), "no base tensor|does not fit"),
        (replacing("bias", "emb.bias", (4,)), "no base tensor"),
        (replacing("module", "pooler.weight", (4,)), "no base tensor"),
        (replacing("other", "classifier.weight", (4,)), "no base tensor"),
    ],
)
def test_replacements_that_do_not_fit_are_refused(replacement, message):
    base = checkpoint({"norm.weight": (4,), "emb.weight": (9, 4)})
    with pytest.raises(AdapterError, match=message):
        place(adapter({}, r=replacement), base)


def test_a_delta_on_a_resized_embedding_fits_the_new_size():
    base = checkpoint({"model.embed_tokens.weight": (9, 4)}, model_type="llama",
                      tie_word_embeddings=False)  # fmt: skip
    result = place(
        adapter(
            {"model.embed_tokens": linear(4, 11, kind="embedding")},
            e=replacing("embedding", "model.embed_tokens.weight", (11, 4)),
        ),
        base,
    )
    assert result.deltas[0].transposed is True
    assert result.replacements[0][1].tensor.shape == (11, 4)


@pytest.mark.parametrize("config", [
    {"model_type": ["bert"]}, {"model_type": 3, "text_config": []}, {"architectures": [1, {}]},
    {"model_type": "llama", "architectures": "x", "tie_word_embeddings": "yes"},
    {"model_type": "llama", "text_config": {"model_type": {}}, "num_attention_heads": "four"},
])  # fmt: skip
def test_configs_of_wrong_types_do_no_harm(config):
    base = checkpoint({"model.fc.weight": (6, 4), "model.embed_tokens.weight": (9, 4)}, **config)
    modules = {"fc": linear(6, 4), "embed_tokens": linear(4, 9, kind="embedding")}
    assert keys(modules, base)[0] in ("model.fc.weight", "model.embed_tokens.weight")
    fused = checkpoint({"qkv_proj.weight": (12, 4)}, **config)
    with pytest.raises(UnsupportedError):
        keys({"q_proj": linear(4, 4)}, fused)


def test_a_dora_is_placed_whole():
    (placement,) = placed({"fc": dora(6, 4)}, checkpoint({"fc.weight": (6, 4)})).deltas
    assert (placement.outputs, placement.rows) == ((), ())
