"""Squeeze against dense float64 truncation, and what it must leave alone."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from whole_delta import effective_delta

from loratools.algebra.ranks import Budget, RankRule
from loratools.lowrank.initial import subtract_initial
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.squeeze import rank_choices, squeeze
from loratools.work.selection import Selection
from loratools_formats import read_adapter, write_adapter
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError

MODULES = {"layers.0.q": (24, 20, 8), "layers.1.q": (24, 20, 8), "layers.1.down": (16, 40, 8)}


def deltas(adapter):
    return {
        name: effective_delta(name, delta, delta.shape) for name, delta in adapter.modules.items()
    }


def written(result, path):
    write_adapter(result.adapter, path, "peft")
    return read_adapter(path)


def total_error(before, after):
    lost = sum(np.linalg.norm(before[n] - after[n]) ** 2 for n in before)
    return math.sqrt(lost / sum(np.linalg.norm(d) ** 2 for d in before.values()))


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_error_is_the_discarded_spectrum(make_folder, tmp_path, dtype, rank):
    source = read_adapter(make_folder(modules=MODULES, dtype=dtype))
    result = squeeze(source, RankRule(rank=rank))
    before, after = deltas(source), deltas(written(result, tmp_path / "out"))
    for module in result.modules:
        s = np.linalg.svd(before[module.name], compute_uv=False)
        want = math.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2))
        assert module.relative_error == pytest.approx(want, abs=1e-6)
        assert module.energy == pytest.approx(1 - want**2, abs=1e-9)
        u, s, vt = np.linalg.svd(before[module.name])
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert np.linalg.norm(after[module.name] - best) <= 1e-6 * np.linalg.norm(best)
    assert result.relative_error == pytest.approx(total_error(before, after), rel=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64"])
@pytest.mark.parametrize("out_dtype", [None, "bf16", "f16", "f32"])
@pytest.mark.parametrize("rank", [2, 8])
def test_reported_error_is_that_of_the_written_file(make_folder, tmp_path, dtype, out_dtype, rank):
    source = read_adapter(make_folder(modules=MODULES, dtype=dtype))
    result = squeeze(source, RankRule(rank=rank), ComputeOptions(dtype=out_dtype))
    before, after = deltas(source), deltas(written(result, tmp_path / "out"))
    true = total_error(before, after)
    assert result.relative_error == pytest.approx(true, rel=1e-4, abs=1e-14)
    if out_dtype is not None:
        types = {t.dtype.code for t in read_adapter(tmp_path / "out").tensors()}
        assert types == {out_dtype.upper()}
    if rank == 8 and (out_dtype in (None, dtype) or (out_dtype == "f32" and dtype != "f64")):
        assert true == 0.0


scalings = st.sampled_from(
    [
        {"lora_alpha": 16},
        {"lora_alpha": 11},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 3.7, "alpha_pattern": {"layers.1.q": 5, "down": 2.5}},
        {"use_rslora": True, "alpha_pattern": {r"layers\.0\..*": 1}},
    ]
)


@pytest.mark.slow
@given(scalings, st.sampled_from(["bf16", "f32"]), st.integers(0, 5))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_full_rank_is_the_identity(make_folder, tmp_path, scaling, dtype, seed):
    name = f"case-{len(list(tmp_path.iterdir()))}"
    folder = make_folder(name, modules=MODULES, dtype=dtype, seed=seed, **scaling)
    source = read_adapter(folder)
    result = squeeze(source, RankRule(rank=8))
    after = written(result, tmp_path / f"{name}-out")
    assert result.relative_error == 0.0
    assert dict(after.config) == dict(source.config)
    old = {t.key: bytes(t.raw()) for t in source.tensors()}
    assert {t.key: bytes(t.raw()) for t in after.tensors()} == old


def test_scales_become_one(make_folder, tmp_path):
    source = read_adapter(
        make_folder(
            modules=MODULES, use_rslora=True, lora_alpha=5, alpha_pattern={"down": 9}, dtype="f32"
        )
    )
    after = written(squeeze(source, RankRule(energy=0.9)), tmp_path / "out")
    assert {d.require_factors().scale for d in after.modules.values()} == {1.0}
    assert after.config["use_rslora"] is False
    assert len({d.require_factors().rank for d in after.modules.values()}) > 1


def test_keep_alpha(make_folder, tmp_path):
    source = read_adapter(
        make_folder(modules=MODULES, lora_alpha=12, alpha_pattern={"down": 3}, dtype="f32")
    )
    result = squeeze(source, RankRule(rank=3), ComputeOptions(keep_alpha=True))
    after = written(result, tmp_path / "out")
    assert {n: d.require_factors().alpha for n, d in after.modules.items()} == {
        "layers.0.q": 12,
        "layers.1.q": 12,
        "layers.1.down": 3,
    }
    error = total_error(deltas(source), deltas(after))
    assert result.relative_error == pytest.approx(error, rel=1e-4)
    assert error < 0.3


def test_kept_module_takes_a_power_of_two_into_its_factor(make_folder, tmp_path):
    source = read_adapter(make_folder(modules=MODULES, lora_alpha=32))
    rule = RankRule(rank=8, patterns=(("down", 2),))
    after = written(squeeze(source, rule), tmp_path / "out")
    assert {d.require_factors().scale for d in after.modules.values()} == {1.0}
    before, now = deltas(source), deltas(after)
    assert np.array_equal(before["layers.0.q"], now["layers.0.q"])
    assert "alpha_pattern" not in json.dumps(after.config["alpha_pattern"])


def test_kept_module_keeps_another_scale(make_folder, tmp_path):
    source = read_adapter(make_folder(modules=MODULES, lora_alpha=11))
    rule = RankRule(rank=8, patterns=(("down", 2),))
    after = written(squeeze(source, rule), tmp_path / "out")
    kept = after.modules["layers.0.q"].direction
    assert kept.scale == 11 / 8
    assert bytes(kept.b.raw()) == bytes(source.modules["layers.0.q"].direction.b.raw())


def test_excluded_modules_keep_every_bit(make_folder, tmp_path):
    source = read_adapter(make_folder(modules=MODULES, lora_alpha=32))
    result = squeeze(source, RankRule(rank=2), selection=Selection("layers", "down"))
    after = written(result, tmp_path / "out")
    ranks = {n: d.require_factors().rank for n, d in after.modules.items()}
    assert ranks == {"layers.0.q": 2, "layers.1.q": 2, "layers.1.down": 8}
    old, new = (each.modules["layers.1.down"].direction for each in (source, after))
    assert (bytes(new.a.raw()), bytes(new.b.raw())) == (bytes(old.a.raw()), bytes(old.b.raw()))
    assert new.scale == old.scale


def test_uniform_gives_one_rank_and_no_patterns(make_folder, tmp_path):
    modules = {"layers.0.q": (24, 20, 4), "layers.1.q": (24, 20, 8)}
    folder = make_folder(
        modules=modules, lora_alpha=11, rank_pattern={"layers.0.q": 4}, dtype="f32"
    )
    source = read_adapter(folder)
    rule = RankRule(rank=8, patterns=((r"1\.q", 6),), uniform=True)
    result = squeeze(source, rule)
    after = written(result, tmp_path / "out")
    assert (after.config["r"], after.config["lora_alpha"]) == (6, 6)
    assert after.config["rank_pattern"] == {}
    assert after.config["alpha_pattern"] == {}
    assert {d.require_factors().rank for d in after.modules.values()} == {6}
    error = total_error(deltas(source), deltas(after))
    assert result.relative_error == pytest.approx(error, rel=1e-4)


def test_serve_ranks_pad_with_zeros_without_loss(make_folder, tmp_path):
    source = read_adapter(make_folder(modules={"q": (40, 30, 12)}, r=12, lora_alpha=24))
    result = squeeze(source, RankRule(rank=12, serve=True))
    after = written(result, tmp_path / "out")
    assert after.modules["q"].require_factors().rank == 16
    assert result.relative_error == 0.0
    assert np.array_equal(deltas(after)["q"], deltas(source)["q"])


def test_budget_bounds_the_file(make_folder, tmp_path):
    modules = {f"layers.{i}.q": (300, 200, 8) for i in range(6)}
    folder = make_folder(modules=modules)
    size = (folder / "adapter_model.safetensors").stat().st_size
    for share in (0.2, 0.5, 0.9):
        out = tmp_path / f"out{share}"
        result = squeeze(read_adapter(folder), RankRule(budget=Budget(share=share)))
        write_adapter(result.adapter, out, "peft")
        got = (out / "adapter_model.safetensors").stat().st_size
        assert share * size - 6000 < got <= share * size


def test_bytes_do_not_depend_on_workers(make_folder, tmp_path):
    folder = make_folder(modules={f"layers.{i}.q": (60, 50, 8) for i in range(12)})
    contents = []
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        options = ComputeOptions(workers=workers, method="rsvd", seed=3)
        result = squeeze(read_adapter(folder), RankRule(energy=0.8), options)
        write_adapter(result.adapter, out, "peft")
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] == contents[2]


def test_squeezing_twice_changes_nothing_more(make_folder, tmp_path):
    source = read_adapter(make_folder(modules=MODULES, dtype="f32"))
    once = written(squeeze(source, RankRule(rank=4)), tmp_path / "one")
    twice = written(squeeze(once, RankRule(rank=4)), tmp_path / "two")
    old = {t.key: bytes(t.raw()) for t in once.tensors()}
    assert {t.key: bytes(t.raw()) for t in twice.tensors()} == old


def test_rank_choices_are_the_errors_of_those_ranks(make_folder):
    source = read_adapter(make_folder(modules=MODULES, dtype="f32"))
    size = (source.source / "adapter_model.safetensors").stat().st_size
    rows = rank_choices(source)
    assert [row.rank for row in rows] == [1, 2, 4, 8]
    assert rows[-1].nbytes == size
    for row in rows[:-1]:
        result = squeeze(source, RankRule(rank=row.rank))
        assert row.relative_error == pytest.approx(result.relative_error, rel=1e-5)


def test_lora_bias_keeps_its_effect(make_folder, tmp_path):
    bias = np.arange(24, dtype=np.float32)
    extra = {"base_model.model.layers.0.q.lora_B.bias": bias}
    source = read_adapter(make_folder(dtype="f32", extra=extra, lora_bias=True, lora_alpha=12))
    after = written(squeeze(source, RankRule(rank=2)), tmp_path / "out").modules["layers.0.q"]
    after = after.require_factors()
    np.testing.assert_allclose(after.scale * after.bias.load(), 1.5 * bias, rtol=1e-7)


def test_wide_layers_of_small_features_reach_no_more_than_they_can(make_folder, tmp_path):
    source = read_adapter(make_folder(modules={"q": (5, 6, 8)}, dtype="f32"))
    rows = rank_choices(source)
    assert rows[-1].rank == 8
    after = written(squeeze(source, RankRule(rank=7)), tmp_path / "out")
    assert total_error(deltas(source), deltas(after)) < 1e-6


def test_untrained_adapter(make_folder, tmp_path):
    zero = {"base_model.model.layers.0.q.lora_B.weight": np.zeros((24, 8), np.float32)}
    source = read_adapter(make_folder(dtype="f32", extra=zero))
    result = squeeze(source, RankRule(energy=0.9))
    assert result.relative_error == 0.0
    assert result.modules[0].rank_out == 1
    assert not deltas(written(result, tmp_path / "out"))["layers.0.q"].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_refused_by_name(make_folder, bad):
    key = "base_model.model.layers.0.q.lora_A.weight"
    values = np.ones((8, 20), np.float32)
    values[3, 4] = bad
    source = read_adapter(make_folder(dtype="f32", extra={key: values}))
    with pytest.raises(AdapterError, match="NaN or infinite") as caught:
        squeeze(source, RankRule(rank=2))
    assert caught.value.tensor == key


def test_values_beyond_the_dtype_are_refused(make_folder):
    key = "base_model.model.layers.0.q.lora_B.weight"
    source = read_adapter(make_folder(dtype="f32", extra={key: np.full((24, 8), 1e12, np.float32)}))
    with pytest.raises(AdapterError, match=r"do not fit dtype F16.*`dtype=bf16`"):
        squeeze(source, RankRule(rank=2), ComputeOptions(dtype="f16"))


def test_nothing_selected_is_an_error(make_folder):
    source = read_adapter(make_folder())
    with pytest.raises(AdapterError, match="no module to squeeze"):
        squeeze(source, RankRule(rank=2), selection=Selection(include="nothing"))


def test_bad_options():
    for kwargs in ({"oversample": -1}, {"seed": -1}, {"workers": 0}):
        with pytest.raises(OptionError):
            ComputeOptions(**kwargs)
    with pytest.raises(OptionError, match="regular expression"):
        Selection(include="(")


def test_missing_device_is_an_option_error(make_folder):
    with pytest.raises(OptionError, match="no cuda device"):
        squeeze(read_adapter(make_folder()), RankRule(rank=2), ComputeOptions(device="cuda"))


def test_changed_base_is_refused_until_its_initial_adapter_is_given(make_folder, tmp_path):
    folder = make_folder("trained", dtype="f32", init_lora_weights="pissa", lora_alpha=12)
    first = make_folder("first", dtype="f32", seed=1, init_lora_weights=True, lora_alpha=12)
    source, initial = read_adapter(folder), read_adapter(first)
    with pytest.raises(UnsupportedError, match=r"init_lora_weights 'pissa'.*`initial`"):
        squeeze(source, RankRule(rank=2))
    true = subtract_initial(source, initial)
    want = deltas(source)["layers.0.q"] - deltas(initial)["layers.0.q"]
    np.testing.assert_allclose(deltas(true)["layers.0.q"], want, atol=1e-12)
    result = squeeze(true, RankRule(rank=8))
    after = written(result, tmp_path / "out")
    assert after.config["init_lora_weights"] is True
    assert after.caveats == ()
    s = np.linalg.svd(want, compute_uv=False)
    assert result.relative_error == pytest.approx(
        math.sqrt(np.sum(s[8:] ** 2) / np.sum(s**2)), rel=1e-5
    )


def test_initial_adapter_must_belong(make_folder):
    source = read_adapter(make_folder("trained", init_lora_weights="olora"))
    plain = read_adapter(make_folder("plain"))
    other = read_adapter(make_folder("other", modules={"layers.9.q": (24, 20, 8)}))
    scaled = read_adapter(make_folder("scaled", seed=1, lora_alpha=3))
    pissa = read_adapter(make_folder("other-kind", seed=1, init_lora_weights="pissa"))
    with pytest.raises(AdapterError, match="other modules"):
        subtract_initial(source, other)
    with pytest.raises(AdapterError, match="another shape or scale"):
        subtract_initial(source, scaled)
    with pytest.raises(AdapterError, match="of another kind"):
        subtract_initial(source, pissa)
    with pytest.raises(AdapterError, match="equals the trained one"):
        subtract_initial(source, plain)
    with pytest.raises(OptionError, match="not trained against a changed base"):
        subtract_initial(plain, plain)


def test_file_changed_during_the_operation_is_noticed(make_folder, tmp_path):
    folder = make_folder()
    result = squeeze(read_adapter(folder), RankRule(rank=2))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(AdapterError, match="changed while"):
        write_adapter(result.adapter, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_result_is_frozen(make_folder):
    result = squeeze(read_adapter(make_folder()), RankRule(rank=2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.relative_error = 0.0


def weights_nbytes(path):
    return (path / "adapter_model.safetensors").stat().st_size


def test_budget_holds_where_the_factors_are_not_those_of_the_file(make_folder, tmp_path):
    modules = {f"layers.{i}.q": (300, 200, 8) for i in range(6)}
    folder = make_folder("trained", modules=modules, init_lora_weights="pissa")
    first = make_folder("first", modules=modules, seed=1)
    true = subtract_initial(read_adapter(folder), read_adapter(first))
    assert all(row.nbytes > 0 for row in rank_choices(true))
    result = squeeze(true, RankRule(budget=Budget(share=0.5)))
    write_adapter(result.adapter, tmp_path / "out", "peft")
    assert 0.4 * weights_nbytes(folder) < weights_nbytes(tmp_path / "out")
    assert weights_nbytes(tmp_path / "out") <= 0.5 * weights_nbytes(folder)


def test_provenance_tells_the_initial_adapter_apart(make_folder):
    source = read_adapter(make_folder("trained", init_lora_weights="pissa"))
    initial = read_adapter(make_folder("first", seed=1))
    result = squeeze(subtract_initial(source, initial), RankRule(rank=2))
    recorded = json.loads(result.adapter.metadata["loratools.inputs"])
    weights = "adapter_model.safetensors"
    assert recorded[f"adapter/{weights}"] == source.inputs[0].sha256()
    assert recorded[f"initial/{weights}"] == initial.inputs[0].sha256()


def test_values_that_lose_their_digits_in_the_dtype_are_refused(make_folder):
    key = "base_model.model.layers.0.q.lora_B.weight"
    tiny = np.full((24, 8), 1e-12, np.float32)
    source = read_adapter(make_folder(dtype="f32", extra={key: tiny}))
    with pytest.raises(AdapterError, match="24 values lose most of their digits in dtype F16"):
        squeeze(source, RankRule(rank=2), ComputeOptions(dtype="f16"))
    assert squeeze(source, RankRule(rank=2), ComputeOptions(dtype="bf16")).relative_error < 0.01


@pytest.mark.parametrize(
    ("value", "problem"),
    [(3.4e38, "values do not fit dtype F32"), (1e-45, "[1-9]\\d* values .* in dtype F32")],
)
def test_what_no_type_holds_is_refused_without_naming_one(make_folder, value, problem):
    key = "base_model.model.layers.0.q.lora_B.weight"
    rng = np.random.default_rng(0)
    edge = (value * rng.uniform(0.5, 1.0, (24, 8))).astype(np.float32)
    extra = {key: edge, key.replace("lora_B", "lora_A"): np.full((8, 20), value, np.float32)}
    source = read_adapter(make_folder(dtype="f32", extra=extra))
    with pytest.raises(AdapterError, match=problem) as told:
        squeeze(source, RankRule(rank=2))
    assert told.value.hint is None


def test_nan_in_a_bias_is_named(make_folder):
    key = "base_model.model.layers.0.q.lora_B.bias"
    extra = {key: np.full(24, np.nan, np.float32)}
    source = read_adapter(make_folder(dtype="f32", extra=extra, lora_bias=True))
    with pytest.raises(AdapterError, match="bias holds NaN") as caught:
        squeeze(source, RankRule(rank=2))
    assert caught.value.tensor == key


def test_options_that_contradict_each_other_are_refused(make_folder):
    source = read_adapter(make_folder(modules=MODULES, alpha_pattern={"down": 3}))
    uniform = RankRule(rank=2, uniform=True)
    with pytest.raises(OptionError, match="changes all modules"):
        squeeze(source, uniform, selection=Selection(include="q"))
    with pytest.raises(OptionError, match="needs one scale"):
        squeeze(source, uniform, ComputeOptions(keep_alpha=True))
    with pytest.raises(OptionError, match="matches no module"):
        squeeze(source, RankRule(rank=2, patterns=(("nothing", 4),)))


def test_table_counts_modules_that_stay(make_folder):
    source = read_adapter(make_folder(modules=MODULES, dtype="f32"))
    selection = Selection(include="down")
    result = squeeze(source, RankRule(rank=2), selection=selection)
    row = next(row for row in rank_choices(source, selection=selection) if row.rank == 2)
    assert row.relative_error == pytest.approx(result.relative_error, rel=1e-5)


def test_energy_is_what_a_randomised_svd_kept(make_folder):
    source = read_adapter(make_folder(modules={"q": (90, 80, 8)}, dtype="f32"))
    options = ComputeOptions(method="rsvd", oversample=0, power_iterations=0)
    module = squeeze(source, RankRule(rank=3), options).modules[0]
    exact = squeeze(source, RankRule(rank=3)).modules[0]
    assert module.energy < exact.energy
    assert module.energy == pytest.approx(1 - module.relative_error**2, abs=1e-6)


def test_kept_alpha_is_the_nominal_one_of_a_rank_stabilised_adapter(make_folder, tmp_path):
    modules = {"layers.0.q": (24, 20, 6), "layers.1.q": (24, 20, 8)}
    source = read_adapter(
        make_folder(modules=modules, rank_pattern={"layers.0.q": 6}, use_rslora=True, dtype="f32")
    )
    options = ComputeOptions(keep_alpha=True)
    after = written(squeeze(source, RankRule(max_rank=6), options), tmp_path / "out")
    assert {delta.require_factors().alpha for delta in after.modules.values()} == {16}
    assert after.config["use_rslora"] is False
