"""What adapters carry besides factors, and what ties them: in hand-made checkpoints."""

import json

import fuse_cases as cases
import numpy as np
import pytest
import rounding
from fuse_cases import EMBED, HEAD, UP, matrix, names_in

from loratools_formats.disk.errors import AdapterError, UnsupportedError

TIED = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "vocab_size": 40}


def tied(folder, **config):
    tensors = {EMBED: matrix(1, 40, 16), f"{UP.format(0)}.weight": matrix(2, 24, 16)}
    return cases.base(folder, tensors, **TIED | config)


def test_a_change_of_the_head_unties_it(tmp_path):
    rng = np.random.default_rng(1)
    base = tied(tmp_path / "base", text_config={"tie_word_embeddings": True})
    b, a = cases.factors(rng, 40, 16, 2)
    adapter = cases.adapter(tmp_path / "adapter", {"lm_head": (b, a)})
    result, after = cases.fused(tmp_path / "out", base, adapter)
    np.testing.assert_array_equal(after[EMBED], matrix(1, 40, 16))
    rounding.assert_rounded_once(after[HEAD], cases.exact(after[EMBED], b, a, 1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["text_config"] == {"tie_word_embeddings": False}
    assert "untied" in [finding.code for finding in result.findings]


def test_one_adapter_on_both_tied_weights_and_one_on_the_head(tmp_path):
    """An embedding is replaced for both by one, its head changed by the other: refused."""
    rng = np.random.default_rng(1)
    base = tied(tmp_path / "base")
    head = cases.adapter(tmp_path / "head", {"lm_head": cases.factors(rng, 40, 16, 2)})
    whole = cases.adapter(
        tmp_path / "whole", {UP.format(0): cases.factors(rng, 24, 16, 2)},
        {EMBED: matrix(9, 43, 16)},
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="one after the other"):
        cases.fusion(base, head, whole)


def saved_vocabulary(folder, rows, *, head=True):
    extra = {EMBED: matrix(7, rows, 16)} | ({HEAD: matrix(8, rows, 16)} if head else {})
    rng = np.random.default_rng(2)
    return cases.adapter(folder, {UP.format(0): cases.factors(rng, 24, 16, 2)}, extra)


@pytest.mark.parametrize("rows", [43, 38])
def test_a_vocabulary_of_another_size(sharded, tmp_path, rows):
    result, after = cases.fused(
        tmp_path / "out", sharded, saved_vocabulary(tmp_path / "adapter", rows)
    )
    for key, seed in ((EMBED, 7), (HEAD, 8)):
        np.testing.assert_array_equal(after[key], matrix(seed, rows, 16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    messages = [finding.message for finding in result.findings]
    assert f"the vocabulary has {rows} entries now, 40 before" in messages
    assert names_in(tmp_path / "out") == names_in(sharded)
    reports = {report.key: report for report in result.tensors}
    old = np.zeros((max(rows, 40), 16))
    new = old.copy()
    old[:40], new[:rows] = matrix(1, 40, 16), matrix(7, rows, 16)
    change = np.linalg.norm((new - old)[:rows]) / np.linalg.norm(old[:rows])
    assert reports[EMBED].relative_change == pytest.approx(change, rel=1e-9)


def test_half_a_vocabulary_is_refused(sharded, tmp_path):
    with pytest.raises(AdapterError, match=r"resized, but not this tensor.*lm_head"):
        cases.fusion(sharded, saved_vocabulary(tmp_path / "adapter", 43, head=False))


def test_replacements_go_in_whole_and_in_the_type_of_the_base(tmp_path):
    rng = np.random.default_rng(3)
    kind = rounding.TYPES["bf16"]
    tensors = {
        f"{UP.format(0)}.weight": matrix(2, 24, 16, kind=kind),
        "model.norm.weight": matrix(3, 16, kind=kind),
        f"{UP.format(0)}.bias": matrix(4, 24, kind=kind),
    }
    base = cases.base(tmp_path / "base", tensors)
    extra = {"model.norm.weight": matrix(5, 16), f"{UP.format(0)}.bias": matrix(6, 24)}
    adapter = cases.adapter(
        tmp_path / "adapter", {UP.format(0): cases.factors(rng, 24, 16, 2)}, extra,
        bias="all", modules_to_save=["norm"],
    )  # fmt: skip
    result, after = cases.fused(tmp_path / "out", base, adapter)
    for key, values in extra.items():
        assert after[key].dtype == kind
        rounding.assert_rounded_once(after[key], values.astype(np.float64), unequal=0)
    reports = {report.key: report for report in result.tensors}
    old = tensors["model.norm.weight"].astype(np.float64)
    change = np.linalg.norm(matrix(5, 16) - old) / np.linalg.norm(old)
    assert reports["model.norm.weight"].relative_change == pytest.approx(change, rel=1e-9)
    with pytest.raises(UnsupportedError, match="cannot be weighted or taken out"):
        cases.fusion(base, (adapter, -1.0))


@pytest.mark.parametrize("same", [False, True])
def test_two_adapters_that_replace_one_tensor(sharded, tmp_path, same):
    rng = np.random.default_rng(3)
    made = [
        cases.adapter(
            tmp_path / f"a{i}",
            {UP.format(i): cases.factors(rng, 24, 16, 2)},
            {"model.norm.weight": matrix(5 if same else 5 + i, 16)},
            modules_to_save=["norm"],
        )
        for i in range(2)
    ]
    if same:
        _, after = cases.fused(tmp_path / "out", sharded, *made)
        np.testing.assert_array_equal(after["model.norm.weight"], matrix(5, 16))
    else:
        with pytest.raises(AdapterError, match="replace the same tensor by different ones"):
            cases.fusion(sharded, *made)


def test_token_rows(sharded, tmp_path):
    rng = np.random.default_rng(3)
    rows = matrix(9, 2, 16)
    adapter = cases.adapter(
        tmp_path / "a", {UP.format(0): cases.factors(rng, 24, 16, 2)},
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows},
        trainable_token_indices=[39, 4],
    )  # fmt: skip
    _, after = cases.fused(tmp_path / "out", sharded, adapter)
    wanted = matrix(1, 40, 16)
    wanted[[39, 4]] = rows
    np.testing.assert_array_equal(after[EMBED], wanted)


@pytest.mark.parametrize("rows_first", [False, True])
def test_rows_of_a_tensor_that_another_adapter_replaces(sharded, tmp_path, rows_first):
    rng = np.random.default_rng(3)
    whole = cases.adapter(
        tmp_path / "whole", {UP.format(0): cases.factors(rng, 24, 16, 2)},
        {EMBED: matrix(7, 40, 16)}, modules_to_save=["embed_tokens"],
    )  # fmt: skip
    rows = cases.adapter(
        tmp_path / "rows", {UP.format(1): cases.factors(rng, 24, 16, 2)},
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": matrix(9, 2, 16)},
        trainable_token_indices=[39, 4],
    )  # fmt: skip
    pair = (rows, whole) if rows_first else (whole, rows)
    with pytest.raises(AdapterError, match=r"replaces a tensor of which .* replaces rows"):
        cases.fusion(sharded, *pair)


@pytest.mark.parametrize("same", [False, True])
def test_two_adapters_that_replace_one_row(sharded, tmp_path, same):
    rng = np.random.default_rng(3)
    rows = matrix(9, 2, 16)
    made = [
        cases.adapter(
            tmp_path / f"a{i}",
            {UP.format(i): cases.factors(rng, 24, 16, 2)},
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows[[i, 1 - i]]},
            trainable_token_indices=[[39, 4], [4, 39] if same else [4, 7]][i],
        )
        for i in range(2)
    ]
    if same:
        _, after = cases.fused(tmp_path / "out", sharded, *made)
        wanted = matrix(1, 40, 16)
        wanted[[39, 4]] = rows
        np.testing.assert_array_equal(after[EMBED], wanted)
    else:
        swapped = cases.adapter(
            tmp_path / "swapped",
            {UP.format(1): cases.factors(rng, 24, 16, 2)},
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows},
            trainable_token_indices=[4, 39],
        )
        with pytest.raises(AdapterError, match=r"replace the same row by different ones.*row 4"):
            cases.fusion(sharded, made[0], swapped)
        assert cases.fusion(sharded, *made)  # row 4 alike, row 7 its own


@pytest.mark.parametrize(
    ("embedding", "head"), [("gpt_neox.embed_in", "embed_out"), ("transformer.wte", "lm_head")]
)
@pytest.mark.parametrize("resized", [0, 1])
def test_both_ends_of_a_vocabulary_are_resized_or_none(tmp_path, embedding, head, resized):
    names = [f"{embedding}.weight", f"{head}.weight"]
    tensors = {name: matrix(i, 40, 16) for i, name in enumerate(names)}
    model_type = "gpt_neox" if head == "embed_out" else "gpt2"
    base = cases.base(
        tmp_path / "base", tensors | {"dense.weight": matrix(3, 24, 16)},
        vocab_size=40, tie_word_embeddings=False, model_type=model_type,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    adapter = cases.adapter(
        tmp_path / "a",
        {"dense": cases.factors(rng, 24, 16, 2)},
        {names[resized]: matrix(4, 43, 16)},
    )
    with pytest.raises(AdapterError, match="resized, but not this tensor"):
        cases.fusion(base, adapter)


def test_a_dora_taken_out_of_weights_is_not_what_was_put_in(sharded, tmp_path):
    """Its change depends on the weights: what can be done is done, and said."""
    rng = np.random.default_rng(3)
    b, a = cases.factors(rng, 24, 16, 2)
    magnitude = rng.uniform(1, 2, 24).astype("f4")
    adapter = cases.adapter(
        tmp_path / "a", {UP.format(0): (b, a)},
        {f"{UP.format(0)}.lora_magnitude_vector": magnitude}, use_dora=True,
    )  # fmt: skip
    result, after = cases.fused(tmp_path / "out", sharded, (adapter, -1.0))
    w = matrix(2, 24, 16).astype(np.float64)
    v = cases.exact(w, b, a, 1)
    exact = 2 * w - magnitude[:, None] / np.linalg.norm(v, axis=1, keepdims=True) * v
    rounding.assert_rounded_once(after[f"{UP.format(0)}.weight"], exact, unequal=0)
    assert "negative-weight" in [finding.code for finding in result.findings]
