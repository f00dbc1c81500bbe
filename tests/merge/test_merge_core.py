"""Methods in the shared space of all factors, against their definitions on m×n matrices."""

import numpy as np
import pytest
from merge_cases import (
    Module,
    all_stacked,
    distance,
    linear,
    run,
    save,
    stacked,
    stored,
    total_distance,
    true_deltas,
)
from merge_definitions import (
    core_space,
    della_chances,
    dropped,
    elected,
    iso_definition,
    knots_definition,
    sce_definition,
    summed,
    trimmed,
    tsv_definition,
    without_outliers,
)

from loratools.algebra import row_blocks
from loratools.algebra.ranks import RankRule
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge.space import shared_space
from loratools.operations.merge.tasks import DenseRows, Tasks

SHAPES = {"tall": (40, 14), "wide": (13, 50), "square": (24, 24)}
WEIGHTS = [(1.0, 1.0, 1.0), (0.6, -0.3, 1.1)]


def triple(folder, weights=(1.0, 1.0, 1.0), ranks=(4, 2, 5), **config):
    """Return three float64 adapters of different ranks; the third lacks one module."""
    found = []
    for index, (weight, rank) in enumerate(zip(weights, ranks, strict=True)):
        modules = {name: linear(*shape, rank) for name, shape in SHAPES.items()}
        modules["experts"] = Module(12, 9, 2, "experts", count=2)
        if index == 2:
            del modules["square"]
        path = save(folder / f"a{index}", modules, dtype="f64", seed=index, lora_alpha=7, **config)
        found.append((path, weight))
    return found


def expected(pairs, define):
    """Apply a definition on (T, m, n) to every matrix."""
    result = {}
    for name, found in all_stacked(pairs).items():
        if found.ndim == 4:
            result[name] = np.stack(
                [define(found[:, e], f"{name}#{e}") for e in range(found.shape[1])]
            )
        else:
            result[name] = define(found, f"{name}#0")
    return result


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("flavor", ["peft", "paper", "mergekit"])
def test_knots_is_its_dense_definition(tmp_path, weights, flavor, majority):
    pairs = triple(tmp_path, weights)
    parameters = {"density": 0.4, "majority_sign": majority, "flavor": flavor, "lambda": 0.7}
    _, got = run(tmp_path / "out", pairs, "knots", parameters=parameters)
    want = expected(pairs, lambda x, _: 0.7 * knots_definition(x, weights, 0.4, majority, flavor))
    for name, delta in want.items():
        assert distance(got[name], delta) <= 1e-9


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("ranks", [(4, 2, 5), (9, 9, 9)])
def test_tsv_is_its_dense_definition(tmp_path, weights, ranks):
    # With rank 9, the 13/3 triplets that TSV-M keeps are fewer than a task has.
    pairs = triple(tmp_path, weights, ranks)
    _, got = run(tmp_path / "out", pairs, "tsv", parameters={"lambda": 0.7})
    want = expected(pairs, lambda x, _: 0.7 * tsv_definition(_present(x), _weights(x, weights)))
    for name in ("tall", "wide"):
        assert distance(got[name], want[name]) <= 1e-9
    # A module that one adapter lacks still counts T tasks when triplets are shared out.
    square = stacked(pairs, "square")
    full = 0.7 * tsv_definition_of(square, weights)
    assert distance(got["square"], full) <= 1e-9


def _present(x):
    return x[[index for index in range(len(x)) if x[index].any()]]


def _weights(x, weights):
    return [weight for weight, delta in zip(weights, x, strict=True) if delta.any()]


def tsv_definition_of(x, weights):
    """The definition with zero deltas left out of the stacks but counted in T."""
    most = min(x.shape[1:]) // len(x)
    cut = []
    for delta in _present(x):
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        cut.append((u[:, :most] * s[:most]) @ vt[:most])
    return tsv_definition(np.stack(cut), _weights(x, weights))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_iso_is_its_dense_definition_on_the_nonzero_singular_values(tmp_path, weights):
    pairs = triple(tmp_path, weights)
    _, got = run(tmp_path / "out", pairs, "iso", parameters={"lambda": 0.7})
    want = expected(pairs, lambda x, _: 0.7 * iso_definition(x, weights))
    for name, delta in want.items():
        assert distance(got[name], delta) <= 1e-9
    s = np.linalg.svd(got["wide"], compute_uv=False)
    np.testing.assert_allclose(s[:11], s[0], rtol=1e-9)
    assert s[11] <= 1e-12 * s[0]


def test_iso_counts_only_what_the_sum_has_left(tmp_path):
    # The first two cancel, so the sum has rank 5 in a space of 4 + 5 dimensions.
    pairs = triple(tmp_path)
    (first, _), (third, _) = pairs[0], pairs[2]
    _, got = run(tmp_path / "out", [(first, 1.0), (first, -1.0), (third, 1.0)], "iso")
    want = true_deltas(third)
    for name in ("tall", "wide"):
        assert distance(got[name], iso_definition(want[name][None], [1.0])) <= 1e-9


def test_an_adapter_of_weight_0_counts_in_tsv_as_one_without_the_module(tmp_path):
    pairs = triple(tmp_path, (1.0, 0.0, 0.5), (4, 3, 5))
    _, got = run(tmp_path / "out", pairs, "tsv")
    for name in ("tall", "wide"):
        x = stacked(pairs, name)
        x[1] = 0.0
        assert distance(got[name], tsv_definition_of(x, (1.0, 0.0, 0.5))) <= 1e-9


def test_tsv_does_not_let_tasks_interfere(tmp_path):
    pairs = triple(tmp_path, ranks=(4, 2, 4))
    _, got = run(tmp_path / "out", pairs, "tsv")
    s = np.linalg.svd(got["tall"], compute_uv=False)
    ours = [np.linalg.svd(delta, compute_uv=False) for delta in stacked(pairs, "tall")]
    wanted = sorted((value for each in ours for value in each[each > 1e-9]), reverse=True)
    np.testing.assert_allclose(s[: len(wanted)], wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.4, "flavor": "peft"}),
        ("ties", {"density": 0.4, "flavor": "mergekit", "majority_sign": "frequency"}),
        ("magnitude_prune", {"density": 0.4}),
        ("dare_linear", {"density": 0.6}),
        ("dare_ties", {"density": 0.6, "flavor": "mergekit"}),
        ("della", {"density": 0.6, "epsilon": 0.2}),
        ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    ],
)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_space_core_is_the_method_on_the_cores_mapped_back(tmp_path, method, parameters, weights):
    pairs = triple(tmp_path, weights)
    _, got = run(
        tmp_path / "out",
        pairs,
        method,
        parameters=parameters,
        space="core",
        compute=ComputeOptions(seed=4),
    )
    want = expected(pairs, lambda x, name: _in_core(method, x, name, weights, **parameters))
    for name, delta in want.items():
        assert distance(got[name], delta) <= 1e-9


def _in_core(
    method, deltas, name, weights, *, density, flavor="peft", majority_sign="total", **more
):
    u, v, cores = core_space(deltas)
    work = Tasks([DenseRows(core) for core in cores], cores.shape[1:], 4, name)
    numbers = np.stack([work.random_rows(t, 0, len(u.T)) for t in range(len(cores))])
    if method in ("ties", "magnitude_prune"):
        x = trimmed(cores, density)
    elif method == "breadcrumbs":
        x = without_outliers(cores, density, more["gamma"])
    elif method == "della":
        flavor = "paper"
        x = dropped(cores, numbers, della_chances(cores, density, more["epsilon"]), flavor)
    else:
        x = _dropped_where_present(cores, numbers, density, flavor)
    if method in ("magnitude_prune", "dare_linear", "breadcrumbs"):
        core = summed(x, weights)
    else:
        divide = not (method == "dare_ties" and flavor == "mergekit")
        core = elected(x, weights, majority_sign, flavor, divide)
    return u @ core @ v.T


def _dropped_where_present(cores, numbers, density, flavor):
    """An absent delta has no norm to keep."""
    x = np.zeros(cores.shape)
    present = [index for index in range(len(cores)) if cores[index].any()]
    x[present] = dropped(cores[present], numbers[present], density, flavor)
    return x


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_sce_in_core_space(tmp_path, density):
    pairs = triple(tmp_path)
    _, got = run(tmp_path / "out", pairs, "sce", parameters={"density": density}, space="core")

    def define(x, _):
        u, v, cores = core_space(x)
        return u @ sce_definition(cores, density) @ v.T

    for name, delta in expected(pairs, define).items():
        assert distance(got[name], delta) <= 1e-9


# ------------------------------------------------------------------------ gauge


CORE_METHODS = [
    ("knots", "full", {"density": 0.4}),
    ("tsv", "full", {}),
    ("iso", "full", {}),
    ("ties", "core", {"density": 0.4}),
    ("dare_linear", "core", {"density": 0.6}),
]


def _resplit(folder, source, change, extra_rank=0):
    """Write the same ΔW with other factors: `change` takes and returns (b, a) of each matrix."""
    from merge_cases import config_of

    tensors, modules = {}, {}
    for name, delta in true_deltas(source).items():
        if name == "experts":
            tensors |= {k: v for k, v in stored(source).items() if k.startswith(name)}
            modules[name] = Module(12, 9, 2, "experts", count=2)
            continue
        a = stored(source)[f"{name}.lora_A.weight"]
        b = stored(source)[f"{name}.lora_B.weight"]
        new_b, new_a = change(b, a)
        rank = new_a.shape[0]
        # The scale is 7/r, and stays the same when the rank grows.
        new_b = new_b * (rank / a.shape[0])
        tensors |= {f"{name}.lora_A.weight": new_a, f"{name}.lora_B.weight": new_b}
        modules[name] = linear(*delta.shape, rank)
    new = save(folder, modules, dtype="f64", extra=tensors, lora_alpha=7)
    assert config_of(new)["lora_alpha"] == config_of(source)["lora_alpha"]
    assert total_distance(true_deltas(new), true_deltas(source)) <= 1e-12
    return new


def _rotated(b, a):
    rng = np.random.default_rng(0)
    gauge = rng.standard_normal((a.shape[0], a.shape[0]))
    return b @ gauge, np.linalg.solve(gauge, a)


def _scaled(b, a):
    return 1000.0 * b, a / 1000.0


def _padded(b, a):
    return np.pad(b, ((0, 0), (0, 3))), np.pad(a, ((0, 3), (0, 0)))


def _doubled(b, a):
    return np.concatenate([0.3 * b, 0.7 * b], axis=1), np.concatenate([a, a])


def _hidden(b, a):
    """Three more ranks that only one factor has, spread over all columns of the other."""
    more = np.random.default_rng(1).standard_normal((3, a.shape[1]))
    return _rotated(np.pad(b, ((0, 0), (0, 3))), np.concatenate([a, more]))


@pytest.mark.parametrize(("method", "space", "parameters"), CORE_METHODS)
@pytest.mark.parametrize("change", [_rotated, _scaled, _padded, _doubled, _hidden])
def test_results_do_not_depend_on_how_a_file_splits_its_factors(
    tmp_path, method, space, parameters, change
):
    pairs = triple(tmp_path)
    again = [
        (_resplit(tmp_path / f"again{i}", path, change), weight)
        for i, (path, weight) in enumerate(pairs)
    ]
    _, got = run(tmp_path / "out", pairs, method, parameters=parameters, space=space)
    _, other = run(tmp_path / "other", again, method, parameters=parameters, space=space)
    for name, delta in got.items():
        assert distance(other[name], delta) <= 1e-9, name


@pytest.mark.parametrize(("method", "space", "parameters"), CORE_METHODS[:4])
def test_results_do_not_depend_on_the_order_of_the_adapters(tmp_path, method, space, parameters):
    pairs = triple(tmp_path, (0.5, 0.8, 1.1))
    _, got = run(tmp_path / "out", pairs, method, parameters=parameters, space=space)
    _, other = run(tmp_path / "other", pairs[::-1], method, parameters=parameters, space=space)
    for name, delta in got.items():
        assert distance(other[name], delta) <= 1e-9


@pytest.mark.parametrize("block", [1, 20, 100])
@pytest.mark.parametrize(("method", "space", "parameters"), [CORE_METHODS[0], *CORE_METHODS[3:]])
def test_results_do_not_depend_on_the_blocks(
    tmp_path, monkeypatch, block, method, space, parameters
):
    pairs = triple(tmp_path)
    _, whole = run(tmp_path / "whole", pairs, method, parameters=parameters, space=space)
    monkeypatch.setattr(row_blocks, "_BLOCK_ELEMENTS", block)
    _, got = run(tmp_path / "out", pairs, method, parameters=parameters, space=space)
    for name, delta in whole.items():
        assert distance(got[name], delta) <= 1e-9


# ------------------------------------------------------------------------ space


def test_the_shared_space_holds_every_delta(tmp_path):
    rng = np.random.default_rng(0)
    terms = [(rng.standard_normal((30, rank)), rng.standard_normal((rank, 20))) for rank in (3, 5)]
    space = shared_space([terms[0], None, terms[1]], (30, 20))
    assert space.u.shape == (30, 8)
    assert space.v.shape == (20, 8)
    assert space.ranks == (3, 0, 5)
    np.testing.assert_allclose(space.u.T @ space.u, np.eye(8), atol=1e-13)
    np.testing.assert_allclose(space.v.T @ space.v, np.eye(8), atol=1e-13)
    for core, term in zip(space.cores, [terms[0], None, terms[1]], strict=True):
        want = np.zeros((30, 20)) if term is None else term[0] @ term[1]
        np.testing.assert_allclose(space.u @ core @ space.v.T, want, atol=1e-13)


def test_an_adapter_with_itself_spans_no_more_than_itself(tmp_path):
    rng = np.random.default_rng(0)
    term = rng.standard_normal((30, 4)), rng.standard_normal((4, 20))
    space = shared_space([term, term], (30, 20))
    assert space.cores.shape == (2, 4, 4)


@pytest.mark.parametrize("method", ["knots", "tsv", "iso"])
def test_untrained_adapters_merge_to_zero(tmp_path, method):
    zero = {"q.lora_B.weight": np.zeros((24, 4))}
    pairs = [
        (save(tmp_path / f"a{i}", {"q": linear(24, 20, 4)}, dtype="f64", extra=zero), 1.0)
        for i in range(2)
    ]
    result, got = run(tmp_path / "out", pairs, method)
    assert not got["q"].any()
    assert result.relative_error == 0.0


@pytest.mark.parametrize("method", ["knots", "tsv"])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_one_adapter_at_weight_1_is_itself(tmp_path, method, dtype):
    modules = {"q": linear(24, 20, 4), "conv": Module(8, 3, 4, "conv", kernel=(3, 2))}
    source = save(tmp_path / "a", modules, dtype=dtype, lora_alpha=7)
    parameters = {"density": 1.0} if method == "knots" else {}
    _, got = run(tmp_path / "out", [(source, 1.0)], method, parameters=parameters)
    # knots merges float32 entries.
    limit = 1e-9 if (method, dtype) == ("tsv", "f64") else 1e-6
    assert total_distance(got, true_deltas(source)) <= limit


@pytest.mark.parametrize("method", ["knots", "tsv", "iso"])
def test_results_are_no_larger_than_the_space_and_can_be_squeezed(tmp_path, method):
    pairs = triple(tmp_path)
    result, whole = run(tmp_path / "out", pairs, method)
    ranks = {module.name: module.rank_out for module in result.modules}
    assert all(rank <= 11 for rank in ranks.values())
    cut, got = run(tmp_path / "cut", pairs, method, rule=RankRule(rank=3))
    for module in cut.modules:
        if module.name == "experts":
            continue
        s = np.linalg.svd(whole[module.name], compute_uv=False)
        optimum = np.sqrt(np.sum(s[3:] ** 2) / np.sum(s**2))
        assert module.rank_out == 3
        assert distance(got[module.name], whole[module.name]) == pytest.approx(optimum, rel=1e-6)
