"""LoRA to DoRA and back, on the bundled adapters and on every kind of layer, with PEFT as judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft_oracle as oracle
import pytest
from peft_cases import CASES
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools.operations.to_dora import to_dora
from loratools.operations.to_lora import to_lora, to_lora_choices
from loratools_formats import read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import UnsupportedError

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def base():
    return read_checkpoint(TINY / "model")


def dora_change(delta, weight):
    """Return m/‖W + ΔW‖ (W + ΔW) − W from its definition."""
    changed = weight + effective_delta("module", delta, weight.shape)
    magnitude = delta.magnitude.load(np.float64).reshape(-1, 1)
    return magnitude / np.linalg.norm(changed, axis=1, keepdims=True) * changed - weight


def weight_of(base, name):
    return base.tensors[f"{name}.weight"].load(np.float64)


@pytest.mark.parametrize("rank", [4, 24])
def test_the_trained_dora_becomes_the_best_lora_of_its_rank(base, rank):
    source = read_adapter(TINY / "dora")
    result = to_lora(source, RankRule(rank=rank), base=base)
    for module in result.modules:
        change = dora_change(source.modules[module.name], weight_of(base, module.name))
        sigma = np.linalg.svd(change, compute_uv=False)
        best = np.sqrt(np.sum(sigma[rank:] ** 2) / np.sum(sigma**2))
        got = effective_delta(module.name, result.adapter.modules[module.name], change.shape)
        assert np.linalg.norm(got - change) / np.linalg.norm(change) == pytest.approx(
            best, rel=1e-4
        )
        assert module.relative_error == pytest.approx(best, rel=1e-4)
        assert module.rank == min(rank, *change.shape)


def test_the_energies_of_both_parts_are_stated(base):
    source = read_adapter(TINY / "dora")
    result = to_lora(source, RankRule(rank=2), base=base)
    for module in result.modules[:5]:
        delta, weight = source.modules[module.name], weight_of(base, module.name)
        direction = effective_delta(module.name, delta, weight.shape)
        magnitude = delta.magnitude.load(np.float64)
        gains = (magnitude / np.linalg.norm(weight + direction, axis=1))[:, None]
        total = np.linalg.norm(gains * (weight + direction) - weight) ** 2
        assert module.low_rank_energy == pytest.approx(
            np.linalg.norm(gains * direction) ** 2 / total, rel=1e-6
        )
        assert module.rescaling_energy == pytest.approx(
            np.linalg.norm((gains - 1) * weight) ** 2 / total, rel=1e-6
        )


def test_the_table_of_ranks_states_the_least_errors(base):
    source = read_adapter(TINY / "dora")
    spectra = [
        np.linalg.svd(dora_change(delta, weight_of(base, name)), compute_uv=False)
        for name, delta in source.modules.items()
    ]
    total = sum(np.sum(sigma**2) for sigma in spectra)
    found = to_lora_choices(source, base=base)
    assert [choice.rank for choice in found.choices][3:6] == [8, 16, 32]
    for choice in found.choices:
        lost = sum(np.sum(sigma[choice.rank :] ** 2) for sigma in spectra)
        assert choice.relative_error == pytest.approx(np.sqrt(lost / total), rel=1e-4, abs=1e-7)


def test_a_dora_without_its_base_is_refused():
    with pytest.raises(UnsupportedError, match="`base`"):
        to_lora(read_adapter(TINY / "dora"), RankRule(rank=4))


def fused_logits(base, adapter, folder):
    import torch
    from transformers import AutoModelForCausalLM

    item = FuseInput(adapter, 1.0, "adapter")
    Fusion(base, [item], FuseOptions(dtype="f32")).write(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20)).logits.numpy()


def test_a_lora_as_a_dora_has_the_same_logits_fused(base, tmp_path):
    source = read_adapter(TINY / "lora")
    result = to_dora(source, base)
    write_adapter(result.adapter, tmp_path / "dora", "peft")
    dora = read_adapter(tmp_path / "dora")
    assert all(delta.is_dora for delta in dora.modules.values())
    before = fused_logits(base, source, tmp_path / "one")
    after = fused_logits(base, dora, tmp_path / "two")
    assert np.linalg.norm(after - before) <= 1e-6 * np.linalg.norm(before)


def test_a_lora_as_a_dora_and_back_is_the_same_change(base):
    source = read_adapter(TINY / "lora")
    back = to_lora(to_dora(source, base).adapter, RankRule(rank=32), base=base)
    for name, delta in source.modules.items():
        shape = base.tensors[f"{name}.weight"].shape
        want = effective_delta(name, delta, shape)
        got = effective_delta(name, back.adapter.modules[name], shape)
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


LAYERS = [
    "linear",
    "rslora",
    "patterns",
    "bias-all",
    "modules-to-save",
    "conv1d-layout",
    "mixed-layouts",
    "conv",
    "embedding",
]


@pytest.mark.parametrize("name", LAYERS)
def test_peft_computes_the_same_with_the_dora(saved, tmp_path, name):
    from safetensors.torch import save_file

    case = CASES[name]
    model = oracle.fresh(case)
    path = tmp_path / "base.safetensors"
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    adapter = read_adapter(saved(name))
    result = to_dora(adapter, read_checkpoint(path))
    write_adapter(result.adapter, tmp_path / "dora", "peft")
    assert read_adapter(tmp_path / "dora").config["use_dora"] is True
    want = oracle.outputs(oracle.loaded(saved(name), case), case)
    got = oracle.outputs(oracle.loaded(tmp_path / "dora", case), case)
    assert oracle.distance(got, want) <= 1e-6

    back = to_lora(result.adapter, RankRule(energy=1.0), base=read_checkpoint(path))
    for module, delta in adapter.modules.items():
        stored = read_checkpoint(path).tensors[f"{module}.weight"].shape
        change = effective_delta(module, delta, stored)
        assert (
            oracle.distance(effective_delta(module, back.adapter.modules[module], stored), change)
            <= 2e-6
        )


def test_stacked_experts_cannot_be_a_dora(saved, tmp_path):
    from safetensors.torch import save_file

    case = CASES["experts-one"]
    path = tmp_path / "base.safetensors"
    save_file({k: v.contiguous().clone() for k, v in oracle.fresh(case).state_dict().items()}, path)
    with pytest.raises(UnsupportedError, match="experts"):
        to_dora(read_adapter(saved("experts-one")), read_checkpoint(path))


def test_a_dora_is_not_made_one_again(base):
    with pytest.raises(UnsupportedError, match="DoRA already"):
        to_dora(read_adapter(TINY / "dora"), base)


def test_a_dora_can_be_kept_whole_where_a_format_holds_that(base, tmp_path):
    source = read_adapter(TINY / "dora")
    result = to_lora(source, RankRule(), base=base, whole=True)
    assert result.relative_error <= 1e-7
    stated = {module.name: module.relative_error for module in result.modules}
    for name, delta in result.adapter.modules.items():
        want = dora_change(source.modules[name], weight_of(base, name))
        got = delta.kind_delta.parts["diff"].load(np.float64)
        assert oracle.distance(got, want) <= 1e-7
        assert stated[name] == pytest.approx(oracle.distance(got, want), rel=1e-3)
    with pytest.raises(UnsupportedError, match="no full differences"):
        write_adapter(result.adapter, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("operation", ["to-lora", "to-dora"])
def test_a_saved_embedding_is_the_weight_that_its_change_is_of(tmp_path, operation):
    import peft
    import peft_models
    import torch

    peft_models.build("llama").save_pretrained(tmp_path / "base")
    model = peft_models.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    config = peft.LoraConfig(target_modules=["embed_tokens"], r=4, use_dora=operation == "to-lora")
    adapted = peft.get_peft_model(model, config).double()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        want = adapted(tokens).logits.numpy()

    source, base = read_adapter(tmp_path / "adapter"), read_checkpoint(tmp_path / "base")
    if operation == "to-lora":
        result = to_lora(source, RankRule(energy=1.0), base=base).adapter
    else:
        result = to_dora(source, base).adapter
    write_adapter(result, tmp_path / "out", "peft")
    loaded = peft.PeftModel.from_pretrained(peft_models.build("llama"), tmp_path / "out").double()
    with torch.no_grad():
        got = loaded(tokens).logits.numpy()
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
