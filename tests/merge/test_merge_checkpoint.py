"""The base model of a merge: one file or shards, and indexes that say what is not so."""

import json
import os

import numpy as np
import pytest
from merge_cases import run
from merge_models import saved_base, saved_by_peft
from safetensors.numpy import load_file, save_file

from loratools.algebra.ranks import RankRule
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import AdapterError, MissingFileError

FULL = RankRule(rank=64)


def sharded(folder, tensors, index=None):
    """Write each tensor into a shard of its own, with an index."""
    folder.mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        shard = f"model-{number:05d}.safetensors"
        save_file({name: tensor}, folder / shard)
        weight_map[name] = shard
    content = {"metadata": {}, "weight_map": weight_map if index is None else index(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def tensors(tmp_path):
    return load_file(saved_base(tmp_path / "base", "linear") / "model.safetensors")


def test_shards_are_the_whole_file(tmp_path, tensors):
    source, _ = saved_by_peft(tmp_path / "a", "linear", 1, use_dora=True)
    shards = sharded(tmp_path / "shards", tensors)
    _, one = run(tmp_path / "one", [(source, 1.0)], base=tmp_path / "base", rule=FULL)
    _, other = run(tmp_path / "other", [(source, 1.0)], base=shards, rule=FULL)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    checkpoint = read_checkpoint(shards)
    assert checkpoint.tensors.keys() == tensors.keys()
    assert len(checkpoint.files) == len(tensors)


def test_a_file_a_folder_and_the_configuration(tmp_path, tensors):
    folder = tmp_path / "base"
    (folder / "config.json").write_text('{"model_type": "toy"}')
    assert read_checkpoint(folder).config == {"model_type": "toy"}
    file = read_checkpoint(folder / "model.safetensors")
    assert (file.config, file.tensors.keys()) == ({}, tensors.keys())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lambda m: m | {"up.weight": "../base/model.safetensors"}, "outside the folder"),
        (lambda m: m | {"up.weight": "/etc/model.safetensors"}, "outside the folder"),
        (lambda m: m | {"up.weight": ".hidden.safetensors"}, "outside the folder"),
        (lambda m: m | {"up.weight": "model.bin"}, "outside the folder"),
        (lambda m: m | {"more": "model-00000.safetensors"}, "in no shard"),
        (
            lambda m: {k: v for k, v in m.items() if k != "up.bias"} | {"x": m["up.bias"]},
            "disagree",
        ),
        (lambda m: m | {"up.bias": m["up.weight"]}, "in no shard|disagree"),
        (lambda m: ["up.weight"], "no weight_map"),
        (lambda m: m | {"up.bias": 3}, "no weight_map"),
    ],
)
def test_an_index_must_agree_with_its_shards(tmp_path, tensors, index, message):
    folder = sharded(tmp_path / "shards", tensors, index)
    with pytest.raises(AdapterError, match=message):
        read_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path, tensors):
    folder = sharded(tmp_path / "shards", tensors)
    os.remove(folder / "model-00001.safetensors")
    with pytest.raises((MissingFileError, AdapterError), match=r"model-00001\.safetensors"):
        read_checkpoint(folder)


def test_a_shard_may_not_lead_out_of_the_folder_by_a_link_to_nothing_regular(tmp_path, tensors):
    folder = sharded(tmp_path / "shards", tensors)
    os.remove(folder / "model-00001.safetensors")
    os.mkfifo(folder / "model-00001.safetensors")
    with pytest.raises(AdapterError, match="regular"):
        read_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}, "weight_map": {}}', "\x00"])
def test_an_index_that_is_no_sound_json_is_refused(tmp_path, text):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(AdapterError, match="JSON"):
        read_checkpoint(tmp_path / "shards")


def test_nothing_there(tmp_path):
    with pytest.raises(MissingFileError, match="is an empty folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(MissingFileError):
        read_checkpoint(tmp_path / "missing")


@pytest.mark.parametrize(
    ("module", "key"),
    [
        ("layers.0.q", "layers.0.q.weight"),
        ("model.layers.0.q", "layers.0.q.weight"),
        ("q", "layers.0.q.weight"),
        ("layers.0.k", "model.layers.0.k.weight"),
        ("base.model.layers.0.k", "model.layers.0.k.weight"),
    ],
)
def test_prefixes_on_either_side_do_not_matter(tmp_path, module, key):
    names = ["layers.0.q.weight", "model.layers.0.k.weight", "layers.0.q.bias", "xq.weight"]
    save_file({n: np.ones((2, 2), np.float32) for n in names}, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).weight(module).key == key


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("v", "no base tensor fits the module"),
        ("layers.1.q", "no base tensor fits"),
        ("ayers.0.q", "no base tensor fits.*Nearest names: layers.0.q.weight"),
        ("k", "several base tensors fit"),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_nearest_names(tmp_path, module, message):
    names = ["layers.0.q.weight", "a.k.weight", "b.k.weight"]
    save_file({n: np.ones((2, 2), np.float32) for n in names}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=message) as caught:
        read_checkpoint(tmp_path).weight(module)
    assert caught.value.tensor == module
