"""Systems whose files nobody has seen, in forms they could take: refused, not read as others."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from statedicts import saved

from loratools.algebra.ranks import RankRule
from loratools.operations.to_lora import to_lora
from loratools_formats import read_adapter
from loratools_formats.disk.errors import LoratoolsError, OptionError

RNG = np.random.default_rng(0)
A, B = "lora_A.weight", "lora_B.weight"
MORE, NONE = "may change the weights", "which no known format recognises as an adapter"


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def peft(folder, tensors, **config):
    folder.mkdir()
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    named = {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


FACTORS = {f"q_proj.{A}": random(4, 24), f"q_proj.{B}": random(36, 4)}
FOLDERS = {
    "tied: scales of both sides": (
        FACTORS | {"q_proj.lora_u": random(24), "q_proj.lora_v": random(36)},
        {},
        MORE,
    ),
    "tied: factors at the root": (
        {"lora_A": random(4, 24), "lora_B": random(36, 4), "q_proj.lora_u": random(4)},
        {},
        MORE,
    ),
    "tied: told in the configuration alone": (FACTORS, {"tie_weights": "qkv"}, MORE),
    "block: a shared block of A": (
        {f"q_proj.{A}": random(2, 24), f"q_proj.{B}": random(36, 4)},
        {},
        "rank in the file and rank in the config differ",
    ),
    "block: blocks by number": (
        {f"q_proj.{A}": random(2, 24), "q_proj.lora_B.0.weight": random(36, 2)},
        {},
        "lacks one of its two factors",
    ),
    "colora: scores of contribution": (FACTORS | {"q_proj.lora_score": random(4)}, {}, MORE),
    "queryable: atoms": (FACTORS | {"q_proj.lora_query.weight": random(4, 24)}, {}, MORE),
    "hyper: generated factors": ({"hyper.mlp.0.weight": random(8, 8)}, {}, "no module to convert"),
}


def refusal(path, **given):
    """Return the error that reading and folding a file ends with."""
    with pytest.raises(LoratoolsError) as raised:
        to_lora(read_adapter(path), RankRule(), given=given)
    assert "\n" not in str(raised.value)
    assert not isinstance(raised.value, OptionError)
    return str(raised.value)


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_with_more_than_factors_are_refused(tmp_path, name):
    tensors, config, message = FOLDERS[name]
    assert message in refusal(peft(tmp_path / "a", tensors, **config))


@pytest.mark.parametrize("name", ["TIED_LORA", "BLOCK_LORA", "COLORA", "HYPELORA", "QUERYABLE"])
def test_types_that_are_not_known_are_refused_by_name(tmp_path, name):
    with pytest.raises(LoratoolsError, match=name):
        read_adapter(peft(tmp_path / "a", FACTORS, peft_type=name))


LAYER = "model.language_model.encoder.layers.0.self_attention.adapter_layer"
FILES = {
    "tied in NeMo 1": (
        {
            f"{LAYER}.lora_kqv_adapter.linear_in.weight": random(4, 24),
            f"{LAYER}.lora_kqv_adapter.linear_out.weight": random(36, 4),
            f"{LAYER}.lora_kqv_adapter.position_embeddings.weight": random(2, 24),
        },
        MORE,
    ),
    "tied in NeMo 1, under its own name": (
        {
            f"{LAYER}.lora_kqv_adapter_tied.linear_in.weight": random(4, 24),
            f"{LAYER}.lora_kqv_adapter_tied.linear_out.weight": random(36, 4),
        },
        NONE,
    ),
    "block in loralib": (
        {"q.lora_A": random(2, 24), "q.lora_B": random(36, 4)},
        "does not fit the others",
    ),
    "hyper": (
        {
            "roberta.hypernet.mlp.0.weight": random(8, 8),
            "roberta.encoder.layer.0.attention.self.query.initial_A": random(24, 4),
            "roberta.encoder.layer.0.attention.self.query.initial_B": random(4, 24),
        },
        NONE,
    ),
    "hyper beside factors": (
        {
            "layers.0.q.lora_A": random(4, 24),
            "layers.0.q.lora_B": random(36, 4),
            "hypernet.mlp.0.weight": random(8, 8),
        },
        MORE,
    ),
    "queryable": ({"layers.0.q.atoms": random(4, 4, 4), "layers.0.q.keys": random(4, 4)}, NONE),
    "queryable beside factors": (
        {
            "layers.0.attn.q_proj.lora_a.weight": random(4, 24),
            "layers.0.attn.q_proj.lora_b.weight": random(36, 4),
            "layers.0.attn.q_proj.atoms": random(4, 4),
        },
        MORE,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_with_more_than_factors_are_refused(tmp_path, name):
    tensors, message = FILES[name]
    suffix = ".pt" if any(key.endswith(".lora_A") for key in tensors) else ".safetensors"
    given = {"alpha": "8"} if name == "block in loralib" else {}
    assert message in refusal(saved(tmp_path / f"adapter{suffix}", tensors), **given)
