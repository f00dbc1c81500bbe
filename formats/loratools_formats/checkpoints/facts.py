"""Facts about a base model that its configuration and the names of its tensors tell.

Every command asks here, so that all of them get one answer: which part of a configuration describes
the language model, whether its embedding is tied to its output layer, and which names embeddings
and transformers' Conv1D have. `loratools.base.tied` adds what only the tensors tell.

Source: transformers 5.23 and 4.57, configuration and modelling files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from loratools_formats.checkpoints.tie_defaults import ALWAYS, BY_TOP, TIED
from loratools_formats.core.orientation import named_conv1d
from loratools_formats.core.tensors import TensorRef, equal_values
from loratools_formats.disk.errors import AdapterError

TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where the configuration of a model of several parts describes its language model."""

_TIE = "tie_word_embeddings"

INPUT_EMBEDDINGS = frozenset(
    {
        "embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings.word_embeddings",
        "decoder.embed_tokens", "embeddings.tok_embeddings", "tok_embeddings", "embeddings",
        "word_embedding", "tokens_embed", "w",
    }
)  # fmt: skip
"""Token embeddings, without the leading parts that wrappers add. `w` is CTRL's."""

SHARED_EMBEDDINGS = frozenset({"shared", "encoder.embed_tokens", "decoder.embed_tokens"})
"""Names of an embedding that the encoder and the decoder of one model share."""

DEFAULT_HEAD = "lm_head"
_HEADS_BY_NAME = {
    "cls.predictions.decoder": (
        "bert", "big_bird", "blip_text_model", "deberta", "deberta-v2", "ernie", "fnet", "layoutlm",
        "lxmert", "megatron-bert", "mobilebert", "mra", "nomic_bert", "nystromformer", "roc_bert",
        "roformer", "squeezebert", "tapas", "visual_bert", "yoso",
    ),
    "predictions.decoder": ("albert",),
    "lm_head.decoder": (
        "roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "xmod",
        "data2vec-text", "longformer", "esm", "ibert", "mpnet", "gte", "bert-generation",
        "jina_embeddings_v3", "luke",
    ),
    "lm_head.out_proj": ("t5gemma", "t5gemma2"),
    "text_model.lm_head": ("kosmos-2", "kosmos-2.5"),
    "proj_out": ("whisper", "moonshine", "moonshine_streaming", "canary", "cohere_asr"),
    "output_projection": ("biogpt", "trocr"),
    "generator_lm_head": ("electra", "convbert"),
    "embed_out": ("gpt_neox", "gpt_neox_japanese"),
    "mlm_score.decoder": ("bridgetower", "vilt"),
    "pred_layer.proj": ("xlm", "flaubert"),
    "decoder": ("modernbert", "modernbert-decoder"),
    "vocab_projector": ("distilbert",),
    "lm_loss": ("xlnet",),
    "output": ("git",),
    "head": ("rwkv",),
}  # fmt: skip
HEADS = {model: name for name, models in _HEADS_BY_NAME.items() for model in models}
"""The output layer that shares the token embedding's weight; `lm_head` in all other models."""

HEAD_BIASES = {
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "predictions.decoder.bias": "predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
}
"""Biases of an output layer that are tied along with its weight and stored once."""

_HEAD_CLASSES = (
    "ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ForMaskedLM", "ForPreTraining",
    "BertGenerationDecoder", "Blip2Model",
)  # fmt: skip
"""How classes with an output layer are called at the end; the last two in full."""

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})

_EMBEDDING = re.compile(
    r"(?!.*_(?:in|out|proj|project|projection|linear)$)(?:.*_)?(?:embed|embeddings?|emb|wte|wpe)(?:_.*)?"
    r"|embed_?tokens.*|shared|tok_embeddings|relative_attention_bias"
)
_INPUT_LEAVES = frozenset(name.rpartition(".")[2] for name in INPUT_EMBEDDINGS - {"w"})
_VOCABULARY_LEAVES = _INPUT_LEAVES | {"shared", DEFAULT_HEAD, "embed_out"}


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the language model: often all of it."""
    for name in TEXT_SECTIONS:
        if isinstance(config.get(name), Mapping):
            return text_section(config[name])
    return config


def text_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the language model's values in place of the whole model's."""
    return {**config, **text_section(config)}


def with_text_values(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with values changed wherever they stand, at the top or inside.

    `tie_word_embeddings` is set in both, since releases of transformers read one or the other, and
    each has a default.
    """
    name = next((s for s in TEXT_SECTIONS if isinstance(config.get(s), Mapping)), None)
    if name is None:
        return {**config, **changes}
    outer = {k: v for k, v in changes.items() if k in config or k == _TIE}
    inner = {k: v for k, v in changes.items() if k in config[name] or k not in outer or k == _TIE}
    return {**config, **outer, name: with_text_values(config[name], inner)}


def model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the model types of a model and of its parts."""
    return frozenset(v for v in values_of(config, "model_type") if isinstance(v, str))


def values_of(config: Mapping[str, Any], name: str) -> Iterator[Any]:
    """Yield an entry of a configuration and of those nested in it, where it is text or a number."""
    if isinstance(config.get(name), int | str):
        yield config[name]
    for value in config.values():
        if isinstance(value, Mapping):
            yield from values_of(value, name)


def has_head(config: Mapping[str, Any]) -> bool | None:
    """Return whether a model's class has an output layer over the vocabulary.

    None if the configuration names no class.
    """
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes:
        return None
    return any(isinstance(name, str) and name.endswith(_HEAD_CLASSES) for name in classes)


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Return whether a configuration ties the output layer to the token embedding.

    Transformers 5 reads `tie_word_embeddings` at the top, and in some classes also in the text
    section if the top says false. Transformers 4 reads the text section alone. Some classes are
    tied where the key is left out.

    Returns:
        None where the two releases disagree, or where the key is left out of a class that is not
        tied by default: then `is_tied` asks the weights.

    Raises:
        AdapterError: the value is neither true nor false.
    """
    now, before = _tie_flags(config)
    return now if now == before else None


def is_tied(config: Mapping[str, Any], embedding: TensorRef | None, head: TensorRef | None) -> bool:
    """Return whether transformers ties a model's output layer to its token embedding.

    Where the configuration does not tell, a checkpoint that does not store the output layer is
    tied, since transformers would start the layer at random. One that stores it is tied if
    transformers 5 ties the two, which it does not if they differ.

    Args:
        config: the configuration.
        embedding: the stored weight of the embedding, None if none is found.
        head: the stored weight of the output layer, None if the checkpoint does not store it.

    Raises:
        AdapterError: `tie_word_embeddings` is neither true nor false.
    """
    said = says_tied(config)
    if said is not None or head is None:
        return said is not False
    now, _ = _tie_flags(config)
    return bool(now) and embedding is not None and equal_values(embedding, head)


def _tie_flags(config: Mapping[str, Any]) -> tuple[bool | None, bool | None]:
    """Return what transformers 5 and 4 read; None where the key is left out and not true."""
    section = text_section(config)
    default = config.get("model_type") in TIED
    types = (section.get("model_type"), f"{config.get('model_type')}_text")
    inner = _tie_flag(section, next((t for t in types if t is not None), None) in TIED)
    outer = _tie_flag(config, default)
    decides = default or config.get("model_type") in BY_TOP
    now = inner if not outer and section is not config and not decides else outer
    return (now if ALWAYS.isdisjoint(model_types(config)) else True), inner


def _tie_flag(config: Mapping[str, Any], default: bool) -> bool | None:
    value = config.get(_TIE)
    if value is None:
        return default or None
    if not isinstance(value, bool):
        raise AdapterError(f"config value {_TIE} is wrong", got=value, expected="true or false")
    return value


def head_of(types: Collection[str]) -> str:
    """Return the path of the output layer in models of the first of some types that has its own."""
    return next((HEADS[name] for name in types if name in HEADS), DEFAULT_HEAD)


def is_embedding(module: str) -> bool:
    """Return whether a module is named as embeddings are, of tokens or of anything else.

    >>> is_embedding("gpt_neox.embed_in"), is_embedding("embed_out"), is_embedding("h.0.wpe")
    (True, False, True)
    """
    leaf = module.rpartition(".")[2]
    return leaf in _INPUT_LEAVES or _EMBEDDING.fullmatch(leaf) is not None


def is_vocabulary(module: str) -> bool:
    """Return whether a module is named as token embeddings and output layers are.

    The output layers of `HEADS` whose last name says nothing, such as `decoder`, are not told.
    """
    return module.rpartition(".")[2] in _VOCABULARY_LEAVES


def is_conv1d(key: str, config: Mapping[str, Any]) -> bool:
    """Return whether a weight or module belongs to transformers' Conv1D, which stores (in, out)."""
    return named_conv1d(key) and not model_types(config).isdisjoint(CONV1D_TYPES)
