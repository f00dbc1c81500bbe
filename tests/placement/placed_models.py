"""Tiny random models of transformers, by name, in the layouts their classes save.

`build(name)` always returns the same weights. Nothing heavy is imported before a model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SEED = 20261125
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SMALL = {
    "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "initializer_range": 0.3,
}  # fmt: skip


def build(name: str) -> Any:
    """Return a fresh model in float64, leaving the global generator as it was."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model = BUILDERS[name]().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # else biases are zero, and one lost would not show
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model


def inputs() -> dict[str, Any]:
    """Return a batch of tokens that every model takes."""
    import torch

    generator = torch.Generator().manual_seed(_SEED + 1)
    return {"input_ids": torch.randint(3, 48, (2, 7), generator=generator)}


def _plain(kind: str, **values: Any) -> Callable[[], Any]:
    def made() -> Any:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**{**_SMALL, **values})
        # Grouped experts cannot do float64.
        return (
            getattr(transformers, f"{kind}ForCausalLM")._from_config(
                config, experts_implementation="eager"
            )
            if "num_experts_per_tok" in values
            else getattr(transformers, f"{kind}ForCausalLM")(config)
        )

    return made


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=16,
            n_head=2,
            vocab_size=48,
            n_positions=32,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _bert(kind: str) -> Callable[[], Any]:
    def made() -> Any:
        import transformers

        config = transformers.BertConfig(
            num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
            vocab_size=48, max_position_embeddings=32, num_labels=3, initializer_range=0.3,
        )  # fmt: skip
        return getattr(transformers, kind)(config)

    return made


def _llava() -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**_VISION),
            text_config=LlamaConfig(**_SMALL),
            image_token_index=47,
        )
    )


def _gemma3() -> Any:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    text = Gemma3TextConfig(**{**_SMALL, "head_dim": 8, "query_pre_attn_scalar": 8})
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=SiglipVisionConfig(**_VISION),
            image_token_index=47,
            mm_tokens_per_image=4,
        )
    )


def _qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 10000.0}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**_SMALL, "rope_parameters": rope},
            vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 16,
                           "mlp_ratio": 2, "patch_size": 4},
            image_token_id=46, video_token_id=47, vision_start_token_id=44, vision_end_token_id=45,
        )
    )  # fmt: skip


BUILDERS = {
    "llama": _plain("Llama"),
    "llama_tied": _plain("Llama", tie_word_embeddings=True),
    "qwen2": _plain("Qwen2", tie_word_embeddings=True),
    "gemma2": _plain("Gemma2", head_dim=8, query_pre_attn_scalar=8),
    "phi3": _plain("Phi3"),
    "gpt_neox": _plain("GPTNeoX", rope_parameters={**_ROPE, "partial_rotary_factor": 0.5}),
    "bloom": _plain("Bloom", n_layer=2, n_head=4),
    "falcon": _plain(
        "Falcon", new_decoder_architecture=True, num_kv_heads=2, alibi=True, bias=True
    ),
    "falcon_mha": _plain("Falcon", multi_query=False, alibi=True, bias=True),
    "falcon_mqa": _plain("Falcon", multi_query=True, alibi=True, bias=True),
    "gpt_bigcode": _plain("GPTBigCode", n_layer=2, n_embd=16, n_head=4, n_inner=24),
    "gpt_bigcode_mha": _plain(
        "GPTBigCode", n_layer=2, n_embd=16, n_head=4, n_inner=24, multi_query=False
    ),
    "gpt2": _gpt2,
    "mixtral": _plain("Mixtral", num_local_experts=3, num_experts_per_tok=2),
    "mixtral_single": _plain("Mixtral", num_local_experts=1, num_experts_per_tok=1),
    "qwen3_moe": _plain(
        "Qwen3Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8
    ),
    "olmoe": _plain("Olmoe", num_experts=3, num_experts_per_tok=2),
    "gpt_oss": _plain(
        "GptOss",
        num_local_experts=3,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=_ROPE,
    ),
    "bert": _bert("BertForSequenceClassification"),
    "bert_mlm": _bert("BertForMaskedLM"),
    "llava": _llava,
    "gemma3": _gemma3,
    "qwen2_vl": _qwen2_vl,
}
