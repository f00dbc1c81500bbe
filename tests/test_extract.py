"""The LoRA between two checkpoints, on checkpoints made here, against dense SVDs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule, gavish_donoho
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.extract.operation import difference, extract, extract_choices
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools.work.selection import Selection
from loratools_formats import read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
NORM, BIAS = "model.norm.weight", "model.layers.0.mlp.up_proj.bias"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        UP: (40, 24),
        DOWN: (24, 40),
        NORM: (24,),
        BIAS: (40,),
        EMBED: (50, 24),
        HEAD: (50, 24),
    }
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def written(folder, tensors, config=LLAMA, shards=1):
    """Write a checkpoint of one file or several."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return read_checkpoint(folder)
    where = {}
    for index in range(shards):
        part = {key: tensors[key] for key in sorted(tensors)[index::shards]}
        save_file(part, folder / f"part-{index}.safetensors")
        where |= dict.fromkeys(part, f"part-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return read_checkpoint(folder)


def pair(tmp_path, change, config=LLAMA, **options):
    old = weights()
    new = {key: array + change.get(key, np.float32(0)) for key, array in old.items()}
    base = written(tmp_path / "base", old, config)
    return base, written(tmp_path / "tuned", new, config, **options)


def noise(shape, seed=1):
    return 0.01 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def delta_of(result, key, shape):
    module = key.removesuffix(".weight")
    return effective_delta(module, result.adapter.modules[module], shape)


def test_a_fused_adapter_is_found_again(tmp_path):
    base, source = read_checkpoint(TINY / "model"), read_adapter(TINY / "lora")
    fusion = Fusion(base, [FuseInput(source, 1.0, "lora")], FuseOptions(dtype="f32"))
    fusion.write(tmp_path / "tuned")
    tuned = read_checkpoint(tmp_path / "tuned")
    found = difference(base, tuned)
    assert set(found.adapter.modules) == set(source.modules)
    assert found.adapter.replacements == {}
    result = extract(base, tuned, found, RankRule(sv_ratio=1e4))
    for name, delta in source.modules.items():
        shape = base.tensors[f"{name}.weight"].shape
        want = effective_delta(name, delta, shape)
        got = effective_delta(name, result.adapter.modules[name], shape)
        assert result.adapter.modules[name].rank == delta.rank
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    write_adapter(result.adapter, tmp_path / "lora", "peft")
    again = read_adapter(tmp_path / "lora")
    assert again.config["base_model_name_or_path"] is None
    assert again.config["task_type"] == "CAUSAL_LM"


def test_a_full_rank_change_has_the_least_error_of_its_rank(tmp_path):
    change = {UP: noise((40, 24)), DOWN: noise((24, 40), 2)}
    base, tuned = pair(tmp_path, change, shards=3)
    result = extract(base, tuned, difference(base, tuned), RankRule(rank=5))
    for module in result.modules:
        key = f"{module.name}.weight"
        exact = tuned.tensors[key].load(np.float64) - base.tensors[key].load(np.float64)
        sigma = np.linalg.svd(exact, compute_uv=False)
        best = np.sqrt(np.sum(sigma[5:] ** 2) / np.sum(sigma**2))
        assert module.relative_error == pytest.approx(best, rel=1e-5)
        got = delta_of(result, key, exact.shape)
        assert np.linalg.norm(got - exact) == pytest.approx(best * np.linalg.norm(exact), rel=1e-5)


def test_a_large_full_rank_change_is_within_one_percent_of_the_optimum(tmp_path):
    rng = np.random.default_rng(5)
    old = {UP: rng.standard_normal((640, 560)).astype(np.float32)}
    exact = 0.01 * rng.standard_normal((640, 560))
    new = {UP: (old[UP] + exact).astype(np.float32)}
    base, tuned = written(tmp_path / "base", old), written(tmp_path / "tuned", new)
    result = extract(base, tuned, difference(base, tuned), RankRule(rank=16))
    sigma = np.linalg.svd(new[UP].astype(np.float64) - old[UP], compute_uv=False)
    best = np.sqrt(np.sum(sigma[16:] ** 2) / np.sum(sigma**2))
    assert best <= result.relative_error * (1 + 1e-6) <= 1.01 * best
    got = delta_of(result, UP, (640, 560))
    error = np.linalg.norm(new[UP].astype(np.float64) - old[UP] - got) / np.linalg.norm(sigma)
    assert result.relative_error == pytest.approx(error, rel=1e-5)


def test_what_did_not_change_is_left_out_and_vectors_are_carried(tmp_path):
    change = {UP: noise((40, 24)), NORM: noise(24), BIAS: noise(40)}
    base, tuned = pair(tmp_path, change)
    found = difference(base, tuned)
    assert list(found.adapter.modules) == ["model.layers.0.mlp.up_proj"]
    assert found.unchanged == 3
    assert {r.target: r.kind for r in found.adapter.replacements.values()} == {
        NORM: "other",
        BIAS: "bias",
    }
    assert set(found.adapter.replacements) == {
        "base_model.model.model.norm.weight",
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.bias",
    }
    result = extract(base, tuned, found, RankRule(rank=24))
    write_adapter(result.adapter, tmp_path / "out", "peft")
    again = read_adapter(tmp_path / "out")
    item = FuseInput(again, 1.0, "out")
    Fusion(base, [item], FuseOptions()).write(tmp_path / "fused")
    fused = read_checkpoint(tmp_path / "fused")
    for key, tensor in tuned.tensors.items():
        np.testing.assert_allclose(fused.tensors[key].load(), tensor.load(), atol=1e-6)


def test_embeddings_are_low_rank_if_they_stand_alone(tmp_path):
    base, tuned = pair(tmp_path, {EMBED: noise((50, 24)), HEAD: noise((50, 24), 3)})
    result = extract(base, tuned, difference(base, tuned), RankRule(rank=24))
    kinds = {name: delta.layer.kind for name, delta in result.adapter.modules.items()}
    assert kinds == {"model.embed_tokens": "embedding", "lm_head": "linear"}
    for key in (EMBED, HEAD):
        exact = tuned.tensors[key].load(np.float64) - base.tensors[key].load(np.float64)
        got = delta_of(result, key, exact.shape)
        assert np.linalg.norm(got - exact) <= 1e-5 * np.linalg.norm(exact)


def test_tied_embeddings_are_carried_whole(tmp_path):
    config = LLAMA | {"tie_word_embeddings": True}
    old = {key: array for key, array in weights().items() if key != HEAD}
    new = {**old, EMBED: old[EMBED] + noise((50, 24)), UP: old[UP] + noise((40, 24))}
    base = written(tmp_path / "base", old, config)
    # Some trainers save what is tied a second time.
    tuned = written(tmp_path / "tuned", {**new, HEAD: new[EMBED]}, config)
    found = difference(base, tuned)
    assert [r.kind for r in found.adapter.replacements.values()] == ["embedding"]
    assert "lm_head" in " ".join(each.message for each in found.findings)


def test_without_an_output_embedding_the_input_embedding_is_tied(tmp_path):
    old = {key: array for key, array in weights().items() if key != HEAD}
    new = {**old, EMBED: old[EMBED] + noise((50, 24)), UP: old[UP] + noise((40, 24))}
    base, tuned = written(tmp_path / "base", old), written(tmp_path / "tuned", new)
    found = difference(base, tuned)
    assert [r.kind for r in found.adapter.replacements.values()] == ["embedding"]
    assert list(found.adapter.modules) == ["model.layers.0.mlp.up_proj"]


def test_resized_embeddings_are_carried_whole(tmp_path):
    old = weights()
    grown = {key: np.concatenate([old[key], noise((3, 24))]) for key in (EMBED, HEAD)}
    new = {**old, **grown, UP: old[UP] + noise((40, 24))}
    base, tuned = written(tmp_path / "base", old), written(tmp_path / "tuned", new)
    found = difference(base, tuned)
    targets = {r.target: r.tensor.shape for r in found.adapter.replacements.values()}
    assert targets == {EMBED: (53, 24), HEAD: (53, 24)}


def test_modules_can_be_chosen(tmp_path):
    base, tuned = pair(tmp_path, {UP: noise((40, 24)), DOWN: noise((24, 40)), NORM: noise(24)})
    found = difference(base, tuned, Selection(include=r"up_proj"))
    assert list(found.adapter.modules) == ["model.layers.0.mlp.up_proj"]
    assert set(found.skipped) == {DOWN, NORM}


def test_prefixes_may_differ(tmp_path):
    old = weights()
    new = {key.removeprefix("model."): array for key, array in old.items()}
    new["layers.0.mlp.up_proj.weight"] = old[UP] + noise((40, 24))
    base, tuned = written(tmp_path / "base", old), written(tmp_path / "tuned", new)
    assert list(difference(base, tuned).adapter.modules) == ["model.layers.0.mlp.up_proj"]


def test_types_may_differ(tmp_path):
    old = {key: array.astype(ml_dtypes.bfloat16) for key, array in weights().items()}
    new = {key: array.astype(np.float32) for key, array in old.items()}
    new[UP] = new[UP] + noise((40, 24))
    base, tuned = written(tmp_path / "base", old), written(tmp_path / "tuned", new)
    found = difference(base, tuned)
    assert found.unchanged == 5
    result = extract(base, tuned, found, RankRule(rank=24))
    exact = new[UP].astype(np.float64) - old[UP].astype(np.float64)
    assert np.linalg.norm(delta_of(result, UP, (40, 24)) - exact) <= 1e-6 * np.linalg.norm(exact)


def test_conv1d_weights_lie_the_other_way_round(tmp_path):
    config = {"model_type": "gpt2"}
    key = "transformer.h.0.attn.c_attn.weight"
    old = {key: noise((24, 72), 7)}
    exact = noise((24, 72), 8)
    base = written(tmp_path / "base", old, config)
    tuned = written(tmp_path / "tuned", {key: old[key] + exact}, config)
    result = extract(base, tuned, difference(base, tuned), RankRule(rank=24))
    (delta,) = result.adapter.modules.values()
    assert delta.shape == (72, 24)
    assert result.adapter.config["fan_in_fan_out"] is True
    got = effective_delta("c_attn", delta, (24, 72))
    assert np.linalg.norm(got - exact) <= 1e-5 * np.linalg.norm(exact)


def test_bits_do_not_depend_on_threads(tmp_path):
    base, tuned = pair(tmp_path, {UP: noise((40, 24)), DOWN: noise((24, 40))})
    made = []
    for workers in (1, 3):
        found = difference(base, tuned, workers=workers)
        options = ComputeOptions(workers=workers)
        made.append(extract(base, tuned, found, RankRule(rank=3), options).adapter)
    one, two = (
        [bytes(t.raw()) for d in adapter.modules.values() for t in d.tensors()] for adapter in made
    )
    assert one == two


def test_the_table_of_ranks(tmp_path):
    base, tuned = pair(tmp_path, {UP: noise((40, 24))})
    choices = extract_choices(difference(base, tuned)).choices
    assert [choice.rank for choice in choices] == [1, 2, 4, 8, 16, 24]
    exact = tuned.tensors[UP].load(np.float64) - base.tensors[UP].load(np.float64)
    sigma = np.linalg.svd(exact, compute_uv=False)
    for choice in choices:
        best = np.sqrt(np.sum(sigma[choice.rank :] ** 2) / np.sum(sigma**2))
        assert choice.relative_error == pytest.approx(best, abs=1e-9)


def test_a_rule_is_needed(tmp_path):
    base, tuned = pair(tmp_path, {UP: noise((40, 24))})
    with pytest.raises(OptionError, match="rank"):
        extract(base, tuned, difference(base, tuned), RankRule())


REFUSED = {
    "nothing changed": ({}, {}, "nothing to extract"),
    "only a norm": ({NORM: noise(24)}, {}, "needs at least one module"),
    "another shape": ({}, {UP: np.zeros((41, 24), "f4")}, "another shape"),
    "a stack": (
        {},
        {"model.layers.0.mlp.experts.gate_up_proj": np.ones((2, 3, 4), "f4")},
        "only one",
    ),
    "no floats": ({}, {"model.steps": np.array([3])}, "only one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_extracted_is_refused(tmp_path, name):
    change, other, message = REFUSED[name]
    old = weights()
    new = {key: array + change.get(key, np.float32(0)) for key, array in old.items()} | other
    base, tuned = written(tmp_path / "base", old), written(tmp_path / "tuned", new)
    with pytest.raises(AdapterError, match=message):
        difference(base, tuned)


@pytest.mark.parametrize(
    ("key", "one", "two"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", np.ones((2, 3, 4), "f4"), 2),
        ("model.layers.0.block_sparse_moe.input_linear.weight", np.ones((2, 3, 4), "f4"), 2),
        ("model.steps", np.array([3]), 2),
        ("model.layers.0.table", np.ones((3, 4), "f4"), 2),
    ],
)
def test_changed_tensors_without_a_place_are_refused_unless_left_out(tmp_path, key, one, two):
    old = {**weights(), key: one}
    new = {**old, key: one * two, UP: old[UP] + noise((40, 24))}
    base, tuned = written(tmp_path / "base", old), written(tmp_path / "tuned", new)
    with pytest.raises(UnsupportedError, match=key):
        difference(base, tuned)
    owner = key.rpartition(".")[0]
    found = difference(base, tuned, Selection(exclude=f"^{owner}$"))
    assert found.skipped == (key,)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"model.layers.1.mlp.up_proj.weight": (40, 24), "model.layers.1.norm.weight": (24,)}),
        ({"model.extra.weight": (4, 6)}, {"head.weight": (3, 24)}),
        ({"model.layers.0.table": (3, 4)}, {"model.layers.0.table": (3, 4), "steps": (3,)}),
    ],
)
@pytest.mark.parametrize("exclude", [None, "down_proj"])
def test_the_hint_leaves_out_what_has_no_place_and_nothing_else(tmp_path, old, new, exclude):
    rng = np.random.default_rng(0)
    before, after = (
        {key: rng.standard_normal(shape).astype(np.float32) for key, shape in some.items()}
        for some in (old, new)
    )
    whole = weights()
    base = written(tmp_path / "base", whole | before)
    changed = whole | {UP: whole[UP] + noise((40, 24)), DOWN: whole[DOWN] + noise((24, 40))}
    tuned = written(tmp_path / "tuned", changed | after)
    selection = Selection(exclude=exclude)
    found = None
    for _ in range(3):  # one hint for what one lacks, another for what has no place
        try:
            found = difference(base, tuned, selection)
        except (AdapterError, UnsupportedError) as error:
            selection = Selection(exclude=shlex.split(error.hint.partition(": ")[2])[0])
    modules = {UP, DOWN} if exclude is None else {UP}
    assert set(found.adapter.modules) == {key.removesuffix(".weight") for key in modules}


def test_values_that_are_not_finite_are_refused(tmp_path):
    change = noise((40, 24))
    change[3, 4] = np.inf
    base, tuned = pair(tmp_path, {UP: change})
    with pytest.raises(AdapterError, match="NaN or infinite"):
        extract(base, tuned, difference(base, tuned), RankRule(rank=2))


@pytest.mark.slow
def test_rules_count_every_singular_value_of_a_large_change(tmp_path):
    old = {UP: np.zeros((540, 600), np.float32)}
    rng = np.random.default_rng(8)
    signal = rng.standard_normal((540, 6)) @ rng.standard_normal((6, 600))
    new = {UP: (0.02 * signal + 0.01 * rng.standard_normal((540, 600))).astype(np.float32)}
    base, tuned = written(tmp_path / "base", old), written(tmp_path / "tuned", new)
    found = difference(base, tuned)
    sigma = np.linalg.svd(new[UP].astype(np.float64), compute_uv=False)
    cumulative = int(np.searchsorted(np.cumsum(sigma), 0.9 * sigma.sum())) + 1
    limit = gavish_donoho(sigma, (540, 600))
    wanted = {
        RankRule(sv_cumulative=0.9): cumulative,
        RankRule(threshold=True): int(np.sum(sigma > limit)),
        RankRule(energy=0.1, min_rank=300): 300,
        RankRule(sv_ratio=5.0): 6,
    }
    assert 256 < cumulative < 540
    for rule, rank in wanted.items():
        (module,) = extract(base, tuned, found, rule).modules
        assert module.rank == rank
        best = np.sqrt(np.sum(sigma[rank:] ** 2) / np.sum(sigma**2))
        assert module.relative_error == pytest.approx(best, rel=1e-2)
    with pytest.raises(OptionError, match="do not fall"):
        extract(base, tuned, found, RankRule(sv_ratio=1e4))


def test_the_seed_is_recorded(tmp_path):
    base, tuned = pair(tmp_path, {UP: noise((40, 24))})
    options = ComputeOptions(seed=3)
    result = extract(base, tuned, difference(base, tuned), RankRule(rank=2), options)
    assert '"seed": 3' in json.dumps(result.adapter.provenance)


def test_a_pattern_alone_leaves_the_ranks_of_others_open(tmp_path):
    base, tuned = pair(tmp_path, {UP: noise((40, 24)), DOWN: noise((24, 40))})
    found = difference(base, tuned)
    with pytest.raises(OptionError, match="Choose a rank"):
        extract(base, tuned, found, RankRule(patterns=(("up_proj", 3),)))
    rule = RankRule(patterns=(("up_proj", 3), ("down_proj", 5)))
    modules = extract(base, tuned, found, rule).modules
    assert {module.name.rpartition(".")[2]: module.rank for module in modules} == {
        "up_proj": 3,
        "down_proj": 5,
    }
