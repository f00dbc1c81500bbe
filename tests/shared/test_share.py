"""Shared sets: what is stored of every adapter, against dense ΔW in float64."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shared_fleets import MODULES, PREFIX, fleet, matrices, write

import loratools as lt
from loratools.algebra.ranks import RankRule, Spectrum
from loratools_formats.disk.errors import (
    AdapterError,
    InexactError,
    LoratoolsError,
    OptionError,
    UnsupportedError,
)

TYPES = {"f32": (np.float32, 2.0**-24), "bf16": (ml_dtypes.bfloat16, 2.0**-8)}


def delta(folder, name):
    """Return ΔW of a PEFT folder with lora_alpha / r, from its bytes alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    key = f"{PREFIX}{name}"
    a, b = (tensors[f"{key}.lora_{half}.weight"].astype(np.float64) for half in "AB")
    return config["lora_alpha"] / config["r"] * (b @ a)


def stored_delta(path, name, place, group=0):
    """Return U Σ Vᵀ of a member from the tensors of a set's file."""
    tensors = load_file(path)
    u, v = (tensors[f"basis.{group}.{side}.{name}"].astype(np.float64) for side in "uv")
    core = tensors[f"cores.{group}.{name}"][place].astype(np.float64)
    return u @ (np.diag(core) if core.ndim == 1 else core) @ v


def relative(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("cores", ["full", "diagonal", "principal"])
def test_errors_are_those_of_what_is_stored(cores, dtype, tmp_path):
    paths = fleet(tmp_path, 5, dtype=TYPES[dtype][0])
    out = tmp_path / "set.safetensors"
    result = lt.fleet_share(paths, cores=cores, rank=4, clusters=1, output=out)
    errors, norms = np.zeros(5), np.zeros(5)
    for module in result.modules:
        for i, path in enumerate(paths):
            true = delta(path, module.name)
            found = stored_delta(out, module.name, i)
            assert module.errors[f"adapter-{i}"] == pytest.approx(relative(found, true), rel=1e-6)
            errors[i] += np.sum((found - true) ** 2)
            norms[i] += np.sum(true**2)
    for i, adapter in enumerate(result.adapters):
        assert adapter.relative_error == pytest.approx((errors[i] / norms[i]) ** 0.5, rel=1e-6)
    assert result.relative_error == pytest.approx((errors.sum() / norms.sum()) ** 0.5, rel=1e-6)
    assert result.bytes_out == out.stat().st_size
    weights = [path / "adapter_model.safetensors" for path in paths]
    assert result.bytes_in == sum(path.stat().st_size for path in weights)


@pytest.mark.parametrize("dtype", TYPES)
def test_one_adapter_at_its_own_rank_keeps_all_but_rounding(dtype, tmp_path):
    kind, unit = TYPES[dtype]
    (path,) = fleet(tmp_path, 1, dtype=kind)
    result = lt.fleet_share([path], rank=8)
    assert [module.rank_out for module in result.modules] == [3, 3, 3]
    assert result.relative_error <= 4 * unit


@pytest.mark.parametrize("dtype", TYPES)
def test_large_bases_keep_all_but_rounding(dtype, tmp_path):
    kind, unit = TYPES[dtype]
    result = lt.fleet_share(fleet(tmp_path, 4, dtype=kind), rank=100, clusters=1)
    assert all(module.rank_out == module.rank_in for module in result.modules)
    assert result.relative_error <= 4 * unit


def test_factors_in_float64_are_kept_in_it(tmp_path):
    paths = fleet(tmp_path, 3, dtype=np.float64)
    assert lt.fleet_share(paths, rank=100, clusters=1).relative_error <= 1e-13


def test_at_one_size_common_spaces_lose_less_than_squeezing_alone(tmp_path):
    paths = fleet(tmp_path, 12, noise=0.05)
    result = lt.fleet_share(paths, rank=6)
    assert result.groups == 1
    assert 2 * result.relative_error < result.alone_error
    assert not result.notes


def test_the_error_alone_is_that_of_the_best_triplets_in_as_many_bytes(tmp_path):
    paths = fleet(tmp_path, 3)
    out = tmp_path / "set.safetensors"
    result = lt.fleet_share(paths, rank=5, clusters=1, weigh="norm", output=out)
    with safe_open(out, "numpy") as file:
        nbytes = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    triplets = []
    for path in paths:
        for name, (rows, columns) in MODULES.items():
            values = np.linalg.svd(delta(path, name), compute_uv=False)[:3]
            triplets += [(-(s**2) / (rows + columns), rows + columns, s**2) for s in values]
    lost = room = 0.0
    for _, numbers, energy in sorted(triplets):
        room += 4 * numbers
        lost += energy if room > nbytes else 0.0
    whole = sum(energy for _, _, energy in triplets)
    assert result.alone_error == pytest.approx((lost / whole) ** 0.5, rel=1e-9)


def test_energy_is_kept(tmp_path):
    paths = fleet(tmp_path, 6)
    for share in (0.5, 0.9, 0.99):
        result = lt.fleet_share(paths, energy=share, clusters=1, weigh="norm")
        for module in result.modules:
            assert module.relative_error**2 <= 1.0 - share + 1e-9


@pytest.mark.parametrize("clusters", [1, 3])
@pytest.mark.parametrize("cores", ["full", "diagonal"])
@pytest.mark.parametrize("budget", ["60%", "75%"])
def test_a_budget_is_kept_and_used(budget, cores, clusters, tmp_path):
    modules = {f"layers.{i}.q_proj": (96, 80) for i in range(2)}
    paths = fleet(tmp_path, 6, modules=modules, rank=8)
    result = lt.fleet_share(paths, budget=budget, cores=cores, clusters=clusters)
    limit = result.bytes_in * float(budget.strip("%")) / 100.0
    assert result.bytes_out <= limit
    whole = all(module.rank_out == module.rank_in for module in result.modules)
    assert whole or result.bytes_out > 0.93 * limit


def test_the_size_of_a_rank_grows_with_its_square():
    spectrum = Spectrum("m", (4, 3), np.ones((1, 2)), 2, 7, bytes_per_square=5, module="path")
    assert (spectrum.nbytes(1), spectrum.nbytes(3)) == (12, 66)
    assert RankRule(patterns=(("^path$", 1),)).of_module(spectrum) == 1


def test_patterns_and_uniform_ranks(tmp_path):
    paths = fleet(tmp_path, 4)
    result = lt.fleet_share(paths, rank=5, rank_pattern={"mlp": 2}, clusters=2)
    assert {m.rank_out for m in result.modules if "mlp" in m.name} == {2}
    assert max(m.rank_out for m in result.modules if "mlp" not in m.name) == 5
    uniform = lt.fleet_share(paths, energy=0.8, uniform=True, clusters=1)
    assert len({m.rank_out for m in uniform.modules}) == 1


def test_families_are_found_by_their_spaces(tmp_path):
    one = fleet(tmp_path / "one", 4, seed=1, noise=0.02)
    other = fleet(tmp_path / "other", 3, seed=2, noise=0.02)
    paths = [one[0], other[0], one[1], other[1], other[2], one[2], one[3]]
    named = {f"{path.parent.name}-{path.name}": path for path in paths}
    for clusters in ("auto", 2):
        result = lt.fleet_share(named, rank=6, clusters=clusters)
        groups = {}
        for adapter in result.adapters:
            groups.setdefault(adapter.name.split("-")[0], set()).add(adapter.group)
        assert groups == {"one": {0}, "other": {1}}


@pytest.mark.parametrize("cores", ["full", "principal"])
def test_moving_adapters_between_groups_lowers_the_error(cores, tmp_path, monkeypatch):
    made = [one for seed in (0, 50) for one in matrices(6, seed=seed, noise=0.8)]
    paths = [write(tmp_path / f"a{i:02}", one) for i, one in enumerate(made)]
    options = {"rank": 4, "clusters": 3, "cores": cores}
    moved = lt.fleet_share(paths, **options, output=tmp_path / "set.safetensors")
    lost = whole = 0.0
    for place, adapter in enumerate(moved.adapters):
        members = [one.name for one in moved.adapters if one.group == adapter.group]
        for name in MODULES:
            dense = delta(paths[place], name)
            at = members.index(adapter.name)
            stored = stored_delta(tmp_path / "set.safetensors", name, at, adapter.group)
            whole += np.linalg.norm(dense) ** 2
            lost += np.linalg.norm(dense - stored) ** 2
    assert moved.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    again = lt.fleet_share(paths[::-1], **options)  # in another order: the same groups
    families = [
        {frozenset(one.name for one in found.adapters if one.group == group) for group in range(3)}
        for found in (moved, again)
    ]
    assert families[0] == families[1]
    monkeypatch.setattr(
        "loratools.operations.shared.operation.reassigned", lambda _, groups, *__: groups
    )
    assert moved.relative_error < 0.96 * lt.fleet_share(paths, **options).relative_error


@pytest.mark.parametrize("rule", [{"rank": 5}, {"budget": "60%"}])
def test_moving_never_raises_the_error(rule, tmp_path, monkeypatch):
    made = matrices(8, seed=3, noise=0.4, common=9)
    paths = [write(tmp_path / f"a{i}", one) for i, one in enumerate(made)]
    moved = lt.fleet_share(paths, **rule, clusters=3, weigh="norm")
    monkeypatch.setattr(
        "loratools.operations.shared.operation.reassigned", lambda _, groups, *__: groups
    )
    first = lt.fleet_share(paths, **rule, clusters=3, weigh="norm")
    assert moved.relative_error <= first.relative_error * (1.0 + 1e-5)


def test_strangers_share_nothing_and_are_told_so(tmp_path):
    wide = {"layers.0.q_proj": (240, 200)}
    made = [matrices(1, seed=seed, common=3, modules=wide)[0] for seed in range(3)]
    paths = [write(tmp_path / f"a{i}", one) for i, one in enumerate(made)]
    result = lt.fleet_share(paths, rank=3)
    assert result.groups == 3
    assert any("share no basis" in note for note in result.notes)


def test_results_do_not_depend_on_threads_or_on_the_split_into_factors(tmp_path):
    made = matrices(4)
    rng = np.random.default_rng(0)
    paths, turned = [], []
    for i, one in enumerate(made):
        paths.append(write(tmp_path / f"a{i}", one, dtype=np.float64))
        mixed = {}
        for name, (b, a) in one.items():
            g = rng.standard_normal((3, 3)) + 3.0 * np.eye(3)
            mixed[name] = (b @ g, np.linalg.inv(g) @ a)
        turned.append(write(tmp_path / f"turned/a{i}", mixed, dtype=np.float64))
    for options in ({"rank": 4}, {"rank": 4, "cores": "diagonal"}, {"energy": 0.8}):
        first = lt.fleet_share(paths, **options, workers=1)
        again = lt.fleet_share(paths, **options, workers=3)
        for key, tensor in first.adapter.carried.items():
            assert bytes(tensor.raw()) == bytes(again.adapter.carried[key].raw())
        other = lt.fleet_share(turned, **options)
        assert [m.rank_out for m in other.modules] == [m.rank_out for m in first.modules]
        loose = 1e-3 if "cores" in options else 1e-6  # least squares stop at 1e-5 of their error
        assert other.relative_error == pytest.approx(first.relative_error, rel=loose)


def test_written_bytes_are_the_same_each_time(tmp_path):
    paths = fleet(tmp_path, 3)
    outs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for out in outs:
        lt.fleet_share(paths, rank=4, output=out)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert (tmp_path / "one.safetensors.provenance.json").exists()


# Taking out.


@pytest.mark.parametrize("cores", ["full", "diagonal"])
def test_what_is_taken_out_is_what_the_set_holds(cores, tmp_path):
    paths = fleet(tmp_path, 4)
    shared = tmp_path / "set.safetensors"
    lt.fleet_share(paths, rank=4, clusters=1, cores=cores, output=shared)
    result = lt.fleet_unshare(shared, all=True, output=tmp_path / "out")
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        f"adapter-{i}" for i in range(4)
    ]
    for i, taken in enumerate(result.adapters):
        assert taken.rank == 4
        adapter = lt.read(tmp_path / "out" / taken.name)
        assert (adapter.format, adapter.base_model) == ("peft", "somebody/base")
        for name in MODULES:
            assert adapter.modules[name].rank == 4
            found, expected = lt.delta(adapter, name), stored_delta(shared, name, i)
            assert relative(found, expected) <= 4 * 2.0**-24


def test_one_adapter_is_taken_into_the_output_itself(tmp_path):
    shared = tmp_path / "set.safetensors"
    lt.fleet_share(fleet(tmp_path, 3), rank=4, output=shared)
    result = lt.fleet_unshare(shared, name="adapter-1", output=tmp_path / "one")
    assert [taken.name for taken in result.adapters] == ["adapter-1"]
    assert list(lt.read(tmp_path / "one").modules) == sorted(MODULES)
    assert (tmp_path / "one" / "provenance.json").exists()


def test_the_type_may_be_another(tmp_path):
    shared = lt.fleet_share(fleet(tmp_path, 3), rank=4, dtype="bf16")
    codes = {tensor.dtype.code for tensor in shared.adapter.carried.values()}
    assert codes == {"BF16"}
    taken = lt.fleet_unshare(shared.adapter, name=["adapter-0"], dtype="f32")
    assert {t.dtype.code for t in taken.made["adapter-0"].tensors()} == {"F32"}
    assert taken.relative_error <= 4 * 2.0**-24


@pytest.mark.parametrize("sample", ["TestPeft", "TestPeftWithBiases"])
def test_other_tensors_come_out_bit_for_bit(tmp_path, sample):
    """Saved modules, biases of factors, convolutions, embeddings, experts, and what is carried."""
    import test_conformance

    folder = tmp_path / "adapter"
    folder.mkdir()
    getattr(test_conformance, sample)().make_sample(folder)
    shared = tmp_path / "set.safetensors"
    result = lt.fleet_share([folder], rank=64, output=shared)
    assert result.relative_error <= 4 * 2.0**-8
    lt.fleet_unshare(shared, name="adapter", dtype="f32", output=tmp_path / "out")
    before, after = lt.read(folder), lt.read(tmp_path / "out")
    assert set(after.modules) == set(before.modules)
    assert set(after.replacements) == set(before.replacements)
    assert set(after.carried) == set(before.carried)
    for key, entry in before.replacements.items():
        other = after.replacements[key]
        assert (other.kind, other.target, other.rows) == (entry.kind, entry.target, entry.rows)
        assert bytes(other.tensor.raw()) == bytes(entry.tensor.raw())
    for key, tensor in before.carried.items():
        assert bytes(after.carried[key].raw()) == bytes(tensor.raw())
    for name, change in before.modules.items():
        assert after.modules[name].layer == change.layer
        assert relative(lt.delta(after, name), lt.delta(before, name)) <= 4 * 2.0**-8
        one, other = (each.modules[name].require_factors() for each in (before, after))
        if one.bias is not None:
            np.testing.assert_allclose(
                other.scale * other.bias.load(np.float64),
                one.scale * one.bias.load(np.float64),
                rtol=2.0**-8,
            )


def test_an_adapter_without_a_module_comes_out_without_it(tmp_path):
    paths = fleet(tmp_path, 3)
    narrow = {name: pair for name, pair in matrices(1)[0].items() if "mlp" not in name}
    paths.append(write(tmp_path / "narrow", narrow))
    shared = tmp_path / "set.safetensors"
    lt.fleet_share(paths, rank=4, clusters=1, output=shared)
    taken = lt.fleet_unshare(shared, all=True, output=tmp_path / "out")
    modules = {each.name: set(taken.made[each.name].modules) for each in taken.adapters}
    assert modules["narrow"] == set(narrow)
    assert modules["adapter-0"] == set(MODULES)


# Adding.


@pytest.mark.parametrize("cores", ["full", "diagonal"])
def test_a_member_that_is_added_again_gets_the_core_that_it_has(cores, tmp_path):
    paths = fleet(tmp_path, 4)
    shared, more = tmp_path / "set.safetensors", tmp_path / "more.safetensors"
    first = lt.fleet_share(paths, rank=4, clusters=1, cores=cores, output=shared)
    added = lt.fleet_add(shared, paths[2], name="again", output=more)
    assert added.relative_error == pytest.approx(first.adapters[2].relative_error, rel=1e-9)
    before, after = load_file(shared), load_file(more)
    for key, tensor in before.items():
        if key.startswith("cores."):
            np.testing.assert_array_equal(after[key][:4], tensor)
            np.testing.assert_array_equal(after[key][4], tensor[2])
        else:
            np.testing.assert_array_equal(after[key], tensor)
    lt.fleet_unshare(more, name="again", output=tmp_path / "again")
    lt.fleet_unshare(more, name="adapter-2", output=tmp_path / "adapter")
    weights = "adapter_model.safetensors"
    one, other = (load_file(tmp_path / name / weights) for name in ("again", "adapter"))
    assert all(np.array_equal(one[key], other[key]) for key in other)


def test_the_error_of_a_newcomer_is_that_of_the_projection(tmp_path):
    paths = fleet(tmp_path, 5)
    shared, more = tmp_path / "set.safetensors", tmp_path / "more.safetensors"
    lt.fleet_share(paths[:4], rank=5, clusters=1, output=shared)
    added = lt.fleet_add(shared, paths[4], output=more)
    for module in added.modules:
        true = delta(paths[4], module.name)
        tensors = load_file(shared)
        u, v = (tensors[f"basis.0.{side}.{module.name}"].astype(np.float64) for side in "uv")
        best = u @ np.linalg.pinv(u) @ true @ np.linalg.pinv(v) @ v
        found = stored_delta(more, module.name, 4)
        assert module.relative_error == pytest.approx(relative(found, true), rel=1e-6)
        assert module.relative_error == pytest.approx(relative(best, true), rel=1e-5)


def test_a_newcomer_joins_the_group_that_fits_it(tmp_path):
    one = fleet(tmp_path / "one", 3, seed=1, noise=0.02)
    other = matrices(5, seed=2, noise=0.02)
    others = [write(tmp_path / f"other-{i}", each) for i, each in enumerate(other)]
    shared = lt.fleet_share([*one, *others[:4]], rank=6, clusters=2)
    added = lt.fleet_add(shared.adapter, others[4])
    assert added.group == {a.name: a.group for a in shared.adapters}["other-0"]
    assert added.group_errors[added.group] == added.relative_error == min(added.group_errors)
    forced = lt.fleet_add(shared.adapter, others[4], group=1 - added.group)
    assert forced.relative_error > added.relative_error


# Refusals.


def refused(kind, match, call, hint=None):
    with pytest.raises(kind, match=match) as caught:
        call()
    if hint is not None:
        assert hint in str(caught.value), str(caught.value)


def test_other_bases_are_refused_unless_forced(tmp_path):
    paths = fleet(tmp_path, 2)
    other = write(tmp_path / "b", matrices(1)[0], base_model_name_or_path="another/base")
    refused(
        OptionError, "different base models", lambda: lt.fleet_share([*paths, other], rank=4),
        "force_base",
    )  # fmt: skip
    assert lt.fleet_share([*paths, other], rank=4, force_base=True).adapters
    shared = lt.fleet_share(paths, rank=4)
    refused(OptionError, "different base", lambda: lt.fleet_add(shared.adapter, other))


def test_modules_of_another_shape_are_refused(tmp_path):
    shapes = {name: (out, in_ + 2) for name, (out, in_) in MODULES.items()}
    paths = [*fleet(tmp_path, 2), write(tmp_path / "wide", matrices(1, modules=shapes)[0])]
    refused(AdapterError, "differs between", lambda: lt.fleet_share(paths, rank=4))
    shared = lt.fleet_share(paths[:2], rank=4)
    refused(AdapterError, "differs between", lambda: lt.fleet_add(shared.adapter, paths[2]))


def test_adapters_of_other_modules_are_refused_unless_allowed(tmp_path):
    shapes = {f"other.{name}": shape for name, shape in MODULES.items()}
    paths = [*fleet(tmp_path, 2), write(tmp_path / "other", matrices(1, modules=shapes)[0])]
    refused(
        AdapterError, "no module with the others", lambda: lt.fleet_share(paths, rank=4),
        "allow_missing",
    )  # fmt: skip
    assert lt.fleet_share(paths, rank=4, allow_missing=True).adapters
    shared = lt.fleet_share(paths[:2], rank=4)
    refused(
        AdapterError, "no bases for 3 of", lambda: lt.fleet_add(shared.adapter, paths[2]), "drop"
    )


def test_doras_zeros_and_other_kinds_are_refused_with_the_way_out(tmp_path):
    paths = fleet(tmp_path, 2)
    magnitudes = {
        f"{PREFIX}{name}.lora_magnitude_vector": np.ones(out, np.float32)
        for name, (out, _) in MODULES.items()
    }
    dora = write(tmp_path / "dora", matrices(1)[0], extra=magnitudes, use_dora=True)
    refused(UnsupportedError, "DoRA", lambda: lt.fleet_share([*paths, dora], rank=4), "to-lora")
    zero = {name: (0.0 * b, a) for name, (b, a) in matrices(1)[0].items()}
    zero = write(tmp_path / "zero", zero)
    refused(AdapterError, "changes nothing", lambda: lt.fleet_share([*paths, zero], rank=4))
    some = {name: (b * ("mlp" in name), a) for name, (b, a) in matrices(1)[0].items()}
    some = write(tmp_path / "some", some)
    result = lt.fleet_share([*paths, some], rank=4, clusters=1)
    assert all(np.isfinite(list(module.errors.values())).all() for module in result.modules)
    refused(
        AdapterError, "changes nothing",
        lambda: lt.fleet_share([*paths, some], rank=4, drop="mlp"),
    )  # fmt: skip


def test_values_that_are_not_finite_are_refused(tmp_path):
    made = matrices(1)[0]
    made["layers.0.mlp.down_proj"][0][0, 0] = np.nan
    paths = [*fleet(tmp_path, 2), write(tmp_path / "nan", made)]
    refused(AdapterError, "NaN", lambda: lt.fleet_share(paths, rank=4))


def test_options_that_do_not_fit(tmp_path):
    paths = fleet(tmp_path, 2)
    refused(OptionError, "no rule", lambda: lt.fleet_share(paths), "rank=64")
    refused(
        OptionError, "diagonal ones keep less",
        lambda: lt.fleet_share(paths, energy=0.9, cores="diagonal"),
    )  # fmt: skip
    refused(OptionError, "too small", lambda: lt.fleet_share(paths, budget="1kB"))
    refused(OptionError, "too few groups", lambda: lt.fleet_share(paths, rank=4, clusters=0))
    refused(OptionError, "matches no module", lambda: lt.fleet_share(paths, rank_pattern={"x": 1}))
    refused(OptionError, "one safetensors file",
            lambda: lt.fleet_share(paths, rank=4, output=tmp_path / "out"))  # fmt: skip
    refused(InexactError, "above the limit", lambda: lt.fleet_share(paths, rank=1, max_error=0.01))
    shared = lt.fleet_share(paths, rank=4).adapter
    refused(OptionError, "no such adapter", lambda: lt.fleet_unshare(shared, name="x"), "adapter-0")
    refused(OptionError, "no adapter of the set is named", lambda: lt.fleet_unshare(shared))
    refused(OptionError, "twice", lambda: lt.fleet_unshare(shared, name="adapter-0", all=True))
    refused(OptionError, "of that name", lambda: lt.fleet_add(shared, paths[0]), "name")
    refused(OptionError, "no such group", lambda: lt.fleet_add(shared, paths[0], name="x", group=7))
    refused(UnsupportedError, "not a shared set", lambda: lt.fleet_unshare(paths[0], all=True))
    assert not list(tmp_path.glob("out*"))


def test_a_set_is_recognised_described_and_refused_elsewhere(tmp_path):
    path = tmp_path / "set.safetensors"
    lt.fleet_share(fleet(tmp_path, 3), rank=4, output=path)
    info = lt.info(path)
    assert (info.format, info.base_model) == ("shared-set", "somebody/base")
    assert any("adapter-0, adapter-1, adapter-2" in each.message for each in info.findings)
    for call in (
        lambda: lt.squeeze(path, rank=2),
        lambda: lt.merge([path, tmp_path / "adapter-0"]),
        lambda: lt.convert(path, to="peft"),
        lambda: lt.fleet_share([path], rank=2),
    ):
        refused(UnsupportedError, "shared set", call, "fleet unshare")
    refused(
        UnsupportedError, "several adapters together",
        lambda: lt.convert(tmp_path / "adapter-0", to="shared-set"), "fleet share",
    )  # fmt: skip
    assert [each.code for each in lt.check(path).findings] == ["LT015", "LT015"]


def changed(source, target, *, tensors=None, text=None, **entries):
    """Write a copy of a set with other tensors or metadata."""
    with safe_open(source, "numpy") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    metadata["shared_set"] = text or json.dumps(json.loads(metadata["shared_set"]) | entries)
    save_file((tensors or (lambda found: found))(held), target, metadata=metadata)
    return target


def without(key):
    return lambda found: {name: tensor for name, tensor in found.items() if key not in name}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"text": "{"}, "no JSON object"),
        ({"text": "[]"}, "no JSON object"),
        ({"text": "{}"}, "no JSON object"),
        ({"version": 2}, "another version"),
        ({"cores": "cubic"}, "misstate"),
        ({"members": []}, "misstate|no members|other"),
        ({"members": [{"name": "x"}]}, "misstate"),
        ({"configs": []}, "misstate"),
        ({"configs": [{"peft_type": "LOHA"}]}, "peft_type 'LOHA'"),
        ({"configs": [{"peft_type": None}]}, "peft_type None"),
        ({"tensors": lambda found: found | {"bias.0.x": np.ones(2)}}, "biases of modules"),
        ({"tensors": lambda found: found | {"own.9.x": np.ones(2)}}, "do not mention"),
        ({"modules": "x"}, "misstate"),
        ({"tensors": without("cores.0.layers.0.mlp")}, "no such tensor"),
        ({"tensors": without("basis.0.u.layers.1")}, "no such tensor"),
        ({"tensors": lambda found: found | {"x": np.ones(2)}}, "do not mention"),
        (
            {"tensors": lambda found: {
                key: tensor[:, :-1] if key.startswith("cores") else tensor
                for key, tensor in found.items()
            }},
            "cores of shape",
        ),
    ],
)  # fmt: skip
def test_files_that_are_not_sound_are_refused(change, match, tmp_path):
    path = tmp_path / "set.safetensors"
    lt.fleet_share(fleet(tmp_path, 2), rank=4, clusters=1, output=path)
    broken = changed(path, tmp_path / "broken.safetensors", **change)
    with pytest.raises(LoratoolsError, match=match):
        lt.fleet_unshare(broken, all=True)


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "a\\b", "a\nb", "x" * 300, 3])
def test_names_that_lead_elsewhere_are_refused(name, tmp_path):
    path = tmp_path / "set.safetensors"
    lt.fleet_share(fleet(tmp_path, 1), rank=4, output=path)
    member = {"config": 0, "group": 0, "name": name, "relative_error": "0", "replacements": {}}
    broken = changed(path, tmp_path / "broken.safetensors", members=[member])
    with pytest.raises(AdapterError, match="misstate"):
        lt.fleet_unshare(broken, all=True, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_clash_are_told_apart(tmp_path):
    paths = fleet(tmp_path / "x", 1) + fleet(tmp_path / "y", 1, seed=1)
    result = lt.fleet_share(paths, rank=4)
    assert [each.name for each in result.adapters] == ["x-adapter-0", "y-adapter-0"]


def test_inputs_stay_and_outputs_need_leave(tmp_path):
    paths = fleet(tmp_path, 2)
    before = [(path / "adapter_model.safetensors").read_bytes() for path in paths]
    out = tmp_path / "set.safetensors"
    lt.fleet_share(paths, rank=4, output=out)
    refused(LoratoolsError, "exists", lambda: lt.fleet_share(paths, rank=4, output=out))
    refused(LoratoolsError, "input", lambda: lt.fleet_add(out, paths[0], name="x", output=out,
                                                          overwrite=True))  # fmt: skip
    shutil.copytree(paths[0], tmp_path / "taken")
    refused(LoratoolsError, "exists",
            lambda: lt.fleet_unshare(out, all=True, output=tmp_path / "taken"))  # fmt: skip
    assert before == [(path / "adapter_model.safetensors").read_bytes() for path in paths]


def test_other_formats_are_shared_under_pefts_names(tmp_path):
    llama = "examples/tiny-llama/lora"
    lt.convert(llama, to="mlx", output=tmp_path / "mlx")
    lt.convert(llama, to="safetensors", output=tmp_path / "file.safetensors")
    shared = tmp_path / "set.safetensors"
    paths = [llama, tmp_path / "mlx", tmp_path / "file.safetensors"]
    result = lt.fleet_share(paths, rank=32, output=shared)
    assert [each.name for each in result.adapters] == ["lora", "mlx", "file"]
    assert (result.groups, len(result.modules)) == (1, 28)
    assert result.relative_error < 0.01
    taken = lt.fleet_unshare(shared, name="file").made["file"]
    true = lt.read(llama)
    for name in true.modules:
        assert relative(lt.delta(taken, name), lt.delta(true, name)) < 0.01


def test_a_kohya_file_comes_out_as_peft_has_it(tmp_path):
    file = "examples/tiny-flux/kohya.safetensors"
    shared = lt.fleet_share([file], rank=64, dtype="f32")
    lt.convert(file, to="peft", output=tmp_path / "peft")
    expected = lt.read(tmp_path / "peft")
    taken = lt.fleet_unshare(shared.adapter, name="kohya").made["kohya"]
    assert set(taken.modules) == set(expected.modules)
    for name in expected.modules:
        assert relative(lt.delta(taken, name), lt.delta(expected, name)) < 1e-5


@pytest.mark.parametrize("named", [False, True])
def test_what_was_done_can_be_done_again_from_the_record(named, tmp_path):
    paths = fleet(tmp_path, 3)
    shared, more, taken = (tmp_path / name for name in ("s.safetensors", "m.safetensors", "out"))
    given = {f"name-{i}": path for i, path in enumerate(paths[:2])} if named else paths[:2]
    lt.fleet_share(given, rank=4, cores="diagonal", output=shared)
    lt.fleet_add(shared, paths[2], name="new", output=more)
    lt.fleet_unshare(more, name="new", dtype="bf16", output=taken)
    lt.fleet_unshare(more, all=True, output=tmp_path / "all")
    for made in (shared, more, taken, tmp_path / "all" / "new"):
        result = lt.replay(made, input=[tmp_path])
        assert result.identical, result


def test_more_adapters_than_files_may_be_open_at_first(tmp_path):
    import resource

    others = [open(__file__) for _ in range(200)]  # noqa: SIM115 - of a process that does more

    (path,) = fleet(tmp_path / "one", 1, modules={"layers.0.q_proj": (8, 6)}, rank=1, common=2)
    paths = [tmp_path / f"adapter-{i}" for i in range(150)]
    for each in paths:
        shutil.copytree(path, each)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (340, before[1]))
    try:
        result = lt.fleet_share(paths, rank=1, clusters=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for other in others:
            other.close()
    assert len(result.adapters) == 150
    assert result.relative_error < 1e-6


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.9}, {"budget": "300%"}])
@pytest.mark.parametrize("cores", ["full", "diagonal", "principal"])
def test_a_module_that_no_adapter_of_a_group_changes_stays_zero(cores, rule, tmp_path):
    if cores == "diagonal" and "energy" in rule:
        pytest.skip("no such rule")
    paths = fleet(tmp_path, 3)
    zero = next(iter(MODULES))
    for path in paths[:2]:
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[f"{PREFIX}{zero}.lora_B.weight"] *= 0.0
        save_file(tensors, file, metadata={"format": "pt"})
    for given, groups in ((paths[:2], 1), (paths, 3)):
        out = tmp_path / f"set-{groups}.safetensors"
        result = lt.fleet_share(given, cores=cores, **rule, clusters=groups, output=out)
        assert result.groups == groups
        lt.fleet_unshare(out, all=True, output=tmp_path / f"out-{groups}")
        for path, adapter in zip(given, result.adapters, strict=True):
            folder = tmp_path / f"out-{groups}" / path.name
            found, true = ([delta(one, name) for name in MODULES] for one in (folder, path))
            error = sum(np.sum((x - y) ** 2) for x, y in zip(found, true, strict=True)) ** 0.5
            norm = sum(np.sum(x**2) for x in true) ** 0.5
            assert error / norm == pytest.approx(adapter.relative_error, rel=1e-5, abs=1e-6)
            assert path == paths[-1] or not delta(folder, zero).any()
