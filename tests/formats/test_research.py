"""State dicts of research code, beside the formulas of its layers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from statedicts import base_of, close, deltas_of, saved

from loratools.algebra.ranks import RankRule
from loratools_formats import find_format, read_adapter
from loratools_formats.disk.errors import (
    AdapterError,
    MissingFileError,
    OptionError,
    UnsupportedError,
)

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
        assert "adapter_config.json" in read_adapter(path).remarks[-1]
        with pytest.raises(UnsupportedError, match="alpha"):
            deltas_of(path, SHAPES, variant="rslora")
        both = r"alpha and variant.* --set alpha=VALUE --set variant=VALUE"
        with pytest.raises(UnsupportedError, match=both):
            deltas_of(path, SHAPES)
        got, _ = deltas_of(path, SHAPES, alpha=8, variant="rslora")
        a, b = self.tensors.values()
        close(got["layers.0.q"], 8 / math.sqrt(RANK) * b.astype("f8") @ a)

    def test_with_their_configuration_they_are_a_peft_folder(self, tmp_path):
        path = saved(tmp_path / "adapter_model.safetensors", self.tensors)
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert find_format(path).name == find_format(tmp_path).name == "peft"

    @pytest.mark.parametrize("name", ["chat.safetensors", "chat.bin", "checkpoint-5.safetensors"])
    def test_under_another_name_the_configuration_beside_them_counts(self, tmp_path, name):
        alone = saved(tmp_path / "alone.safetensors", self.tensors)
        assert find_format(alone).name == "peft-weights"  # it asks for alpha
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q"]}
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        path = saved(folder / name, self.tensors)
        for adapter in (read_adapter(path), read_adapter(folder)):
            factors = adapter.modules["layers.0.q"].factors
            assert adapter.format == "peft"
            assert factors is not None
            assert factors.scale == 8 / RANK
            assert next(finding.code for finding in adapter.findings) == "weights-renamed"

    def test_of_two_weight_files_one_must_be_named(self, tmp_path):
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        for name in ("one.safetensors", "two.safetensors"):
            saved(tmp_path / name, self.tensors)
        with pytest.raises(MissingFileError, match=r"one\.safetensors, two\.safetensors"):
            read_adapter(tmp_path)
        assert read_adapter(tmp_path / "two.safetensors").modules["layers.0.q"].rank == RANK

    def test_a_scale_in_the_file_makes_it_a_single_file(self, tmp_path):
        alpha = {"base_model.model.layers.0.q.alpha": np.float32(RANK / 2)}
        path = saved(tmp_path / "one.safetensors", self.tensors | alpha)
        assert find_format(path).name == "safetensors"
        assert read_adapter(path).modules["layers.0.q"].factors.scale == 0.5

    def test_a_scale_that_is_assumed_is_a_finding(self, tmp_path):
        path = saved(tmp_path / "one.safetensors", self.tensors)
        (found,) = read_adapter(path, "safetensors").findings
        assert found.code == "scale-assumed"

    def test_other_tensors_are_refused(self, tmp_path):
        extra = {"base_model.model.layers.0.q.lora_magnitude_vector": random(OUT)}
        path = saved(tmp_path / "adapter_model.safetensors", self.tensors | extra)
        with pytest.raises(AdapterError, match="magnitude"):
            read_adapter(path)


class TestLoldu:
    """What `LoLDUParametrization` makes of a weight, by its own steps, in float32."""

    alpha, prefix = 6, "layers.0.q.parametrizations.weight."

    def trained(self, init_method):
        """Return the weight before and after training, and the whole state dict."""
        import torch

        weight = torch.from_numpy(random(OUT, IN))
        permutation, lower, upper = torch.linalg.lu(weight)
        diagonal = torch.diagonal(upper)[:RANK].clone()
        upper = (upper / torch.diagonal(upper).unsqueeze(-1))[:RANK]
        lower, scale = lower[:, :RANK], self.alpha / RANK
        start = {
            "lu": diagonal,
            "constant": torch.full((RANK,), diagonal.mean().item()),
            "ones": diagonal,  # z begins as ones, but what is subtracted is the diagonal
            "uniform": torch.from_numpy(random(RANK)),
        }[init_method]
        residual = weight - scale * permutation @ lower @ torch.diag(start) @ upper
        z = start + 0.1 * torch.from_numpy(random(RANK))
        after = residual.double() + scale * (
            permutation.double() @ lower.double() @ torch.diag(z).double() @ upper.double()
        )
        tensors = {
            "original": residual, "0.layer_weights": residual, "0.lora_A": upper,
            "0.lora_B": lower, "0.P": permutation, "0.vector_z": z,
            "0.scaling_factor": torch.tensor(scale), "0.lora_dropout_mask": torch.ones(1, IN),
        }  # fmt: skip
        found = {self.prefix + k: np.ascontiguousarray(v.numpy()) for k, v in tensors.items()}
        return weight.numpy(), after.numpy(), found

    @pytest.mark.parametrize("init_method", ["lu", "constant", "ones"])
    def test_its_vector_needs_the_base(self, tmp_path, init_method):
        weight, after, tensors = self.trained(init_method)
        z = {f"{self.prefix}0.vector_z": tensors[f"{self.prefix}0.vector_z"]}
        path = saved(tmp_path / "loldu.safetensors", z)
        assert find_format(path).name == "loldu"
        given = {"alpha": self.alpha, "init_method": init_method}
        with pytest.raises(UnsupportedError, match="`base`"):
            deltas_of(path, SHAPES, **given)
        base = base_of(tmp_path / "base", {"layers.0.q": weight})
        got, result = deltas_of(path, SHAPES, base=base, **given)
        close(got["layers.0.q"], after - weight, 1e-4)
        assert result.adapter.modules["layers.0.q"].rank == RANK

    @pytest.mark.parametrize("init_method", ["lu", "uniform"])
    def test_its_whole_state_dict_tells_any_start(self, tmp_path, init_method):
        weight, after, tensors = self.trained(init_method)
        path = saved(tmp_path / "loldu.safetensors", tensors)
        base = base_of(tmp_path / "base", {"layers.0.q": weight})
        got, _ = deltas_of(path, SHAPES, base=base, rule=RankRule(rank=RANK))
        close(got["layers.0.q"], after - weight, 1e-5)

    def test_a_random_start_is_refused(self, tmp_path):
        weight, _, tensors = self.trained("uniform")
        z = {f"{self.prefix}0.vector_z": tensors[f"{self.prefix}0.vector_z"]}
        path = saved(tmp_path / "loldu.safetensors", z)
        base = base_of(tmp_path / "base", {"layers.0.q": weight})
        with pytest.raises(OptionError, match="random start is lost"):
            deltas_of(path, SHAPES, base=base, alpha=self.alpha, init_method="uniform")

    def test_pivots_that_rounding_decides_are_refused(self, tmp_path):
        weight, _, tensors = self.trained("lu")
        weight[1:] = weight[1]
        weight[2, 1] += 1
        weight[3, 1] += 1
        z = {f"{self.prefix}0.vector_z": tensors[f"{self.prefix}0.vector_z"]}
        path = saved(tmp_path / "loldu.safetensors", z)
        base = base_of(tmp_path / "base", {"layers.0.q": weight})
        with pytest.raises(UnsupportedError, match="not determined"):
            deltas_of(path, SHAPES, base=base, alpha=self.alpha, init_method="lu")

    @pytest.mark.parametrize(
        ("name", "value"),
        [("0.scaling_factor", random(2)), ("0.P", random(3, 3)), ("0.layer_weights", random(2, 2))],
    )
    def test_tensors_that_do_not_fit_are_refused(self, tmp_path, name, value):
        weight, _, tensors = self.trained("lu")
        path = saved(tmp_path / "loldu.safetensors", tensors | {self.prefix + name: value})
        base = base_of(tmp_path / "base", {"layers.0.q": weight})
        with pytest.raises(AdapterError):
            deltas_of(path, SHAPES, base=base, rule=RankRule(rank=RANK))

    def test_half_of_a_parametrisation_is_refused(self, tmp_path):
        _, _, tensors = self.trained("lu")
        del tensors[f"{self.prefix}0.P"]
        with pytest.raises(AdapterError, match="all of the parametrisation"):
            read_adapter(saved(tmp_path / "loldu.safetensors", tensors))


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

    def test_logits_and_banks_that_do_not_fit_are_refused(self, tmp_path):
        tensors, _ = self.tensors()
        for number, (name, value) in enumerate(
            [("logits_A", random(4, 4)), ("logits_B", random(6, 4, 9)), ("vector_bank", random(9))]
        ):
            path = tmp_path / f"{number}.safetensors"
            saved(path, tensors | {f"layers.0.q.{name}": value})
            shapes = {f"layers.0.{name}": (OUT, IN) for name in ("q", "v")}
            with pytest.raises(AdapterError):
                deltas_of(path, shapes, topk=3)

    def test_the_model_beside_it_is_refused(self, tmp_path):
        tensors, _ = self.tensors()
        path = saved(tmp_path / "model.safetensors", tensors | {"layers.0.q.weight": random(4, 4)})
        with pytest.raises(AdapterError, match="adapter alone"):
            read_adapter(path)


class TestUniLora:
    """`UniLinear` of the authors: x @ A @ B, A and B numbers of the bank times their norms."""

    def tensors(self, bank_of=("q", "v")):
        bank, found = random(50), {}
        for name in ("q", "v"):
            for side, shape in (("A", (IN, RANK)), ("B", (RANK, OUT))):
                found[f"layers.0.{name}.project_params_{side}"] = RNG.integers(0, 50, shape)
                found[f"layers.0.{name}.norm_factor_{side}"] = random(*shape)
        return found | {f"layers.0.{name}.vector_bank": bank for name in bank_of}, bank

    @pytest.mark.parametrize("bank_of", [("q", "v"), ("v",)])
    def test_numbers_of_a_bank(self, tmp_path, bank_of):
        tensors, bank = self.tensors(bank_of)
        path = saved(tmp_path / "model.safetensors", tensors)
        assert find_format(path).name == "unilora"
        got, _ = deltas_of(path, {f"layers.0.{name}": (OUT, IN) for name in ("q", "v")})
        x = RNG.standard_normal((5, IN))
        for name, delta in got.items():
            a, b = (
                bank[tensors[f"{name}.project_params_{side}"]].astype("f8")
                * tensors[f"{name}.norm_factor_{side}"]
                for side in "AB"
            )
            close(x @ delta.T, x @ a @ b)

    def test_indices_beyond_the_bank_are_refused(self, tmp_path):
        tensors, _ = self.tensors(bank_of=("q",))
        path = saved(
            tmp_path / "model.safetensors", tensors | {"layers.0.q.vector_bank": random(9)}
        )
        with pytest.raises(AdapterError, match="below 9"):
            deltas_of(path, {f"layers.0.{name}": (OUT, IN) for name in ("q", "v")})
