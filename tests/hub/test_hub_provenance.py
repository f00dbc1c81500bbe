"""Commits of the Hub in records: what was read can be named, shown and read again."""

from __future__ import annotations

import json

import pytest
from hub_server import LORA, MODEL, RSLORA
from safetensors import safe_open

import loratools as lt
from loratools_formats.disk.provenance import PROVENANCE_FILE, sha256_of


@pytest.fixture
def repos(here):
    here.add("me/tiny", LORA)
    here.add("me/other", RSLORA)
    here.add("me/model", MODEL)
    return here


def test_commits_are_recorded_and_replay_reads_them_again(repos, tmp_path):
    commit = repos.repos["me/tiny"].sha("main")
    made = tmp_path / "both"
    lt.merge({"me/tiny": 0.7, "hf://me/other": 0.3}, rank=4, output=made)
    statement = json.loads((made / PROVENANCE_FILE).read_text())
    first, second = statement["predicate"]["call"]["arguments"]["adapters"]
    assert first["reference"] == f"hf://me/tiny@{commit}"
    assert first["commit"] == commit
    assert second["commit"] == repos.repos["me/other"].sha("main")
    assert str(tmp_path) not in json.dumps(statement)
    with safe_open(made / "adapter_model.safetensors", "np") as file:
        commits = json.loads(file.metadata()["loratools.commits"])
    assert commits["adapters 0"] == f"hf://me/tiny@{commit}"
    files = dict(repos.repos["me/tiny"].files())
    files["adapter_model.safetensors"] = (RSLORA / "adapter_model.safetensors").read_bytes()
    repos.repos["me/tiny"].commit(files)
    assert repos.repos["me/tiny"].sha("main") != commit
    found = lt.replay(made)
    assert found.identical
    inputs = lt.provenance(made).steps[-1].inputs
    assert {one.commit for one in inputs if one.role == "0"} == {commit}


def test_headers_of_a_distant_base_do_for_a_record(repos, tmp_path):
    lt.convert("me/tiny", base="me/model", to="gguf", output=tmp_path / "adapter.gguf")
    statement = json.loads((tmp_path / f"adapter.gguf.{PROVENANCE_FILE}").read_text())
    base = statement["predicate"]["call"]["arguments"]["base"]
    assert base["commit"] == repos.repos["me/model"].sha("main")
    before = sha256_of(tmp_path / "adapter.gguf")
    again = lt.replay(tmp_path / "adapter.gguf", output=tmp_path / "again.gguf")
    assert again.identical
    assert sha256_of(tmp_path / "again.gguf") == before
