"""Every class of diffusers that has a table of names, small; and adapters of all its modules.

The widths keep the proportions that tables know: ratios of heads, and of the sides of MLPs.
"""

from __future__ import annotations

import importlib
import warnings

import numpy as np

from loratools.naming.tables import filled, find_table, flattened

_UNET = {
    "sample_size": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SD1 = _UNET | {"block_out_channels": (8, 8, 16, 16)}
SD2 = SD1 | {"use_linear_projection": True}
SDXL = _UNET | {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
    "use_linear_projection": True,
}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_FLUX = _HEADS | {"in_channels": 4, "num_layers": 2, "num_single_layers": 2,
                  "joint_attention_dim": 12}  # fmt: skip
_WAN = _HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 8,
                 "ffn_dim": 40, "num_layers": 2}  # fmt: skip
_WAN_I2V = {"image_dim": 20, "added_kv_proj_dim": 16}
_HUNYUAN = _HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2,
                     "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 12,
                     "pooled_projection_dim": 10, "rope_axes_dim": (2, 2, 4)}  # fmt: skip
_LTX = _HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2,
                 "cross_attention_dim": 16, "caption_channels": 12}  # fmt: skip
_COSMOS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
           "out_channels": 4, "num_layers": 2, "text_embed_dim": 12, "adaln_lora_dim": 4,
           "max_size": (2, 8, 8)}  # fmt: skip

CLASSES = {
    # name of a model: its table, class, loader and configuration
    "sd1": ("sd1", "UNet2DConditionModel", "StableDiffusion", SD1),
    "sd2": ("sd1", "UNet2DConditionModel", "StableDiffusion", SD2),
    "sdxl": ("sdxl", "UNet2DConditionModel", "StableDiffusionXL", SDXL),
    "kolors": (
        "sdxl", "UNet2DConditionModel", "StableDiffusion",
        SDXL | {"encoder_hid_dim": 14, "encoder_hid_dim_type": "text_proj"},
    ),
    "flux1": (
        "flux1", "FluxTransformer2DModel", "Flux",
        _FLUX | {"pooled_projection_dim": 10, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4)},
    ),
    "chroma": (
        "chroma", "ChromaTransformer2DModel", "Flux",
        _FLUX | {"axes_dims_rope": (2, 2, 4), "approximator_num_channels": 8,
                 "approximator_hidden_dim": 12, "approximator_layers": 2},
    ),
    "flux2": (
        "flux2", "Flux2Transformer2DModel", "Flux2",
        _FLUX | {"timestep_guidance_channels": 8, "axes_dims_rope": (2, 2, 2, 2)},
    ),
    "sd3": (
        "sd3", "SD3Transformer2DModel", "SD3",
        _HEADS | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3,
                  "joint_attention_dim": 12, "caption_projection_dim": 16,
                  "pooled_projection_dim": 10, "pos_embed_max_size": 8,
                  "dual_attention_layers": (0,)},
    ),
    "auraflow": (
        "auraflow", "AuraFlowTransformer2DModel", "AuraFlow",
        _HEADS | {"sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
                  "joint_attention_dim": 12, "caption_projection_dim": 16,
                  "pos_embed_max_size": 16},
    ),
    "lumina2": (
        "lumina2", "Lumina2Transformer2DModel", "Lumina2",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
         "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 8,
         "axes_dim_rope": (4, 2, 2), "axes_lens": (8, 8, 8), "cap_feat_dim": 12},
    ),
    "z_image": (
        "z_image", "ZImageTransformer2DModel", "ZImage",
        {"in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
         "n_kv_heads": 2, "cap_feat_dim": 12, "axes_dims": [4, 2, 2], "axes_lens": [8, 8, 8]},
    ),
    "qwen_image": (
        "qwen_image", "QwenImageTransformer2DModel", "QwenImage",
        _HEADS | {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 12,
                  "axes_dims_rope": (2, 2, 4)},
    ),
    "qwen_image21": (
        "qwen_image21", "QwenImage21Transformer2DModel", "QwenImage",
        _HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "context_in_dim": 12,
                  "axes_dims_rope": (2, 2, 4)},
    ),
    "wan2": ("wan2", "WanTransformer3DModel", "Wan", _WAN),
    "wan2_i2v": ("wan2", "WanTransformer3DModel", "Wan", _WAN | _WAN_I2V),
    "wan2_vace": (
        "wan2", "WanVACETransformer3DModel", "Wan",
        _WAN | {"vace_layers": [0, 1], "vace_in_channels": 6},
    ),
    "wan2_animate": (
        "wan2", "WanAnimateTransformer3DModel", "Wan",
        _WAN | _WAN_I2V | {"in_channels": 12, "latent_channels": 4, "motion_encoder_size": 16,
                           "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8,
                           "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
                           "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2,
                           "inject_face_latents_blocks": 1},
    ),
    "anyflow": (
        "wan2", "AnyFlowTransformer3DModel", "Wan", _WAN,
    ),
    "anyflow_far": (
        "wan2", "AnyFlowFARTransformer3DModel", "Wan", _WAN,
    ),
    "chronoedit": ("wan2", "ChronoEditTransformer3DModel", "Wan", _WAN | _WAN_I2V),
    "skyreels2": ("wan2", "SkyReelsV2Transformer3DModel", "SkyReelsV2", _WAN | _WAN_I2V),
    "wan_animate2": (
        "wan_animate2", "WanAnimate2Transformer3DModel", None,
        {"in_dim": 6, "dim": 16, "ffn_dim": 40, "freq_dim": 8, "text_dim": 12, "out_dim": 4,
         "num_heads": 2, "num_layers": 2},
    ),
    "hunyuan_video": ("hunyuan_video", "HunyuanVideoTransformer3DModel", "HunyuanVideo", _HUNYUAN),
    "framepack": (
        "hunyuan_video", "HunyuanVideoFramepackTransformer3DModel", "HunyuanVideo",
        _HUNYUAN | {"has_image_proj": True, "image_proj_dim": 14, "has_clean_x_embedder": True},
    ),
    "hunyuan_video15": (
        "hunyuan_video15", "HunyuanVideo15Transformer3DModel", None,
        _HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1,
                  "text_embed_dim": 12, "text_embed_2_dim": 10, "image_embed_dim": 14,
                  "rope_axes_dim": (2, 2, 4)},
    ),
    "hunyuan_image": (
        "hunyuan_image", "HunyuanImageTransformer2DModel", None,
        _HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
                  "num_refiner_layers": 1, "text_embed_dim": 12, "text_embed_2_dim": 10,
                  "rope_axes_dim": (4, 4), "guidance_embeds": True, "use_meanflow": True},
    ),
    "ltx_video": ("ltx_video", "LTXVideoTransformer3DModel", "LTXVideo", _LTX),
    "ltx2": (
        "ltx2", "LTX2VideoTransformer3DModel", "LTX2",
        _LTX | {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
                "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8,
                "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True,
                "audio_cross_attn_mod": True},
    ),
    "cosmos2": (
        "cosmos2", "CosmosTransformer3DModel", "Cosmos",
        _COSMOS | {"use_crossattn_projection": True, "crossattn_proj_in_channels": 14,
                   "encoder_hidden_states_channels": 12, "img_context_dim_in": 10,
                   "img_context_dim_out": 8},
    ),
    "anima": (
        "cosmos2", "CosmosTransformer3DModel", "Anima",
        _COSMOS | {"extra_pos_embed_type": None},
    ),
    "hidream": (
        "hidream", "HiDreamImageTransformer2DModel", "HiDreamImage",
        _HEADS | {"patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
                  "caption_channels": [12, 10], "text_emb_dim": 10, "num_routed_experts": 2,
                  "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2),
                  "max_resolution": (8, 8), "llama_layers": [0, 1]},
    ),
    "krea2": (
        "krea2", "Krea2Transformer2DModel", "Krea2",
        {"in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
         "num_key_value_heads": 1, "intermediate_size": 40, "timestep_embed_dim": 8,
         "text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2,
         "text_num_key_value_heads": 2, "text_intermediate_size": 24,
         "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
         "axes_dims_rope": (2, 2, 4)},
    ),
    "ideogram4": (
        "ideogram4", "Ideogram4Transformer2DModel", "Ideogram4",
        _HEADS | {"in_channels": 4, "num_layers": 2, "intermediate_size": 40, "adaln_dim": 6,
                  "llm_features_dim": 12, "mrope_section": (2, 1, 1)},
    ),
    "ace_step15": (
        "ace_step15", "AceStepTransformer1DModel", "AceStep",
        {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "in_channels": 12,
         "audio_acoustic_hidden_dim": 4},
    ),
}  # fmt: skip


def make_model(name):
    """Return a small model with random weights."""
    import diffusers
    import torch

    _, kind, _, config = CLASSES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own
        model = getattr(diffusers, kind)(**config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def loader_of(name):
    """Return the class whose methods a pipeline loads LoRAs with."""
    loader = CLASSES[name][2]
    module = importlib.import_module("diffusers.loaders.lora_pipeline")
    return None if loader is None else getattr(module, f"{loader}LoraLoaderMixin")


def layers(model):
    """Return the shapes of the weights that a LoRA can change, by path."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {
        path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, kinds)
    }


def adapter(table, shapes, naming, *, alpha=3.0, seed=0, ranks=(2, 3)):
    """Return random LoRAs of all modules, of ranks in turn, and each change by diffusers' name.

    naming: "kohya" or "comfyui". Modules that the table does not have are left out.
    """
    generator = np.random.default_rng(seed)
    tensors, changes = {}, {}
    for index, (name, row, parts) in enumerate(_rows(find_table(table), shapes, naming)):
        (columns,) = {shape[1:] for _, shape in parts}
        rank, height = ranks[index % len(ranks)], sum(shape[0] for _, shape in parts)
        ones = (1,) * (len(columns) - 1)
        a = (0.3 * generator.standard_normal((rank, *columns))).astype(np.float32)
        b = (0.3 * generator.standard_normal((height, rank, *ones))).astype(np.float32)
        prefix = f"lora_unet_{flattened(name)}" if naming == "kohya" else f"diffusion_model.{name}"
        tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"] = a, b
        tensors[f"{prefix}.alpha"] = np.array(alpha, np.float32)
        b, a = b.astype(float).reshape(height, -1), a.astype(float).reshape(rank, -1)
        whole, start = alpha / rank * (b @ a), 0
        for path, (rows, *_) in parts:
            change = whole[start : start + rows]
            turn = rows // 2 if row.swapped_halves else 0
            changes[path] = np.roll(change, turn, axis=0)
            start += rows
    return tensors, changes


def _rows(table, shapes, naming):
    """Yield what each module of a table is called in a naming, its row, and what it consists of."""
    rows = {}
    for path, shape in shapes.items():
        linear = shape if len(shape) == 2 else (None, None)
        place = table.locate(path, flat=False, schemes=("diffusers",), shape=linear)
        if place is not None:
            rows.setdefault((place.row, place.numbers), {})[place.covered[0]] = (path, shape)
    for (row, numbers), parts in rows.items():
        names = row.names(table.kohya if naming == "kohya" else "original")
        ordered = [parts[part] for part in range(len(row.parts))]
        if len(names) == 1:
            yield filled(names[0], numbers), row, ordered
        else:
            for name, part in zip(names, ordered, strict=True):
                yield filled(name, numbers), row, [part]


def loaded(name, model, path):
    """Return what the LoRA layers add to each weight of a model that diffusers has given a file."""
    loader, place = loader_of(name), {"weight_name": path.name, "return_lora_metadata": True}
    if loader is None:
        model.load_lora_adapter(str(path.parent), weight_name=path.name)
    elif hasattr(loader, "load_lora_into_unet"):
        state, alphas, metadata = loader.lora_state_dict(
            str(path.parent), unet_config=model.config, **place
        )
        loader.load_lora_into_unet(state, alphas, model, metadata=metadata)
    elif loader.__name__ == "FluxLoraLoaderMixin":
        state, alphas, metadata = loader.lora_state_dict(
            str(path.parent), return_alphas=True, **place
        )
        loader.load_lora_into_transformer(state, alphas, model, metadata=metadata)
    else:
        state, metadata = loader.lora_state_dict(str(path.parent), **place)
        loader.load_lora_into_transformer(state, model, metadata=metadata)
    return _added(model)


def _added(model):
    from peft.tuners.lora import LoraLayer

    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            ((key, a),) = layer.lora_A.items()
            a, b = (m.weight.detach().double().numpy() for m in (a, layer.lora_B[key]))
            found[path] = layer.scaling[key] * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))
    return found
