"""What merging does with every kind of module, with what adapters lack, and with what clashes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from merge_cases import (
    DTYPES,
    MODULES,
    Module,
    best,
    config_of,
    distance,
    linear,
    raw,
    run,
    save,
    scale_and_rank,
    stacked,
    stored,
    total_distance,
    true_deltas,
    weighted_sum,
)
from merge_definitions import elected, trimmed
from merge_models import DORA_KINDS, saved_base, saved_by_peft
from safetensors.numpy import load_file, save_file

from loratools.algebra.ranks import Budget, RankRule
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge import tasks
from loratools.operations.merge.methods import get_method
from loratools.operations.merge.options import Override, weight_override
from loratools_formats import read_adapter
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError

FULL = RankRule(rank=64)
SPAN = ["linear", "cat", "fedex", "karcher", "model_stock"]

KINDS = {
    "plain": ({"layers.0.q": linear(24, 20, 8)}, {}),
    "rslora": ({"layers.0.q": linear(24, 20, 8)}, {"use_rslora": True, "lora_alpha": 11}),
    "patterns": (
        {"layers.0.q": linear(24, 20, 8), "layers.1.q": linear(24, 20, 3)},
        {"alpha_pattern": {r"layers\.1\..*": 2.5, "q": 7}, "rank_pattern": {"1.q": 3}},
    ),
    "rslora-patterns": (
        {"layers.0.q": linear(24, 20, 8), "layers.1.q": linear(24, 20, 3)},
        {"use_rslora": True, "alpha_pattern": {"layers.1.q": 2.5}},
    ),
    "conv": (
        {
            "wide": Module(8, 3, 4, "conv", kernel=(3, 2)),
            "point": Module(6, 8, 4, "conv", kernel=(1, 1)),
            "line": Module(7, 6, 2, "conv", kernel=(3,)),
        },
        {"lora_alpha": 11},
    ),
    "embedding": ({"embed": Module(12, 33, 4, "embedding")}, {"lora_alpha": 11}),
    "experts": (
        {"mlp.experts": Module(10, 7, 4, "experts", count=3), "q": linear(9, 6, 2)},
        {"lora_alpha": 11},
    ),
    "experts-rslora": (
        {"mlp.experts": Module(10, 7, 4, "experts", count=3)},
        {"use_rslora": True},
    ),
}


# ------------------------------------------------------------------------- itself


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64"])
@pytest.mark.parametrize("method", SPAN)
def test_one_adapter_at_weight_1_is_itself_bit_for_bit(tmp_path, kind, dtype, method):
    modules, config = KINDS[kind]
    source = save(tmp_path / "a", modules, dtype=dtype, **config)
    result, got = run(tmp_path / "out", [(source, 1.0)], method)
    assert result.relative_error == 0.0
    want = true_deltas(source)
    assert all(np.array_equal(got[name], want[name]) for name in want)
    if kind in ("plain", "conv", "embedding", "experts") and config.get("lora_alpha") == 11:
        assert raw(tmp_path / "out") == raw(source)
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if raw(tmp_path / "out") == raw(source):
            assert config_of(tmp_path / "out").get(key) == config_of(source).get(key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method", ["tsv", "ties", "magnitude_prune", "dare_linear", "dare_ties", "della", "sce"]
)
def test_one_adapter_at_weight_1_and_density_1_is_itself(tmp_path, kind, method):
    modules, config = KINDS[kind]
    source = save(tmp_path / "a", modules, **config)
    parameters = {} if method == "tsv" else {"density": 1.0}
    result, got = run(tmp_path / "out", [(source, 1.0)], method, parameters=parameters)
    assert total_distance(got, true_deltas(source)) <= 1e-6
    assert {m.name: m.rank_out for m in result.modules} == {
        name: min(module.rank, module.out) for name, module in modules.items()
    }


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("weight", [1.0, 0.3, -0.3])
def test_lora_bias_is_kept_and_weighted(tmp_path, dtype, weight):
    bias = {"layers.0.q.lora_B.bias": np.linspace(-1, 2, 24).astype(np.float32)}
    source = save(tmp_path / "a", MODULES, dtype=dtype, extra=bias, lora_bias=True, lora_alpha=11)
    result, got = run(tmp_path / "out", [(source, weight)])
    assert total_distance(got, weighted_sum([(source, weight)])) <= (
        2**-8 if dtype == "bf16" else 1e-6
    )
    assert config_of(tmp_path / "out")["lora_bias"] is True
    want = weight * _bias(source, "layers.0.q")
    assert distance(_bias(tmp_path / "out", "layers.0.q"), want) <= 1e-6
    if weight == 1.0:
        assert result.relative_error == 0.0
        assert raw(tmp_path / "out") == raw(source)


def _bias(folder, path):
    scale, _ = scale_and_rank(config_of(folder), path)
    return scale * stored(folder)[f"{path}.lora_B.bias"]


def test_biases_of_factors_add_up_also_where_an_adapter_has_none(tmp_path):
    rng = np.random.default_rng(0)
    pairs = []
    for index, (weight, has_bias) in enumerate([(0.7, True), (0.3, True), (1.5, False)]):
        extra = {"layers.0.q.lora_B.bias": rng.standard_normal(24).astype(np.float32)}
        path = save(
            tmp_path / f"a{index}", MODULES, seed=index, lora_alpha=3 + index, lora_bias=has_bias,
            extra=extra if has_bias else None,
        )  # fmt: skip
        pairs.append((path, weight))
    _, got = run(tmp_path / "out", pairs)
    assert total_distance(got, weighted_sum(pairs)) <= 1e-6
    want = sum(weight * _bias(path, "layers.0.q") for path, weight in pairs[:2])
    assert distance(_bias(tmp_path / "out", "layers.0.q"), want) <= 1e-6
    run(tmp_path / "mean", pairs, parameters={"normalize": True})
    assert distance(_bias(tmp_path / "mean", "layers.0.q"), want / 2.5) <= 1e-6
    for method in ("ties", "tsv"):
        with pytest.raises(UnsupportedError, match=r"lora_bias.*`method=linear`"):
            run(tmp_path / method, pairs, method)
    assert config_of(tmp_path / "out")["lora_bias"] is True
    assert read_adapter(tmp_path / "out").modules["layers.0.q"].direction.bias is not None


# --------------------------------------------------------------------------- DoRA


def identity_parameters(method):
    return {"density": 1.0} if "density" in get_method(method).parameters else {}


@pytest.mark.parametrize("kind", DORA_KINDS)
@pytest.mark.parametrize(
    "method", [*SPAN, "ties", "magnitude_prune", "dare_linear", "della", "breadcrumbs", "sce"]
)
def test_one_dora_at_weight_1_is_what_peft_merges(tmp_path, kind, method):
    source, changes = saved_by_peft(tmp_path / "a", kind, seed=1, use_dora=True)
    rule = RankRule() if method == "cat" else FULL
    result, got = run(
        tmp_path / "out",
        [(source, 1.0)],
        method,
        base=saved_base(tmp_path / "base", kind),
        parameters=identity_parameters(method),
        rule=rule,
    )
    assert config_of(tmp_path / "out")["use_dora"] is False
    if method == "cat":
        assert {module.rank_out for module in result.modules} == {4}
        return
    # Rows of the change are float32.
    assert total_distance(got, changes) <= 1e-6
    assert result.relative_error <= 1e-6
    assert not any("magnitude" in name for name in stored(tmp_path / "out"))


@pytest.mark.parametrize("kind", DORA_KINDS)
def test_dora_and_lora_add_up_through_the_base(tmp_path, kind):
    dora, one = saved_by_peft(tmp_path / "dora", kind, seed=1, use_dora=True)
    lora, other = saved_by_peft(tmp_path / "lora", kind, seed=2, use_rslora=True, r=3)
    base = saved_base(tmp_path / "base", kind)
    for index, pairs in enumerate([[(dora, 0.7), (lora, -0.4)], [(lora, -0.4), (dora, 0.7)]]):
        out = tmp_path / f"out{index}"
        _, got = run(out, pairs, base=base, rule=FULL)
        want = {name: 0.7 * one[name] - 0.4 * other[name] for name in one}
        assert total_distance(got, want) <= 1e-6
        assert config_of(out)["use_dora"] is False
    _, got = run(
        tmp_path / "ties",
        [(dora, 0.7), (lora, -0.4)],
        "ties",
        base=base,
        parameters={"density": 0.4},
        rule=FULL,
    )
    for name in one:
        x = np.stack([one[name], other[name]]).astype(np.float32)
        want = elected(trimmed(x, 0.4), (0.7, -0.4), "total", "peft")
        assert distance(got[name], want) <= 1e-6


def test_slerp_of_doras_uses_their_effective_changes(tmp_path):
    pairs, changes = [], []
    for seed in range(2):
        path, change = saved_by_peft(tmp_path / f"a{seed}", "linear", seed, use_dora=True)
        pairs.append((path, 1.0))
        changes.append(change)
    _, got = run(
        tmp_path / "out", pairs, "slerp", base=saved_base(tmp_path / "base", "linear"), rule=FULL
    )
    for name, delta in got.items():
        one, two = changes[0][name], changes[1][name]
        cosine = np.sum(one * two) / (np.linalg.norm(one) * np.linalg.norm(two))
        want = math.sin(math.acos(cosine) / 2) / math.sin(math.acos(cosine)) * (one + two)
        assert distance(delta, want) <= 1e-6


def test_a_dora_is_cut_to_the_rank_of_its_factors_unless_asked_otherwise(tmp_path):
    source, changes = saved_by_peft(tmp_path / "a", "linear", seed=1, use_dora=True)
    base = saved_base(tmp_path / "base", "linear")
    result, got = run(tmp_path / "out", [(source, 1.0)], base=base)
    for module in result.modules:
        assert module.rank_out == 4
        lost = distance(got[module.name], changes[module.name])
        optimum = distance(best(changes[module.name], 4), changes[module.name])
        assert lost == pytest.approx(optimum, rel=1e-5)
        assert module.relative_error == pytest.approx(lost, rel=1e-5)


def test_dora_needs_the_base(tmp_path):
    source, _ = saved_by_peft(tmp_path / "a", "linear", seed=1, use_dora=True)
    with pytest.raises(UnsupportedError, match=r"depends on the base weight.*`base`") as caught:
        run(tmp_path / "out", [(source, 1.0)])
    assert caught.value.tensor == "down"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whose", [0, 1])
def test_a_dora_of_a_weight_that_is_replaced_is_refused(tmp_path, whose):
    sources = [
        saved_by_peft(tmp_path / f"a{seed}", "embedding", seed, use_dora=seed == 0)[0]
        for seed in range(2)
    ]
    file = sources[whose] / "adapter_model.safetensors"
    tensors = load_file(file) | {
        "base_model.model.embed.base_layer.weight": np.ones((23, 12), "f4")
    }
    save_file(tensors, file)
    base = saved_base(tmp_path / "base", "embedding")
    with pytest.raises(UnsupportedError, match=r"depends on.*to-lora .*--base"):
        run(tmp_path / "out", [(source, 1.0) for source in sources], base=base)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("knots", {}, "works on low-rank factors"),
        ("tsv", {}, "works on low-rank factors"),
        ("iso", {}, "works on low-rank factors"),
        ("ties", {"space": "core"}, "works on low-rank factors"),
        ("ties", {"parameters": {"flavor": "paper"}}, "over all modules is not supported"),
    ],
)
def test_methods_that_need_factors_refuse_a_dora(tmp_path, method, options, message):
    source, _ = saved_by_peft(tmp_path / "a", "linear", seed=1, use_dora=True)
    base = saved_base(tmp_path / "base", "linear")
    with pytest.raises(UnsupportedError, match=message):
        run(tmp_path / "out", [(source, 1.0)], method, base=base, **options)


@pytest.mark.parametrize("name", ["sv_cumulative", "threshold"])
def test_rules_that_need_all_singular_values_are_refused_with_a_dora(tmp_path, name):
    source, _ = saved_by_peft(tmp_path / "a", "linear", seed=1, use_dora=True)
    base = saved_base(tmp_path / "base", "linear")
    rule = RankRule(**{name: True if name == "threshold" else 0.9})
    with pytest.raises(OptionError, match="a DoRA"):
        run(tmp_path / "out", [(source, 1.0)], base=base, rule=rule)


def test_base_weights_are_found_and_checked(tmp_path):
    source, _ = saved_by_peft(tmp_path / "a", "linear", seed=1, use_dora=True)
    good = saved_base(tmp_path / "base", "linear")
    from safetensors.numpy import load_file

    tensors = load_file(good / "model.safetensors")
    changed = {
        "missing": {n: t for n, t in tensors.items() if n != "down.weight"},
        "shape": tensors | {"down.weight": tensors["down.weight"][:, :-1].copy()},
        "nan": tensors | {"down.weight": np.full((7, 20), np.nan)},
        "two": {f"x.{n}": t for n, t in tensors.items()}
        | {f"y.{n}": t for n, t in tensors.items()},
    }
    messages = {
        "missing": "no base tensor fits the module",
        "shape": "does not fit the base weight",
        "nan": "base weight holds NaN",
        "two": "no base tensor fits the module",
    }
    for name, found in changed.items():
        (tmp_path / name).mkdir()
        save_file(found, tmp_path / name / "model.safetensors")
        with pytest.raises(AdapterError, match=messages[name]):
            run(tmp_path / f"{name}-out", [(source, 1.0)], base=tmp_path / name)
    (tmp_path / "prefixed").mkdir()
    prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save_file(prefixed, tmp_path / "prefixed" / "model.safetensors")
    _, one = run(tmp_path / "one", [(source, 1.0)], base=good)
    _, other = run(tmp_path / "other", [(source, 1.0)], base=tmp_path / "prefixed")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_square_base_weight_of_unknown_orientation_is_refused(tmp_path):
    # c_proj is a Conv1D in GPT-2, but the file says fan_in_fan_out false.
    extra = {"h.0.c_proj.lora_magnitude_vector": np.ones(12, np.float32)}
    source = save(tmp_path / "a", {"h.0.c_proj": linear(12, 12, 4)}, extra=extra, use_dora=True)
    (tmp_path / "base").mkdir()
    base = {"h.0.c_proj.weight": np.ones((12, 12), np.float32)}
    save_file(base, tmp_path / "base" / "model.safetensors")
    with pytest.raises(UnsupportedError, match="square"):
        run(tmp_path / "out", [(source, 1.0)], base=tmp_path / "base")


def test_dora_and_factor_biases_add_up(tmp_path):
    dora, one = saved_by_peft(tmp_path / "dora", "linear", seed=1, use_dora=True)
    bias = {"up.lora_B.bias": np.linspace(-1, 1, 20).astype(np.float32)}
    modules = {"up": linear(20, 12, 4), "down": linear(7, 20, 4)}
    lora = save(tmp_path / "lora", modules, extra=bias, lora_bias=True, lora_alpha=6)
    base = saved_base(tmp_path / "base", "linear")
    _, got = run(tmp_path / "out", [(dora, 0.5), (lora, 2.0)], base=base, rule=FULL)
    other = true_deltas(lora)
    want = {name: 0.5 * one[name] + 2.0 * other[name] for name in one}
    assert total_distance(got, want) <= 1e-6
    assert distance(_bias(tmp_path / "out", "up"), 2.0 * _bias(lora, "up")) <= 1e-6


# -------------------------------------------------------------- what does not match


def test_absent_modules_count_as_zero_and_are_reported(tmp_path):
    first = save(tmp_path / "a", {"q": linear(24, 20, 4), "k": linear(9, 20, 4)}, seed=1)
    second = save(tmp_path / "b", {"q": linear(24, 20, 6), "v": linear(8, 20, 6)}, seed=2)
    pairs = [(first, 0.7), (second, 0.3)]
    result, got = run(tmp_path / "out", pairs)
    assert total_distance(got, weighted_sum(pairs)) <= 1e-6
    reports = {m.name: (m.ranks_in, m.absent) for m in result.modules}
    assert reports == {
        "k": ((4, None), ("b",)),
        "q": ((4, 6), ()),
        "v": ((None, 6), ("a",)),
    }
    config = config_of(tmp_path / "out")
    assert sorted(config["target_modules"]) == ["k", "q", "v"]
    assert read_adapter(tmp_path / "out").modules.keys() == {"q", "k", "v"}
    for method in ("ties", "dare_linear", "tsv", "knots"):
        _, other = run(tmp_path / method, pairs, method)
        assert other.keys() == {"q", "k", "v"}


def test_an_absent_module_is_a_zero_vote_in_ties(tmp_path):
    first = save(tmp_path / "a", {"q": linear(24, 20, 4), "k": linear(9, 20, 4)}, seed=1)
    second = save(tmp_path / "b", {"q": linear(24, 20, 4)}, seed=2)
    pairs = [(first, 0.7), (second, 0.3)]
    _, got = run(tmp_path / "out", pairs, "ties", parameters={"density": 0.5}, rule=FULL)
    x = stacked(pairs, "k").astype(np.float32)
    want = elected(trimmed(x, 0.5), (0.7, 0.3), "total", "peft")
    assert distance(got["k"], want) <= 1e-6


def test_an_intersection_of_nothing_is_an_error(tmp_path):
    first = save(tmp_path / "a", {"q": linear(24, 20, 4)})
    second = save(tmp_path / "b", {"other.q": linear(24, 20, 4)})
    third = save(tmp_path / "c", {"q": linear(24, 20, 4), "k": linear(9, 20, 4)})
    for pairs, named in (
        ([(first, 1.0), (second, 1.0)], "got q; expected such as other.q"),
        ([(second, 1.0), (first, 1.0)], "got other.q; expected such as q"),
        ([(first, 1.0), (third, 1.0), (second, 1.0)], "got other.q; expected such as k"),
    ):
        with pytest.raises(AdapterError, match=f"shares no module with the others; {named}"):
            run(tmp_path / "out", pairs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (linear(20, 24, 4), "got linear, out 20, in 24; expected linear, out 24, in 20"),
        (Module(24, 5, 4, "conv", kernel=(2, 2)), "got conv, out 24, in 20"),
        (Module(24, 20, 4, "embedding"), "got embedding, out 24, in 20"),
        (Module(24, 20, 4, "experts", count=3), "got experts, out 24, in 20, 3 experts"),
    ],
)
def test_modules_of_another_shape_or_kind_are_refused_by_name(tmp_path, module, message):
    first = save(tmp_path / "a", {"q": linear(24, 20, 4)})
    second = save(tmp_path / "b", {"q": module})
    with pytest.raises(AdapterError, match=message) as caught:
        run(tmp_path / "out", [(first, 1.0), (second, 1.0)])
    assert caught.value.tensor == "q"
    assert str(second) in str(caught.value)


def test_kernels_of_one_size_but_another_shape_are_refused(tmp_path):
    paths = [
        save(tmp_path / f"a{i}", {"c": Module(8, 3, 4, "conv", kernel=kernel)})
        for i, kernel in enumerate([(3, 2), (2, 3)])
    ]
    with pytest.raises(AdapterError, match="a module differs"):
        run(tmp_path / "out", [(path, 1.0) for path in paths])


def test_the_orientation_of_a_square_linear_weight_does_not_matter_to_its_factors(tmp_path):
    # PEFT's factors are (r, in) and (out, r) for Conv1D too; fan_in_fan_out concerns the weight.
    paths = [
        save(tmp_path / f"a{i}", {"h.0.c_proj": linear(20, 20, 4)}, seed=i, fan_in_fan_out=flag)
        for i, flag in enumerate([True, False])
    ]
    pairs = [(path, 0.5) for path in paths]
    _, got = run(tmp_path / "out", pairs)
    assert total_distance(got, weighted_sum(pairs)) <= 1e-6


def test_different_base_models_need_to_be_forced(tmp_path):
    paths = [
        save(tmp_path / f"a{i}", seed=i, base_model_name_or_path=name)
        for i, name in enumerate(["one/model", "another/model", None])
    ]
    pairs = [(path, 0.5) for path in paths]
    with pytest.raises(OptionError, match=r"got another/model, one/model.*`force_base=True`"):
        run(tmp_path / "out", pairs)
    _, got = run(tmp_path / "out", pairs, force_base=True)
    assert total_distance(got, weighted_sum(pairs)) <= 1e-6
    run(tmp_path / "unnamed", [pairs[0], pairs[2]])


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "pissa_niter_4", "loftq"])
def test_adapters_of_a_changed_base_are_refused(tmp_path, init):
    plain = save(tmp_path / "a")
    changed = save(tmp_path / "b", init_lora_weights=init)
    with pytest.raises(
        UnsupportedError, match=r"changed the base weights.*loratools squeeze .* --initial"
    ) as caught:
        run(tmp_path / "out", [(plain, 1.0), (changed, 1.0)])
    assert str(changed) in str(caught.value)


def test_other_variants_are_refused_by_their_key(tmp_path):
    with pytest.raises(UnsupportedError, match="alora_invocation_tokens"):
        run(tmp_path / "out", [(save(tmp_path / "a", alora_invocation_tokens=[1]), 1.0)])


def test_variants_that_do_not_fold_alone_are_refused_by_name(tmp_path):
    pooled = save(tmp_path / "a", use_qalora=True, qalora_group_size=2)
    with pytest.raises(UnsupportedError, match=r"qalora.*loratools to-lora"):
        run(tmp_path / "out", [(pooled, 1.0)])


@pytest.mark.parametrize(
    ("method", "space"),
    [("linear", "full"), ("tsv", "full"), ("ties", "full"), ("ties", "core"), ("knots", "full")],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("end", ["lora_A.weight", "lora_B.weight"])
def test_nan_and_infinity_are_refused_by_name(tmp_path, method, space, bad, end):
    good = save(tmp_path / "a", seed=1)
    values = stored(good)[f"layers.0.q.{end}"].astype(np.float32)
    values[2, 3] = bad
    broken = save(tmp_path / "b", extra={f"layers.0.q.{end}": values})
    with pytest.raises(AdapterError, match="NaN or infinite") as caught:
        run(tmp_path / "out", [(good, 1.0), (broken, 1.0)], method, space=space)
    assert caught.value.tensor == f"base_model.model.layers.0.q.{end}"


def test_nan_is_refused_where_all_modules_are_trimmed_at_once(tmp_path):
    broken = save(tmp_path / "b", extra={"layers.0.q.lora_A.weight": np.full((8, 20), np.nan)})
    with pytest.raises(AdapterError, match="NaN or infinite"):
        run(tmp_path / "out", [(broken, 1.0)], "ties", parameters={"flavor": "paper"})


def test_a_nan_magnitude_is_refused(tmp_path):
    source, _ = saved_by_peft(tmp_path / "a", "linear", seed=1, use_dora=True)
    from safetensors.numpy import load_file

    tensors = load_file(source / "adapter_model.safetensors")
    key = "base_model.model.up.lora_magnitude_vector"
    tensors[key] = tensors[key] * np.nan
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="NaN or infinite values") as caught:
        run(tmp_path / "out", [(source, 1.0)], base=saved_base(tmp_path / "base", "linear"))
    assert caught.value.tensor == key


@pytest.mark.parametrize("method", ["linear", "ties", "tsv"])
def test_a_change_too_large_for_its_arithmetic_is_refused(tmp_path, method):
    huge = {
        f"layers.0.q.lora_{f}.weight": np.full(s, 1e200)
        for f, s in (("A", (8, 20)), ("B", (24, 8)))
    }
    source = save(tmp_path / "a", dtype="f64", extra=huge)
    with pytest.raises(AdapterError, match="overflow") as caught:
        run(tmp_path / "out", [(source, 1.0), (save(tmp_path / "b"), 1.0)], method)
    assert caught.value.tensor == "layers.0.q"


def test_a_nan_bias_of_factors_is_refused(tmp_path):
    bias = {"layers.0.q.lora_B.bias": np.full(24, np.nan, np.float32)}
    source = save(tmp_path / "a", extra=bias, lora_bias=True)
    with pytest.raises(AdapterError, match="bias of factors holds NaN") as caught:
        run(tmp_path / "out", [(source, 1.0)])
    assert caught.value.tensor == "base_model.model.layers.0.q.lora_B.bias"


def test_values_beyond_the_stored_type_are_refused(tmp_path):
    pairs = [(save(tmp_path / f"a{i}", seed=i, lora_alpha=11), 1e12) for i in range(2)]
    with pytest.raises(AdapterError, match="do not fit dtype F16"):
        run(tmp_path / "out", pairs, "linear", compute=ComputeOptions(dtype="f16"))


# ------------------------------------------------------------------ stacked experts


def old_experts(folder, count, dim1, dim2, rank, seed, version="0.18.0", **config):
    """Write experts as PEFT before 0.19 did: ΔW (E, dim1, dim2) seen as (E, in, out)."""
    module = Module(dim2, dim1, rank, "experts", count=count)
    return save(
        folder, {"mlp.experts": module}, dtype="f64", seed=seed, peft_version=version, **config
    )


def test_experts_of_both_layouts_merge(tmp_path):
    old = old_experts(tmp_path / "old", 3, 10, 7, 2, seed=1, lora_alpha=3)
    module = Module(10, 7, 4, "experts", count=3)
    new = save(tmp_path / "new", {"mlp.experts": module}, dtype="f64", seed=2)
    one, other = true_deltas(old)["mlp.experts"], true_deltas(new)["mlp.experts"]
    assert one.shape == (3, 7, 10)
    assert other.shape == (3, 10, 7)
    _, got = run(tmp_path / "to-new", [(new, 0.7), (old, 0.3)])
    assert distance(got["mlp.experts"], 0.7 * other + 0.3 * one.transpose(0, 2, 1)) <= 1e-12
    _, got = run(tmp_path / "to-old", [(old, 0.3), (new, 0.7)])
    assert distance(got["mlp.experts"], 0.7 * other.transpose(0, 2, 1) + 0.3 * one) <= 1e-12
    assert config_of(tmp_path / "to-old")["peft_version"] == "0.18.0"
    _, got = run(tmp_path / "ties", [(new, 0.7), (old, 0.3)], "ties", rule=FULL)
    both = np.stack([other, one.transpose(0, 2, 1)]).astype(np.float32)
    for expert in range(3):
        want = elected(trimmed(both[:, expert], 0.2), (0.7, 0.3), "total", "peft")
        assert distance(got["mlp.experts"][expert], want) <= 1e-6


def test_square_experts_merge_only_in_one_known_layout(tmp_path):
    olds = [old_experts(tmp_path / f"old{i}", 3, 8, 8, 2, seed=i) for i in range(2)]
    pairs = [(path, 0.5) for path in olds]
    _, got = run(tmp_path / "out", pairs)
    assert total_distance(got, weighted_sum(pairs)) <= 1e-12
    new = old_experts(tmp_path / "new", 3, 8, 8, 2, seed=3, version="0.21.2")
    with pytest.raises(AdapterError, match=r"stored either way; expected .* stored as \(in, out\)"):
        run(tmp_path / "mixed", [(olds[0], 1.0), (new, 1.0)])


def test_each_expert_is_merged_and_cut_by_itself(tmp_path):
    modules = {"mlp.experts": Module(10, 7, 4, "experts", count=3)}
    pairs = [(save(tmp_path / f"a{i}", modules, dtype="f64", seed=i), 0.7) for i in range(2)]
    result, got = run(tmp_path / "out", pairs, rule=RankRule(rank=3))
    want = weighted_sum(pairs)["mlp.experts"]
    for expert in range(3):
        assert distance(got["mlp.experts"][expert], best(want[expert], 3)) <= 1e-6
    lost = distance(got["mlp.experts"], want)
    assert result.relative_error == pytest.approx(lost, rel=1e-6)
    assert result.energy == pytest.approx(1 - lost**2, abs=1e-9)


# --------------------------------------------------------------------- replacements


def with_head(folder, seed, value, **config):
    extra = {
        "head.weight": np.full((3, 20), value, np.float32),
        "head.bias": np.full(3, 2 * value, np.float32),
    }
    return save(folder, seed=seed, extra=extra, modules_to_save=["head"], **config)


def heads(tmp_path):
    return [
        (with_head(tmp_path / "one", 1, 1.0), 0.9),
        (with_head(tmp_path / "two", 2, 4.0), 0.1),
    ]


def test_clashing_replacements_are_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"different values.*one, two.*`replacements`") as caught:
        run(tmp_path / "out", heads(tmp_path))
    assert caught.value.tensor == "base_model.model.head.bias"


@pytest.mark.parametrize(
    ("policy", "value"), [("first", 1.0), ("average", 2.5), ("one", 1.0), ("two", 4.0)]
)
def test_policies_settle_clashing_replacements(tmp_path, policy, value):
    pairs = heads(tmp_path)
    _, got = run(tmp_path / "out", pairs, replacements=policy)
    tensors = stored(tmp_path / "out")
    assert np.all(tensors["head.weight"] == value)
    assert np.all(tensors["head.bias"] == 2 * value)
    assert total_distance(got, weighted_sum(pairs)) <= 1e-6
    assert config_of(tmp_path / "out")["modules_to_save"] == ["head"]


def test_an_unknown_policy_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"got three; expected first, average, one, two"):
        run(tmp_path / "out", heads(tmp_path), replacements="three")


def test_an_adapter_without_the_tensor_cannot_settle_a_clash_of_others(tmp_path):
    plain = save(tmp_path / "plain", seed=3)
    with pytest.raises(AdapterError, match="plain does not replace"):
        run(tmp_path / "out", [*heads(tmp_path), (plain, 1.0)], replacements="plain")


def test_equal_replacements_and_those_of_one_adapter_are_kept(tmp_path):
    first = with_head(tmp_path / "one", 1, 1.5)
    second = with_head(tmp_path / "two", 2, 1.5)
    third = save(tmp_path / "three", seed=3)
    run(tmp_path / "out", [(third, 1.0), (first, 1.0), (second, 1.0)])
    assert np.all(stored(tmp_path / "out")["head.weight"] == 1.5)
    assert config_of(tmp_path / "out")["modules_to_save"] == ["head"]
    for policy in ("first", "one", "three"):
        out = tmp_path / f"by-{policy}"
        run(out, [(third, 1.0), (first, 1.0)], replacements=policy)
        assert np.all(stored(out)["head.weight"] == 1.5)


def test_averages_are_rounded_once_and_need_one_shape(tmp_path):
    values = [np.full((3, 20), v, np.float64) for v in (1.0, 1.0078125, 1.0078125)]
    pairs = []
    for index, value in enumerate(values):
        extra = {"head.weight": value.astype(DTYPES["bf16"])}
        path = save(tmp_path / f"a{index}", seed=index, extra=extra, modules_to_save=["head"])
        pairs.append((path, 1.0))
    run(tmp_path / "out", pairs, replacements="average")
    # The mean 1.0052… lies nearer to 1.0078125 than to 1.
    assert np.all(stored(tmp_path / "out")["head.weight"] == 1.0078125)
    other = save(
        tmp_path / "other",
        extra={"head.weight": np.ones((4, 20), np.float32)},
        modules_to_save=["head"],
    )
    with pytest.raises(AdapterError, match="different shapes"):
        run(tmp_path / "bad", [*pairs, (other, 1.0)], replacements="average")


def test_token_rows_of_different_tokens_are_refused(tmp_path):
    pairs = []
    for index, rows in enumerate([[1, 5], [1, 6]]):
        extra = {"embed.token_adapter.trainable_tokens_delta": np.full((2, 8), index, np.float32)}
        path = save(tmp_path / f"a{index}", extra=extra, trainable_token_indices={"embed": rows})
        pairs.append((path, 1.0))
    with pytest.raises(AdapterError, match=r"different (trainable_token_indices|values)"):
        run(tmp_path / "out", pairs)
    with pytest.raises(AdapterError, match=r"different (trainable_token_indices|shapes or rows)"):
        run(tmp_path / "average", pairs, replacements="average")


def test_biases_of_the_base_are_replacements(tmp_path):
    pairs = []
    for index in range(2):
        extra = {"layers.0.q.base_layer.bias": np.full(24, index + 1, np.float32)}
        pairs.append((save(tmp_path / f"a{index}", extra=extra, bias="lora_only"), 0.5))
    with pytest.raises(AdapterError, match="different values"):
        run(tmp_path / "out", pairs)
    run(tmp_path / "average", pairs, replacements="average")
    assert np.all(stored(tmp_path / "average")["layers.0.q.base_layer.bias"] == 1.5)
    assert config_of(tmp_path / "average")["bias"] == "lora_only"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("head.weight", {"modules_to_save": ["head"]}),
        ("head.bias", {"bias": "all"}),
        ("lm_head.weight", {}),
    ],
)
def test_a_tensor_replaced_here_and_changed_by_factors_there_is_refused(tmp_path, name, config):
    # PEFT would look for <module>.base_layer.weight, and silently not find the values.
    extra = {name: np.ones((3, 20) if name.endswith("weight") else 3, np.float32)}
    first = save(tmp_path / "a", extra=extra, **config)
    more = MODULES | {name.rpartition(".")[0]: linear(3, 20, 2)}
    second = save(tmp_path / "b", more, seed=1)
    for pairs in ([(first, 1.0), (second, 1.0)], [(second, 1.0), (first, 1.0)]):
        with pytest.raises(
            AdapterError, match="replaces a tensor of a module that another changes"
        ):
            run(tmp_path / "out", pairs)


def test_a_saved_embedding_with_factors_of_its_own_is_kept(tmp_path):
    modules = MODULES | {"embed_tokens": Module(12, 33, 4, "embedding")}
    weight = {"embed_tokens.base_layer.weight": np.ones((33, 12), np.float32)}
    pairs = [(save(tmp_path / f"a{i}", modules, seed=i, extra=weight), 0.5) for i in range(2)]
    _, got = run(tmp_path / "out", pairs)
    assert np.all(stored(tmp_path / "out")["embed_tokens.base_layer.weight"] == 1.0)
    assert total_distance(got, weighted_sum(pairs)) <= 1e-6


def test_bare_parameters_are_kept_and_may_not_clash(tmp_path):
    pairs = [
        (save(tmp_path / f"a{i}", seed=i, extra={"odd.buffer": np.arange(4)}), 1.0)
        for i in range(2)
    ]
    run(tmp_path / "out", pairs)
    assert stored(tmp_path / "out")["odd.buffer"].tolist() == [0, 1, 2, 3]
    other = save(tmp_path / "other", extra={"odd.buffer": np.arange(4) + 1})
    with pytest.raises(AdapterError, match="replace the same base tensor by different values"):
        run(tmp_path / "bad", [*pairs, (other, 1.0)])


# ------------------------------------------------------------------------ overrides


def test_weights_of_modules_that_match(tmp_path):
    first, second = (save(tmp_path / f"a{i}", seed=i) for i in range(2))
    overrides = (
        weight_override("down=0.25"),
        weight_override(r"layers\.\d=2,-1"),
        weight_override("q=9"),
    )
    _, got = run(tmp_path / "out", [(first, 1.0), (second, 1.0)], overrides=overrides)
    one, other = true_deltas(first), true_deltas(second)
    assert (
        distance(got["layers.1.down"], 0.25 * (one["layers.1.down"] + other["layers.1.down"]))
        <= 1e-6
    )
    # The first match decides.
    assert distance(got["layers.0.q"], 2 * one["layers.0.q"] - other["layers.0.q"]) <= 1e-6


def test_parameters_of_modules_that_match(tmp_path):
    pairs = [(save(tmp_path / f"a{i}", seed=i), 1.0) for i in range(2)]
    overrides = (
        Override("down", None, {"density": 0.7}),
        Override("q", (0.5, 2.0)),
        Override("layers", None, {"lambda": 3.0}),
    )
    _, got = run(
        tmp_path / "out", pairs, "ties", parameters={"density": 0.3}, overrides=overrides, rule=FULL
    )
    x = {name: stacked(pairs, name).astype(np.float32) for name in MODULES}
    want = elected(trimmed(x["layers.1.down"], 0.7), (1.0, 1.0), "total", "peft")
    assert distance(got["layers.1.down"], want) <= 1e-6
    want = 3.0 * elected(trimmed(x["layers.0.q"], 0.3), (0.5, 2.0), "total", "peft")
    assert distance(got["layers.0.q"], want) <= 1e-6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (Override("q", (1.0, 2.0, 3.0)), "wrong number of weights for modules matching q"),
        (Override("q", None, {"densty": 1}), "no parameter densty"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path, override, message):
    pairs = [(save(tmp_path / f"a{i}", seed=i), 1.0) for i in range(2)]
    with pytest.raises(OptionError, match=message):
        run(tmp_path / "out", pairs, "ties", overrides=(override,))


@pytest.mark.parametrize("text", ["q", "q=", "q=x", "q=1,", "q=nan", "q=inf,1", "=", "(=1"])
def test_weight_patterns_that_are_none(text):
    with pytest.raises(OptionError, match=r"not a (weight pattern|regular expression)"):
        weight_override(text)


def test_weight_patterns_may_hold_an_equals_sign():
    assert weight_override("a=b=1,-2") == Override("a=b", (1.0, -2.0))


# ---------------------------------------------------------------------------- ranks


def test_energy_of_a_streamed_merge_is_reached_or_refused(tmp_path):
    pairs = [(save(tmp_path / f"a{i}", seed=i, dtype="f64"), 1.0) for i in range(2)]
    _, whole = run(tmp_path / "whole", pairs, "ties", rule=FULL)
    rule = RankRule(energy=0.9, max_rank=20)
    result, got = run(tmp_path / "out", pairs, "ties", rule=rule)
    for module in result.modules:
        s = np.linalg.svd(whole[module.name], compute_uv=False) ** 2
        assert module.rank_out == int(np.argmax(np.cumsum(s) >= 0.9 * s.sum())) + 1
        assert module.energy == pytest.approx(s[: module.rank_out].sum() / s.sum(), abs=1e-6)
        lost = distance(got[module.name], whole[module.name])
        assert lost == pytest.approx(math.sqrt(1 - module.energy), abs=1e-6)
    with pytest.raises(OptionError, match=r"rank 16 keeps only .* `max_rank`"):
        run(tmp_path / "more", pairs, "ties", rule=RankRule(energy=0.99999))


def test_uniform_and_budget_of_streamed_merges(tmp_path):
    modules = {"layers.0.q": linear(240, 200, 8), "layers.1.q": linear(240, 200, 3)}
    pairs = [(save(tmp_path / f"a{i}", modules, seed=i), 1.0) for i in range(2)]
    result, _ = run(tmp_path / "uniform", pairs, "ties", rule=RankRule(uniform=True))
    assert [module.rank_out for module in result.modules] == [8, 8]
    for nbytes in (9_000, 30_000):
        out = tmp_path / f"budget{nbytes}"
        run(out, pairs, "ties", rule=RankRule(budget=Budget(nbytes=nbytes)))
        size = (out / "adapter_model.safetensors").stat().st_size
        assert nbytes - 5_000 < size <= nbytes
    with pytest.raises(OptionError, match="budget is too small"):
        run(tmp_path / "small", pairs, "ties", rule=RankRule(budget=Budget(nbytes=4_000)))


def test_rank_patterns_and_keep_alpha(tmp_path):
    pairs = [(save(tmp_path / f"a{i}", seed=i, dtype="f64", lora_alpha=11), 0.7) for i in range(2)]
    rule = RankRule(rank=6, patterns=(("down", 2),))
    result, got = run(tmp_path / "out", pairs, rule=rule, compute=ComputeOptions(keep_alpha=True))
    assert {m.name: m.rank_out for m in result.modules} == {"layers.0.q": 6, "layers.1.down": 2}
    assert config_of(tmp_path / "out")["lora_alpha"] == 11
    for name, rank in (("layers.0.q", 6), ("layers.1.down", 2)):
        assert distance(got[name], best(weighted_sum(pairs)[name], rank)) <= 1e-6


@pytest.mark.parametrize("shape", [(700, 900), (900, 600)])
@pytest.mark.parametrize("rank", [16, 64])
def test_the_streamed_svd_is_near_the_optimum_and_measures_itself(tmp_path, shape, rank):
    # Both sides above 512, so that the randomised range finder runs.
    pairs = [(save(tmp_path / f"a{i}", {"q": linear(*shape, 16)}, seed=i), 1.0) for i in range(3)]
    result, got = run(tmp_path / "out", pairs, "ties", rule=RankRule(rank=rank))
    function = get_method("ties").function
    entries = stacked(pairs, "q").astype(np.float32)
    work = tasks.Tasks([tasks.DenseRows(x) for x in entries], shape, 0, "")
    dense = function(work, np.ones(3))(0, shape[0])
    s = np.linalg.svd(dense, compute_uv=False)
    optimum = math.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2))
    lost = distance(got["q"], dense)
    assert optimum <= lost * (1 + 1e-6)
    assert lost <= 1.02 * optimum
    assert result.relative_error == pytest.approx(lost, rel=1e-5)
    assert result.energy == pytest.approx(1 - lost**2, abs=1e-5)


# -------------------------------------------------------------------- dtypes, bytes


@pytest.mark.parametrize(
    ("types", "want"),
    [
        (("bf16", "bf16"), "torch.bfloat16"),
        (("f16", "f16"), "torch.float16"),
        (("bf16", "f16"), "torch.float32"),
        (("bf16", "f32"), "torch.float32"),
        (("f32", "f64"), "torch.float64"),
    ],
)
@pytest.mark.parametrize("method", ["linear", "ties", "tsv"])
def test_types_are_widened_until_they_hold_all(tmp_path, types, want, method):
    pairs = [(save(tmp_path / f"a{i}", seed=i, dtype=dtype), 0.7) for i, dtype in enumerate(types)]
    _, got = run(tmp_path / "out", pairs, method)
    assert {kind for kind, _, _ in raw(tmp_path / "out").values()} == {want}
    if method == "linear" and "16" not in want and want != "torch.bfloat16":
        assert total_distance(got, weighted_sum(pairs)) <= 1e-6


def test_factors_of_one_module_may_differ_in_type(tmp_path):
    extra = {"layers.0.q.lora_B.weight": np.ones((24, 8), np.float32)}
    source = save(tmp_path / "a", {"layers.0.q": linear(24, 20, 8)}, dtype="bf16", extra=extra)
    result, _ = run(tmp_path / "out", [(source, 1.0)])
    assert result.relative_error == 0.0
    assert {kind for kind, _, _ in raw(tmp_path / "out").values()} == {
        "torch.bfloat16",
        "torch.float32",
    }


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "karcher", "ties", "dare_ties", "knots", "tsv"])
def test_bytes_do_not_depend_on_workers_or_runs(tmp_path, method):
    modules = {f"layers.{i}.q": linear(60, 50, 8) for i in range(8)}
    pairs = [(save(tmp_path / f"a{i}", modules, seed=i), 0.7) for i in range(3)]
    found = []
    for workers in (1, 2, 5, 2):
        out = tmp_path / f"out{len(found)}"
        run(out, pairs, method, compute=ComputeOptions(workers=workers))
        found.append(contents(out))
    assert found[0] == found[1] == found[2] == found[3]


def test_bytes_of_a_large_streamed_merge_do_not_depend_on_workers(tmp_path):
    modules = {f"layers.{i}.q": linear(600, 520, 4) for i in range(3)}
    pairs = [(save(tmp_path / f"a{i}", modules, seed=i), 0.7) for i in range(2)]
    found = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        compute = ComputeOptions(workers=workers)
        run(out, pairs, "ties", parameters={"flavor": "paper"}, compute=compute)
        found.append(contents(out))
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_seeds_choose_the_masks_of_random_methods(tmp_path, method):
    pairs = [(save(tmp_path / f"a{i}", seed=i), 0.7) for i in range(2)]
    deltas = []
    for index, seed in enumerate((0, 1, 0)):
        _, got = run(
            tmp_path / f"out{index}", pairs, method, rule=FULL, compute=ComputeOptions(seed=seed)
        )
        deltas.append(got)
    assert total_distance(deltas[0], deltas[2]) == 0.0
    assert total_distance(deltas[0], deltas[1]) > 0.1


def test_the_record_names_what_was_done_and_from_which_files(tmp_path):
    import hashlib

    pairs = [(save(tmp_path / f"a{i}", seed=i), 0.5 + i) for i in range(2)]
    result, _ = run(tmp_path / "out", pairs, "ties", parameters={"density": 0.4})
    metadata = result.adapter.metadata
    assert metadata["loratools.operation"] == "merge"
    options = json.loads(metadata["loratools.options"])
    assert (options["method"], options["parameters"]) == ("ties", {"density": 0.4})
    assert options["weights"] == [0.5, 1.5]
    digests = json.loads(metadata["loratools.inputs"])
    for index, (path, _) in enumerate(pairs):
        weights = (path / "adapter_model.safetensors").read_bytes()
        want = hashlib.sha256(weights).hexdigest()
        assert digests[f"{index}/adapter_model.safetensors"] == want


def test_inputs_are_never_changed(tmp_path):
    pairs = [(save(tmp_path / f"a{i}", seed=i), 0.5) for i in range(2)]
    before = [contents(path) for path, _ in pairs]
    for method in ("linear", "ties", "tsv"):
        run(tmp_path / method, pairs, method)
    assert [contents(path) for path, _ in pairs] == before


def test_no_adapters_are_an_error(tmp_path):
    with pytest.raises(OptionError, match="wrong number of adapters"):
        run(tmp_path / "out", [])


def test_names_that_the_base_cannot_tell_are_kept_with_a_note():
    import loratools as lt

    rng = np.random.default_rng(0)
    model = Path(__file__).parents[2] / "examples" / "tiny-llama" / "model"
    names = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in ("q", "zz")]
    pairs = [(rng.standard_normal((128, 4)), rng.standard_normal((4, 128))) for _ in names]
    given = [lt.from_factors({n: p}, base_model="x") for n, p in zip(names, pairs, strict=True)]
    result = lt.merge(given, base=model, allow_missing=True)
    assert sorted(result.adapter.modules) == sorted(names)
    (told,) = [each for each in result.findings if each.code == "names-kept"]
    assert names[1] in told.message
