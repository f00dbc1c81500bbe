"""Adapters that hold nothing, or zeros alone, are refused by every command, with the cause."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from loratools.cli import cli

RNG = np.random.default_rng(0)
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
ADAPTERS = {
    "no tensors": ({}, "holds no tensors"),
    "empty tensors": (
        {KEY.format("A"): np.zeros((0,), "f4"), KEY.format("B"): np.zeros((0,), "f4")},
        "is empty",
    ),
    "zeros": (
        {KEY.format("A"): np.zeros((4, 16), "f4"), KEY.format("B"): np.zeros((16, 4), "f4")},
        "changes nothing",
    ),
    "one zero factor": (
        {
            KEY.format("A"): RNG.standard_normal((4, 16)).astype("f4"),
            KEY.format("B"): np.zeros((16, 4), "f4"),
        },
        "changes nothing",
    ),
}
COMMANDS = (
    ["info", "lora"],
    ["squeeze", "lora", "-o", "out", "--rank", "2"],
    ["squeeze", "lora"],
    ["merge", "lora", "good", "-o", "out"],
    ["convert", "lora", "out", "--to", "mlx"],
    ["convert", "lora", "out.gguf", "--base", "base"],
    ["fuse", "base", "lora", "-o", "out"],
    ["fuse", "base", "lora", "--dry-run"],
    ["verify", "base", "--base", "base", "--adapter", "lora"],
    ["to-lora", "lora", "-o", "out"],
    ["to-dora", "lora", "-o", "out", "--base", "base"],
    ["spectrum", "lora"],
    ["compare", "good", "lora"],
    ["repair", "lora", "-o", "out", "--base", "base"],
)


def folder(path, tensors):
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weight = {"model.layers.0.self_attn.q_proj.weight": RNG.standard_normal((16, 16)).astype("f4")}
    (tmp_path / "base").mkdir()
    save_file(weight, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    values = {"A": (4, 16), "B": (16, 4)}
    good = {KEY.format(k): RNG.standard_normal(s).astype("f4") for k, s in values.items()}
    folder(tmp_path / "good", good)
    return tmp_path


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_command_refuses_it_and_names_the_cause(place, name):
    tensors, message = ADAPTERS[name]
    folder(place / "lora", tensors)
    for command in COMMANDS:
        done = CliRunner().invoke(cli, command)
        assert done.exception is not None, command
        text = str(done.exception)
        assert message in text, (command, text)
        assert "ZeRO-3" in text
    assert not (place / "out").exists()
    assert not (place / "out.gguf").exists()


def test_the_adapter_before_training_may_be_zero(place):
    tensors, _ = ADAPTERS["one zero factor"]
    folder(place / "start", tensors)
    done = CliRunner().invoke(
        cli, ["squeeze", "good", "--initial", "start", "--rank", "4", "--dry-run"]
    )
    assert "changes nothing" not in str(done.exception)


def test_zeros_of_a_kind_that_multiplies_are_a_change(place):
    path = place / "ia3"
    path.mkdir()
    key = "base_model.model.model.layers.0.self_attn.q_proj.ia3_l"
    save_file({key: np.zeros((16, 1), "f4")}, path / "adapter_model.safetensors")
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (path / "adapter_config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(cli, ["fuse", "base", "ia3", "-o", "out"])
    assert done.exception is None


def test_merging_names_that_hardly_meet_is_asked_for(place):
    values = {"A": (4, 16), "B": (16, 4)}
    other = {
        KEY.format(k).replace("q_proj", "o_proj"): RNG.standard_normal(s).astype("f4")
        for k, s in values.items()
    }
    folder(place / "lora", other)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (place / "lora" / "adapter_config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(cli, ["merge", "lora", "good", "-o", "out"])
    assert "allow_missing" in str(done.exception)
    done = CliRunner().invoke(cli, ["merge", "lora", "good", "-o", "out", "--allow-missing"])
    assert done.exception is None
    assert (place / "out" / "adapter_model.safetensors").exists()
