"""Elementwise methods against their definitions, PEFT's functions and mergekit's.

What a method keeps of a task is decided on float32 entries, so those are what every definition
gets; random masks are taken from our generator.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from merge_cases import (
    Module,
    all_stacked,
    distance,
    linear,
    run,
    save,
    total_distance,
    true_deltas,
    weighted_sum,
)
from merge_definitions import (
    della_chances,
    dropped,
    elected,
    sce_definition,
    summed,
    trimmed,
    without_outliers,
)
from merge_others import masks_given, mergekit, peft
from rounding import assert_equal_products

from loratools.algebra import row_blocks
from loratools.algebra.ranks import RankRule
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge import elementwise, selection, tasks
from loratools.operations.merge.methods import get_method, registered_methods
from loratools.operations.merge.selection import Bracket, Histogram, bits_of, largest
from loratools.operations.merge.tasks import DenseRows, FactorRows, Tasks, ZeroRows
from loratools_formats.disk.errors import OptionError, UnsupportedError

EXAMPLES = Path(__file__).parents[2] / "examples" / "tiny-llama"
SEED = 5
WEIGHTS = [(1.0, 1.0, 1.0), (0.6, -0.3, 1.1)]
SIGNS = ["total", "frequency"]
FULL = RankRule(rank=64)


def entries(shape=(23, 17), count=3, seed=0, size=1.0):
    """Return (T, m, n) float32 entries of low rank, as deltas are."""
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((count, shape[0], 4)), rng.standard_normal((count, 4, shape[1]))
    return (size * b @ a).astype(np.float32)


def as_tasks(found, seed=SEED, name="layers.0.q#0"):
    return Tasks([DenseRows(each) for each in found], found.shape[1:], seed, name)


def merged(method, found, weights, **parameters):
    """Return what our method makes of (T, m, n) entries, whatever its blocks."""
    work = as_tasks(found)
    function = get_method(method).function(work, np.array(weights), **parameters)
    return np.concatenate([function(*span) for span in work.spans()])


def uniform(found):
    """Return our random numbers for each entry of each task."""
    work = as_tasks(found)
    return np.stack([work.random_rows(t, 0, found.shape[1]) for t in range(len(found))])


# ------------------------------------------------------------------- thresholds


positive = st.floats(0, width=32, allow_nan=False, allow_infinity=False).map(abs)


@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=14),
        elements=st.one_of(positive, st.sampled_from([0.0, 1.0, 1e-45, 3.4e38])),
    ),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_selection_is_exact_for_any_floats_and_blocks(values, data):
    k = data.draw(st.integers(1, values.size))
    height = data.draw(st.integers(1, values.shape[0]))
    counts = Histogram()
    blocks = [values[i : i + height] for i in range(0, len(values), height)]
    for block in blocks:
        counts.add_high(block)
    counts.choose(k)
    for block in reversed(blocks):
        counts.add_low(block)
    want = np.partition(values.ravel(), values.size - k)[values.size - k]
    assert np.float32(counts.value()).tobytes() == np.float32(want).tobytes()


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "heavy", "wide"])
@pytest.mark.parametrize("sample", ["drawn", "none", "elsewhere"])
def test_selection_by_a_sample_is_exact_even_if_the_sample_misleads(monkeypatch, kind, sample):
    monkeypatch.setattr(selection, "_MOST_KEPT", 300)  # so that values are counted by bins, too
    rng = np.random.default_rng(3)
    values = np.abs(rng.standard_normal((60, 700))).astype(np.float32)
    if kind == "ties":
        values = np.round(values, 1)
    elif kind == "zeros":
        values[rng.random(values.shape) < 0.9] = 0.0
    elif kind == "heavy":
        values = values**-3
    elif kind == "wide":
        values = np.exp(20 * (values - 1.0)).astype(np.float32)
    drawn = {"drawn": rng.choice(values.ravel(), 4096), "elsewhere": np.float32([7.0] * 99)}
    ranks = [0, 1, 2, 40, 4200, 8400, 21000, 41999, 42000]
    got = largest(lambda look: map(look, values), ranks, drawn.get(sample), values.size)
    ordered = np.sort(values.ravel())[::-1]
    assert got == [math.inf, *(float(ordered[k - 1]) for k in ranks[1:])]


def test_one_pass_finds_what_a_fair_sample_brackets():
    rng = np.random.default_rng(4)
    values = np.abs(rng.standard_normal(1 << 18)).astype(np.float32)
    bracket = Bracket(rng.choice(values, 1 << 14), 52_000, values.size)
    for part in np.split(values, 64):
        bracket.add(*bracket.look(bits_of(part)))
    assert bracket.value() == np.sort(values)[-52_000]


def test_magnitudes_are_selected_as_from_all_entries_where_they_are_sampled():
    rng = np.random.default_rng(6)
    b, a = (
        rng.standard_normal((600, 3)) * np.exp(rng.standard_normal((600, 1))),
        (rng.standard_normal((3, 500))),
    )
    work = Tasks([FactorRows(b, a)], (600, 500), 0, "")
    assert tasks._LEAST_SAMPLED <= 600 * 500
    found = np.sort(
        np.abs(np.concatenate([work.sources[0].rows(*span) for span in work.spans()])).ravel()
    )
    ranks = [1, 3000, 60_000, 299_000]
    assert work.largest_magnitudes(0, ranks) == [float(found[-k]) for k in ranks]


def test_places_in_rows_are_those_of_a_stable_sort():
    rng = np.random.default_rng(5)
    values = np.abs(rng.integers(0, 40, (30, 200))).astype(np.float32)
    want = np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1)
    assert np.array_equal(elementwise.places_in_rows(values), want)


@pytest.mark.parametrize("block", [1, 40, 1000, 1 << 19])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (97, 131), (128, 64), (33, 1000)])
def test_thresholds_are_those_of_numpy_and_torch_bit_for_bit(monkeypatch, shape, block):
    import torch

    monkeypatch.setattr(row_blocks, "_BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(shape[0])
    b, a = rng.standard_normal((shape[0], 3)) * 1e-4, rng.standard_normal((3, shape[1]))
    work = Tasks([FactorRows(b, a), ZeroRows(shape[1])], shape, 0, "")
    found = np.abs(np.concatenate([work.sources[0].rows(*span) for span in work.spans()])).ravel()
    count = found.size
    for k in sorted({1, 2, count // 5, count // 2, count - 1, count} & set(range(1, count + 1))):
        got = np.float32(work.kth_largest(work.magnitudes(0), k))
        assert got == np.partition(found, count - k)[count - k]
        assert got == torch.from_numpy(found).kthvalue(count - k + 1).values.item()
        assert work.kth_largest(work.magnitudes(1), k) == 0.0
    assert work.kth_largest(work.magnitudes(0), 0) == math.inf


@pytest.mark.parametrize(
    ("shape", "density"),
    [((10, 10), 0.29), ((7, 100), 0.07), ((23, 17), 0.2), ((10, 29), 0.58), ((100, 7), 0.57)],
)
def test_the_number_kept_is_that_of_peft(shape, density):
    # int(density · numel) of floats: another order of the products keeps another number.
    found = entries(shape, count=1)
    kept = np.count_nonzero(merged("magnitude_prune", found, [1.0], density=density))
    assert kept == int(density * found.size)
    want = peft("magnitude_prune", found, [1.0], density)
    assert kept == np.count_nonzero(want)


def test_equal_magnitudes_at_the_threshold_are_all_kept():
    found = np.array([[[3.0, -2.0, 2.0, 1.0]]], np.float32)
    got = merged("magnitude_prune", found, [1.0], density=0.5)
    np.testing.assert_array_equal(got, [[3.0, -2.0, 2.0, 0.0]])


# ------------------------------------------------------------------ definitions


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("flavor", ["peft", "paper", "mergekit"])
class TestDefinitions:
    """Each method and flavor, on one module."""

    @pytest.mark.parametrize("majority", SIGNS)
    @pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
    def test_ties(self, flavor, weights, density, majority):
        x = entries()
        got = merged(
            "ties", x, weights,
            density=density, flavor=flavor, majority_sign=majority, lambda_=0.7,
        )  # fmt: skip
        want = 0.7 * elected(trimmed(x, density), weights, majority, flavor)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
    def test_magnitude_prune(self, flavor, weights, density):
        x = entries()
        got = merged("magnitude_prune", x, weights, density=density, flavor=flavor, lambda_=0.7)
        want = 0.7 * summed(trimmed(x, density), weights)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("density", [0.3, 0.9])
    def test_dare_linear(self, flavor, weights, density):
        x = entries()
        got = merged("dare_linear", x, weights, density=density, flavor=flavor, lambda_=0.7)
        want = 0.7 * summed(dropped(x, uniform(x), density, flavor), weights)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("majority", SIGNS)
    def test_dare_ties(self, flavor, weights, majority):
        x = entries()
        got = merged(
            "dare_ties", x, weights, density=0.4, flavor=flavor, majority_sign=majority, lambda_=0.7
        )
        sparse = dropped(x, uniform(x), 0.4, flavor)
        want = 0.7 * elected(sparse, weights, majority, flavor, divide=flavor != "mergekit")
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("majority", SIGNS)
    def test_della(self, flavor, weights, majority):
        x = entries()
        chances = della_chances(x, 0.6, 0.25)
        options = {"density": 0.6, "epsilon": 0.25, "majority_sign": majority, "lambda_": 0.7}
        if flavor == "peft":
            with pytest.raises(OptionError, match="paper or mergekit"):
                get_method("della").checked({"flavor": "peft"})
            return
        got = merged("della", x, weights, flavor=flavor, **options)
        want = 0.7 * elected(dropped(x, uniform(x), chances, flavor), weights, majority, flavor)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("density", "gamma"),
    [(0.9, 0.01), (0.5, 0.2), (0.5, 0.0), (0.95, 0.3), (0.1, 0.5), (1.0, 0.5), (0.001, 0.1)],
)
def test_breadcrumbs_is_its_definition(weights, density, gamma):
    x = entries()
    got = merged("breadcrumbs", x, weights, density=density, gamma=gamma, lambda_=0.7)
    sparse = x if density == 1.0 else without_outliers(x, density, gamma)
    np.testing.assert_allclose(got, 0.7 * summed(sparse, weights), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_sce_is_its_definition(density, size):
    x = entries(size=size)
    got = merged("sce", x, [1.0] * 3, density=density, lambda_=0.7)
    np.testing.assert_allclose(got, 0.7 * sce_definition(x, density), rtol=1e-12, atol=1e-13 * size)


def test_della_favours_large_entries_and_keeps_the_share_asked_for():
    x = entries((40, 500), count=1)
    got = merged("della", x, [1.0], density=0.6, epsilon=0.3)
    kept = got != 0.0
    assert np.mean(kept) == pytest.approx(0.6, abs=0.02)
    large = np.abs(x[0]) >= np.median(np.abs(x[0]), axis=1, keepdims=True)
    assert np.mean(kept[large]) == pytest.approx(0.75, abs=0.02)
    assert np.mean(kept[~large]) == pytest.approx(0.45, abs=0.02)


def test_dare_keeps_the_share_asked_for_and_the_mean():
    x = np.ones((1, 300, 400), np.float32)
    got = merged("dare_linear", x, [1.0], density=0.3)
    assert np.mean(got != 0.0) == pytest.approx(0.3, abs=0.005)
    assert got.mean() == pytest.approx(1.0, abs=0.02)
    assert set(np.unique(got)) == {0.0, 1.0 / 0.3}


# ----------------------------------------------------------------------- blocks


METHODS = {
    "ties": {"density": 0.3},
    "magnitude_prune": {"density": 0.3},
    "dare_linear": {"density": 0.3},
    "dare_ties": {"density": 0.3, "flavor": "mergekit"},
    "della": {"density": 0.5, "flavor": "mergekit"},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "sce": {"density": 0.5},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [1, 17, 50, 170])
def test_results_do_not_depend_on_the_blocks(monkeypatch, method, block):
    x = entries()
    whole = merged(method, x, [1.0] * 3, **METHODS[method])
    numbers = uniform(x)
    monkeypatch.setattr(row_blocks, "_BLOCK_ELEMENTS", block)
    assert len(list(as_tasks(x).spans())) > 1
    got = merged(method, x, [1.0] * 3, **METHODS[method])
    if METHODS[method].get("flavor") == "mergekit" or method == "sce":
        # Norms are sums over blocks, so their last bit may differ.
        assert_equal_products(got, whole, x[0].size)
    else:
        assert np.array_equal(got, whole)
    rows = np.concatenate([as_tasks(x).random_rows(1, *span) for span in as_tasks(x).spans()])
    assert np.array_equal(rows, numbers[1])


def test_random_numbers_differ_by_seed_module_and_task():
    x = entries(count=2)
    numbers = [
        as_tasks(x, seed, name).random_rows(task, 0, 23).tobytes()
        for seed in (0, 1, 1 << 70)
        for name in ("layers.0.q#0", "layers.0.q#1")
        for task in (0, 1)
    ]
    # A seed beyond 64 bits stands for another of 64.
    assert len(set(numbers)) == 12


# ----------------------------------------------------------------------- others


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.2, 0.55])
class TestPeft:
    """flavor=peft is what PEFT's functions make of dense ΔW, given the same masks."""

    @pytest.mark.parametrize("majority", SIGNS)
    def test_ties(self, weights, density, majority):
        x = entries()
        got = merged("ties", x, weights, density=density, majority_sign=majority)
        np.testing.assert_allclose(got, peft("ties", x, weights, density, majority), atol=2e-6)

    def test_magnitude_prune(self, weights, density):
        x = entries()
        got = merged("magnitude_prune", x, weights, density=density)
        np.testing.assert_allclose(got, peft("magnitude_prune", x, weights, density), atol=2e-6)

    def test_dare_linear(self, weights, density):
        x = entries()
        got = merged("dare_linear", x, weights, density=density)
        with masks_given(uniform(x) < density) as asked:
            want = peft("dare_linear", x, weights, density)
        assert {float(chance) for each in asked for chance in each.flat} == {
            float(np.float32(density))
        }
        np.testing.assert_allclose(got, want, atol=1e-5)

    @pytest.mark.parametrize("majority", SIGNS)
    def test_dare_ties(self, weights, density, majority):
        x = entries()
        got = merged("dare_ties", x, weights, density=density, majority_sign=majority)
        with masks_given(uniform(x) < density):
            want = peft("dare_ties", x, weights, density, majority)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
class TestMergekit:
    """flavor=mergekit is what mergekit makes of the deltas, given the same masks."""

    @pytest.mark.parametrize("density", [0.2, 0.55, 0.0001, 1.0])
    def test_ties(self, weights, density):
        x = entries()
        got = merged("ties", x, weights, density=density, flavor="mergekit", lambda_=0.7)
        want = mergekit("ties", x, weights, density=density, **{"lambda": 0.7})
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("density", [0.2, 0.55, 0.0001, 1.0])
    def test_magnitude_prune(self, weights, density):
        import torch
        from mergekit.sparsify import magnitude

        x = entries()
        got = merged("magnitude_prune", x, weights, density=density, flavor="mergekit")
        sparse = [magnitude(torch.from_numpy(each), density).numpy() for each in x]
        np.testing.assert_allclose(got, summed(sparse, weights), rtol=1e-12, atol=1e-13)

    def test_frequency_is_its_count(self, weights):
        import torch
        from mergekit.merge_methods.generalized_task_arithmetic import get_mask
        from mergekit.sparsify import magnitude

        x = entries()
        got = merged("ties", x, weights, density=0.4, flavor="mergekit", majority_sign="frequency")
        factors = torch.tensor(weights, dtype=torch.float64)[:, None, None]
        sparse = torch.stack([magnitude(torch.from_numpy(each), 0.4).double() for each in x])
        mask = get_mask(sparse * factors, method="count")
        divisor = (factors * mask).sum(dim=0)
        divisor[divisor == 0] = 1
        want = ((sparse * factors * mask).sum(dim=0) / divisor).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
    def test_dare(self, weights, method):
        x = entries()
        got = merged(method, x, weights, density=0.4, flavor="mergekit", lambda_=0.7)
        with masks_given(uniform(x) < 0.4):
            want = mergekit(method, x, weights, density=0.4, **{"lambda": 0.7})
        # It works in float32 after the mask.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    def test_della(self, weights):
        x = entries()
        got = merged("della", x, weights, density=0.6, epsilon=0.25, flavor="mergekit")
        masks = uniform(x) < della_chances(x, 0.6, 0.25)
        with masks_given(masks) as asked:
            want = mergekit("della", x, weights, density=0.6, epsilon=0.25)
        np.testing.assert_allclose(asked, della_chances(x, 0.6, 0.25), atol=1e-6)
        # It works in float32 after the mask; a divisor Σw near zero magnifies that.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("density", "gamma"), [(0.9, 0.01), (0.5, 0.2), (0.5, 0.0), (0.95, 0.3), (0.1, 0.5)]
    )
    def test_breadcrumbs(self, weights, density, gamma):
        x = entries()
        got = merged("breadcrumbs", x, weights, density=density, gamma=gamma, lambda_=0.7)
        want = mergekit("breadcrumbs", x, weights, density=density, gamma=gamma, **{"lambda": 0.7})
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_sce_is_mergekits(density, count):
    x = entries(count=count)
    got = merged("sce", x, [1.0] * count, density=density)
    want = mergekit("sce", x, select_topk=density)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_sce_lets_a_faint_task_have_the_places_where_it_is_alone():
    x = entries(count=2)
    x[1] *= 0.01
    x[0, :9] = 0.0
    got = merged("sce", x, [1.0, 1.0])
    np.testing.assert_allclose(got, mergekit("sce", x), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got[:9], x[1, :9], rtol=1e-10)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_ties_svd_on_a_real_model(tmp_path):
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "model").double()
    model = PeftModel.from_pretrained(model, EXAMPLES / "lora", adapter_name="lora")
    model.load_adapter(EXAMPLES / "rslora", adapter_name="rslora")
    model = model.double()
    model.add_weighted_adapter(
        ["lora", "rslora"], [0.7, 0.4], "both",
        combination_type="ties_svd", svd_rank=12, density=0.3, svd_full_matrices=False,
    )  # fmt: skip
    pairs = [(EXAMPLES / "lora", 0.7), (EXAMPLES / "rslora", 0.4)]
    result, got = run(
        tmp_path / "out",
        pairs,
        "ties",
        parameters={"density": 0.3},
        rule=RankRule(rank=12),
        compute=ComputeOptions(dtype="f32"),
    )
    compared = 0
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            path = name.removeprefix("base_model.model.")
            want = module.get_delta_weight("both").detach().numpy()
            assert distance(got[path], want) <= 1e-6
            compared += 1
    assert compared == len(result.modules) == 28


# ----------------------------------------------------------------- whole merges


KINDS = {
    "layers.0.q": linear(24, 20, 4),
    "layers.1.down": linear(9, 31, 3),
    "conv": Module(8, 3, 4, "conv", kernel=(3, 2)),
    "embed": Module(12, 33, 4, "embedding"),
    "experts": Module(10, 7, 2, "experts", count=3),
}


def triple(folder, dtype="f64", weights=(0.6, -0.3, 1.1)):
    """Return three adapters of several kinds; the second lacks two modules."""
    most = {n: m for n, m in KINDS.items() if n not in ("layers.1.down", "embed")}
    return [
        (save(folder / f"a{i}", modules, seed=i, dtype=dtype, lora_alpha=7), weight)
        for i, (modules, weight) in enumerate(zip([KINDS, most, KINDS], weights, strict=True))
    ]


def matrices(pairs):
    """Yield (name, expert, (T, m, n) float32 entries) of every matrix."""
    for name, deltas in all_stacked(pairs).items():
        found = deltas.astype(np.float32)
        for expert in range(found.shape[1] if found.ndim == 4 else 1):
            yield name, expert, found[:, expert] if found.ndim == 4 else found


def gathered(per_matrix):
    """Put matrices of experts back into stacks."""
    by_name = {}
    for (name, _), matrix in per_matrix.items():
        by_name.setdefault(name, []).append(matrix)
    return {n: np.stack(m) if n == "experts" else m[0] for n, m in by_name.items()}


def test_ties_of_whole_adapters_of_all_kinds(tmp_path):
    pairs = triple(tmp_path)
    weights = [weight for _, weight in pairs]
    result, got = run(tmp_path / "out", pairs, "ties", parameters={"density": 0.3}, rule=FULL)
    want = {
        (name, expert): elected(trimmed(x, 0.3), weights, "total", "peft")
        for name, expert, x in matrices(pairs)
    }
    # Rows wait as float32 until they are decomposed.
    assert total_distance(got, gathered(want)) <= 1e-6
    absent = {module.name: module.absent for module in result.modules}
    assert absent["embed"] == absent["layers.1.down"] == ("a1",)
    assert absent["experts"] == ()


def test_sce_of_whole_adapters(tmp_path):
    pairs = triple(tmp_path, weights=(1.0, 1.0, 1.0))
    _, got = run(tmp_path / "out", pairs, "sce", parameters={"density": 0.4}, rule=FULL)
    want = {(n, e): sce_definition(x, 0.4) for n, e, x in matrices(pairs)}
    assert total_distance(got, gathered(want)) <= 1e-6


@pytest.mark.parametrize("flavor", ["peft", "mergekit"])
def test_dare_of_whole_adapters_takes_masks_by_module_expert_and_adapter(tmp_path, flavor):
    pairs = triple(tmp_path)
    _, got = run(
        tmp_path / "out",
        pairs,
        "dare_linear",
        parameters={"density": 0.4, "flavor": flavor},
        rule=FULL,
        compute=ComputeOptions(seed=77),
    )
    want = {}
    for name, expert, found in matrices(pairs):
        work = as_tasks(found, 77, f"{name}#{expert}")
        x = found.astype(np.float64)
        total = np.zeros(x.shape[1:])
        for task, (_, weight) in enumerate(pairs):
            kept = np.where(work.random_rows(task, 0, x.shape[1]) < 0.4, x[task], 0.0)
            if flavor == "peft":
                total += weight * kept / 0.4
            elif kept.any():
                total += weight * kept * np.abs(x[task]).sum() / np.abs(kept).sum()
        want[name, expert] = total
    assert total_distance(got, gathered(want)) <= 1e-6


@pytest.mark.parametrize("majority", SIGNS)
@pytest.mark.parametrize("density", [0.07, 0.5])
def test_paper_flavor_of_ties_trims_over_all_modules_at_once(tmp_path, density, majority):
    pairs = triple(tmp_path)
    weights = [weight for _, weight in pairs]
    parameters = {"density": density, "flavor": "paper", "majority_sign": majority}
    _, got = run(tmp_path / "out", pairs, "ties", parameters=parameters, rule=FULL)
    found = list(matrices(pairs))
    thresholds = []
    for task in range(3):
        everything = np.concatenate([np.abs(x[task]).ravel() for _, _, x in found])
        thresholds.append(np.sort(everything)[-int(density * everything.size)])
    want = {
        (n, e): elected(trimmed(x, density, thresholds=thresholds), weights, majority, "paper")
        for n, e, x in found
    }
    assert total_distance(got, gathered(want)) <= 1e-6
    each = {(n, e): elected(trimmed(x, density), weights, majority, "paper") for n, e, x in found}
    assert total_distance(gathered(each), gathered(want)) > 1e-2


def test_paper_flavor_trims_over_all_modules_where_an_override_asks_for_it(tmp_path):
    from loratools.operations.merge.options import Override

    pairs = triple(tmp_path)
    parameters = {"density": 0.2, "flavor": "paper"}
    _, whole = run(tmp_path / "whole", pairs, "ties", parameters=parameters, rule=FULL)
    _, got = run(
        tmp_path / "out",
        pairs,
        "ties",
        parameters={"density": 0.2},
        overrides=(Override("conv", None, {"flavor": "paper"}),),
        rule=FULL,
    )
    assert np.array_equal(got["conv"], whole["conv"])
    assert distance(got["embed"], whole["embed"]) > 1e-2


@pytest.mark.parametrize("block", [30, 1 << 19])
def test_paper_flavor_does_not_depend_on_the_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(row_blocks, "_BLOCK_ELEMENTS", block)
    pairs = triple(tmp_path)
    parameters = {"density": 0.2, "flavor": "paper"}
    _, got = run(tmp_path / "out", pairs, "ties", parameters=parameters, rule=FULL)
    monkeypatch.undo()
    _, want = run(tmp_path / "whole", pairs, "ties", parameters=parameters, rule=FULL)
    assert total_distance(got, want) <= 1e-7


IDENTITY = [
    (entry.name, flavor)
    for entry in registered_methods()
    if entry.method is not None and entry.name not in ("slerp", "iso", "knots")
    for flavor in (["peft", "paper", "mergekit"] if "flavor" in entry.method.parameters else [None])
    if (entry.name, flavor) != ("della", "peft")
]
"""Two are needed for a slerp; iso changes singular values; knots is below, for its rank."""


@pytest.mark.parametrize(("method", "flavor"), IDENTITY)
def test_one_adapter_at_weight_1_is_itself(tmp_path, method, flavor):
    source = save(tmp_path / "a", KINDS, seed=3, lora_alpha=7)
    parameters = {} if flavor is None else {"flavor": flavor}
    if "density" in get_method(method).parameters:
        parameters["density"] = 1.0
    result, got = run(tmp_path / "out", [(source, 1.0)], method, parameters=parameters)
    # Elementwise results are float32 rows, decomposed and rounded to float32 factors.
    limit = 1e-9 if get_method(method).kind == "span" else 1e-6
    assert total_distance(got, true_deltas(source)) <= limit
    assert result.relative_error <= 1e-6


@pytest.mark.parametrize("method", sorted(METHODS))
def test_core_space_at_density_1_is_the_adapter_too(tmp_path, method):
    source = save(tmp_path / "a", KINDS, seed=3, lora_alpha=7)
    _, got = run(
        tmp_path / "out", [(source, 1.0)], method, parameters={"density": 1.0}, space="core"
    )
    assert total_distance(got, true_deltas(source)) <= 1e-6


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "breadcrumbs", "sce"])
def test_density_0_keeps_nothing(tmp_path, method):
    pairs = triple(tmp_path, weights=(1.0, 1.0, 1.0))
    result, got = run(tmp_path / "out", pairs, method, parameters={"density": 0.0})
    assert not any(delta.any() for delta in got.values())
    assert result.relative_error == 0.0


def test_a_density_that_keeps_less_than_one_entry_keeps_none_but_in_mergekit():
    x = entries((3, 3), count=1)
    assert not merged("ties", x, [1.0], density=0.1).any()
    assert np.count_nonzero(merged("ties", x, [1.0], density=0.1, flavor="mergekit")) == 1


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("ties", {"density": 1.01}, "density is a share"),
        ("magnitude_prune", {"density": -0.1}, "density is a share"),
        ("breadcrumbs", {"density": 2.0}, "density is a share"),
        ("sce", {"density": -1.0}, "density is a share"),
        ("dare_linear", {"density": 0.0}, "too small for dropping at random"),
        ("dare_ties", {"density": 1.5}, "density is a share"),
        ("della", {"density": 0.1, "epsilon": 0.1}, r"density ± epsilon must stay inside"),
        ("della", {"density": 0.9, "epsilon": 0.1}, r"density ± epsilon must stay inside"),
        ("della", {"density": 0.5, "epsilon": -0.1}, r"density ± epsilon must stay inside"),
        ("breadcrumbs", {"gamma": 1.0}, "gamma is a share"),
        ("breadcrumbs", {"gamma": -0.1}, "gamma is a share"),
        ("ties", {"density": math.nan}, "finite number"),
        ("ties", {"lambda": math.inf}, "finite number"),
        ("ties", {"majority_sign": "most"}, "total or frequency"),
        ("ties", {"flavor": "mine"}, "peft or paper or mergekit"),
        ("ties", {"densty": 0.5}, "Did you mean density"),
        ("linear", {"normalize": "perhaps"}, "type bool"),
        ("karcher", {"max_iter": 2.5}, "type int"),
        ("karcher", {"max_iter": math.inf}, "type int"),
    ],
)
def test_wrong_parameters_are_refused(tmp_path, method, parameters, message):
    with pytest.raises(OptionError, match=message):
        run(
            tmp_path / "out",
            triple(tmp_path, weights=(1.0, 1.0, 1.0)),
            method,
            parameters=parameters,
        )


def test_sce_has_no_place_for_weights(tmp_path):
    with pytest.raises(OptionError, match="takes no weights"):
        run(tmp_path / "out", triple(tmp_path), "sce")


@pytest.mark.parametrize("name", ["sv_cumulative", "threshold"])
def test_rules_that_need_all_singular_values_are_refused(tmp_path, name):
    rule = RankRule(**{name: True if name == "threshold" else 0.9})
    with pytest.raises(OptionError, match="needs all singular values"):
        run(tmp_path / "out", triple(tmp_path), "ties", rule=rule)
    result, _ = run(tmp_path / "core", triple(tmp_path / "b"), "ties", space="core", rule=rule)
    assert result.energy <= 1.0


def test_the_largest_rank_of_the_inputs_is_the_default_and_energy_is_told(tmp_path):
    pairs = triple(tmp_path)
    result, got = run(tmp_path / "out", pairs, "ties")
    _, whole = run(tmp_path / "whole", pairs, "ties", rule=FULL)
    for module in result.modules:
        assert module.rank_out == max(rank for rank in module.ranks_in if rank is not None)
        lost = distance(got[module.name], whole[module.name])
        assert module.relative_error == pytest.approx(lost, rel=1e-4)
        assert module.energy == pytest.approx(1 - lost**2, abs=1e-6)
    assert 0.3 < result.energy < 0.99


def test_ties_is_not_the_sum_and_core_space_is_not_full_space(tmp_path):
    pairs = triple(tmp_path)
    _, full = run(tmp_path / "full", pairs, "ties", rule=FULL)
    _, core = run(tmp_path / "core", pairs, "ties", space="core")
    assert total_distance(full, weighted_sum(pairs)) > 0.1
    assert total_distance(core, full) > 0.1
    with pytest.raises(OptionError, match="`space=core` is for elementwise methods"):
        run(tmp_path / "linear", pairs, "linear", space="core")
    assert elementwise.TIES.kind == "elementwise"
    assert not issubclass(OptionError, UnsupportedError)
