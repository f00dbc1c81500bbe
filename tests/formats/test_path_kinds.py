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
from loratools_formats.contract.file_kinds import is_of_model

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


BYTES = {
    "array.npy": (b"\x93NUMPY\x01\x00", "is a NumPy array.*from_factors"),
    "weights.h5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "old.bin": (
        b"algg\x01\x00\x00\x00",
        "adapter of llama.cpp from before GGUF.*loratools convert",
    ),
    "model.onnx": (b"\x08\x07\x12\x07pytorch", "is a model for ONNX, which is not read"),
    "._x.safetensors": (b"\x00\x05\x16\x07" + bytes(40), "macOS notes about another file"),
    ".DS_Store": (b"\x00\x00\x00\x01Bud1", "macOS notes about a folder"),
    "zeros.safetensors": (bytes(600), "zeros where a file begins.*Fetch the file again"),
    "cut.safetensors": (b"\x90\x01" + bytes(6) + b'{"a":{"dtype"', "ends within its header.*again"),
    "gone.safetensors": (b"Entry not found", "is a text and holds no weights: 'Entry not found'"),
    "no.gguf": (b'{"error":"no"}', "is a text and holds no weights"),
    "noise.safetensors": (bytes(range(200, 240)), "begins with the bytes c8 c9"),
    "noise.gguf": (bytes(range(200, 240)), "begins with the bytes c8 c9"),
    "noise": (
        bytes(range(200, 240)),
        "begins with the bytes c8 c9.*Adapters are safetensors, GGUF",
    ),
    "x.safetensors.part": (b"\x01", "is a download that has not ended"),
    "tokenizer.model": (b"\n\x0e\n\x05<unk>", "is a file of a tokenizer"),
    "trainer_state.json": (b"{}", "is the record of a training run"),
    "film.mp4": (b"\x00\x00\x00\x18ftypmp42", "is a video or an image"),
    "data.parquet": (b"PAR1\x15\x04", "is a table of data"),
}
PICKLES = {
    "optimizer.pt": ({"state": {}, "param_groups": [{"lr": 1.0}]}, "state of a training run"),
    "other.pt": ({"state": {}, "param_groups": [{"lr": 1.0}]}, "state of a training run"),
    "words.pt": ({"string_to_param": {"*": "T"}}, "is a textual inversion"),
    "model.bin": ({f"{MODULE}.weight": "T", "lm_head.weight": "T"}, "is a model's weights"),
    "x.bin": ({"x": "T"}, "holds the tensor x, which no known format recognises"),
    "list.pth": (["T"], "content is of type list.*Load them with torch"),
    "one.pt": ("T", "content is of type Tensor"),
    "light.ckpt": ({"state_dict": {"x": "T"}, "epoch": 1}, "tensors are below 'state_dict'"),
    "mixed.bin": ({"x": "T", "n": 1}, "entry 'n' is of type int"),
}


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
        ["info", *shlex.split(found)]
        for found in re.findall(r"(?:Name|or name one,) .*?(?:: |as )(.*)", text)
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
        ("one", r"is a folder that holds 1 adapter\. Name it: one/style\.safetensors", 1),
        ("several", r"is a folder that holds 2 adapters\. Add --out-dir DIR to take all", 1),
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


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("as_base", [False, True])
def test_a_file_is_called_what_its_first_bytes_say(place, name, as_base):
    content, message = BYTES[name]
    (place / name).write_bytes(content)
    words = ["quantize", name, "-o", "out"] if as_base else ["info", name]
    code, text = loratools(*words)
    assert code == 2
    assert re.search(message.split(".*")[0], text), text
    assert as_base or re.search(message, text), text
    assert re.search(r"\. [A-Z`]", text), f"no next step: {text}"


def with_tensors(value, torch):
    """Return a value with a tensor in each place of a "T"."""
    if isinstance(value, dict):
        return {key: with_tensors(one, torch) for key, one in value.items()}
    if isinstance(value, list):
        return [with_tensors(one, torch) for one in value]
    return torch.zeros(4, 4) if value == "T" else value


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_called_what_it_holds(place, name):
    torch = pytest.importorskip("torch")
    content, message = PICKLES[name]
    torch.save(with_tensors(content, torch), name)
    code, text = loratools("info", name)
    assert code == 2
    assert re.search(message, text), text
    assert re.search(r"\. [A-Z`]", text), f"no next step: {text}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter.ckpt", "pytorch_model.bin"])
def test_pickles_say_how_to_make_safetensors_of_them(place, name):
    """An adapter in a trainer's checkpoint is taken out, and a base's pickled file made one."""
    torch = pytest.importorskip("torch")
    if name == "adapter.ckpt":
        tensors = {key: torch.ones(shape) for key, shape in FLAT.items()}
        torch.save({"state_dict": tensors, "epoch": 1}, name)
        first, then = ["info", name], ["info", "adapter-saved.safetensors"]
    else:
        torch.save({f"{MODULE}.weight": torch.ones(16, 16), "lm_head.weight": torch.ones(4)}, name)
        first = ["fuse", name, "good", "-o", "out.safetensors"]
        then = ["fuse", "pytorch_model-saved.safetensors", "good", "-o", "out.safetensors"]
    code, text = loratools(*first)
    assert code == 2
    found = re.search(r": python (-c .*)", text)
    assert found is not None, text
    subprocess.run([sys.executable, *shlex.split(found[1])], check=True, capture_output=True)
    assert loratools(*then)[0] == 0


@pytest.mark.parametrize(
    ("names", "adapter_is", "base_is"),
    [
        (["config.json"], "folder of a model.*without its weights", "without its weights"),
        (["config.json", "flax_model.msgpack"], "weights are Flax's", "weights are Flax's"),
        (["config.json", "tf_model.h5"], "weights are Keras's", "weights are Keras's"),
        (["optimizer.pt", "rng_state.pth"], "holds the state of a training run", "the state of a"),
        (["zero_to_fp32.py", "latest"], "DeepSpeed.*python", "DeepSpeed.*python"),
        ([".gitattributes", "README.md"], "it holds .gitattributes, README.md", "without weights"),
        (["._adapter_model.safetensors", ".DS_Store"], "is a folder without weights", "without"),
        (["adapter_config.json"], "no weights in the folder", "is an adapter, not a model"),
        (["adapter_model.safetensors"], "adapter_config.json is not", "is an adapter, not a model"),
    ],
)
def test_a_folder_is_called_what_it_holds(place, names, adapter_is, base_is):
    (place / "odd").mkdir()
    for name in names:
        (place / "odd" / name).write_text('{"peft_type": "LORA"}')
    for words, message in ((["info", "odd"], adapter_is), (["fuse", "odd", "good"], base_is)):
        code, text = loratools(*words, *(["-o", "out"] if words[0] == "fuse" else []))
        assert code == 2
        assert re.search(message, text), text
        assert re.search(r"\. [A-Z`]", text), f"no next step: {text}"


def test_links_in_a_circle_say_so(place):
    (place / "circle").symlink_to("circle")
    assert "leads back to it" in loratools("info", "circle")[1]


def test_a_missing_shard_says_what_to_fetch(place):
    os.remove("index/model-00001-of-00001.safetensors")
    code, text = loratools("fuse", "index", "good", "-o", "out")
    assert code == 2
    assert "is listed in the index and is not there. Fetch it" in text


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


def test_a_path_nearly_as_typed_is_named(place):
    assert "Did you mean base/model.safetensors?" in loratools("info", "base/modl.safetensors")[1]
    assert "Did you mean ./empty?" in loratools("info", "./empt")[1]
    assert "Did you mean" not in loratools("info", "./xyzzy")[1]


@pytest.mark.parametrize(
    "leaves",
    [
        ("weight", "weight_scale", "comfy_quant"),
        ("qweight", "qzeros", "scales", "g_idx"),
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight", "scales", "biases"),
        ("_weight_qdata", "_weight_scale"),
        ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
        ("weight", "scale_weight", "scale_input"),
        ("experts.down_proj_blocks", "experts.down_proj_scales", "experts.down_proj_bias"),
    ],
)
def test_quantised_weights_are_a_models(leaves):
    """`info` tells of such a file how it is quantised, and other commands what it is."""
    names = [f"model.layers.{i}.mlp.{leaf}" for i in range(3) for leaf in leaves]
    assert is_of_model(names)
    assert not is_of_model([*names, "model.layers.0.mlp.lora_A.weight"])
