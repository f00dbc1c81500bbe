"""A path that is no adapter or no model is called what it is, and every hint leads on."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from loratools.cli import cli
from loratools.cli.errors import describe

RNG = np.random.default_rng(1)
MODULE = "model.layers.0.self_attn.q_proj"
FACTORS = {
    f"base_model.model.{MODULE}.lora_A.weight": (4, 16),
    f"base_model.model.{MODULE}.lora_B.weight": (16, 4),
}
FLAT = {"lora_unet_x_to_q.lora_down.weight": (4, 8), "lora_unet_x_to_q.lora_up.weight": (8, 4)}

OTHERS = {
    "notes.txt": "two lines\nof a text: ä\n".encode(),
    "paper.pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "picture.png": b"\x89PNG\r\n\x1a\n",
    "data.json": b'{"steps": 3}\n',
    "list.json": b"[1, 2]",
    "config.json": b'{"peft_type": "LORA", "r": 4}',
    "packed.tar.gz": b"\x1f\x8b\x08\x00",
    "packed.safetensors": b"PK\x03\x04" + bytes(20),
}


def save(path, shapes, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: RNG.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    save_file(tensors, path, metadata=metadata or {"format": "pt"})


def adapter(path):
    save(path / "adapter_model.safetensors", FACTORS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))


def model(path):
    save(path / "model.safetensors", {f"{MODULE}.weight": (16, 16), "model.norm.weight": (16,)})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16}
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "good")
    model(tmp_path / "base")
    model(tmp_path / "a model")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "noconfig" / "adapter_model.safetensors", FACTORS)
    (tmp_path / "zero.safetensors").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    save(tmp_path / "one" / "style.safetensors", FLAT)
    for name in ("a", "b"):
        save(tmp_path / "several" / f"{name}.safetensors", FLAT)
    save(tmp_path / "checkpoint.safetensors", {f"{MODULE}.weight": (16, 16)})
    save(tmp_path / "inversion.safetensors", {"emb_params": (2, 8)})
    (tmp_path / "pointer.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    )
    adapter(tmp_path / "models--acme--lora" / "snapshots" / "0123abc")
    (tmp_path / "page.safetensors").write_text("\n<!DOCTYPE html><title>404</title>")
    (tmp_path / "adapter.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    for name, content in OTHERS.items():
        (tmp_path / name).write_bytes(content)
    shard = "model-00001-of-00001.safetensors"
    save(tmp_path / "index" / shard, {f"{MODULE}.weight": (16, 16)})
    listed = json.dumps({"weight_map": {f"{MODULE}.weight": shard}})
    (tmp_path / "index" / "model.safetensors.index.json").write_text(listed)
    (tmp_path / "nest" / "one").mkdir(parents=True)
    (tmp_path / "nest" / "two").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.md").write_text("nothing")
    (tmp_path / "models--acme--lora" / "refs").mkdir()
    (tmp_path / "models--acme--lora" / "refs" / "main").write_text("0123abc")
    model(tmp_path / "models--acme--base" / "snapshots" / "4567def")
    adapter(tmp_path / "runs" / "checkpoint-5")
    hada = {"w1_a": (16, 4), "w1_b": (4, 16), "w2_a": (16, 4), "w2_b": (4, 16)}
    names = {f"base_model.model.{MODULE}.hada_{name}": shape for name, shape in hada.items()}
    save(tmp_path / "loha.safetensors", names)
    return tmp_path


def loratools(*arguments):
    done = CliRunner().invoke(cli, [str(each) for each in arguments])
    if done.exception is None:
        return done.exit_code, done.output
    return 2, f"error: {describe(done.exception)}\n"


def pasted(text):
    """Run each command that a message prints, or `info` of each path that it says to name."""
    values = {"ADAPTER": "good", "MODEL": "base", "alpha=VALUE": "alpha=8"}
    values["variant=VALUE"] = "variant=lora"
    commands = [
        shlex.split(found) for found in re.findall(r"loratools ((?:fuse|to-lora|info) .*)", text)
    ]
    commands += [
        ["info", *shlex.split(found)] for found in re.findall(r"Name .*?(?:: |as )(.*)", text)
    ]
    for command in commands:
        code, output = loratools(*(values.get(word, word) for word in command))
        assert code == 0, (command, output)
    return len(commands)


@pytest.mark.parametrize(
    ("path", "message", "commands"),
    [
        ("a model", r"is a model \(LlamaForCausalLM\), not an adapter", 1),
        ("base/model.safetensors", "is a model's weights, not an adapter", 1),
        ("checkpoint.safetensors", "is a model's weights, not an adapter", 1),
        ("empty", "is an empty folder", 0),
        ("noconfig", r"adapter_model\.safetensors is there, adapter_config\.json is not", 1),
        ("zero.safetensors", "is an empty file", 0),
        ("page.safetensors", "is a web page", 0),
        ("adapter.zip", "is an archive", 0),
        ("notes", "is a folder without weights", 0),
        ("/dev/null", "is no regular file", 0),
        ("notes.txt", r"is a text file\. Name the folder or the file of an adapter", 0),
        ("paper.pdf", "is a PDF document", 0),
        ("picture.png", "is an image", 0),
        ("data.json", "is a JSON file", 0),
        ("list.json", "is a JSON file", 0),
        ("config.json", r"configuration under another name.*mv config\.json adapter_config", 0),
        ("packed.tar.gz", "is an archive", 0),
        ("packed.safetensors", r"mv packed\.safetensors packed\.bin", 0),
        ("index/model.safetensors.index.json", "is the index of a model's weight files", 1),
        ("nest", "holds no adapter, and its sub-folders hold none", 0),
        ("./no/such", r"error: \./no/such: no such file or folder\n$", 0),
        ("dangling", "is a link to nowhere, which does not exist", 0),
        ("one", r"is a folder that holds style\.safetensors", 1),
        ("several", "is a folder that holds 2 weight files", 1),
        ("inversion.safetensors", r"error: inversion\.safetensors: is a textual inversion", 0),
        ("pointer.safetensors", "is a Git LFS pointer.*git lfs pull", 0),
        ("models--acme--lora", "is a folder of the Hugging Face cache", 1),
        ("runs", "is a folder that holds 1 adapter", 1),
        ("good/adapter_config.json", "is an adapter's configuration", 1),
        ("loha.safetensors", r"PEFT's weights, and adapter_config\.json", 0),
        ("acme/chat-lora", "hf download acme/chat-lora", 0),
        ("hf://acme/chat-lora", "hf download acme/chat-lora", 0),
        ("good/nothing", r"no such file or folder\n$", 0),
    ],
)
def test_what_is_no_adapter_is_called_what_it_is(place, path, message, commands):
    code, text = loratools("squeeze", path, "--rank", "2", "--dry-run")
    assert code == 2
    assert re.search(message, text), text
    assert text.count("\n") == 1
    assert pasted(text) == commands


@pytest.mark.parametrize(
    ("path", "message", "commands"),
    [
        ("good", "is an adapter, not a model", 1),
        ("acme/model-7b", "hf download acme/model-7b", 0),
        ("dangling", "is a link to nowhere", 0),
        ("./no/such", r"error: \./no/such: no such file or folder\n$", 0),
        ("../no/such", r"error: \.\./no/such: no such file or folder\n$", 0),
        ("notes.txt", r"is a text file\. Name a model's folder, or its weights", 0),
        ("paper.pdf", "is a PDF document", 0),
        ("pointer.safetensors", "is a Git LFS pointer.*git lfs pull", 0),
        ("zero.safetensors", "is an empty file", 0),
    ],
)
def test_what_is_no_model_is_called_what_it_is(place, path, message, commands):
    code, text = loratools("quantize", path, "-o", "out")
    assert code == 2
    assert re.search(message, text), text
    assert pasted(text) == commands


def test_a_folder_of_the_cache_names_its_model(place):
    code, text = loratools("fuse", "models--acme--base", "good", "-o", "out")
    assert code == 2
    found = re.search(r"Name one: (\S+)", text)
    assert found is not None
    assert loratools("fuse", found[1], "good", "-o", "out")[0] == 0


def test_merging_into_a_model_points_to_fuse(place):
    code, text = loratools("merge", "a model", "good", "-o", "out")
    assert code == 2
    assert "loratools fuse 'a model' good -o fused" in text
    assert pasted(text) == 1


@pytest.mark.slow
def test_pickled_bases_say_how_to_make_safetensors(place):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    made = transformers.LlamaForCausalLM(config)
    made.save_pretrained("pickled")
    os.remove("pickled/model.safetensors")
    torch.save(made.state_dict(), "pickled/pytorch_model.bin")
    code, text = loratools("fuse", "pickled", "good", "-o", "out")
    assert code == 2
    found = re.search(r"make safetensors of them: python (.*)", text)
    assert found is not None
    subprocess.run([sys.executable, *shlex.split(found[1])], check=True, capture_output=True)
    assert loratools("fuse", "pickled-safetensors", "good", "-o", "out")[0] == 0
