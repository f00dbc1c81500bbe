"""One small file for each dialect, with the true ΔW of its modules computed here, densely.

Key names follow the writers named in each function; dimensions are small, module names are real.
Run as a script, this writes the golden files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent.parent / "golden" / "singlefile"
HIDDEN = 8


@dataclass
class DialectFile:
    """Tensors and metadata of a file, and what a reader must make of it."""

    format: str
    dialects: set[str]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    deltas: dict[str, np.ndarray] = field(default_factory=dict)
    additions: set[str] = field(default_factory=set)
    replacements: set[str] = field(default_factory=set)
    carried: set[str] = field(default_factory=set)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def draw(self, *shape: int, dtype=ml_dtypes.bfloat16) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(dtype)

    def pair(
        self,
        name: str,
        out: int,
        in_: int,
        rank: int,
        leaves: tuple[str, str],
        *,
        module: str | None = None,
        alpha: float | None = None,
        kernel: tuple[int, ...] = (),
        alpha_key: str | None = None,
        scale: float | None = None,
    ) -> None:
        """Add two factors, and alpha if given; scale is what the reader must find."""
        a = self.draw(rank, in_, *kernel)
        b = self.draw(out, rank, *(1 for _ in kernel))
        self.tensors[name + leaves[0]], self.tensors[name + leaves[1]] = a, b
        if alpha is not None:
            self.tensors[alpha_key or f"{name}.alpha"] = np.array(alpha, np.float32)
            scale = alpha / rank
        flat = a.astype(np.float64).reshape(rank, -1)
        self.deltas[module or name] = (
            (1.0 if scale is None else scale) * b.astype(np.float64).reshape(out, rank) @ flat
        )


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


def kohya_sd15() -> DialectFile:
    """sd-scripts `networks/lora.py` for SD 1.x: diffusers paths flattened; 1×1 convolutions."""
    file = DialectFile("kohya", {"kohya"})
    unet = "lora_unet_down_blocks_0_attentions_0"
    for projection in ("to_q", "to_k", "to_v", "to_out_0"):
        name = f"{unet}_transformer_blocks_0_attn1_{projection}"
        file.pair(name, 8, 8, 4, KOHYA, alpha=2.0)
    file.pair(f"{unet}_transformer_blocks_0_ff_net_0_proj", 64, 8, 4, KOHYA, alpha=2.0)
    file.pair(f"{unet}_proj_in", 8, 8, 4, KOHYA, alpha=2.0, kernel=(1, 1))
    te = "lora_te_text_model_encoder_layers_0"
    file.pair(f"{te}_self_attn_q_proj", 6, 6, 4, KOHYA, alpha=1.0)
    file.pair(f"{te}_mlp_fc1", 24, 6, 4, KOHYA, alpha=1.0)
    file.metadata = {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_args": "{}",
        "ss_tag_frequency": json.dumps({"img": {"private name": 3}}),
        "modelspec.title": "small",
    }
    return file


def kohya_sdxl() -> DialectFile:
    """sd-scripts for SDXL: original UNet names, two text encoders, convolutions 3×3 and 1×1."""
    file = DialectFile("kohya", {"kohya"}, seed=1)
    blocks = "lora_unet_input_blocks"
    file.pair(f"{blocks}_4_1_transformer_blocks_0_attn2_to_k", 8, 12, 4, KOHYA, alpha=4.0)
    file.pair(f"{blocks}_4_1_proj_in", 8, 8, 4, KOHYA, alpha=4.0)
    file.pair(f"{blocks}_1_0_in_layers_2", 8, 6, 2, KOHYA, alpha=1.0, kernel=(3, 3))
    file.pair(f"{blocks}_4_0_skip_connection", 8, 6, 4, KOHYA, alpha=4.0, kernel=(1, 1))
    file.pair("lora_te1_text_model_encoder_layers_0_mlp_fc2", 6, 24, 4, KOHYA, alpha=4.0)
    file.pair("lora_te2_text_model_encoder_layers_0_mlp_fc2", 10, 40, 4, KOHYA, alpha=4.0)
    file.pair("lora_te2_text_projection", 10, 10, 4, KOHYA, alpha=4.0)
    return file


def kohya_flux() -> DialectFile:
    """sd-scripts `networks/lora_flux.py`: BFL names flattened; one module without alpha."""
    file = DialectFile("kohya", {"kohya"}, seed=2)
    h = HIDDEN
    double, single = "lora_unet_double_blocks_0", "lora_unet_single_blocks_0"
    file.pair(f"{double}_img_attn_qkv", 3 * h, h, 4, KOHYA, alpha=8.0)
    file.pair(f"{double}_txt_attn_proj", h, h, 4, KOHYA, alpha=8.0)
    file.pair(f"{double}_img_mlp_0", 4 * h, h, 4, KOHYA, alpha=8.0)
    file.pair(f"{single}_linear1", 7 * h, h, 4, KOHYA, alpha=8.0)
    file.pair(f"{single}_linear2", h, 5 * h, 4, KOHYA)
    return file


def musubi_wan() -> DialectFile:
    """musubi-tuner `networks/lora_wan.py`."""
    file = DialectFile("kohya", {"kohya"}, seed=3)
    for name in ("self_attn_q", "cross_attn_k", "self_attn_o"):
        file.pair(f"lora_unet_blocks_0_{name}", 8, 8, 4, KOHYA, alpha=4.0)
    file.pair("lora_unet_blocks_0_ffn_0", 16, 8, 4, KOHYA, alpha=4.0)
    return file


def wan_fun() -> DialectFile:
    """VideoX-Fun: two underscores after the prefix."""
    file = DialectFile("kohya", {"Wan-Fun"}, seed=4)
    file.pair("lora_unet__blocks_0_self_attn_q", 8, 8, 4, KOHYA, alpha=2.0)
    return file


def trailing_underscore() -> DialectFile:
    """A FLUX trainer whose alpha keys have an underscore too many."""
    file = DialectFile("kohya", {"OneTrainer"}, seed=5)
    name = "lora_transformer_single_transformer_blocks_7_attn_to_k"
    file.pair(name, 8, 8, 4, KOHYA, alpha=2.0, alpha_key=f"{name}_.alpha")
    return file


def onetrainer_legacy() -> DialectFile:
    """OneTrainer's legacy keys, with a trained embedding in the same file."""
    file = DialectFile("safetensors", {"OneTrainer", "kohya", "OneTrainer embedding"}, seed=6)
    name = "lora_transformer_transformer_blocks_0_attn_to_q"
    file.pair(name, 8, 8, 4, KOHYA, alpha=1.0)
    file.pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 8, 4, KOHYA, alpha=1.0)
    file.format = "kohya"
    file.tensors["bundle_emb.token.clip_l"] = file.draw(2, 8)
    file.carried = {"bundle_emb.token.clip_l"}
    return file


def onetrainer_omi() -> DialectFile:
    """OneTrainer's dotted diffusers paths with kohya's leaves (OneTrainer issue 1544)."""
    file = DialectFile("diffusers", {"OneTrainer in diffusers naming"}, seed=7)
    name = "transformer.transformer_blocks.0.attn.to_q"
    file.pair(name, 8, 8, 4, KOHYA, alpha=1.0)
    return file


def lycoris() -> DialectFile:
    """LyCORIS through sd-scripts: LoCon, LoHa, LoKr, full, norms and both DoRA axes."""
    file = DialectFile("kohya", {"kohya", "LyCORIS", "kohya with other leaves"}, seed=8)
    block = "lora_unet_down_blocks_0"
    _hadamard(file, f"{block}_attentions_0_transformer_blocks_0_attn1_to_q")
    _kronecker(file, f"{block}_attentions_0_transformer_blocks_0_attn1_to_k")
    _whole_kronecker(file, f"{block}_attentions_0_transformer_blocks_0_attn1_to_v")
    _tucker(file, f"{block}_resnets_0_conv1")
    name = f"{block}_resnets_0_conv2"
    diff = file.draw(6, 4, 3, 3)
    file.tensors[f"{name}.diff"] = diff
    file.deltas[name] = diff.astype(np.float64).reshape(6, -1)
    file.tensors[f"{name}.diff_b"] = file.draw(6)
    norm = f"{block}_resnets_0_norm1"
    file.tensors[f"{norm}.w_norm"], file.tensors[f"{norm}.b_norm"] = file.draw(4), file.draw(4)
    file.additions = {f"{name}.diff_b", f"{norm}.w_norm", f"{norm}.b_norm"}
    return file


def _hadamard(file: DialectFile, name: str) -> None:
    w1a, w1b = file.draw(8, 2), file.draw(2, 6)
    w2a, w2b = file.draw(8, 2), file.draw(2, 6)
    leaves = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b}
    file.tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    file.tensors[f"{name}.alpha"] = np.array(1.0, np.float32)
    wide = [t.astype(np.float64) for t in (w1a, w1b, w2a, w2b)]
    file.deltas[name] = 0.5 * (wide[0] @ wide[1]) * (wide[2] @ wide[3])


def _kronecker(file: DialectFile, name: str) -> None:
    w1, w2a, w2b = file.draw(2, 3), file.draw(4, 2), file.draw(2, 2)
    file.tensors |= {
        f"{name}.lokr_w1": w1,
        f"{name}.lokr_w2_a": w2a,
        f"{name}.lokr_w2_b": w2b,
        f"{name}.alpha": np.array(1.0, np.float32),
    }
    w1, w2a, w2b = (t.astype(np.float64) for t in (w1, w2a, w2b))
    file.deltas[name] = 0.5 * np.kron(w1, w2a @ w2b)


def _whole_kronecker(file: DialectFile, name: str) -> None:
    """Two whole factors, and an alpha that means nothing (supermerger issue 459)."""
    w1, w2 = file.draw(2, 3), file.draw(4, 2)
    file.tensors |= {
        f"{name}.lokr_w1": w1,
        f"{name}.lokr_w2": w2,
        f"{name}.alpha": np.array(1e-5, np.float32),
    }
    file.deltas[name] = np.kron(w1.astype(np.float64), w2.astype(np.float64))


def _tucker(file: DialectFile, name: str) -> None:
    down, up, mid = file.draw(2, 4, 1, 1), file.draw(6, 2, 1, 1), file.draw(2, 2, 3, 3)
    file.tensors |= {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.lora_mid.weight": mid,
        f"{name}.alpha": np.array(1.0, np.float32),
    }
    d, u, m = (t.astype(np.float64) for t in (down[:, :, 0, 0], up[:, :, 0, 0], mid))
    file.deltas[name] = 0.5 * np.einsum("om,mnkl,ni->oikl", u, m, d).reshape(6, -1)


def simpletuner() -> DialectFile:
    """SimpleTuner's LyCORIS: flattened diffusers paths after `lycoris_`."""
    file = DialectFile("kohya", {"SimpleTuner LyCORIS"}, seed=9)
    _kronecker(file, "lycoris_transformer_blocks_0_attn_to_q")
    return file


def comfyui() -> DialectFile:
    """ComfyUI: original dotted paths, either leaf, biases and replaced weights."""
    file = DialectFile("comfyui", {"ComfyUI"}, seed=10)
    h = HIDDEN
    file.pair("diffusion_model.double_blocks.0.img_attn.qkv", 3 * h, h, 4, PEFT)
    file.pair("diffusion_model.double_blocks.0.img_mlp.0", 4 * h, h, 4, KOHYA, alpha=2.0)
    clip = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    file.pair(clip, 8, 8, 4, KOHYA)
    file.tensors["diffusion_model.double_blocks.0.img_mlp.0.diff_b"] = file.draw(4 * h)
    file.additions = {"diffusion_model.double_blocks.0.img_mlp.0.diff_b"}
    norm = "diffusion_model.double_blocks.0.img_attn.norm.key_norm.set_weight"
    file.tensors[norm] = file.draw(h)
    file.replacements = {norm}
    return file


def wan_lora() -> DialectFile:
    """diffusion-pipe for Wan: `diffusion_model.` and lora_A/lora_B, without alpha."""
    file = DialectFile("comfyui", {"ComfyUI"}, seed=11)
    for name in ("self_attn.q", "cross_attn.v", "ffn.0"):
        file.pair(f"diffusion_model.blocks.0.{name}", 8, 8, 4, PEFT)
    return file


def diffusers_metadata() -> DialectFile:
    """diffusers `save_lora_weights` with adapter metadata: patterns, two components."""
    file = DialectFile("diffusers", {"diffusers"}, seed=12)
    block = "transformer.transformer_blocks.0.attn"
    file.pair(f"{block}.to_q", 8, 8, 4, PEFT, scale=2.0)
    file.pair(f"{block}.to_k", 8, 8, 2, PEFT, scale=4.0)
    file.pair(f"{block}.to_out.0", 8, 8, 4, PEFT, scale=0.25)
    te = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    file.pair(te, 6, 6, 4, PEFT, scale=0.5)
    configs = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.rank_pattern": {"attn.to_k": 2},
        "transformer.alpha_pattern": {"attn.to_out.0": 1},
        "transformer.target_modules": ["to_q", "to_k", "to_out.0"],
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 2,
    }
    file.metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(configs, indent=2)}
    return file


def diffusers_alpha() -> DialectFile:
    """The same form with alpha tensors instead."""
    file = DialectFile("diffusers", {"diffusers", "OneTrainer in diffusers naming"}, seed=13)
    block = "transformer.transformer_blocks.0.attn"
    file.pair(f"{block}.to_q", 8, 8, 4, PEFT, alpha=8.0)
    file.pair(f"{block}.to_k", 8, 8, 4, PEFT)
    return file


def diffusers_dora() -> DialectFile:
    """PEFT's DoRA in one file."""
    file = DialectFile("diffusers", {"diffusers"}, seed=14)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    file.pair(name, 8, 6, 4, PEFT)
    file.tensors[f"{name}.lora_magnitude_vector"] = file.draw(8)
    return file


def old_diffusers() -> DialectFile:
    """diffusers before PEFT: attention processors, and text encoders with linear_layer."""
    file = DialectFile("diffusers", {"old diffusers"}, seed=15)
    attn = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    old = ("_lora.down.weight", "_lora.up.weight")
    file.pair(f"{attn}.processor.to_q", 8, 8, 4, old, module=f"{attn}.to_q")
    file.pair(f"{attn}.processor.to_out", 8, 8, 4, old, module=f"{attn}.to_out.0")
    dotted = (".lora.down.weight", ".lora.up.weight")
    file.pair("unet.mid_block.attentions.0.proj_in", 8, 8, 4, dotted)
    linear = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    file.pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 6, 6, 4, linear)
    return file


def ai_toolkit() -> DialectFile:
    """ai-toolkit for FLUX.1: diffusers' form, no alpha."""
    file = DialectFile("diffusers", {"diffusers"}, seed=16)
    for name in ("attn.to_q", "attn.add_k_proj", "ff.net.0.proj"):
        file.pair(f"transformer.transformer_blocks.0.{name}", 8, 8, 4, PEFT)
    return file


def bfl_control() -> DialectFile:
    """FLUX.1 Canny and Depth: unprefixed BFL names, biases, norms, an input twice as wide."""
    file = DialectFile("safetensors", {"BFL control"}, seed=17)
    h = HIDDEN
    file.pair("double_blocks.0.img_attn.qkv", 3 * h, h, 4, PEFT)
    file.pair("img_in", h, 2 * h, 4, PEFT)
    file.tensors["img_in.lora_B.bias"] = file.draw(h)
    norm = "double_blocks.0.img_attn.norm.key_norm.scale"
    file.tensors[norm] = file.draw(h)
    file.replacements = {norm}
    return file


def xlabs() -> DialectFile:
    """XLabs x-flux: processors of both kinds of blocks."""
    file = DialectFile("safetensors", {"XLabs"}, seed=18)
    h, leaves = HIDDEN, (".down.weight", ".up.weight")
    for stream in "12":
        block = "double_blocks.0.processor"
        file.pair(f"{block}.qkv_lora{stream}", 3 * h, h, 4, leaves)
        file.pair(f"{block}.proj_lora{stream}", h, h, 4, leaves)
    file.pair("single_blocks.0.processor.qkv_lora", 3 * h, h, 4, leaves)
    file.pair("single_blocks.0.processor.proj_lora", h, 5 * h, 4, leaves)
    return file


def fal_kontext() -> DialectFile:
    """PEFT's prefix before the path, alone or after a component."""
    file = DialectFile("safetensors", {"PEFT in one file"}, seed=19)
    file.pair(
        "base_model.model.transformer_blocks.0.attn.to_q", 8, 8, 4, PEFT,
        module="transformer_blocks.0.attn.to_q",
    )  # fmt: skip
    file.pair(
        "transformer.base_model.model.blocks.0.attn.to_q", 8, 8, 4, PEFT,
        module="transformer.blocks.0.attn.to_q",
    )  # fmt: skip
    return file


def adapter_name_infix() -> DialectFile:
    """Qwen-Image-Lightning: PEFT's state with the adapter's name in every key."""
    file = DialectFile("safetensors", {"PEFT with adapter name"}, seed=20)
    leaves = (".lora_A.default.weight", ".lora_B.default.weight")
    file.pair("transformer_blocks.0.attn.to_q", 8, 8, 4, leaves)
    return file


def mochi() -> DialectFile:
    """Mochi's trainer: factors without `.weight`."""
    file = DialectFile("safetensors", {"Mochi"}, seed=21)
    file.pair("transformer_blocks.0.attn1.to_q", 8, 8, 4, (".lora_A", ".lora_B"))
    return file


def control_lora() -> DialectFile:
    """Stability's ControlLoRA: bare leaves, and whole tensors that replace others."""
    file = DialectFile("safetensors", {"ControlLoRA"}, seed=22)
    name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    file.pair(name, 8, 8, 4, (".down", ".up"))
    file.tensors["zero_convs.0.0.weight"] = file.draw(4, 4, 1, 1)
    file.tensors["lora_controlnet"] = np.zeros(0, np.float32)
    file.replacements, file.carried = {"zero_convs.0.0.weight"}, {"lora_controlnet"}
    return file


def mixture() -> DialectFile:
    """PEFT's and kohya's keys in one file."""
    file = DialectFile("safetensors", {"diffusers", "kohya"}, seed=23)
    file.pair("unet.mid_block.attentions.0.proj_in", 8, 8, 4, PEFT)
    file.pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 8, 8, 4, KOHYA, alpha=2.0)
    return file


def dora_axes() -> DialectFile:
    """LyCORIS' dora_scale for each input (before version 3) and for each output (since)."""
    file = DialectFile("kohya", {"kohya", "LyCORIS"}, seed=24)
    for name, shape in (("to_q", (1, 6)), ("to_k", (8, 1))):
        module = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_{name}"
        file.pair(module, 8, 6, 4, KOHYA, alpha=2.0)
        file.tensors[f"{module}.dora_scale"] = file.draw(*shape)
    return file


def lycoris_on_the_weight() -> DialectFile:
    """LyCORIS kinds whose change depends on the base weight: GLoRA, OFT, BOFT and IA³."""
    file = DialectFile("kohya", {"LyCORIS", "kohya"}, seed=25)
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    names = [f"{block}_attn1_{projection}" for projection in ("to_q", "to_k", "to_v", "to_out_0")]
    for name in names:
        file.weights[name] = file.rng.standard_normal((8, 6))
    glora, oft, boft, ia3 = names
    parts = [file.draw(6, 2), file.draw(2, 6), file.draw(8, 2), file.draw(2, 6)]
    leaves = ("a1", "a2", "b1", "b2")
    file.tensors |= {f"{glora}.{n}.weight": t for n, t in zip(leaves, parts, strict=True)}
    file.tensors[f"{glora}.alpha"] = np.array(1.0, np.float32)
    a1, a2, b1, b2 = (t.astype(np.float64) for t in parts)
    file.deltas[glora] = 0.5 * (file.weights[glora] @ a1 @ a2 + b1 @ b2)
    for name, shape in ((oft, (2, 4, 4)), (boft, (2, 4, 2, 2))):
        file.tensors[f"{name}.oft_blocks"] = blocks = file.draw(*shape)
        file.tensors[f"{name}.alpha"] = np.array(0.0, np.float32)
        skew = blocks.astype(np.float64) - blocks.astype(np.float64).swapaxes(-1, -2)
        eye = np.eye(shape[-1])
        turns = (eye + skew) @ np.linalg.inv(eye - skew)
        weight = file.weights[name]
        if name == oft:
            turned = np.concatenate(
                [t.T @ w for t, w in zip(turns, np.split(weight, 2), strict=True)]
            )
        else:
            first = np.concatenate(
                [t @ w for t, w in zip(turns[0], np.split(weight, 4), strict=True)]
            )
            pairs = first.reshape(2, 2, 2, 6).swapaxes(1, 2)
            second = np.einsum("nij,njc->nic", turns[1], pairs.reshape(4, 2, 6))
            turned = second.reshape(2, 2, 2, 6).swapaxes(1, 2).reshape(8, 6)
        file.deltas[name] = turned - weight
    file.tensors[f"{ia3}.weight"] = factors = file.draw(8)
    file.tensors[f"{ia3}.on_input"] = np.array(0, np.int64)
    file.deltas[ia3] = factors.astype(np.float64)[:, None] * file.weights[ia3]
    return file


def ai_toolkit_lokr() -> DialectFile:
    """ai-toolkit since it writes LoKr by default: dotted original paths, LyCORIS leaves."""
    file = DialectFile("comfyui", {"ComfyUI"}, seed=26)
    _kronecker(file, "diffusion_model.layers.0.attention.to_q")
    _whole_kronecker(file, "diffusion_model.layers.0.feed_forward.w1")
    return file


def wan_differences() -> DialectFile:
    """Extracted Wan adapters: differences of norms and biases beside factors; a 3-D convolution."""
    file = DialectFile("comfyui", {"ComfyUI"}, seed=27)
    block = "diffusion_model.blocks.0"
    file.pair(f"{block}.self_attn.q", 8, 8, 4, KOHYA, alpha=4.0)
    file.pair("diffusion_model.patch_embedding", 8, 4, 2, KOHYA, kernel=(1, 2, 2))
    file.tensors[f"{block}.ffn.0.diff"] = diff = file.draw(16, 8)
    file.deltas[f"{block}.ffn.0"] = diff.astype(np.float64)
    norm, bias = f"{block}.norm3.diff", f"{block}.self_attn.q.diff_b"
    file.tensors[norm], file.tensors[bias] = file.draw(8), file.draw(8)
    file.additions = {norm, bias}
    return file


def wan_experts() -> DialectFile:
    """Both experts of Wan 2.2 in diffusers' form, each with a configuration of its own."""
    file = DialectFile("diffusers", {"diffusers"}, seed=28)
    file.pair("transformer.blocks.0.attn1.to_q", 8, 8, 4, PEFT, scale=0.5)
    file.pair("transformer_2.blocks.0.attn1.to_q", 8, 8, 2, PEFT, scale=4.0)
    configs = {"transformer": (4, 2), "transformer_2": (2, 8)}
    settings = {f"{name}.r": rank for name, (rank, _) in configs.items()}
    settings |= {f"{name}.lora_alpha": alpha for name, (_, alpha) in configs.items()}
    file.metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    return file


def onetrainer_prior() -> DialectFile:
    """OneTrainer for Stable Cascade."""
    file = DialectFile("kohya", {"OneTrainer"}, seed=29)
    file.pair("lora_prior_unet_down_blocks_0_2_attention_attn_to_q", 8, 8, 4, KOHYA, alpha=1.0)
    return file


def musubi_hunyuan() -> DialectFile:
    """musubi-tuner for HunyuanVideo."""
    file = DialectFile("kohya", {"kohya"}, seed=30)
    file.pair("lora_unet_double_blocks_0_img_attn_qkv", 24, 8, 4, KOHYA, alpha=2.0)
    file.pair("lora_unet_single_blocks_0_linear1", 56, 8, 4, KOHYA, alpha=2.0)
    return file


def dora_with_adapter_name() -> DialectFile:
    """PEFT's DoRA with the adapter's name in the key, of a convolution too."""
    file = DialectFile("safetensors", {"PEFT with adapter name"}, seed=31)
    leaves = (".lora_A.default.weight", ".lora_B.default.weight")
    file.pair("mid_block.attentions.0.proj_out", 8, 6, 4, leaves)
    file.pair("mid_block.resnets.0.conv1", 8, 6, 4, leaves, kernel=(3, 3))
    for name, shape in (("attentions.0.proj_out", (8,)), ("resnets.0.conv1", (1, 8, 1, 1))):
        file.tensors[f"mid_block.{name}.lora_magnitude_vector.default.weight"] = file.draw(*shape)
    return file


def eight_bit_kohya() -> DialectFile:
    """A kohya file whose factors were stored in 8-bit floats."""
    file = DialectFile("kohya", {"kohya"}, seed=32)
    name = "lora_unet_blocks_0_self_attn_q"
    file.pair(name, 8, 8, 4, KOHYA, alpha=2.0)
    a, b = (file.tensors[name + leaf].astype(ml_dtypes.float8_e4m3fn) for leaf in KOHYA)
    file.tensors[name + KOHYA[0]], file.tensors[name + KOHYA[1]] = a, b
    file.deltas[name] = 0.5 * b.astype(np.float64) @ a.astype(np.float64)
    return file


MAKERS: tuple[Callable[[], DialectFile], ...] = (
    kohya_sd15, kohya_sdxl, kohya_flux, musubi_wan, wan_fun, trailing_underscore,
    onetrainer_legacy, onetrainer_omi, lycoris, simpletuner, comfyui, wan_lora,
    diffusers_metadata, diffusers_alpha, diffusers_dora, old_diffusers, ai_toolkit, bfl_control,
    xlabs, fal_kontext, adapter_name_infix, mochi, control_lora, mixture, dora_axes,
    lycoris_on_the_weight, ai_toolkit_lokr, wan_differences, wan_experts, onetrainer_prior,
    musubi_hunyuan, dora_with_adapter_name, eight_bit_kohya,
)  # fmt: skip


def save(file: DialectFile, path: Path) -> Path:
    """Write a file."""
    # The library writes other memory orders as they lie.
    tensors = {name: np.array(tensor, order="C") for name, tensor in file.tensors.items()}
    save_file(tensors, path, metadata=file.metadata or None)
    return path


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for maker in MAKERS:
        sys.stdout.write(f"{save(maker(), GOLDEN / f'{maker.__name__}.safetensors')}\n")
