"""Models of any class of transformers, tiny, and what PEFT makes of adapters for them."""

from __future__ import annotations

import warnings

SIZES = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48, "moe_intermediate_size": 24, "d_ff": 48, "ffn_dim": 48, "n_inner": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "depth": 2, "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "d_kv": 8, "head_dim": 8,
    "vocab_size": 96, "image_size": 28, "patch_size": 14, "projection_dim": 32,
    "out_hidden_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "max_position_embeddings": 64, "n_positions": 64,
}  # fmt: skip


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def config_of(cls):
    """Return a tiny configuration of a class's type."""
    from transformers import PretrainedConfig

    def shrink(config):
        for name, value in list(vars(config).items()):
            if isinstance(value, PretrainedConfig):
                shrink(value)
            elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
                setattr(config, name, min(value, SIZES[name]))
            elif name.endswith("_token_id") and isinstance(value, int):
                setattr(config, name, min(value, 90))
        layers = getattr(config, "num_hidden_layers", None)
        for name in ("layer_types", "mlp_layer_types"):
            types = getattr(config, name, None)
            if isinstance(types, list) and isinstance(layers, int) and len(types) > layers:
                rest = [kind for kind in types if kind != types[0]]
                setattr(config, name, (types[:1] + rest[:1] + types[1:])[:layers])
        return config

    return shrink(cls.config_class())


def made(name):
    """Return a class's tiny model, or raise what it raises."""
    import torch
    import transformers

    cls = getattr(transformers, name)
    config = config_of(cls)
    torch.manual_seed(0)
    model = cls(config).float().eval()
    if sum(weight.numel() for weight in model.parameters()) > 3_000_000:
        raise ValueError("not tiny")
    return model


def changed(model):
    """Change some weights of a model by one rank; return the names of their parameters."""
    import torch
    from transformers.pytorch_utils import Conv1D

    linear = [
        f"{path}.weight"
        for path, module in model.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and min(module.weight.shape) > 1
    ]
    tied = {id(model.get_input_embeddings().weight)} if has_embeddings(model) else set()
    weights = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    names = [name for name in linear[::2] if name in weights and id(weights[name]) not in tied]
    names += [name for name in weights if name.endswith(EXPERTS) and weights[name].ndim == 3]
    with torch.no_grad():
        for name in names:
            *stack, out, in_ = weights[name].shape
            left = torch.randn((*stack, out, 1), generator=generator)
            right = torch.randn((*stack, 1, in_), generator=generator)
            weights[name].add_(left @ right, alpha=0.05)
    return names


def has_embeddings(model):
    """Return whether a model has an embedding of tokens."""
    try:
        return hasattr(model.get_input_embeddings(), "weight")
    except (NotImplementedError, AttributeError):
        return False


def merged(folder, adapter, cls):
    """Return the weights that PEFT makes of a base and an adapter; its warnings are errors."""
    import peft

    base = cls.from_pretrained(folder).float()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message=".*[Uu]nexpected keys.*")
        model = peft.PeftModel.from_pretrained(base, str(adapter))
    return dict(model.merge_and_unload().named_parameters())
