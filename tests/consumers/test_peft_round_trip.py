"""Reading an adapter that PEFT saved and writing it again changes nothing."""

from __future__ import annotations

import json
from collections import Counter

import peft_oracle as oracle
import pytest
from peft_cases import CASES

from loratools_formats import read_adapter, write_adapter

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]


def contents(folder):
    """Return a folder's tensors and metadata, found by the safetensors package, and its config."""
    from safetensors import deserialize

    raw = (folder / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors = {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in deserialize(raw)
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    # As text, since 1, 1.0 and True are equal.
    return tensors, header.get("__metadata__"), json.dumps(config, sort_keys=True)


@pytest.mark.parametrize("name", CASES)
def test_a_copy_has_the_same_tensors_bit_for_bit_and_the_same_config(saved, tmp_path, name):
    write_adapter(read_adapter(saved(name)), tmp_path / "copy", "peft")
    assert contents(tmp_path / "copy") == contents(saved(name))


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_the_file_has_exactly_one_place(saved, name):
    adapter = read_adapter(saved(name))
    places = Counter(tensor.key for delta in adapter.modules.values() for tensor in delta.tensors())
    places.update(one.tensor.key for one in adapter.replacements.values())
    places.update(tensor.key for tensor in adapter.carried.values())
    tensors, _, _ = contents(saved(name))
    assert places == Counter(dict.fromkeys(tensors, 1))


def test_pickled_weights_become_safetensors_with_the_same_bits(saved, tmp_path):
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    folder.mkdir()
    tensors = load_file(saved("dora-conv") / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    config = (saved("dora-conv") / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").write_bytes(config)
    write_adapter(read_adapter(folder), tmp_path / "copy", "peft")
    assert contents(tmp_path / "copy") == contents(saved("dora-conv"))


def test_a_named_adapter_is_copied_from_its_sub_folder(saved, tmp_path):
    import shutil

    shutil.copytree(saved("dora"), tmp_path / "both")
    shutil.copytree(saved("patterns"), tmp_path / "both" / "second")
    write_adapter(read_adapter(tmp_path / "both" / "second"), tmp_path / "copy", "peft")
    assert contents(tmp_path / "copy") == contents(saved("patterns"))
