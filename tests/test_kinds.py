"""Kinds that no library here writes as PEFT folders: beside their definitions, or LyCORIS."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule
from loratools.kinds import all_kinds
from loratools.lowrank.initial import subtract_initial
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.info import describe
from loratools.operations.squeeze import squeeze
from loratools.operations.to_lora import to_lora
from loratools_formats import read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import KindDelta, Layer, ModuleChange
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import AdapterError, UnsupportedError

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((4, 24)), RNG.standard_normal((36, 4))
MIDDLE = RNG.standard_normal((4, 4))


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def other(kind, settings=None, layer=None, **parts):
    refs = {name: in_memory(name, np.ascontiguousarray(array)) for name, array in parts.items()}
    delta = KindDelta(kind, refs, settings or {"scale": 1.0}, layer or Layer("linear"))
    return ModuleChange(delta)


def adapter_of(delta):
    return Adapter("peft", None, {"layer": delta}, config={"peft_type": "LORA"})


def change_of(delta, shape, rule=None):
    result = to_lora(adapter_of(delta), rule or RankRule())
    return effective_delta("layer", result.adapter.modules["layer"], shape)


def close(got, want, relative=1e-6):
    assert np.linalg.norm(got - want) <= relative * np.linalg.norm(want)


def test_a_middle_matrix_stands_between_the_factors():
    delta = other("middle", {"scale": 0.5}, a=A, b=B, middle=MIDDLE)
    close(change_of(delta, (36, 24)), 0.5 * B @ MIDDLE @ A)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_error_of_an_exact_fold_is_that_of_its_rounding(dtype):
    a, b, middle = random(3, 40), random(50, 3), random(3, 3)
    delta = other("middle", {"scale": 1.5}, a=a, b=b, middle=middle)
    result = to_lora(adapter_of(delta), RankRule(), ComputeOptions(dtype=dtype))
    want = 1.5 * b.astype(np.float64) @ middle @ a
    (new,) = result.adapter.modules.values()
    error = np.linalg.norm(effective_delta("m", new, want.shape) - want) / np.linalg.norm(want)
    assert error > 0.0
    assert result.relative_error == pytest.approx(error, rel=1e-3)
    assert result.modules[0].relative_error == result.relative_error


def test_gates_of_zero_are_dead_ranks():
    gate = np.array([[0.5, 0.0, -2.0, 0.0]])
    delta = other("gated", {"alpha": 8.0}, a=A, b=B, gate=gate)
    result = to_lora(adapter_of(delta), RankRule())
    assert result.adapter.modules["layer"].rank == 2
    close(change_of(delta, (36, 24)), 2.0 * B @ np.diag(gate[0]) @ A)


def test_pruned_ranks_of_adalora_are_dropped():
    e = np.array([[1.0], [0.0], [0.0], [-0.5]])
    delta = other("adalora", {"scale": 3.0}, a=A, b=B, e=e)
    result = to_lora(adapter_of(delta), RankRule())
    assert result.adapter.modules["layer"].rank == 2
    close(change_of(delta, (36, 24)), 3.0 * B @ (A * e))


@pytest.mark.parametrize("pooled", [True, False])
def test_qa_lora_pools_its_input_where_the_weight_says_so(tmp_path, pooled):
    x = RNG.standard_normal(24)
    small = random(4, 6 if pooled else 24)
    factors = {".lora_A.weight": small, ".lora_B.weight": B.astype("f4")}
    folder = saved(tmp_path / "adapter", factors, use_qalora=True, qalora_group_size=4)
    adapter = read_adapter(folder)
    with pytest.raises(UnsupportedError, match="`base`"):
        to_lora(adapter, RankRule())
    save_file({"q_proj.weight": np.zeros((36, 24), "f4")}, tmp_path / "base.safetensors")
    result = to_lora(adapter, RankRule(), base=read_checkpoint(tmp_path / "base.safetensors"))
    got = effective_delta("q_proj", result.adapter.modules["q_proj"], (36, 24))
    seen = x.reshape(6, 4).mean(axis=1) * 6 if pooled else x
    close(got @ x, 2.0 * B @ (small @ seen))


def test_a_core_of_a_convolution_joins_its_first_factor():
    up, mid, down = random(8, 3), random(3, 2, 3, 3), random(2, 6)
    delta = other("tucker", {"scale": 1.5}, Layer("conv", kernel=(3, 3)), up=up, mid=mid, down=down)
    want = 1.5 * np.einsum("om,mnkl,ni->oikl", up, mid, down)
    result = to_lora(adapter_of(delta), RankRule())
    assert result.adapter.modules["layer"].rank == 3
    close(change_of(delta, (8, 6, 3, 3)), want)


@pytest.mark.parametrize("crossed", [False, True])
def test_full_differences_are_read_by_rows(crossed):
    diff = random(36, 24)
    delta = other(
        "full",
        {"scale": 2.0, "crossed": crossed},
        diff=np.ascontiguousarray(diff.T) if crossed else diff,
    )
    close(change_of(delta, (36, 24), RankRule(rank=24)), 2.0 * diff)


def test_a_kronecker_product_is_cut_off_without_being_formed():
    left, right = random(6, 4), random(6, 6)
    want = np.kron(left, right).astype(np.float64)
    sigma = np.linalg.svd(want, compute_uv=False)
    result = to_lora(adapter_of(other("lokr", w1=left, w2=right)), RankRule(rank=5))
    best = np.sqrt(np.sum(sigma[5:] ** 2) / np.sum(sigma**2))
    assert result.relative_error == pytest.approx(best, rel=1e-5)
    close(change_of(other("lokr", {"scale": -1.0}, w1=left, w2=right), (36, 24)), -want)


def test_a_rank_of_zero_stays_one():
    delta = other("adalora", a=A, b=B, e=np.zeros((4, 1)))
    result = to_lora(adapter_of(delta), RankRule())
    assert result.adapter.modules["layer"].rank == 1
    assert result.relative_error == 0.0


@pytest.mark.parametrize(
    "parts",
    [
        {"a": A, "b": B, "middle": MIDDLE[:3]},
        {"a": A, "b": B},
        {"a": A, "b": B * np.nan, "middle": MIDDLE},
    ],
)
def test_tensors_that_do_not_fit_are_refused(parts):
    with pytest.raises(AdapterError):
        to_lora(adapter_of(other("middle", **parts)), RankRule())


def test_a_magnitude_makes_a_fold_a_dora():
    magnitude = in_memory("m", np.abs(random(36)))
    direction = replace(other("middle", a=A, b=B, middle=MIDDLE).direction, shape=(36, 24))
    delta = ModuleChange(direction, magnitude)
    result = squeeze(adapter_of(delta), RankRule(rank=2))
    assert result.adapter.modules["layer"].kind == "dora"
    assert result.directional
    with pytest.raises(UnsupportedError, match="`base`"):
        to_lora(adapter_of(delta), RankRule(rank=2))


class TestLycoris:
    """The changes that LyCORIS's own modules compute."""

    pytestmark = pytest.mark.filterwarnings("ignore")

    def module(self, name, layer, **options):
        pytest.importorskip("lycoris")
        import torch
        from lycoris.modules.locon import LoConModule
        from lycoris.modules.loha import LohaModule
        from lycoris.modules.lokr import LokrModule

        torch.manual_seed(1)
        made = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}[name]
        module = made("name", layer, **options)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
        state = {k: v.detach().numpy() for k, v in module.state_dict().items() if k != "alpha"}
        return module, state

    def linear(self):
        from torch import nn

        return nn.Linear(24, 36)

    def conv(self):
        from torch import nn

        return nn.Conv2d(6, 8, 3)

    def check(self, kind, module, state, layer=None):
        # The method for merging applies the scale of LoHa and LoKr twice, in version 4.1.3.
        locon = kind == "tucker"
        weight = module.get_diff_weight()[0] if locon else module.get_weight(module.shape)
        want = weight.detach().double().numpy()
        delta = other(kind, {"scale": float(module.scale)}, layer, **state)
        close(change_of(delta, want.shape), want, 1e-5)

    @pytest.mark.parametrize("rank", [2, 8])
    def test_loha(self, rank):
        module, state = self.module("loha", self.linear(), lora_dim=rank, alpha=3)
        self.check("loha", module, {k.removeprefix("hada_"): v for k, v in state.items()})

    def test_loha_with_cores(self):
        module, state = self.module("loha", self.conv(), lora_dim=2, alpha=3, use_tucker=True)
        layer = Layer("conv", kernel=(3, 3))
        self.check("loha", module, {k.removeprefix("hada_"): v for k, v in state.items()}, layer)

    @pytest.mark.parametrize(
        "options",
        [
            {"lora_dim": 2, "factor": 4, "decompose_both": True},
            {"lora_dim": 1000, "factor": 4},
            {"lora_dim": 2, "factor": 6},
        ],
    )
    def test_lokr_and_its_scale(self, options):
        module, state = self.module("lokr", self.linear(), alpha=3, **options)
        whole = {"lokr_w1", "lokr_w2"} <= set(state)
        assert module.scale == (1.0 if whole else 3 / options["lora_dim"])
        self.check("lokr", module, {k.removeprefix("lokr_"): v for k, v in state.items()})

    def test_lokr_with_a_core(self):
        module, state = self.module(
            "lokr", self.conv(), lora_dim=1, alpha=3, factor=2, use_tucker=True
        )
        parts = {k.removeprefix("lokr_").replace("t2", "w2_t"): v for k, v in state.items()}
        self.check("lokr", module, parts, Layer("conv", kernel=(3, 3)))

    def test_locon_with_a_core(self):
        module, state = self.module("locon", self.conv(), lora_dim=2, alpha=3, use_tucker=True)
        parts = {k.removeprefix("lora_").removesuffix(".weight"): v for k, v in state.items()}
        self.check("tucker", module, parts, Layer("conv", kernel=(3, 3)))


def saved(folder, tensors, **config):
    folder.mkdir()
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    named = {f"base_model.model.q_proj{key}": value for key, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


FACTORS = {".lora_A.weight": A.astype("f4"), ".lora_B.weight": B.astype("f4")}
R = MIDDLE.astype("f4")


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("_lora_latent_mapping.weight", {}),
        (".default_lora_latent_mapping.weight", {}),
        (".lora_N.weight", {"init_lora_weights": "n_lora"}),
    ],
)
def test_trained_matrices_between_factors_are_part_of_the_change(tmp_path, key, config):
    folder = saved(tmp_path / "adapter", FACTORS | {key: R}, **config)
    adapter = read_adapter(folder)
    result = to_lora(adapter, RankRule())
    got = effective_delta("q_proj", result.adapter.modules["q_proj"], (36, 24))
    close(got, 2.0 * B @ MIDDLE @ A)
    # What a reader that drops the matrix would make of it is something else altogether.
    assert np.linalg.norm(got - 2.0 * B @ A) > 0.5 * np.linalg.norm(got)
    write_adapter(result.adapter, tmp_path / "out", "peft")
    assert read_adapter(tmp_path / "out").config.get("init_lora_weights", True) is True


def test_lora_xs_without_its_matrices_is_refused(tmp_path):
    folder = saved(tmp_path / "adapter", FACTORS)
    (tmp_path / "reconstr_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="LoRA-XS"):
        to_lora(read_adapter(folder), RankRule())
    with pytest.raises(UnsupportedError, match="LoRA-XS"):
        squeeze(read_adapter(folder), RankRule(rank=2))


def test_the_fork_of_lora_ga_needs_what_it_began_with(tmp_path):
    start = {".lora_A.weight": random(4, 24), ".lora_B.weight": random(36, 4)}
    config = {"peft_type": "LORAGA", "init_lora_weights": "lora_ga", "bsz": 2, "scale": "stable"}
    adapter = read_adapter(saved(tmp_path / "adapter", FACTORS, **config))
    with pytest.raises(UnsupportedError, match="`initial`"):
        to_lora(adapter, RankRule())
    whole = subtract_initial(adapter, read_adapter(saved(tmp_path / "start", start, **config)))
    result = to_lora(whole, RankRule())
    b, a = start[".lora_B.weight"].astype("f8"), start[".lora_A.weight"]
    close(
        effective_delta("q_proj", result.adapter.modules["q_proj"], (36, 24)), 2 * (B @ A - b @ a)
    )


def test_nlora_without_its_matrix_is_an_error(tmp_path):
    folder = saved(tmp_path / "adapter", FACTORS, init_lora_weights="n_lora")
    with pytest.raises(AdapterError, match="lora_N"):
        read_adapter(folder)


COEFFICIENTS = {f".lora_{side}.coefficients": random(64) for side in "AB"}
ZERO = {".lora_A.weight": A.astype("f4"), ".lora_B.weight": np.zeros((36, 4), "f4")}
SQUARE = {".lora_A.weight": random(16, 16), ".lora_B.weight": np.zeros((36, 16), "f4")}


@pytest.mark.parametrize(
    ("name", "tensors", "config"),
    [
        ("NOLA", ZERO, {"use_nola": True, "nola_num_basis": 64}),
        ("NOLA", ZERO | COEFFICIENTS, {"use_nola": True, "nola_num_basis": 64}),
        ("MoRA", SQUARE, {"use_mora": True, "mora_type": 6}),
    ],
)
def test_what_is_no_product_is_recognised_and_not_a_change_of_zero(tmp_path, name, tensors, config):
    adapter = read_adapter(saved(tmp_path / "adapter", tensors, **config))
    (finding,) = describe(adapter).findings
    assert name in finding.message
    for operation in (lambda: to_lora(adapter, RankRule()), lambda: squeeze(adapter, RankRule())):
        with pytest.raises(UnsupportedError, match=name):
            operation()


@pytest.mark.parametrize("extra", [COEFFICIENTS, {".lora_atoms": random(4, 4, 4)}])
def test_tensors_beside_factors_that_are_not_known_are_refused(tmp_path, extra):
    with pytest.raises(AdapterError, match="may change the weights"):
        read_adapter(saved(tmp_path / "adapter", ZERO | extra))


def test_the_change_of_a_bayesian_lora_is_that_of_its_mean(tmp_path):
    spread = {".lora_A_rho": random(4, 24)}
    adapter = read_adapter(saved(tmp_path / "adapter", FACTORS | spread))
    (note,) = (text for text in adapter.remarks if "posterior" in text)
    assert "BLoB" in note
    result = to_lora(adapter, RankRule())
    close(effective_delta("q_proj", result.adapter.modules["q_proj"], (36, 24)), 2.0 * B @ A)
    write_adapter(adapter, tmp_path / "again", "peft")
    assert set(read_adapter(tmp_path / "again").carried) == set(adapter.carried) != set()
    for name, made in (("plain", result), ("small", squeeze(adapter, RankRule(rank=2)))):
        write_adapter(made.adapter, tmp_path / name, "peft")
        assert not read_adapter(tmp_path / name).carried


def test_the_authors_fork_of_uni_lora_calls_its_indices_logits(tmp_path):
    bank = random(50)
    indices = {"A": RNG.integers(0, 50, (4, 24)), "B": RNG.integers(0, 50, (36, 4))}
    norms = {"A": random(4, 24), "B": random(36, 4)}
    tensors = {}
    for side in "AB":
        tensors[f".unilora_logits_{side}"] = indices[side]
        tensors[f".unilora_norm_{side}"] = norms[side]
    folder = saved(tmp_path / "adapter", tensors, peft_type="UNILORA", r=4, lora_alpha=None, topk=2)
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.unilora_vector_bank": bank}, path)
    result = to_lora(read_adapter(folder), RankRule())
    a, b = (bank[indices[side]].astype("f8") * norms[side] for side in "AB")
    close(effective_delta("q_proj", result.adapter.modules["q_proj"], (36, 24)), b @ a)


def test_sparse_deltas_of_spiel_are_flat_places(tmp_path):
    places = np.array([0, 25, 35 * 24 + 23], np.int32)
    values = random(3)
    tensors = {".sft_delta.values": values, ".sft_delta.indices": places}
    folder = saved(tmp_path / "adapter", tensors, peft_type="SFT", r=None, lora_alpha=None)
    save_file({"q_proj.weight": np.zeros((36, 24), "f4")}, tmp_path / "base.safetensors")
    base = read_checkpoint(tmp_path / "base.safetensors")
    result = to_lora(read_adapter(folder), RankRule(rank=24), base=base)
    want = np.zeros((36, 24))
    want[0, 0], want[1, 1], want[35, 23] = values
    close(effective_delta("q_proj", result.adapter.modules["q_proj"], (36, 24)), want)


def test_the_page_of_to_lora_has_a_row_for_every_kind():
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs/commands/to-lora.md").read_text()
    for kind in all_kinds():
        needs = {"nothing": "", "shape": "shapes of the base", "weight": "weights of the base"}
        fold = "exact" if kind.low_rank else "approximate"
        assert f"| {kind.title} | `{kind.name}` | {fold} | {needs[kind.needs]} |" in page
