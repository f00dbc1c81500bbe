"""A folder that another program replaces while it is read: all files are of one of the two."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile
from loratools_formats.disk.one_folder import of_one_folder

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def swapped(tmp_path, monkeypatch):
    """Return a function: puts one folder in another's place when a file is about to be opened."""

    def swap(name, folder, other, times=1):
        left = [times]
        opened = RegularFile.__init__

        def opened_later(self, path, *args, **kwargs):
            if Path(path).name == name and left[0]:
                left[0] -= 1
                os.rename(folder, tmp_path / "aside")
                os.rename(other, folder)
                os.rename(tmp_path / "aside", other)
            opened(self, path, *args, **kwargs)

        monkeypatch.setattr(RegularFile, "__init__", opened_later)
        return left

    return swap


def scaled_copy(folder, times_alpha, times_b):
    shutil.copytree(TINY / "lora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] *= times_alpha
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "adapter_model.safetensors")
    for name in weights:
        if "lora_B" in name:
            weights[name] = (weights[name].astype("f4") * times_b).astype(weights[name].dtype)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_an_adapter_that_is_replaced_is_the_old_or_the_new_one(tmp_path, swapped):
    """Of alpha 10 times as large and B 4 times, each alone would be a third adapter."""
    folder, other = tmp_path / "a", tmp_path / "other"
    scaled_copy(folder, 1, 1)
    scaled_copy(other, 10, 4)
    old = lt.delta(read_adapter(folder), NAME)
    left = swapped("adapter_model.safetensors", folder, other)
    found = lt.delta(read_adapter(folder), NAME)
    assert left == [0]
    np.testing.assert_allclose(found, 40 * old, rtol=1e-6)


def test_a_model_that_is_replaced_is_the_old_or_the_new_one(tmp_path, swapped):
    for name in ("a", "other"):
        shutil.copytree(TINY / "model", tmp_path / name)
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["num_key_value_heads"] *= 3
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    inode = (tmp_path / "other/model.safetensors").stat().st_ino
    left = swapped("model.safetensors", tmp_path / "a", tmp_path / "other")
    found = read_checkpoint(tmp_path / "a")
    assert left == [0]
    assert found.config["num_key_value_heads"] == config["num_key_value_heads"]
    assert found.files[0].file.identity.inode == inode


def test_a_folder_that_is_replaced_again_and_again_is_told(tmp_path, swapped):
    folder, other = tmp_path / "a", tmp_path / "other"
    scaled_copy(folder, 1, 1)
    scaled_copy(other, 10, 4)
    swapped("adapter_model.safetensors", folder, other, times=1000)
    with pytest.raises(AdapterError, match="a: changes again and again while it is read"):
        read_adapter(folder)


def test_what_fails_meanwhile_is_read_again(tmp_path):
    (tmp_path / "a").mkdir()
    tries = []

    def read():
        tries.append(len(tries))
        if len(tries) < 3:
            (tmp_path / "a" / str(len(tries))).touch()
            raise AdapterError("half of it")
        return "whole"

    assert of_one_folder(tmp_path / "a", read) == "whole"
    assert tries == [0, 1, 2]


@pytest.mark.parametrize("there", [True, False])
def test_an_error_of_what_stays_is_raised_at_once(tmp_path, there):
    tries = []

    def read():
        tries.append(1)
        raise AdapterError("not sound")

    path = tmp_path if there else tmp_path / "nothing"
    with pytest.raises(AdapterError, match="not sound"):
        of_one_folder(path, read)
    assert tries == [1]
