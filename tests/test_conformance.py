"""The conformance kit on the built-in formats and on a third-party plugin package."""

import base64
import hashlib
import json
from pathlib import Path
from typing import ClassVar

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from loratools_formats import Format, get_format, registered_formats
from loratools_formats.contract.testing import FormatConformance

PREFIX = "base_model.model."


class TestPeft(FormatConformance):
    """A folder with every kind of tensor that PEFT writes together."""

    format: Format = get_format("peft")
    biases = False  # of factors, which PEFT has beside neither embeddings nor experts

    def make_sample(self, folder: Path) -> Path:
        rng = np.random.default_rng(0)

        def bf16(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

        tensors = {
            "layers.0.q_proj.lora_A.weight": bf16(8, 20),
            "layers.0.q_proj.lora_B.weight": bf16(12, 8),
            "layers.1.q_proj.lora_A.weight": bf16(4, 20),
            "layers.1.q_proj.lora_B.weight": bf16(12, 4),
            "conv.lora_A.weight": bf16(8, 3, 5, 5),
            "conv.lora_B.weight": bf16(6, 8, 1, 1),
            "classifier.weight": bf16(3, 12),
            "classifier.bias": bf16(3),
            "tokens.token_adapter.trainable_tokens_delta": bf16(2, 16),
            "unrelated.buffer": np.arange(4, dtype=np.int64),
        }
        if self.biases:
            tensors["layers.0.q_proj.lora_B.bias"] = bf16(12)
        else:
            tensors |= {
                "embed.lora_embedding_A": bf16(8, 50),
                "embed.lora_embedding_B": bf16(16, 8),
                "mlp.experts.lora_A.weight": bf16(24, 10),
                "mlp.experts.lora_B.weight": bf16(14, 24),
                "mlp.experts.base_layer.lora_A.weight": bf16(24, 7),
                "mlp.experts.base_layer.lora_B.weight": bf16(10, 24),
            }
        save_file(
            {PREFIX + name: tensor for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt", "kept": "yes"},
        )
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": "somebody/model",
            "r": 8,
            "lora_alpha": 12,
            "rank_pattern": {"layers.1.q_proj": 4},
            "alpha_pattern": {"q_proj": 6.5},
            "lora_bias": self.biases,
            "modules_to_save": ["classifier"],
            "target_modules": ["q_proj", "conv", *([] if self.biases else ["embed"])],
            "trainable_token_indices": {"tokens": [3, 9]},
        }
        if not self.biases:
            config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def stored_keys(self, path: Path) -> set[str]:
        with safe_open(path / "adapter_model.safetensors", "numpy") as file:
            return set(file.keys())


class TestPeftWithBiases(TestPeft):
    """A folder with biases of factors."""

    biases = True


class SingleFileConformance(FormatConformance):
    """One file of a naming, with tensors of several types and digests in its metadata."""

    keys: ClassVar[dict[str, tuple[str, str, str]]]
    others: tuple[str, ...] = ()

    def make_sample(self, folder: Path) -> Path:
        rng = np.random.default_rng(0)
        tensors = {}
        for start, leaves in self.keys.items():
            down, up, alpha = leaves
            tensors[start + down] = rng.standard_normal((4, 20)).astype(ml_dtypes.bfloat16)
            tensors[start + up] = rng.standard_normal((12, 4)).astype(ml_dtypes.bfloat16)
            if alpha:
                tensors[start + alpha] = np.array(2.5, np.float32)
        for key in self.others:
            tensors[key] = rng.standard_normal(12).astype(np.float32)
        path = folder / "sample.safetensors"
        metadata = {"ss_network_dim": "4", "ss_network_alpha": "2.5", "kept": "yes"}
        save_file(tensors, path, metadata)
        data = path.read_bytes()
        digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        save_file(tensors, path, metadata | {"sshs_model_hash": digest})
        return path

    def stored_keys(self, path: Path) -> set[str]:
        with safe_open(path, "numpy") as file:
            return set(file.keys())


class TestMlx(FormatConformance):
    """A folder as mlx-lm saves it, experts and an embedding included."""

    format: Format = get_format("mlx")

    def make_sample(self, folder: Path) -> Path:
        rng = np.random.default_rng(0)
        tensors = {}
        for name, a, b in (
            ("model.layers.0.self_attn.q_proj", (20, 4), (4, 12)),
            ("model.layers.0.mlp.switch_mlp.up_proj", (3, 4, 20), (3, 12, 4)),
            ("model.embed_tokens", (50, 4), (4, 20)),
        ):
            tensors[f"{name}.lora_a"] = rng.standard_normal(a).astype(np.float32)
            tensors[f"{name}.lora_b"] = rng.standard_normal(b).astype(np.float32)
        save_file(tensors, folder / "adapters.safetensors")
        parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
        config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": parameters}
        config["model"] = "somebody/model"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def stored_keys(self, path: Path) -> set[str]:
        with safe_open(path / "adapters.safetensors", "numpy") as file:
            return set(file.keys())


KOHYA_LEAVES = (".lora_down.weight", ".lora_up.weight", ".alpha")
PEFT_LEAVES = (".lora_A.weight", ".lora_B.weight", "")


class TestKohya(SingleFileConformance):
    format: Format = get_format("kohya")
    keys: ClassVar = {
        "lora_unet_mid_block_attentions_0_proj_in": KOHYA_LEAVES,
        "lora_te_text_model_encoder_layers_0_mlp_fc1": KOHYA_LEAVES,
    }
    others = ("lora_unet_mid_block_norm.w_norm", "lora_unet_mid_block_norm.b_norm")


class TestDiffusers(SingleFileConformance):
    format: Format = get_format("diffusers")
    keys: ClassVar = {
        "transformer.blocks.0.attn.to_q": PEFT_LEAVES,
        "transformer.blocks.0.attn.processor.to_out": ("_lora.down.weight", "_lora.up.weight", ""),
        "text_encoder.layers.0.mlp": PEFT_LEAVES,
    }


class TestComfyUI(SingleFileConformance):
    format: Format = get_format("comfyui")
    keys: ClassVar = {
        "diffusion_model.blocks.0.attn.qkv": PEFT_LEAVES,
        "diffusion_model.blocks.1.attn.qkv": KOHYA_LEAVES,
    }
    others = ("diffusion_model.blocks.1.attn.qkv.diff_b", "diffusion_model.norm.set_weight")


class TestOtherSingleFiles(SingleFileConformance):
    format: Format = get_format("safetensors")
    keys: ClassVar = {
        "double_blocks.0.processor.qkv_lora1": (".down.weight", ".up.weight", ""),
        "lora_unet_mid_block_attentions_0_proj_in": KOHYA_LEAVES,
        "transformer_blocks.0.attn.to_q": (".lora_A", ".lora_B", ""),
    }


class TestGguf(FormatConformance):
    """A file with every kind of tensor that llama.cpp loads, written with the gguf package."""

    format: Format = get_format("gguf")

    def make_sample(self, folder: Path) -> Path:
        rng = np.random.default_rng(0)
        path = folder / "sample.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 12.0)
        writer.add_string("adapter.lora.task_name", "test")
        writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/some/model")
        writer.add_uint32("general.base_model.count", 1)
        writer.add_array("general.tags", ["lora", "test"])
        for name, a, b in (
            ("blk.0.attn_q", (8, 20), (12, 8)),
            ("blk.1.attn_q", (3, 20), (12, 3)),
            ("blk.0.ffn_up_exps", (4, 8, 20), (4, 12, 8)),
            ("token_embd", (50, 8), (20, 8)),
        ):
            kind = np.float16 if name.startswith("blk.1") else np.float32
            writer.add_tensor(f"{name}.weight.lora_a", rng.standard_normal(a).astype(kind))
            writer.add_tensor(f"{name}.weight.lora_b", rng.standard_normal(b).astype(kind))
        writer.add_tensor("blk.0.attn_norm.weight", np.ones(20, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def stored_keys(self, path: Path) -> set[str]:
        return {tensor.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "plugin"))
    registered_formats.cache_clear()
    yield
    registered_formats.cache_clear()


@pytest.mark.usefixtures("plugins")
class TestThirdParty(FormatConformance):
    """A format from another package, found through its entry point."""

    @property
    def format(self) -> Format:
        import loratools_demo_plugin

        return loratools_demo_plugin.FORMAT

    def make_sample(self, folder: Path) -> Path:
        def entry(*shape: int) -> dict:
            data = np.arange(np.prod(shape), dtype="<f4").tobytes()
            return {
                "dtype": "F32",
                "shape": shape,
                "data": base64.b64encode(data).decode(),
            }

        module = {"scale": 0.5, "a": entry(2, 5), "b": entry(3, 2)}
        path = folder / "sample.demo.json"
        path.write_text('{"demo-adapter":' + json.dumps({"layer": module}) + "}")
        return path

    def stored_keys(self, path: Path) -> set[str]:
        modules = json.loads(path.read_text())["demo-adapter"]
        return {f"{name}.{factor}" for name in modules for factor in ("a", "b")}


@pytest.mark.usefixtures("plugins")
def test_broken_plugin_stays_visible_and_stops_nothing():
    entries = {entry.name: entry for entry in registered_formats()}
    assert entries["broken"].format is None
    assert "a library this plugin needs is missing" in entries["broken"].error
    assert entries["broken"].package == "loratools-broken-plugin"
    assert get_format("peft").name == "peft"
    assert get_format("demo").name == "demo"
