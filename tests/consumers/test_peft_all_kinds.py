"""Every kind that PEFT knows is either folded or refused with a reason, and none is forgotten."""

from __future__ import annotations

import peft_models
import peft_oracle as oracle
import pytest
from peft_kinds import CASES

from loratools.algebra.ranks import RankRule
from loratools.operations.info import describe
from loratools.operations.squeeze import squeeze
from loratools.operations.to_lora import to_lora
from loratools_formats import read_adapter
from loratools_formats.disk.errors import UnsupportedError
from loratools_formats.formats.peft.kinds.declaration import NOT_A_CHANGE
from loratools_formats.formats.peft.kinds.table import PEFT_KINDS

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in oracle.WARNINGS),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CAUSAL = {"task_type": "CAUSAL_LM"}
VIRTUAL = {**CAUSAL, "num_virtual_tokens": 3}
QUERY = {**CAUSAL, "target_modules": ["q_proj"], "r": 2}

REFUSED = {
    "PROMPT_TUNING": ("PromptTuningConfig", VIRTUAL, "adds tokens"),
    "PREFIX_TUNING": ("PrefixTuningConfig", VIRTUAL, "keys and values"),
    "P_TUNING": ("PromptEncoderConfig", {**VIRTUAL, "encoder_hidden_size": 8}, "adds tokens"),
    "MULTITASK_PROMPT_TUNING": (
        "MultitaskPromptTuningConfig",
        {**VIRTUAL, "num_tasks": 2},
        "adds tokens",
    ),
    "CPT": (
        "CPTConfig",
        {**CAUSAL, "cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
        "adds tokens",
    ),
    "CARTRIDGE": ("CartridgeConfig", VIRTUAL, "keys and values"),
    "ADAPTION_PROMPT": (
        "AdaptionPromptConfig",
        {**CAUSAL, "adapter_len": 3, "adapter_layers": 1},
        "gated attention",
    ),
    "XLORA": ("XLoraConfig", {**CAUSAL, "hidden_size": 16}, "per token"),
    "POLY": ("PolyConfig", {**QUERY, "n_tasks": 2, "n_skills": 2}, "per task"),
    "LILY": ("LilyConfig", {**QUERY, "stride_A": 1, "num_B": 2}, "routed"),
    "SHADOW": ("ShadowConfig", CAUSAL, "second network"),
    "LN_TUNING": ("LNTuningConfig", {**CAUSAL, "target_modules": ["input_layernorm"]}, "norm"),
}
"""By kind: its configuration class, arguments, and a word of the reason."""


def folded_types():
    """Return the kinds that have a case among those compared with PEFT's merged weights."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = {config.__name__: kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {names[case.config] for case in CASES} | {"LORA"}


def test_every_kind_of_peft_is_compared_with_its_merge_or_refused():
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    known = {kind.value for kind in PeftType}
    assert {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING} <= known
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} <= known
    assert folded_types() | set(REFUSED) == known
    assert not folded_types() & set(REFUSED)
    assert set(NOT_A_CHANGE) == set(REFUSED)
    # Bone is what MiSS was called, and SFT is a fork's.
    assert set(PEFT_KINDS) - {"BONE", "SFT"} == folded_types() - {"LORA"}


@pytest.mark.parametrize("peft_type", REFUSED)
def test_kinds_without_a_weight_change_are_recognised_and_refused(tmp_path, peft_type):
    import peft

    name, options, reason = REFUSED[peft_type]
    model = peft_models.build("llama")
    model.config.use_cache = False
    if peft_type == "XLORA":
        lora = peft.LoraConfig(target_modules=["q_proj"], r=2)
        peft.get_peft_model(peft_models.build("llama"), lora).save_pretrained(tmp_path / "lora")
        options = {**options, "adapters": {"0": str(tmp_path / "lora")}}
    peft.get_peft_model(model, getattr(peft, name)(**options)).save_pretrained(tmp_path / "adapter")

    adapter = read_adapter(tmp_path / "adapter")
    (finding,) = (each for each in describe(adapter).findings if each.severity == "error")
    assert finding.code == "no-weight-change"
    assert f"kind {peft_type}" in finding.message
    assert reason in finding.message
    assert adapter.modules == {}
    for operation in (lambda: to_lora(adapter, RankRule()), lambda: squeeze(adapter, RankRule())):
        with pytest.raises(UnsupportedError, match=reason):
            operation()


def test_every_wavelet_that_peft_can_use_has_its_filter():
    import numpy as np
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
    from peft.tuners.waveft.wavelet import Wavelet, wavelist

    from loratools.kinds.numbers.wavelets import scaling_filter

    # Others are in its list of sizes, but have no filter, or one that is longer than it thinks.
    usable = {
        name
        for name in wavelist()
        if len(Wavelet(name)) == WAVELET_REDUCTIONS.get(name, (0, 0))[0] + 2
    }
    assert len(usable) == 24
    for name in usable:
        np.testing.assert_allclose(scaling_filter(name), Wavelet(name).rec_lo, atol=1e-11)
    for name in (*(WAVELET_REDUCTIONS.keys() - usable), "db", "bior2.2"):
        with pytest.raises(UnsupportedError, match=name):
            scaling_filter(name)


def test_activations_are_those_of_transformers():
    import numpy as np
    import torch
    from transformers.activations import ACT2FN

    from loratools.kinds.numbers.activations import activation

    inputs = 4.0 * np.random.default_rng(0).standard_normal((50, 30))
    for name in ACT2FN.keys() - {"xielu"}:  # it has numbers that are trained
        with torch.no_grad():
            want = ACT2FN[name].double()(torch.from_numpy(inputs)).numpy()
        np.testing.assert_allclose(activation(name)(inputs), want, atol=1e-11)
    with pytest.raises(UnsupportedError, match="xielu"):
        activation("xielu")


@pytest.fixture(scope="module")
def saved_kind(tmp_path_factory):
    """Return a function from a case's name to the folder of its base and adapter."""
    from peft_kinds import make

    root = tmp_path_factory.mktemp("kinds")
    by_name = {case.name: case for case in CASES}

    def one(name):
        if not (root / name).exists():
            make(by_name[name], root / name)
        return root / name

    return one


def test_adamss_on_another_base_is_refused(saved_kind, tmp_path):
    from safetensors.torch import load_file, save_file

    from loratools_formats.checkpoints.checkpoint import read_checkpoint
    from loratools_formats.disk.errors import AdapterError

    folder = saved_kind("adamss")
    weights = load_file(folder / "base" / "model.safetensors")
    save_file({key: tensor.flip(-1) for key, tensor in weights.items()}, tmp_path / "b.safetensors")
    other = read_checkpoint(tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="not the one that the adapter was trained on"):
        to_lora(read_adapter(folder / "adapter"), RankRule(), base=other)
    copy = oracle.copied(folder / "adapter", tmp_path / "copy")
    oracle.edit_config(copy, num_subspaces=4)
    with pytest.raises(AdapterError, match="a different number of groups"):
        to_lora(read_adapter(copy), RankRule(), base=read_checkpoint(folder / "base"))


def test_trainable_tokens_of_a_tied_embedding_are_refused(saved_kind, tmp_path):
    import json
    import shutil

    from loratools_formats.checkpoints.checkpoint import read_checkpoint

    folder = saved_kind("tokens")
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    with pytest.raises(UnsupportedError, match="tied to the embedding"):
        to_lora(read_adapter(folder / "adapter"), RankRule(), base=read_checkpoint(base))


def test_biases_of_layers_that_have_none_are_refused(saved_kind, tmp_path):
    from safetensors.torch import load_file, save_file

    from loratools_formats.checkpoints.checkpoint import read_checkpoint

    folder = saved_kind("beft")
    weights = load_file(folder / "base" / "model.safetensors")
    save_file({"up.weight": weights["up.weight"], "sq.weight": weights["sq.weight"]},
              tmp_path / "b.safetensors")  # fmt: skip
    base = read_checkpoint(tmp_path / "b.safetensors")
    with pytest.raises(UnsupportedError, match="has none"):
        to_lora(read_adapter(folder / "adapter"), RankRule(), base=base)


def test_shapes_that_the_file_does_not_hold_are_asked_for_by_name(saved_kind):
    for name in ("vera", "miss"):
        adapter = read_adapter(saved_kind(name) / "adapter")
        with pytest.raises(UnsupportedError, match=r"shapes of the base.*`base`; only headers"):
            to_lora(adapter, RankRule())
