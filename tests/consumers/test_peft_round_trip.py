"""Reading an adapter that PEFT saved and writing it again changes nothing."""

from __future__ import annotations

import json
from collections import Counter

import peft_oracle as oracle
import pytest
from peft_cases import CASES, Case

import loratools as lt
from loratools_formats import read_adapter, write_adapter
from loratools_formats.disk.errors import UnsupportedError

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


@pytest.mark.parametrize("asked", [{"to": "tinker"}, {"to": "peft", "fold_alpha": True}])
def test_biases_of_factors_follow_a_scale_that_moves_into_them(tmp_path, asked):
    """PEFT adds scale · bias; one scale for all, or none, changes the biases as it does B."""
    ranks = {"up": 3}
    config = {"target_modules": ["up", "square"], "lora_bias": True, "rank_pattern": ranks}
    case = Case("linear", config, "bfloat16")
    folder = oracle.save(tmp_path / "a", case)
    done = lt.convert(folder, output=tmp_path / "b", **asked)
    stated = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert not stated["rank_pattern"] or asked["to"] == "peft"
    oracle.edit_config(tmp_path / "b", target_modules=["up", "square"])  # not a layer without bias
    before = oracle.base_state(case)
    wanted, found = (
        oracle.changes(oracle.state(oracle.loaded(each, case).merge_and_unload()), before)
        for each in (folder, tmp_path / "b")
    )
    assert set(found) == set(wanted)
    weights = [name for name in wanted if name.endswith(".weight")]
    off = {name: found[name] - wanted[name] for name in weights}
    error = oracle.norm(off) / oracle.norm({name: wanted[name] for name in weights})
    other = max(oracle.distance(found[n], wanted[n]) for n in wanted if n not in weights)
    # What is told is true, up to what adding a change to a base in float64 rounds.
    assert done.relative_error == pytest.approx(error, rel=1e-6, abs=2.0**-48)
    assert done.other_error == pytest.approx(other, rel=1e-6, abs=2.0**-48)
    assert max(error, other) <= (2.0**-23 if asked["to"] == "tinker" else 2.0**-8)


def test_embeddings_are_none_of_all_linear_layers(tmp_path):
    config = {"target_modules": ["embed", "head"]}
    folder = oracle.save(tmp_path / "a", Case("embedding", config))
    with pytest.raises(UnsupportedError, match="Tinker adapts no embedding"):
        lt.convert(folder, to="tinker", output=tmp_path / "tinker")
    oracle.edit_config(folder, target_modules="all-linear")
    assert "LT401" in {finding.code for finding in lt.check(folder).findings}
    lt.convert(folder, to="peft", output=tmp_path / "b")
    stated = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert stated["target_modules"] == ["embed", "head"]


def test_biases_of_factors_do_not_go_beside_embeddings(tmp_path):
    """PEFT would refuse to load the two together."""
    biased = Case("bert", {"target_modules": ["query"], "lora_bias": True})
    embedding = Case("bert", {"target_modules": ["query", "word_embeddings"]})
    pair = [oracle.save(tmp_path / str(i), case) for i, case in enumerate((biased, embedding))]
    with pytest.raises(UnsupportedError, match="lora_bias"):
        lt.merge(pair, output=tmp_path / "out")
