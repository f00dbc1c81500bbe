"""State dicts of research code, beside the formulas of its layers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from statedicts import close, deltas_of, saved

from loratools_formats import find_format, read_adapter
from loratools_formats.errors import AdapterError, OptionError, UnsupportedError

RNG = np.random.default_rng(0)
OUT, IN, RANK = 36, 24, 4
SHAPES = {"layers.0.q": (OUT, IN)}


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


FACTORS = {"layers.0.q.weight_a": random(RANK, IN), "layers.0.q.weight_b": random(OUT, RANK)}


FACTORS = {"layers.0.q.weight_a": random(RANK, IN), "layers.0.q.weight_b": random(OUT, RANK)}


class TestLoraFactory:
    @pytest.mark.parametrize(
        ("variant", "root", "suffix"),
        [("lora", RANK, ".safetensors"), ("rslora", math.sqrt(RANK), ".ckpt")],
    )
    def test_its_scale_and_variant_are_asked_for(self, tmp_path, variant, root, suffix):
        path = saved(tmp_path / f"final{suffix}", FACTORS)
        assert find_format(path).name == "lorafactory"
        with pytest.raises(UnsupportedError, match="alpha"):
            deltas_of(path, SHAPES, variant=variant)
        got, _ = deltas_of(path, SHAPES, variant=variant, alpha=32)
        b, a = FACTORS["layers.0.q.weight_b"], FACTORS["layers.0.q.weight_a"]
        close(got["layers.0.q"], 32 / root * b.astype("f8") @ a)
        with pytest.raises(OptionError, match="variant"):
            deltas_of(path, SHAPES, variant="pissa", alpha=32)

    @pytest.mark.parametrize("extra", ["weight_ab_mixer", "weight_e", "weight"])
    def test_variants_with_further_tensors_are_refused(self, tmp_path, extra):
        path = saved(
            tmp_path / "final.safetensors", FACTORS | {f"layers.0.q.{extra}": random(4, 4)}
        )
        with pytest.raises(AdapterError, match=extra):
            read_adapter(path)


class TestPeftWeights:
    """What ICM-LoRA ends with: a generated `adapter_model.safetensors` and nothing else."""

    tensors = {  # noqa: RUF012
        "base_model.model.layers.0.q.lora_A.weight": random(RANK, IN),
        "base_model.model.layers.0.q.lora_B.weight": random(OUT, RANK),
    }

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "restored_state_dict.pth"])
    def test_their_scale_is_asked_for(self, tmp_path, name):
        path = saved(tmp_path / name, self.tensors)
        assert find_format(path).name == "peft-weights"
        assert "adapter_config.json" in read_adapter(path).notes[-1]
        with pytest.raises(UnsupportedError, match="alpha"):
            deltas_of(path, SHAPES, variant="rslora")
        got, _ = deltas_of(path, SHAPES, alpha=8, variant="rslora")
        a, b = self.tensors.values()
        close(got["layers.0.q"], 8 / math.sqrt(RANK) * b.astype("f8") @ a)

    def test_with_their_configuration_they_are_a_peft_folder(self, tmp_path):
        path = saved(tmp_path / "adapter_model.safetensors", self.tensors)
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert find_format(path).name == find_format(tmp_path).name == "peft"

    def test_other_names_are_single_files(self, tmp_path):
        assert find_format(saved(tmp_path / "lora.safetensors", self.tensors)).name == "safetensors"

    def test_other_tensors_are_refused(self, tmp_path):
        extra = {"base_model.model.layers.0.q.lora_magnitude_vector": random(OUT)}
        path = saved(tmp_path / "adapter_model.safetensors", self.tensors | extra)
        with pytest.raises(AdapterError, match="magnitude"):
            read_adapter(path)


class TestVbLora:
    """`VBLinear` of the authors: x @ A @ B with both composed of the bank's vectors."""

    length, vectors, topk = 6, 10, 3

    def tensors(self, bank_of=("q", "v")):
        bank, found = random(self.vectors, self.length), {}
        for name in ("q", "v"):
            found[f"layers.0.{name}.logits_A"] = random(IN // self.length, RANK, self.vectors)
            found[f"layers.0.{name}.logits_B"] = random(OUT // self.length, RANK, self.vectors)
        return found | {f"layers.0.{name}.vector_bank": bank for name in bank_of}, bank

    def mixed(self, logits, bank):
        import torch

        top, indices = torch.from_numpy(logits).double().topk(self.topk, dim=-1)
        weights = torch.softmax(top, dim=-1)
        return (weights.unsqueeze(-1) * torch.from_numpy(bank).double()[indices]).sum(-2)

    @pytest.mark.parametrize("bank_of", [("q", "v"), ("q",)])
    def test_its_first_logits_lie_across(self, tmp_path, bank_of):
        tensors, bank = self.tensors(bank_of)
        path = saved(tmp_path / "model.safetensors", tensors)
        assert find_format(path).name == "vblora"
        shapes = {f"layers.0.{name}": (OUT, IN) for name in ("q", "v")}
        with pytest.raises(UnsupportedError, match="topk"):
            deltas_of(path, shapes)
        got, _ = deltas_of(path, shapes, topk=self.topk)
        x = RNG.standard_normal((5, IN))
        for name, delta in got.items():
            a = self.mixed(tensors[f"{name}.logits_A"], bank).transpose(1, 2).reshape(-1, RANK)
            b = self.mixed(tensors[f"{name}.logits_B"], bank).transpose(0, 1).reshape(RANK, -1)
            close(x @ delta.T, x @ (a @ b).numpy())

    def test_a_module_without_a_bank_is_refused(self, tmp_path):
        tensors, _ = self.tensors(bank_of=())
        with pytest.raises(AdapterError, match="vector_bank"):
            read_adapter(saved(tmp_path / "model.safetensors", tensors))

    def test_the_model_beside_it_is_refused(self, tmp_path):
        tensors, _ = self.tensors()
        path = saved(tmp_path / "model.safetensors", tensors | {"layers.0.q.weight": random(4, 4)})
        with pytest.raises(AdapterError, match="adapter alone"):
            read_adapter(path)
