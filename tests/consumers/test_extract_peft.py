"""Extracted changes of stacked experts and Conv1D layers, as PEFT loads and merges them."""

from __future__ import annotations

import numpy as np
import peft_models
import peft_oracle as oracle
import pytest

from loratools.algebra.ranks import RankRule
from loratools.operations.extract.operation import difference, extract
from loratools_formats import write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import UnsupportedError

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

CHANGED = {
    "mixtral": ("experts.gate_up_proj", "experts.down_proj", "q_proj.weight"),
    "gpt_oss": ("experts.gate_up_proj", "experts.down_proj", "q_proj.weight"),
}


def saved(folder, name, changed=()):
    """Save a model under the names that it has in memory, some of its weights changed."""
    import torch
    from safetensors.torch import save_file

    model = peft_models.build(name)
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    for key, tensor in state.items():
        if key.endswith(tuple(changed)):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors")
    return state


def merged(name, adapter):
    import peft

    model = peft.PeftModel.from_pretrained(peft_models.build(name), str(adapter))
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("name", CHANGED)
def test_stacked_experts_become_target_parameters_that_peft_merges_to_the_tuned_model(
    tmp_path, name
):
    old = saved(tmp_path / "base", name)
    want = saved(tmp_path / "tuned", name, CHANGED[name])
    base, tuned = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "tuned")
    found = difference(base, tuned)
    result = extract(base, tuned, found, RankRule(rank=48))
    stacks = [n for n, d in result.adapter.modules.items() if d.layer.kind == "experts"]
    assert len(stacks) == 4
    assert result.relative_error <= 1e-6
    write_adapter(result.adapter, tmp_path / "adapter", "peft")
    got = merged(name, tmp_path / "adapter")
    for key, tensor in want.items():
        np.testing.assert_allclose(got[key].numpy(), tensor.numpy(), atol=2e-6)
        assert key.endswith(CHANGED[name]) == bool((tensor != old[key]).any())


def test_each_expert_has_the_least_error_of_its_rank(tmp_path):
    old = saved(tmp_path / "base", "mixtral")
    new = saved(tmp_path / "tuned", "mixtral", ["layers.0.mlp.experts.down_proj"])
    base, tuned = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "tuned")
    result = extract(base, tuned, difference(base, tuned), RankRule(rank=3))
    (module,) = result.modules
    key = "model.layers.0.mlp.experts.down_proj"
    sigma = np.linalg.svd((new[key].double() - old[key].double()).numpy(), compute_uv=False)
    best = np.sqrt(np.sum(sigma[:, 3:] ** 2) / np.sum(sigma**2))
    assert module.relative_error == pytest.approx(best, rel=1e-5)
    write_adapter(result.adapter, tmp_path / "adapter", "peft")
    got = merged("mixtral", tmp_path / "adapter")[key].double().numpy()
    error = np.linalg.norm(got - new[key].double().numpy()) / np.linalg.norm(sigma)
    assert error == pytest.approx(best, rel=1e-4)


def test_stacks_of_a_model_type_that_is_not_known_are_refused(tmp_path):
    import json

    for folder, changed in (("base", ()), ("tuned", ["experts.down_proj"])):
        saved(tmp_path / folder, "mixtral", changed)
        config = json.loads((tmp_path / folder / "config.json").read_text())
        config["model_type"] = "future_moe"
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    base, tuned = read_checkpoint(tmp_path / "base"), read_checkpoint(tmp_path / "tuned")
    with pytest.raises(UnsupportedError, match="does not tell how experts lie"):
        difference(base, tuned)
