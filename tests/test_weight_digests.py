"""Digests of base weights: of all bytes, and computed once for each state of a file."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_info, threadpool_limits

import loratools as lt
from loratools.work.provenance import operation_record
from loratools.work.weight_digests import weight_digests
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile

EXAMPLES = Path(__file__).parents[1] / "examples"
LONG_AGO = 1_600_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LORATOOLS_CACHE", str(folder))
    return folder


def digest(path):
    return weight_digests([RegularFile(path)])[0]


def true_digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def old_file(path, data):
    path.write_bytes(data)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def kept(cache):
    return sorted((cache / "digests").iterdir()) if (cache / "digests").is_dir() else []


def test_a_base_and_its_tuned_model_have_other_digests_though_their_headers_are_equal(tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    weights = {"model.layers.0.mlp.up_proj.weight": np.ones((8, 4), np.float32)}
    for folder, factor in ((base, 1.0), (tuned, 2.0)):
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        scaled = {key: np.float32(factor) * value for key, value in weights.items()}
        save_file(scaled, folder / "model.safetensors")
    lt.extract(base, tuned, rank=1).write(tmp_path / "out")
    statement = json.loads((tmp_path / "out" / "provenance.json").read_text())
    found = {
        one["role"]: one["digest"]["sha256"]
        for one in statement["predicate"]["inputs"]
        if one["name"] == "model.safetensors"
    }
    assert found == {
        "base": true_digest(base / "model.safetensors"),
        "tuned": true_digest(tuned / "model.safetensors"),
    }
    assert found["base"] != found["tuned"]
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_a_file_is_hashed_once(tmp_path, cache, monkeypatch):
    path = old_file(tmp_path / "w", b"weights")
    assert digest(path) == true_digest(path)
    monkeypatch.setattr(RegularFile, "sha256", None)
    assert digest(path) == true_digest(path)
    assert len(kept(cache)) == 1


def test_a_changed_file_is_hashed_again(tmp_path):
    path = old_file(tmp_path / "w", b"weights")
    digest(path)
    old_file(path, b"wEights")
    os.utime(path, (LONG_AGO + 1, LONG_AGO + 1))
    assert digest(path) == true_digest(path)


def test_a_file_written_just_now_is_not_kept(tmp_path, cache):
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    assert digest(path) == true_digest(path)
    assert kept(cache) == []


def test_a_spoilt_entry_is_not_believed(tmp_path, cache):
    path = old_file(tmp_path / "w", b"weights")
    digest(path)
    kept(cache)[0].write_bytes(b"\xff rubbish")
    assert digest(path) == true_digest(path)


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, cache):
    path = old_file(tmp_path / "w", b"weights")
    cache.write_bytes(b"a file where the folder should be")
    assert digest(path) == true_digest(path)
    assert digest(path) == true_digest(path)


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path, cache):
    path = old_file(tmp_path / "w", b"weights")
    file = RegularFile(path)
    path.write_bytes(b"others!")
    with pytest.raises(AdapterError, match="changed"):
        weight_digests([file])
    assert kept(cache) == []


def test_hashing_leaves_the_threads_of_blas_alone(tmp_path, monkeypatch):
    """It runs beside the work: were their number restored meanwhile, last digits would differ."""
    seen = []

    def threads():
        return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]

    monkeypatch.setattr(RegularFile, "sha256", lambda _: seen.append(threads()) or "0" * 64)
    paths = [old_file(tmp_path / name, name.encode()) for name in ("a", "b")]
    with threadpool_limits(2):
        before = threads()
        weight_digests([RegularFile(path) for path in paths])
        assert seen == [before, before]
        assert threads() == before


def changed_configuration(tmp_path, replaced):
    """Return a base that was read, its configuration changed since, and what it was."""
    shutil.copytree(EXAMPLES / "tiny-llama" / "model", tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    before = config.read_bytes()
    base = read_checkpoint(tmp_path / "base")
    if replaced:
        (tmp_path / "other").write_bytes(before + b" ")
        (tmp_path / "other").replace(config)
    else:
        config.write_bytes(before[:-3])
    return base, before


def test_a_configuration_is_recorded_as_it_was_read(tmp_path):
    base, before = changed_configuration(tmp_path, replaced=True)
    record = operation_record("to-lora", {}, {}, base=base)
    digests = {each["name"]: each["digest"] for each in record["inputs"]}
    assert digests["config.json"] == {"sha256": hashlib.sha256(before).hexdigest()}


def test_a_configuration_that_was_written_to_since_is_not_recorded(tmp_path):
    base, _ = changed_configuration(tmp_path, replaced=False)
    with pytest.raises(AdapterError, match=r"config\.json: file (changed|ended) while"):
        operation_record("to-lora", {}, {}, base=base)
