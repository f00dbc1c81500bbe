"""Methods that are weighted sums, against dense float64 arithmetic and against mergekit."""

import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_cases import (
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
from merge_others import mergekit

from loratools.algebra.ranks import Budget, RankRule
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge.options import Override
from loratools.operations.merge.span import karcher, model_stock, slerp
from loratools_formats.disk.errors import OptionError

F32 = ComputeOptions(dtype="f32")

scalings = st.sampled_from(
    [
        {"lora_alpha": 16},
        {"lora_alpha": 11},
        {"lora_alpha": 0.3, "use_rslora": True},
        {"lora_alpha": 3.7, "alpha_pattern": {"layers.0.q": 5, "down": 2.5}},
        {"use_rslora": True, "alpha_pattern": {r"layers\.\d\.q": 1, "layers.2.q": 99}},
    ]
)
weight = st.floats(-2.0, 2.0).map(lambda value: round(value, 3)).filter(bool)


@st.composite
def adapters(draw):
    """Adapters that share layers.0.q, of any rank, scale, type and further modules."""
    found = []
    for seed in range(draw(st.integers(1, 4))):
        modules = {"layers.0.q": linear(24, 20, draw(st.integers(1, 9)))}
        for name, (out, in_) in {"layers.1.down": (16, 40), "layers.2.q": (6, 5)}.items():
            if draw(st.booleans()):
                modules[name] = linear(out, in_, draw(st.integers(1, 7)))
        dtype = draw(st.sampled_from(["bf16", "f16", "f32", "f64"]))
        found.append((modules, dtype, seed, draw(scalings), draw(weight)))
    return found


def saved(folder, drawn):
    return [
        (save(folder / f"adapter{seed}", modules, dtype=dtype, seed=seed, **scaling), weight)
        for modules, dtype, seed, scaling, weight in drawn
    ]


def pair(folder, weights=(0.7, 0.3), **config):
    """Return two adapters of different ranks, scales and modules."""
    first = save(folder / "first", MODULES, seed=1, lora_alpha=11, **config)
    more = {"layers.0.q": linear(24, 20, 4), "layers.1.down": linear(16, 40, 3)}
    second = save(folder / "second", more, seed=2, use_rslora=True, **config)
    return list(zip([first, second], weights, strict=True))


def similar(folder, count, noise=1.0):
    """Return adapters whose ΔW have positive inner products, as those of one base often do."""
    common = np.random.default_rng(9).standard_normal((2, 24, 6))
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        b = common[0] + noise * rng.standard_normal((24, 6))
        a = common[1][:20].T + noise * rng.standard_normal((6, 20))
        extra = {"q.lora_A.weight": a, "q.lora_B.weight": b}
        modules = {"q": linear(24, 20, 6)}
        path = save(folder / f"similar{seed}", modules, dtype="f64", extra=extra, lora_alpha=7)
        found.append((path, 1.0))
    return found


@pytest.mark.slow
@given(drawn=adapters(), method=st.sampled_from(["linear", "cat"]))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_sum_is_the_float64_sum_of_true_deltas(tmp_path_factory, drawn, method):
    folder = tmp_path_factory.mktemp("sum")
    pairs = saved(folder, drawn)
    result, got = run(folder / "out", pairs, method, compute=F32)
    want = weighted_sum(pairs)
    assert total_distance(got, want) <= 1e-6
    for module in result.modules:
        rank = sum(r or 0 for r in module.ranks_in)
        assert module.rank_out <= rank
        assert module.energy == pytest.approx(1.0, abs=1e-12)
        lost = distance(got[module.name], want[module.name])
        assert module.relative_error == pytest.approx(lost, rel=1e-3, abs=1e-12)
    assert result.relative_error == pytest.approx(total_distance(got, want), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_rounding_to_the_inputs_type_is_all_that_is_lost_and_reported(tmp_path, dtype):
    pairs = pair(tmp_path, dtype=dtype)
    result, got = run(tmp_path / "out", pairs)
    lost = total_distance(got, weighted_sum(pairs))
    assert {kind for kind, _, _ in raw(tmp_path / "out").values()} == {
        {"bf16": "torch.bfloat16", "f16": "torch.float16"}[dtype]
    }
    # Two factors, each rounded to 8 (11) bits: at most 2^-8 (2^-11) of each entry.
    assert 0.0 < lost <= 2 * {"bf16": 2.0**-9, "f16": 2.0**-12}[dtype] * 1.01
    assert result.relative_error == pytest.approx(lost, rel=1e-4)


def test_factors_that_need_no_rounding_are_put_beside_each_other_bit_for_bit(tmp_path):
    first = save(tmp_path / "a", MODULES, dtype="bf16", seed=1)
    second = save(tmp_path / "b", MODULES, dtype="bf16", seed=2, lora_alpha=4)
    pairs = [(first, 1.0), (second, -0.5)]
    for method in ("linear", "cat"):
        result, got = run(tmp_path / method, pairs, method)
        want = weighted_sum(pairs)
        assert all(np.array_equal(got[name], want[name]) for name in want)
        assert result.relative_error == 0.0
        for name, old in stored(first).items():
            assert np.array_equal(
                _leading(stored(tmp_path / method)[name], old), old * _ratio(name)
            )


def _leading(new, old):
    return new[: old.shape[0], : old.shape[1]]


def _ratio(name):
    # Scale 2 of the first adapter goes into its B; the result's scale is 1.
    return 2.0 if "lora_B" in name else 1.0


def test_weights_of_opposite_sign_subtract(tmp_path):
    ((first, _), (second, _)) = pair(tmp_path)
    _, got = run(tmp_path / "out", [(first, 1.0), (second, -0.7)])
    one, other = true_deltas(first), true_deltas(second)
    for name, delta in got.items():
        assert distance(delta, one[name] - 0.7 * other[name]) <= 1e-6


@pytest.mark.parametrize("weight", [-1.0, -0.3, -2.0])
@pytest.mark.parametrize("alpha", [16, 11])
def test_a_negative_weight_leaves_alpha_positive(tmp_path, weight, alpha):
    source = save(tmp_path / "a", lora_alpha=alpha)
    _, got = run(tmp_path / "out", [(source, weight)])
    assert config_of(tmp_path / "out")["lora_alpha"] > 0
    assert total_distance(got, weighted_sum([(source, weight)])) <= 1e-6


def test_nearly_equal_adapters_subtract_without_losing_the_difference(tmp_path):
    # The difference is 1e-5 of the terms: in squares, 1e-10, near what Gram matrices resolve.
    first = save(tmp_path / "a", MODULES, dtype="f64", seed=1)
    rng = np.random.default_rng(0)
    moved = {k: v * (1 + 1e-5 * rng.standard_normal(v.shape)) for k, v in stored(first).items()}
    second = save(tmp_path / "b", MODULES, dtype="f64", extra=moved)
    pairs = [(first, 0.7), (second, -0.7)]
    _, got = run(tmp_path / "out", pairs, rule=RankRule(rank=16))
    assert total_distance(got, weighted_sum(pairs)) <= 1e-6
    _, cut = run(tmp_path / "cut", pairs, rule=RankRule(rank=5))
    for name, want in weighted_sum(pairs).items():
        assert distance(cut[name], best(want, 5)) <= 1e-5


def test_an_adapter_less_itself_is_zero(tmp_path):
    source = save(tmp_path / "a", lora_alpha=11)
    size = np.linalg.norm(true_deltas(source)["layers.0.q"])
    for index, rule in enumerate([RankRule(), RankRule(rank=4), RankRule(energy=0.9)]):
        _, got = run(tmp_path / f"out{index}", [(source, 0.3), (source, -0.3)], rule=rule)
        # What is left is rounding: products of float32 factors summed in float64.
        assert np.linalg.norm(got["layers.0.q"]) <= 1e-7 * size


def test_weight_zero_counts_for_nothing(tmp_path):
    ((first, _), (second, _)) = pair(tmp_path)
    _, got = run(tmp_path / "out", [(first, 1.0), (second, 0.0)])
    assert total_distance(got, true_deltas(first)) <= 1e-6
    for name in ("linear", "Linear", "CAT"):  # names are found in capitals, too
        with pytest.raises(OptionError, match="nothing would be left"):
            run(tmp_path / "zero", [(first, 0.0)], method=name)


def test_modules_of_weight_zero_are_left_out(tmp_path):
    (first, _), _ = pair(tmp_path)
    (name, *others) = sorted(true_deltas(first))
    result, got = run(
        tmp_path / "out", [(first, 1.0)], overrides=(Override(f"^{re.escape(name)}$", (0.0,)),)
    )
    assert result.left_out == (name,)
    assert sorted(got) == others
    want = {path: delta for path, delta in true_deltas(first).items() if path != name}
    assert total_distance(got, want) <= 1e-6


def test_normalize_divides_by_the_sum_of_weights(tmp_path):
    pairs = pair(tmp_path, weights=(3.0, -1.5))
    _, got = run(tmp_path / "out", pairs, parameters={"normalize": True})
    want = {name: delta / 1.5 for name, delta in weighted_sum(pairs).items()}
    assert total_distance(got, want) <= 1e-6
    with pytest.raises(OptionError, match="add up to zero"):
        run(tmp_path / "zero", pair(tmp_path / "more", (1.0, -1.0)), parameters={"normalize": True})


@pytest.mark.parametrize("rank", [1, 3, 7, 12])
def test_linear_at_a_rank_is_the_best_approximation_of_the_true_sum(tmp_path, rank):
    pairs = pair(tmp_path, dtype="f64")
    result, got = run(tmp_path / "out", pairs, rule=RankRule(rank=rank))
    want = weighted_sum(pairs)
    for module in result.modules:
        dense = want[module.name]
        s = np.linalg.svd(dense, compute_uv=False)
        kept = min(rank, sum(module.ranks_in))
        assert module.rank_out == kept
        optimum = math.sqrt(np.sum(s[kept:] ** 2) / np.sum(s**2))
        assert distance(got[module.name], dense) == pytest.approx(optimum, rel=1e-9, abs=1e-9)
        assert distance(got[module.name], best(dense, kept)) <= 1e-6
        assert module.relative_error == pytest.approx(optimum, rel=1e-6, abs=1e-8)
        assert module.energy == pytest.approx(1 - optimum**2, abs=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_linear_keeps_the_energy_asked_for_and_no_more_ranks(tmp_path, share):
    pairs = pair(tmp_path)
    result, _ = run(tmp_path / "out", pairs, rule=RankRule(energy=share))
    for module in result.modules:
        s = np.linalg.svd(weighted_sum(pairs)[module.name], compute_uv=False)
        shares = np.cumsum(s**2) / np.sum(s**2)
        assert module.rank_out == int(np.argmax(shares >= share)) + 1
        assert module.energy == pytest.approx(shares[module.rank_out - 1], abs=1e-9)


def test_budget_bounds_the_file_and_uses_it(tmp_path):
    modules = {f"layers.{i}.q": linear(600, 400, 8) for i in range(4)}
    pairs = [(save(tmp_path / f"a{i}", modules, dtype="bf16", seed=i), 0.6) for i in range(2)]
    whole = sum((path / "adapter_model.safetensors").stat().st_size for path, _ in pairs)
    for share in (0.2, 0.5, 0.9):
        out = tmp_path / f"out{share}"
        run(out, pairs, rule=RankRule(budget=Budget(share=share)))
        size = (out / "adapter_model.safetensors").stat().st_size
        assert share * whole - 12_000 < size <= share * whole


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3)])
def test_uniform_gives_every_module_one_rank(tmp_path, weights):
    modules = {"layers.0.q": linear(24, 20, 8), "layers.1.q": linear(24, 20, 3)}
    paths = [save(tmp_path / f"a{i}", modules, seed=i) for i in range(2)]
    pairs = list(zip(paths, weights, strict=True))
    result, got = run(tmp_path / "out", pairs, rule=RankRule(uniform=True))
    assert [module.rank_out for module in result.modules] == [16, 16]
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    assert not config["rank_pattern"]
    assert not config.get("alpha_pattern")
    assert total_distance(got, weighted_sum(pairs)) <= 1e-6


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3)])
def test_serve_ranks_are_ranks_that_vllm_takes(tmp_path, weights):
    modules = {"q": linear(40, 30, 6)}
    paths = [save(tmp_path / f"a{i}", modules, seed=i) for i in range(2)]
    pairs = list(zip(paths, weights, strict=True))
    result, got = run(tmp_path / "out", pairs, rule=RankRule(serve=True))
    assert result.modules[0].rank_out == 16
    assert total_distance(got, weighted_sum(pairs)) <= 1e-6


def test_cat_keeps_all_ranks_and_refuses_rank_options(tmp_path):
    pairs = pair(tmp_path)
    result, _ = run(tmp_path / "out", pairs, "cat")
    assert [module.rank_out for module in result.modules] == [12, 11]
    with pytest.raises(OptionError, match="keeps all ranks"):
        run(tmp_path / "cut", pairs, "cat", rule=RankRule(rank=4))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 5.0, 1.0)])
def test_fedex_is_the_exact_mean_and_reports_the_residual(tmp_path, weights):
    kinds = {
        "layers.0.q": linear(24, 20, 8),
        "experts": Module(10, 7, 8, "experts", count=3),
    }
    paths = [save(tmp_path / f"a{i}", kinds, seed=i, lora_alpha=11) for i in range(3)]
    pairs = list(zip(paths, weights, strict=True))
    result, got = run(tmp_path / "out", pairs, "fedex", compute=F32)
    shares = np.array(weights) / sum(weights)
    want = weighted_sum(list(zip(paths, shares, strict=True)))
    assert total_distance(got, want) <= 1e-6
    averaged = {
        name: sum(share * stored(path)[name] for share, path in zip(shares, paths, strict=True))
        for name in stored(paths[0])
    }
    scale, _ = scale_and_rank(config_of(paths[0]), "layers.0.q")
    a, b = averaged["experts.lora_A.weight"], averaged["experts.lora_B.weight"]
    products = {
        "layers.0.q": averaged["layers.0.q.lora_B.weight"] @ averaged["layers.0.q.lora_A.weight"],
        "experts": b.reshape(10, 8, 3).transpose(2, 0, 1) @ a.reshape(3, 8, 7),
    }
    residual = total_distance({n: scale * p for n, p in products.items()}, want)
    assert result.factor_residual == pytest.approx(residual, rel=1e-9)


def test_fedex_has_no_residual_where_factors_cannot_be_averaged(tmp_path):
    result, _ = run(tmp_path / "out", pair(tmp_path), "fedex")
    assert result.factor_residual is None
    with pytest.raises(OptionError, match="add up to zero"):
        run(tmp_path / "zero", pair(tmp_path / "more", (1.0, -1.0)), "fedex")


def dense_slerp(first, second, t):
    one, two = first.ravel(), second.ravel()
    cosine = one @ two / (np.linalg.norm(one) * np.linalg.norm(two))
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * first + math.sin(t * theta) * second) / math.sin(theta)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.8, 0.2), (1.0, 3.0), (2.0, -0.5)])
def test_slerp_is_the_dense_formula_and_mergekits_nuslerp(tmp_path, weights):
    pairs = [(path, w) for (path, _), w in zip(similar(tmp_path, 2), weights, strict=True)]
    _, got = run(tmp_path / "out", pairs, "slerp")
    both = stacked(pairs, "q")
    assert distance(got["q"], dense_slerp(*both, weights[1] / sum(weights))) <= 1e-9
    assert distance(got["q"], mergekit("nuslerp", both, weights)) <= 1e-9


def test_slerp_takes_t_and_moves_at_an_even_angle(tmp_path):
    pairs = similar(tmp_path, 2)
    both = stacked(pairs, "q")
    for t in (0.0, 0.3, 1.0):
        _, got = run(tmp_path / f"out{t}", pairs, "slerp", parameters={"t": t})
        assert distance(got["q"], dense_slerp(*both, t)) <= 1e-9


def test_slerp_of_parallel_opposite_or_absent_deltas_is_the_straight_line():
    line = np.array([0.75, 0.25])
    for gram in ([[1.0, 2.0], [2.0, 4.0]], [[1.0, -2.0], [-2.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]):
        np.testing.assert_allclose(slerp(np.array(gram), line), line)
    with pytest.raises(OptionError, match="give no t"):
        slerp(np.eye(2), np.array([1.0, -1.0]))


@pytest.mark.parametrize("count", [1, 3])
def test_slerp_takes_two_adapters(tmp_path, count):
    with pytest.raises(OptionError, match="wrong number of adapters"):
        run(tmp_path / "out", similar(tmp_path, count), "slerp")


def dense_karcher(deltas, weights, steps=200):
    """The point of the sphere whose weighted log-map vectors cancel, times the mean norm."""
    flat = deltas.reshape(len(deltas), -1)
    norms = np.linalg.norm(flat, axis=1)
    units, shares = flat / norms[:, None], np.array(weights) / sum(weights)
    mean = shares @ units / np.linalg.norm(shares @ units)
    for _ in range(steps):
        dots = np.clip(units @ mean, -1, 1)
        logs = [
            math.acos(d) / math.sqrt(1 - d * d) * (u - d * mean)
            for u, d in zip(units, dots, strict=True)
        ]
        move = shares @ np.array(logs)
        size = np.linalg.norm(move)
        if size < 1e-14:
            break
        mean = math.cos(size) * mean + math.sin(size) * move / size
    return (shares @ norms * mean).reshape(deltas.shape[1:])


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (3.0, 1.0, 0.5, 2.0)])
def test_karcher_is_the_dense_mean_on_the_sphere(tmp_path, weights):
    pairs = [(path, w) for (path, _), w in zip(similar(tmp_path, 4), weights, strict=True)]
    parameters = {"max_iter": 200, "tol": 1e-12}
    _, got = run(tmp_path / "out", pairs, "karcher", parameters=parameters)
    assert distance(got["q"], dense_karcher(stacked(pairs, "q"), weights)) <= 1e-9


def test_karcher_is_mergekits_at_its_tolerance(tmp_path):
    pairs = similar(tmp_path, 3)
    _, got = run(tmp_path / "out", pairs, "karcher")
    assert distance(got["q"], mergekit("karcher", stacked(pairs, "q"))) <= 1e-9


def test_karcher_with_weights_is_mergekits(tmp_path):
    import torch
    from mergekit.merge_methods.karcher import karcher_merge_tensors

    weights = (0.5, 0.2, 0.3)
    pairs = [(path, w) for (path, _), w in zip(similar(tmp_path, 3), weights, strict=True)]
    _, got = run(tmp_path / "out", pairs, "karcher")
    tensors = [torch.from_numpy(delta) for delta in stacked(pairs, "q")]
    assert distance(got["q"], karcher_merge_tensors(tensors, list(weights)).numpy()) <= 1e-9


def test_karcher_leaves_out_absent_deltas_but_not_their_share_of_the_length():
    gram = np.diag([4.0, 0.0, 0.0])
    np.testing.assert_allclose(karcher(gram, np.array([1.0, 1.0, 2.0])), [0.25, 0.0, 0.0])
    np.testing.assert_array_equal(karcher(np.zeros((2, 2)), np.ones(2)), [0.0, 0.0])
    with pytest.raises(OptionError, match="add up to zero"):
        karcher(np.diag([1.0, 1.0, 0.0]), np.array([1.0, -1.0, 1.0]))


@pytest.mark.parametrize("seed", range(10))
def test_karcher_of_opposite_deltas_is_the_direction_of_the_first(seed):
    # No mean is better than another; mergekit lets the rounding of the entries choose one.
    delta = np.random.default_rng(seed).standard_normal((1, 20))
    deltas = np.concatenate([delta, -1.7 * delta])
    np.testing.assert_allclose(karcher(deltas @ deltas.T, np.ones(2)) @ deltas, 1.35 * delta[0])


def dense_model_stock(deltas):
    flat = deltas.reshape(len(deltas), -1)
    units = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    count = len(deltas)
    cosine = np.mean([units[i] @ units[j] for i in range(count) for j in range(i)])
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * deltas.mean(axis=0)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.3, 1.5])
def test_model_stock_is_the_dense_formula_and_mergekits(tmp_path, count, noise):
    pairs = similar(tmp_path, count, noise)
    _, got = run(tmp_path / "out", pairs, "model_stock")
    deltas = stacked(pairs, "q")
    assert distance(got["q"], dense_model_stock(deltas)) <= 1e-9
    assert distance(got["q"], mergekit("model_stock", deltas)) <= 1e-9


def test_model_stock_has_no_place_for_weights(tmp_path):
    with pytest.raises(OptionError, match="takes no weights"):
        model_stock(np.eye(2), np.array([1.0, 2.0]))
    for weight in (0.0, -1.0):
        with pytest.raises(OptionError, match="takes no weights"):
            model_stock(np.eye(2), np.array([weight, weight]))
    # Opposite deltas have no finite estimate; like mergekit, stay at the base.
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    np.testing.assert_array_equal(model_stock(opposite, np.ones(2)), [0.0, 0.0])


@pytest.mark.parametrize("method", ["slerp", "karcher", "model_stock"])
def test_coefficients_are_found_for_each_module_and_expert(tmp_path, method):
    kinds = {"layers.0.q": linear(24, 20, 4), "experts": Module(10, 7, 4, "experts", count=3)}
    pairs = [(save(tmp_path / f"a{i}", kinds, seed=i, dtype="f64"), 1.0) for i in range(2)]
    _, got = run(tmp_path / "out", pairs, method)
    name = {"slerp": "nuslerp"}.get(method, method)
    weights = (1.0, 1.0) if method == "slerp" else ()
    assert (
        distance(got["layers.0.q"], mergekit(name, stacked(pairs, "layers.0.q"), weights)) <= 1e-9
    )
    experts = stacked(pairs, "experts")
    for expert in range(3):
        want = mergekit(name, experts[:, expert], weights)
        assert distance(got["experts"][expert], want) <= 1e-9


def test_far_more_adapters_than_a_module_has_ranks(tmp_path):
    found = []
    for seed in range(60):  # 60 · 5 columns on 24 × 20
        path = save(tmp_path / f"a{seed}", {"q": linear(24, 20, 5)}, seed=seed)
        found.append((path, 0.1 + 0.07 * seed))
    truth = weighted_sum(found)["q"]
    for name, rule, kept in (
        ("all", RankRule(), truth),
        ("few", RankRule(rank=7), best(truth, 7)),
    ):
        done, written = run(tmp_path / name, found, rule=rule, compute=F32)
        assert distance(written["q"], truth) == pytest.approx(distance(kept, truth), abs=1e-6)
        assert done.relative_error == pytest.approx(distance(written["q"], truth), abs=1e-6)


def test_float64_factors_lose_nothing_to_gram_matrices(tmp_path):
    rng = np.random.default_rng(0)
    found = []
    for name, weight in (("x", 0.7), ("y", 0.3)):
        sizes = 10.0 ** -np.arange(0, 12)  # down to 1e-11, where Gram matrices see nothing
        b, a = rng.standard_normal((24, 12)) * sizes, rng.standard_normal((12, 20))
        extra = {"q.lora_A.weight": a, "q.lora_B.weight": b}
        path = save(tmp_path / name, {"q": linear(24, 20, 12)}, dtype="f64", extra=extra)
        found.append((path, weight))
    done, written = run(tmp_path / "out", found)
    assert distance(written["q"], weighted_sum(found)["q"]) <= 1e-14
    assert done.relative_error <= 1e-14
