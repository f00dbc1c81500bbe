"""Kinds on layers other than `nn.Linear`: Conv1D of GPT-2, embeddings, convolutions.

Every pair of a kind and a layer that PEFT accepts and merges is here, with options as in
`peft_kinds`.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import peft_oracle as oracle
import pytest
from peft_kinds import CASES, ConvNet, EmbeddingNet, Net, make
from test_peft_folds import errors

from loratools.algebra.ranks import RankRule
from loratools.operations.to_lora import to_lora
from loratools_formats import read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in oracle.WARNINGS),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

BY_NAME = {case.name: case for case in CASES}
FULL_RANK = 48

PAIRS = {
    "Conv1D": (
        "adalora deft-qr fourierft frod frod-seeded gralora-hybrid hira ia3 pvera randlora "
        "tinylora unilora unilora-seeded vblora vera-seeded waveft-db4"
    ),
    "Embedding": "coft hira oft-cayley-shared tinylora",
    "Conv1d": "hira loha-conv lokr-conv1d",
    "Conv2d": "adalora boft-conv coft hira hra-gs ia3 loha-conv lokr-conv-tucker",
    "Conv3d": "hira ia3",
}
TARGETS = {
    "Conv1D": ["c_fc", "c_proj", "c_attn"],
    "Embedding": ["embed_tokens"],
    "Conv1d": ["wide", "point"],
    "Conv2d": ["wide", "point"],
    "Conv3d": ["wide"],
}


def model_of(layer):
    """Return a class whose modules are of a layer."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    class Gpt2(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc, self.c_proj, self.c_attn = Conv1D(48, 24), Conv1D(24, 48), Conv1D(24, 24)

    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            kind = getattr(nn, layer)
            self.wide, self.point = kind(6, 8, 3), kind(8, 8, 1)

    return {"Conv1D": Gpt2, "Embedding": EmbeddingNet}.get(layer, Convolutions)


@pytest.mark.parametrize(
    ("layer", "name"), [(layer, name) for layer in PAIRS for name in PAIRS[layer].split()]
)
def test_folds_to_what_peft_merges(tmp_path, layer, name):
    case = BY_NAME[name]
    assert case.model in (Net, ConvNet) or layer == "Conv1d"
    options = {**case.options, "target_modules": TARGETS[layer]}
    if "feedforward_modules" in options:
        options["feedforward_modules"] = TARGETS[layer][:1]
    if layer == "Conv1D":
        options["fan_in_fan_out"] = True
    want = make(replace(case, model=model_of(layer), options=options), tmp_path)
    config = {"model_type": "gpt2"} if layer == "Conv1D" else {}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    result = to_lora(
        read_adapter(tmp_path / "adapter"),
        RankRule() if case.exact else RankRule(rank=FULL_RANK),
        base=read_checkpoint(tmp_path / "base"),
        given={"order": ",".join(TARGETS[layer])} if name == "unilora-seeded" else None,
    )
    assert set(result.adapter.modules) == set(TARGETS[layer])
    assert max(errors(result.adapter, want).values()) <= 1e-5
    kinds = {delta.layer.kind for delta in result.adapter.modules.values()}
    assert kinds == {"Conv1D": {"linear"}, "Embedding": {"embedding"}}.get(layer, {"conv"})
    write_adapter(result.adapter, tmp_path / "plain", "peft")
    got = merged_by_peft(model_of(layer)(), tmp_path / "base", tmp_path / "plain")
    assert max(np.linalg.norm(got[key] - want[key]) for key in want) <= 1e-5 * norm(want)


def merged_by_peft(model, base, plain):
    """Return what PEFT adds to a base when it merges a plain LoRA in float64."""
    import peft
    from safetensors.torch import load_file

    before = load_file(base / "model.safetensors")
    model.load_state_dict(before)
    loaded = peft.PeftModel.from_pretrained(model, str(plain)).double()
    after = loaded.merge_and_unload().state_dict()
    return {key: (after[key] - before[key].double()).numpy() for key in before}


def norm(change):
    return np.sqrt(sum(np.sum(array**2) for array in change.values()))
