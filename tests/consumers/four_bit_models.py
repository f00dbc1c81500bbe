"""Small models that transformers quantises on the fly, for comparison with ours."""

import dataclasses
from typing import Any

import numpy as np

_SEED = 20260912
_LLAMA = {
    "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_TOWER = {
    "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
    """A class of transformers, its configuration class, and its values."""

    cls: str
    config: str
    values: dict[str, Any]

    def load(self, folder, **kwargs):
        """Load a checkpoint in the type it says."""
        import transformers

        model_class = getattr(transformers, self.cls)
        return model_class.from_pretrained(folder, dtype="auto", **kwargs)


MODELS = {
    "llama": Model("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "tied": Model("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"tie_word_embeddings": True}),
    "gpt2": Model(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 320, "n_positions": 32,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "score": Model(
        "LlamaForSequenceClassification", "LlamaConfig", _LLAMA | {"num_labels": 3}
    ),
    "bert": Model(
        "BertModel",
        "BertConfig",
        {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 192,
         "num_attention_heads": 2, "vocab_size": 320, "max_position_embeddings": 32},
    ),
    "mixtral": Model(
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128,
         "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320,
         "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 32},
    ),
    "qwen_moe": Model(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128,
         "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320,
         "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
         "shared_expert_intermediate_size": 64, "max_position_embeddings": 32},
    ),
    "t5": Model(
        "T5ForConditionalGeneration",
        "T5Config",
        {"num_layers": 1, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4,
         "vocab_size": 320, "decoder_start_token_id": 0},
    ),
    "whisper": Model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"encoder_layers": 1, "decoder_layers": 1, "d_model": 64, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
         "vocab_size": 320, "num_mel_bins": 8, "max_source_positions": 16, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
    "deberta": Model(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 192,
         "num_attention_heads": 2, "vocab_size": 320, "max_position_embeddings": 32},
    ),
    "albert": Model(
        "AlbertForMaskedLM",
        "AlbertConfig",
        {"num_hidden_layers": 1, "hidden_size": 64, "embedding_size": 64, "intermediate_size": 192,
         "num_attention_heads": 2, "vocab_size": 320, "max_position_embeddings": 32},
    ),
    "clip": Model(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _TOWER | {"vocab_size": 320}, "projection_dim": 64,
         "vision_config": _TOWER | {"image_size": 16, "patch_size": 8}},
    ),
}  # fmt: skip


def build(name):
    """Return a random model in bfloat16."""
    import torch
    import transformers

    model = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        config = getattr(transformers, model.config)(**model.values)
        return getattr(transformers, model.cls)(config).to(torch.bfloat16).eval()


def quantized_by_transformers(name, folder, options):
    """Load a plain checkpoint, quantised on the fly."""
    import torch
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return MODELS[name].load(folder, quantization_config=config)


def logits(name, model):
    """Return the first output for fixed tokens."""
    import torch

    tokens = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(_SEED))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if name == "t5":
        inputs["decoder_input_ids"] = tokens
    if name == "whisper":
        sound = torch.rand((2, 8, 32), generator=torch.Generator().manual_seed(_SEED))
        inputs = {"input_features": sound.to(model.dtype), "decoder_input_ids": tokens}
    if name == "clip":
        sight = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(_SEED))
        inputs["pixel_values"] = sight.to(model.dtype)
    with torch.no_grad():
        return model.eval()(**inputs)[0].float().numpy()


def tensors_of(folder):
    """Return all tensors of a folder's shards as arrays."""
    from loratools_formats.checkpoints.checkpoint import read_checkpoint

    return {key: np.array(ref.load()) for key, ref in read_checkpoint(folder).tensors.items()}
