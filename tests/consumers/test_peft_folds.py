"""Every kind that PEFT can create, folded: compared with the weights that PEFT itself merges.

`want` is PEFT's merged weight minus the base's, from float32 arithmetic; exact folds agree with it
to 1e-5, the others have the error of the best approximation of their rank, found by a dense SVD.
"""

from __future__ import annotations

import json

import numpy as np
import peft_oracle as oracle
import pytest
from peft_kinds import CASES, Case, Net, make
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule
from loratools.kinds import all_kinds, get_kind
from loratools.operations.squeeze import squeeze
from loratools.operations.to_lora import to_lora, to_lora_choices
from loratools_formats import read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.change import KindDelta, ModuleChange
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in oracle.WARNINGS),
    pytest.mark.filterwarnings("ignore:FBD:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

BY_NAME = {case.name: case for case in CASES}
EXACT = [case.name for case in CASES if case.exact]
APPROXIMATE = [case.name for case in CASES if not case.exact]
ALONE = [case.name for case in CASES if case.exact and not case.base]
GIVEN = {"randlora-seeded": {"draws": "bf16"}, "unilora-seeded": {"order": "up,down,sq"}}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return a function from a case's name to its folder and the change PEFT merges."""
    root = tmp_path_factory.mktemp("kinds-saved-by-peft")
    found = {}

    def one(name):
        if name not in found:
            found[name] = make(BY_NAME[name], root / name)
        return root / name, found[name]

    return one


def folded(folder, case, rule):
    adapter = read_adapter(folder / "adapter")
    base = read_checkpoint(folder / "base") if case.base else None
    return to_lora(adapter, rule, base=base, given=GIVEN.get(case.name))


def errors(adapter, want):
    """Return ‖got − want‖/‖want‖ of every weight and bias."""
    found = {}
    for name, delta in adapter.modules.items():
        weight = want[f"{name}.weight"]
        got = effective_delta(name, delta, weight.shape)
        found[name] = np.linalg.norm(got - weight) / (np.linalg.norm(weight) or 1.0)
        bias = want.get(f"{name}.bias")
        part = delta.direction
        added = 0.0 if part.bias is None else part.scale * part.bias.load(np.float64)
        if bias is not None and np.abs(bias).max() > 0:
            found[f"{name}.bias"] = np.linalg.norm(added - bias) / np.linalg.norm(bias)
        else:
            assert np.abs(added).max() == 0
    return found


def outputs_in_peft(folder, case, adapter_folder):
    """Return what the base with a plain LoRA loaded by PEFT computes."""
    import peft
    import torch
    from safetensors.torch import load_file

    model = case.model()
    model.load_state_dict(load_file(folder / "base" / "model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(model, str(adapter_folder)).double()
    assert loaded.peft_config["default"].peft_type == "LORA"
    with torch.no_grad():
        return loaded(inputs_of(case)).numpy()


def outputs_of_sum(folder, case, change):
    """Return what the base with a change added computes."""
    import torch
    from safetensors.torch import load_file

    model = case.model().double()
    base = load_file(folder / "base" / "model.safetensors")
    model.load_state_dict({k: v.double() + torch.from_numpy(change[k]) for k, v in base.items()})
    with torch.no_grad():
        return model(inputs_of(case)).numpy()


def inputs_of(case):
    import torch

    if case.model.__name__ == "EmbeddingNet":
        return torch.arange(30)
    shapes = {"ConvNet": (2, 6, 5, 5), "Conv1dNet": (2, 6, 7)}
    shape = shapes.get(case.model.__name__, (7, 24))
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape))


@pytest.mark.parametrize("name", EXACT)
def test_exact_kinds_fold_to_what_peft_merges(made, tmp_path, name):
    folder, want = made(name)
    case = BY_NAME[name]
    result = folded(folder, case, RankRule())
    assert max(errors(result.adapter, want).values()) <= 1e-5
    assert result.relative_error <= 1e-6
    write_adapter(result.adapter, tmp_path / "plain", "peft")
    got = outputs_in_peft(folder, case, tmp_path / "plain")
    expected = outputs_of_sum(folder, case, want)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_other_kinds_have_the_least_possible_error_of_their_rank(made, tmp_path, name):
    folder, want = made(name)
    case = BY_NAME[name]
    result = folded(folder, case, RankRule(rank=3))
    total = lost = 0.0
    for module in result.modules:
        matrix = want[f"{module.name}.weight"]
        sigma = np.linalg.svd(matrix.reshape(len(matrix), -1), compute_uv=False)
        total, lost = total + np.sum(sigma**2), lost + np.sum(sigma[3:] ** 2)
        best = np.sqrt(np.sum(sigma[3:] ** 2) / np.sum(sigma**2))
        assert module.relative_error == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert errors(result.adapter, want)[module.name] == pytest.approx(best, rel=1e-4, abs=1e-5)
    assert result.relative_error == pytest.approx(np.sqrt(lost / total), rel=1e-4)
    write_adapter(result.adapter, tmp_path / "plain", "peft")
    outputs_in_peft(folder, case, tmp_path / "plain")


@pytest.mark.parametrize("name", APPROXIMATE)
def test_other_kinds_at_full_rank_are_what_peft_merges(made, tmp_path, name):
    folder, want = made(name)
    case = BY_NAME[name]
    result = folded(folder, case, RankRule(rank=48))
    assert max(errors(result.adapter, want).values()) <= 1e-5
    write_adapter(result.adapter, tmp_path / "plain", "peft")
    got = outputs_in_peft(folder, case, tmp_path / "plain")
    expected = outputs_of_sum(folder, case, want)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_other_kinds_need_a_rule_for_the_rank(made, name):
    folder, _ = made(name)
    with pytest.raises(OptionError, match="not of low rank"):
        folded(folder, BY_NAME[name], RankRule())


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_every_tensor_is_in_one_place_and_a_copy_is_the_same(made, tmp_path, name):
    from safetensors import safe_open

    folder, _ = made(name)
    adapter = read_adapter(folder / "adapter")
    assert adapter.caveats == ()
    kinds = {delta.kind for delta in adapter.modules.values()}
    others = {"bdlora": {"blockdiag", "lora"}, "unilora-seeded": set()}
    assert kinds == others.get(name, {BY_NAME[name].kind})
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "np") as file:
        stored = list(file.keys())
    keys = [tensor.key for tensor in adapter.tensors()]
    assert sorted(keys) == sorted(stored)
    write_adapter(adapter, tmp_path / "copy", "peft")
    again = read_adapter(tmp_path / "copy")
    assert oracle.stored_bytes(again) == oracle.stored_bytes(adapter)
    assert json.loads((tmp_path / "copy" / "adapter_config.json").read_text()) == adapter.config


@pytest.mark.parametrize("name", [case.name for case in CASES if case.base])
def test_kinds_that_need_the_base_say_so(made, name):
    folder, _ = made(name)
    adapter = read_adapter(folder / "adapter")
    known = all(
        None not in d.shape and get_kind(d.kind).needs != "weight" for d in adapter.modules.values()
    )
    if known:  # only where the layers' kernels must be known
        return
    with pytest.raises(UnsupportedError, match=r"`base`|--base MODEL"):
        to_lora(adapter, RankRule(rank=2), given=GIVEN.get(name))


@pytest.mark.parametrize("name", ALONE)
def test_squeeze_folds_on_the_fly(made, name):
    folder, want = made(name)
    result = squeeze(read_adapter(folder / "adapter"), RankRule(rank=2))
    for module in result.modules:
        matrix = want[f"{module.name}.weight"]
        sigma = np.linalg.svd(matrix, compute_uv=False)
        best = np.sqrt(np.sum(sigma[2:] ** 2) / np.sum(sigma**2))
        assert module.relative_error == pytest.approx(best, rel=1e-4, abs=1e-5)
        assert errors(result.adapter, want)[module.name] == pytest.approx(best, rel=1e-4, abs=1e-5)


def test_merge_folds_on_the_fly(made):
    from loratools.operations.merge.align import MergeInput
    from loratools.operations.merge.operation import merge
    from loratools.operations.merge.options import MergeOptions

    parts = {"loha": 0.5, "gralora": -2.0, "unilora": 1.0}
    folders = {name: made(name) for name in parts}
    inputs = [
        MergeInput(read_adapter(folder / "adapter"), parts[name], name)
        for name, (folder, _) in folders.items()
    ]
    result = merge(inputs, MergeOptions())
    want = {
        key: sum(parts[name] * change[key] for name, (_, change) in folders.items())
        for key in folders["loha"][1]
    }
    assert max(errors(result.adapter, want).values()) <= 1e-5


@pytest.mark.parametrize("name", ["c3a", "oft", "vera", "hra"])
def test_squeeze_names_the_command_for_what_it_cannot_fold(made, name):
    folder, _ = made(name)
    command = r"loratools to-lora .+" if name == "c3a" else r"loratools to-lora .+ --base MODEL"
    with pytest.raises(UnsupportedError, match=command):
        squeeze(read_adapter(folder / "adapter"), RankRule(rank=2))


def test_what_is_drawn_in_an_unrecorded_type_must_be_given(made):
    folder, _ = made("randlora-seeded")
    adapter, base = read_adapter(folder / "adapter"), read_checkpoint(folder / "base")
    with pytest.raises(UnsupportedError, match="--set draws=VALUE"):
        to_lora(adapter, RankRule(rank=2), base=base)
    with pytest.raises(OptionError, match="draws"):
        to_lora(adapter, RankRule(rank=2), base=base, given={"draws": "f64"})
    with pytest.raises(OptionError, match="alpha"):
        to_lora(adapter, RankRule(rank=2), base=base, given={"draws": "f16", "alpha": "3"})


def test_hira_is_not_its_product(made):
    folder, want = made("hira")
    delta = read_adapter(folder / "adapter").modules["up"].kind_delta
    product = delta.parts["b"].load(np.float64) @ delta.parts["a"].load(np.float64)
    assert np.linalg.norm(product - want["up.weight"]) > 0.5 * np.linalg.norm(want["up.weight"])


def test_the_scale_of_randlora_is_pefts_and_not_the_authors(made):
    folder, want = made("randlora")
    adapter, base = read_adapter(folder / "adapter"), read_checkpoint(folder / "base")
    result = to_lora(adapter, RankRule(rank=48), base=base)
    got = effective_delta("up", result.adapter.modules["up"], (48, 24))
    count = adapter.modules["up"].kind_delta.parts["lambda"].shape[1]
    assert count > 1
    np.testing.assert_allclose(got, want["up.weight"], rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(got / np.sqrt(count) - want["up.weight"]) > 0.1 * np.linalg.norm(got)


def renamed(folder, target, names):
    from safetensors.numpy import load_file, save_file

    copy = oracle.copied(folder, target)
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({names.get(key, key): value for key, value in tensors.items()}, path)
    return copy


def test_the_authors_files_of_randlora_have_another_scale(made, tmp_path):
    folder, want = made("randlora")
    base = read_checkpoint(folder / "base")
    names = {f"base_model.randlora_{side}": f"base_model.randbasis_{side}" for side in "AB"}
    names |= {
        f"base_model.model.{module}.randlora_{side}": f"unused.{module}.{side}"
        for module in ("up", "down", "sq")
        for side in "AB"
    }
    copy = renamed(folder / "adapter", tmp_path / "copy", names)
    with pytest.raises(AdapterError, match="unknown tensor"):
        read_adapter(copy)
    path = copy / "adapter_model.safetensors"
    from safetensors.numpy import load_file, save_file

    tensors = {k: v for k, v in load_file(path).items() if not k.startswith("unused")}
    save_file(tensors, path)
    adapter = read_adapter(copy)
    result = to_lora(adapter, RankRule(rank=48), base=base)
    got = effective_delta("up", result.adapter.modules["up"], (48, 24))
    count = adapter.modules["up"].kind_delta.parts["lambda"].shape[1]
    np.testing.assert_allclose(got * np.sqrt(count), want["up.weight"], rtol=1e-4, atol=1e-4)


def test_seeded_files_of_randlora_without_a_version_must_say_whose_they_are(made, tmp_path):
    folder, _ = made("randlora-seeded")
    copy = oracle.copied(folder / "adapter", tmp_path / "copy")
    oracle.edit_config(copy, peft_version=None)
    with pytest.raises(UnsupportedError, match="--set rule=VALUE"):
        to_lora(read_adapter(copy), RankRule(rank=2), base=read_checkpoint(folder / "base"))


@pytest.mark.parametrize("name", ["loha", "vera", "oft", "unilora"])
def test_a_tensor_that_is_not_known_is_refused(made, tmp_path, name):
    folder, _ = made(name)
    adapter = read_adapter(folder / "adapter")
    key = next(iter(adapter.modules["up"].kind_delta.parts.values())).key
    copy = renamed(folder / "adapter", tmp_path / "copy", {key: f"{key}_rho"})
    with pytest.raises(AdapterError):
        to_lora(read_adapter(copy), RankRule(rank=2), base=read_checkpoint(folder / "base"))


@pytest.mark.parametrize("name", ["loha", "vera", "oft", "adalora", "ia3"])
def test_a_config_key_that_is_not_known_is_refused_by_name(made, tmp_path, name):
    folder, _ = made(name)
    copy = oracle.copied(folder / "adapter", tmp_path / "copy")
    oracle.edit_config(copy, use_future=True)
    adapter = read_adapter(copy)
    with pytest.raises(UnsupportedError, match="use_future"):
        to_lora(adapter, RankRule(rank=2), base=read_checkpoint(folder / "base"))


MISSING = {
    "adalora": "init_r",
    "loha": "alpha",
    "oft": "use_cayley_neumann",
    "fourierft": "random_loc_seed",
    "vera-seeded": "projection_prng_key",
    "hra": "apply_GS",
    "deft": "decomposition_method",
    "gralora": "hybrid_r",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_number_that_is_not_in_the_config_is_never_assumed(made, tmp_path, name):
    folder, _ = made(name)
    copy = oracle.copied(folder / "adapter", tmp_path / "copy")
    oracle.edit_config(copy, **{MISSING[name]: None})
    with pytest.raises(AdapterError, match=MISSING[name]):
        read_adapter(copy)


def test_uni_lora_without_its_indices_asks_for_the_base_and_the_order_of_layers(made):
    folder, _ = made("unilora-seeded")
    adapter, base = read_adapter(folder / "adapter"), read_checkpoint(folder / "base")
    assert "indices are not in the file" in " ".join(adapter.remarks)
    for operation in (lambda: to_lora(adapter, RankRule()), lambda: squeeze(adapter, RankRule())):
        with pytest.raises(UnsupportedError, match=r"`base`|--base MODEL"):
            operation()
    with pytest.raises(UnsupportedError, match="set=order=NAME"):
        to_lora(adapter, RankRule(), base=base)
    with pytest.raises(OptionError, match="order"):
        to_lora(adapter, RankRule(), base=base, given={"order": "up,down"})
    with pytest.raises(OptionError, match="alpha"):
        to_lora(adapter, RankRule(), base=base, given={"order": "up,down,sq", "alpha": "3"})


LAYERED = {
    "UniLoraConfig": ({"r": 3, "theta_d_length": 50}, {"order": "q_proj,v_proj,up_proj"}),
    "FrodConfig": ({"save_projection": False, "progressbar": False, "sparse_rate": 0.1}, {}),
}


@pytest.mark.parametrize("name", LAYERED)
def test_what_is_drawn_for_all_layers_of_a_model_at_once_is_drawn_again(tmp_path, name):
    import peft
    import peft_models
    import torch
    from safetensors.torch import save_file

    options, given = LAYERED[name]
    torch.manual_seed(4)
    model = peft_models.build("llama")
    before = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    (tmp_path / "base").mkdir()
    model.config.save_pretrained(tmp_path / "base")
    save_file(
        {key: tensor for key, tensor in before.items() if key != "lm_head.weight"},
        tmp_path / "base" / "model.safetensors",
    )
    targets = ["up_proj", "v_proj", "q_proj"]
    adapted = peft.get_peft_model(model, getattr(peft, name)(target_modules=targets, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    after = adapted.merge_and_unload().state_dict()
    base = read_checkpoint(tmp_path / "base")
    rule = RankRule() if name == "UniLoraConfig" else RankRule(rank=24)
    result = to_lora(read_adapter(tmp_path / "adapter"), rule, base=base, given=given)
    assert len(result.adapter.modules) == 6
    assert bool(result.cautions) == (name == "FrodConfig")
    want = {f"{k}": (after[k].double() - before[k].double()).numpy() for k in before}
    assert max(errors(result.adapter, want).values()) <= 1e-5


def test_choices_are_none_where_all_folds_exactly(made):
    folder, _ = made("gralora")
    assert to_lora_choices(read_adapter(folder / "adapter")) is None


def test_choices_state_the_least_error_of_each_rank(made):
    folder, want = made("c3a")
    choices = to_lora_choices(read_adapter(folder / "adapter")).choices
    spectra = [np.linalg.svd(want[f"{n}.weight"], compute_uv=False) for n in ("up", "down", "sq")]
    total = sum(np.sum(sigma**2) for sigma in spectra)
    for choice in choices:
        lost = sum(np.sum(sigma[choice.rank :] ** 2) for sigma in spectra)
        assert choice.relative_error == pytest.approx(np.sqrt(lost / total), rel=1e-4, abs=1e-6)


def test_every_declaration_is_named_as_its_file_and_known_by_a_reader():
    names = {case.kind for case in CASES}
    for kind in all_kinds():
        assert get_kind(kind.name) is kind
        assert isinstance(kind.parts, tuple)
    # The rest belongs to other formats and trainers.
    others = {"full", "tucker", "middle", "gated", "qalora", "loralib", "increlora"}
    others |= {"diag_oft", "butterfly_oft", "lycoris_glora", "lycoris_ia3"}
    others |= {"loldu", "loldu_full", "lorat", "megatron", "randlora_authors"}
    others |= {"torchtune", "unscaled"}
    assert {kind.name for kind in all_kinds()} - names == others
    with pytest.raises(UnsupportedError, match="future"):
        get_kind("future")


def test_a_tensor_that_the_kind_does_not_know_is_an_error(made):
    folder, _ = made("loha")
    adapter = read_adapter(folder / "adapter")
    delta = adapter.modules["up"].kind_delta
    wrong = KindDelta(
        "loha", {**delta.parts, "w3": delta.parts["w1_a"]}, delta.settings, delta.layer, delta.shape
    )
    from dataclasses import replace

    with pytest.raises(AdapterError, match="w3"):
        to_lora(replace(adapter, modules={"up": ModuleChange(wrong)}), RankRule())


def test_qa_lora_on_ordinary_layers_is_what_peft_computes(tmp_path):
    import peft
    import torch
    from peft_kinds import Net
    from safetensors.torch import save_file

    case = BY_NAME["loha"]
    torch.manual_seed(3)
    model = Net()
    (tmp_path / "base").mkdir()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "base" / "model.safetensors")
    config = peft.LoraConfig(
        target_modules=["up", "sq"], r=3, lora_alpha=5, use_qalora=True, qalora_group_size=4
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
        want = adapted.double().eval()(inputs_of(case)).numpy()
    # PEFT pools the input of GPTQ layers only, whatever the configuration says.
    base = read_checkpoint(tmp_path / "base")
    result = to_lora(read_adapter(tmp_path / "adapter"), RankRule(), base=base)
    write_adapter(result.adapter, tmp_path / "plain", "peft")
    assert not read_adapter(tmp_path / "plain").config["use_qalora"]
    got = outputs_in_peft(tmp_path, case, tmp_path / "plain")
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_pissa_through_its_initial_adapter_is_the_change_of_the_original(tmp_path):
    import peft
    import torch
    from peft_kinds import Net

    from loratools.lowrank.initial import subtract_initial

    torch.manual_seed(4)
    model = Net()
    before = {k: v.clone().double().numpy() for k, v in model.state_dict().items()}
    config = peft.LoraConfig(target_modules=["up", "sq"], r=3, init_lora_weights="pissa")
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = {k: v.double().numpy() for k, v in adapted.merge_and_unload().state_dict().items()}
    trained = read_adapter(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="`initial`"):
        to_lora(trained, RankRule())
    result = to_lora(subtract_initial(trained, read_adapter(tmp_path / "initial")), RankRule())
    want = {key: merged[key] - before[key] for key in before}
    assert max(errors(result.adapter, want).values()) <= 1e-5


def test_ranks_that_adalora_pruned_keep_the_scale_of_the_first_rank(tmp_path):
    import peft
    import torch
    from peft_kinds import Net
    from safetensors.torch import save_file

    torch.manual_seed(5)
    model = Net()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    config = peft.AdaLoraConfig(target_modules=["up", "sq"], init_r=4, target_r=2, total_step=9)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    masks = {"up": [True, False, True, False], "sq": [True, True, True, False]}
    adapted.peft_config["default"].rank_pattern = {
        f"{name}.lora_E.default": mask for name, mask in masks.items()
    }
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = Net()
    fresh.load_state_dict(base)
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    merged = loaded.merge_and_unload().state_dict()
    want = {key: (merged[key].double() - base[key].double()).numpy() for key in base}
    result = to_lora(read_adapter(tmp_path / "adapter"), RankRule())
    assert {m.name: m.rank for m in result.modules} == {"up": 2, "sq": 3}
    assert max(errors(result.adapter, want).values()) <= 1e-5


def test_saved_modules_stay_with_a_folded_adapter(tmp_path):
    import peft
    import torch
    from peft_kinds import Net

    torch.manual_seed(6)
    model = Net()
    config = peft.LoHaConfig(target_modules=["up"], r=2, modules_to_save=["sq"])
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    source = read_adapter(tmp_path / "adapter")
    assert {r.target: r.kind for r in source.replacements.values()} == {
        "sq.weight": "module",
        "sq.bias": "module",
    }
    result = to_lora(source, RankRule())
    write_adapter(result.adapter, tmp_path / "plain", "peft")
    again = read_adapter(tmp_path / "plain")
    assert again.config["modules_to_save"] == ["sq"]
    assert {k: bytes(r.tensor.raw()) for k, r in again.replacements.items()} == {
        k: bytes(r.tensor.raw()) for k, r in source.replacements.items()
    }


# What a file leaves out is only computed again by `to-lora`; rows of embeddings are no rows of ΔW.
NOT_FUSED = ["frod-seeded", "unilora-seeded"]


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_fuse_cannot_put_in_names_to_lora(made, name):
    from loratools.operations.fuse.draft import FuseInput
    from loratools.operations.fuse.operation import Fusion
    from loratools.operations.fuse.options import FuseOptions

    folder, _ = made(name)
    item = FuseInput(read_adapter(folder / "adapter"), 1.0, name)
    with pytest.raises(UnsupportedError, match="to-lora"):
        Fusion(read_checkpoint(folder / "base"), [item], FuseOptions())


@pytest.mark.parametrize("name", [n for n in (*EXACT, *APPROXIMATE) if n not in NOT_FUSED])
def test_fuse_puts_every_kind_into_the_base_without_loss(made, tmp_path, name):
    from loratools.folding.without_base import with_settings
    from loratools.operations.fuse.draft import FuseInput
    from loratools.operations.fuse.operation import Fusion
    from loratools.operations.fuse.options import FuseOptions

    folder, want = made(name)
    base = read_checkpoint(folder / "base")
    adapter = with_settings(read_adapter(folder / "adapter"), GIVEN.get(name, {}))
    Fusion(base, [FuseInput(adapter, 1.0, name)], FuseOptions()).write(tmp_path / "fused")
    fused = read_checkpoint(tmp_path / "fused")
    for key, tensor in base.tensors.items():
        change = fused.tensors[key].load(np.float64) - tensor.load(np.float64)
        largest = max(1.0, np.abs(want[key]).max(), np.abs(tensor.load(np.float64)).max())
        np.testing.assert_allclose(change, want[key], atol=1e-6 * largest, err_msg=key)


def test_info_names_the_kind(made):
    from click.testing import CliRunner

    from loratools.cli import cli

    folder, _ = made("vera")
    done = CliRunner().invoke(cli, ["info", "-v", str(folder / "adapter")])
    assert done.exit_code == 0
    assert "3: vera on linear" in done.output
    assert "24 × ?" in done.output


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("GloraConfig", {"r": 3, "bias": "all"}),
        ("BOFTConfig", {"boft_block_size": 4, "bias": "boft_only"}),
        ("VeraConfig", {"r": 6, "bias": "vera_only"}),
    ],
)
def test_trained_biases_are_carried_and_changed(tmp_path, config, options):
    options = {"target_modules": ["up", "sq"], **options}
    case = Case(f"{config}-bias", config, "", exact=False, base=True, model=Net, options=options)
    want = make(case, tmp_path)
    adapter, base = read_adapter(tmp_path / "adapter"), read_checkpoint(tmp_path / "base")
    result = to_lora(adapter, RankRule(energy=1.0), base=base)
    write_adapter(result.adapter, tmp_path / "plain", "peft")
    assert read_adapter(tmp_path / "plain").config["bias"] in ("all", "lora_only")
    got = outputs_in_peft(tmp_path, case, tmp_path / "plain")
    expected = outputs_of_sum(tmp_path, case, want)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
