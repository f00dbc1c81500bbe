"""The table of names of transformers' classes, compared with the installed transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from placed_headers import header

from loratools.base.placement import model_class
from loratools.base.placement.class_view import class_view
from loratools.base.placement.names import Names
from loratools.base.tied import find_tie, shared_embeddings
from loratools_formats.checkpoints.checkpoint import Checkpoint, read_checkpoint

TABLE = Path(model_class.__file__).parent / "data" / "class_names.json"
SAMPLE = (
    "Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration", "MixtralForCausalLM",
    "ViTForImageClassification", "Qwen2_5_VLForConditionalGeneration", "GPT2LMHeadModel",
    "BertForMaskedLM", "Ernie4_5_VLMoeModel", "Lfm2MoeForCausalLM", "HunYuanMoEV1ForCausalLM",
    "Dots1ForCausalLM", "DbrxForCausalLM",
)  # fmt: skip


def test_rules_are_those_of_the_installed_transformers():
    import make_class_names
    import transformers
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    assert model_class.release() == transformers.__version__, "run make_class_names.py again"
    rules = json.loads(TABLE.read_text(encoding="utf-8"))["rules"]
    wanted = _build_checkpoint_conversion_mapping()
    assert rules.keys() == wanted.keys()
    for name, transforms in wanted.items():
        assert rules[name] == json.loads(json.dumps([make_class_names.rule(t) for t in transforms]))


@pytest.mark.parametrize("name", SAMPLE)
def test_stored_names_and_names_in_memory_lead_to_the_class_s(name):
    import make_class_names

    table = json.loads(TABLE.read_text(encoding="utf-8"))
    model = make_class_names.model_of(name)
    assert make_class_names.wrong(model, make_class_names.expected(model), table) == {}


def test_experts_are_one_parameter_in_the_class(tmp_path):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3,
    }  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    model.save_pretrained(tmp_path)
    view = class_view(read_checkpoint(tmp_path))
    own = model.state_dict()
    assert view.checkpoint.tensors.keys() == own.keys()
    for key, tensor in view.checkpoint.tensors.items():
        assert torch.equal(torch.from_numpy(tensor.load().copy()), own[key])
        start, stop = tensor.numel // 3, tensor.numel // 3 + 7
        part = torch.from_numpy(tensor.elements(start, stop).copy())
        assert torch.equal(part, own[key].reshape(-1)[start:stop])


TIES = (
    "MambaForCausalLM", "FalconMambaForCausalLM", "XLNetLMHeadModel",
    "XLMWithLMHeadModel", "CTRLLMHeadModel", "OpenAIGPTLMHeadModel", "BigBirdForMaskedLM",
    "MegatronBertForMaskedLM", "XmodForMaskedLM", "RobertaPreLayerNormForMaskedLM",
    "Kosmos2ForConditionalGeneration", "CamembertForMaskedLM", "ElectraForMaskedLM",
    "BertGenerationDecoder", "Blip2Model", "T5GemmaForConditionalGeneration",
)  # fmt: skip
"""Classes whose embedding, output layer, body or name is called as others are not."""
UNTIED = ("Mamba2ForCausalLM", "GPTNeoXForCausalLM")
SAY_SO = frozenset({"BigBirdPegasusForCausalLM", "LukeForMaskedLM"})
"""Classes that tie nothing though their configuration says so; `fuse` asks what is true."""


def pytest_generate_tests(metafunc):
    if "tied" in metafunc.fixturenames:
        every = json.loads(TABLE.read_text(encoding="utf-8"))["classes"]
        metafunc.parametrize(
            "tied", every if metafunc.config.getoption("models") else [*TIES, *UNTIED]
        )


@pytest.mark.slow
def test_the_tie_of_a_class_is_found(tied, request):
    """Nor is one found where the class has none."""
    import make_class_names

    try:
        model = make_class_names.model_of(tied)
        model.tie_weights()
        head = model.get_output_embeddings()
        weight = head.weight
    except Exception as error:
        if not request.config.getoption("models"):
            raise
        pytest.skip(f"not built, or without an output layer: {type(error).__name__}: {error}"[:100])
    path = f"{next(name for name, module in model.named_modules() if module is head)}.weight"
    state = model.state_dict(keep_vars=True)
    others = [key for key, tensor in state.items() if tensor is weight and key != path]
    assert bool(others) == (tied in TIES) or request.config.getoption("models")
    kept = {}  # each tensor once, as it is saved: a tied output layer under the embedding's name
    for key, tensor in state.items():
        if key != path or not others:
            kept.setdefault(id(tensor), (key, tuple(tensor.shape)))
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [tied]}
    base = Checkpoint(Path("base"), {k: header(k, shape) for k, shape in kept.values()}, config, ())
    names = Names(base)
    tie = find_tie(names)
    if not others:
        assert (tie is not None) == (tied in SAY_SO)
    elif tie is None:
        assert shared_embeddings(names)
    else:
        assert (tie.embedding, tie.head) == (kept[id(weight)][0], path)
