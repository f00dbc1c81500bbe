"""Adapters of mlx-lm for models that it stores in ways of its own; PEFT computes the same.

mlx-lm and transformers agree on a tiny model only if its configuration is as older releases of
transformers wrote it: `rope_theta` at the top, `num_experts`, and what mlx-lm takes for granted. Of
gpt-oss, mlx-lm loads floating weights under its own names only.
"""

from __future__ import annotations

import json
import shutil

import mlx_adapters
import numpy as np
import peft_oracle
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

import loratools as lt

pytestmark = [pytest.mark.filterwarnings(line) for line in peft_oracle.WARNINGS]

WORDS = [[1, 5, 9, 2, 7, 3, 11, 4]]
SETTINGS = {
    "PhimoeForCausalLM": {"attention_bias": True, "lm_head_bias": True},
    "Mistral3ForConditionalGeneration": {"tie_word_embeddings": False},
    "Qwen2MoeForCausalLM": {},
    "AfmoeForCausalLM": {},
    "MuseGlimmerForConditionalGeneration": {},
    "GptOssForCausalLM": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
}


def saved(name, folder):
    """Save a tiny model for transformers and for mlx-lm; return its class."""
    import torch
    import transformers

    cls = getattr(transformers, name)
    config = tiny_models.config_of(cls)
    for key, value in SETTINGS[name].items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = cls(config).float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # biases that are all zero would show nothing
                weight.add_(0.05 * torch.randn(weight.shape))
    model.save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "for-mlx")
    file = folder / "for-mlx" / "config.json"
    values = json.loads(file.read_text())
    for section in (values, values.get("text_config", {})):
        rope = section.get("rope_parameters") or {}
        if rope:
            section["rope_theta"] = rope["rope_theta"]
        if "num_local_experts" in section:
            section.setdefault("num_experts", section["num_local_experts"])
    file.write_text(json.dumps(values))
    if name == "GptOssForCausalLM":
        file = folder / "for-mlx" / "model.safetensors"
        weights = {key: w for old, v in load_file(file).items() for key, w in apart(old, v)}
        save_file(weights, file, metadata={"format": "pt"})
    return cls


def apart(key, values):
    """Yield a tensor of gpt-oss under mlx-lm's names, gate and up apart."""
    is_bias = key.endswith("_bias")
    path, _, leaf = key.removesuffix("_bias").rpartition(".")
    if leaf not in ("gate_up_proj", "down_proj"):
        yield key, values
        return
    turned = values if is_bias else values.swapaxes(1, 2)
    axis = 1
    end = "bias" if is_bias else "weight"
    if leaf == "down_proj":
        yield f"{path}.down_proj.{end}", np.ascontiguousarray(turned)
        return
    for start, part in enumerate(("gate_proj", "up_proj")):
        rows = range(start, turned.shape[axis], 2)
        yield f"{path}.{part}.{end}", np.ascontiguousarray(turned.take(rows, axis))


def of_mlx(model):
    import mlx.core as mx

    return np.array(model(mx.array(WORDS))).astype("f8")


def of_torch(model):
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(WORDS)).logits.double().numpy()


def assert_close(got, want, share=5e-5):
    assert np.linalg.norm(got - want) <= share * np.linalg.norm(want)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_both_compute_the_same_with_an_adapter(name, tmp_path):
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model
    from peft import PeftModel

    cls = saved(name, tmp_path)
    base = tmp_path / "base"
    model, _ = load_model(tmp_path / "for-mlx", strict=False)
    assert_close(of_mlx(model), of_torch(cls.from_pretrained(base)))
    mlx_adapters.adapted(model, tmp_path / "mlx")  # routers and experts among the layers
    want = of_mlx(model)

    lt.convert(tmp_path / "mlx", to="peft", base=base, output=tmp_path / "peft")
    adapted = PeftModel.from_pretrained(cls.from_pretrained(base), str(tmp_path / "peft"))
    assert_close(of_torch(adapted), want)
    lt.fuse(base, tmp_path / "mlx", output=tmp_path / "fused")
    assert_close(of_torch(cls.from_pretrained(tmp_path / "fused")), want)
    lt.squeeze(tmp_path / "peft", rank=8, uniform=True, output=tmp_path / "uniform")
    lt.convert(tmp_path / "uniform", to="mlx", base=base, output=tmp_path / "back")
    again, _ = load_model(tmp_path / "for-mlx", strict=False)
    load_adapters(again, str(tmp_path / "back"))
    assert_close(of_mlx(again), want)


@pytest.mark.parametrize("name", ["PhimoeForCausalLM", "Llama4ForCausalLM"])
def test_a_router_that_returns_several_tensors_is_adapted_as_a_parameter(name, tmp_path):
    import torch
    from peft import PeftModel

    model = tiny_models.made(name)
    model.save_pretrained(tmp_path / "base")
    cls = type(model)
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("router.weight", "q_proj.weight")):
                left, right = (torch.randn(n, generator=generator) for n in weight.shape)
                weight.add_(0.05 * torch.outer(left, right))
    model.save_pretrained(tmp_path / "tuned")
    lt.extract(tmp_path / "base", tmp_path / "tuned", rank=1, output=tmp_path / "x")
    adapted = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "x")
    assert_close(of_torch(adapted), of_torch(model), 1e-4)
    found = tiny_models.merged(tmp_path / "base", tmp_path / "x", cls)
    changed = [key for key, weight in found.items() if not torch.equal(weight, before[key])]
    assert {key.split(".")[-2] for key in changed} == {"router", "q_proj"}
