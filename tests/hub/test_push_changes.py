"""Files that change while they are published: what was read is what is published, or nothing is."""

import re
import shutil

import numpy as np
import pytest
from hub_server import LORA, RSLORA
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.face import push as pushing
from loratools.hub import upload
from loratools_formats.disk.errors import AdapterError, LoratoolsError
from loratools_formats.disk.provenance import PROVENANCE_FILE

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The requests that a push makes once it has looked at the repository, in their order.
REQUESTS = {
    "made": "/api/repos/create",
    "announced": "/preupload/",
    "large files asked for": r"\.git/info/lfs/objects/batch",
    "a large file sent": "/lfs/",
    "committed": "/commit/main",
}


@pytest.fixture
def hub(here, monkeypatch):
    monkeypatch.setattr(upload, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(pushing, "picture_of", lambda *_: None)
    return here


@pytest.fixture(params=["small", "large"])
def adapter(request, tmp_path):
    """Return an adapter whose weights are kept in memory, or are too large for that."""
    folder = tmp_path / "adapter"
    lt.squeeze(LORA, rank=4, output=folder)
    if request.param == "large":
        tensors = load_file(folder / WEIGHTS)
        tensors |= {"base_model.model.lm_head.weight": np.ones((700, 500), "f4")}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / PROVENANCE_FILE).unlink()  # of the weights before, which push leaves out
    return folder


def other_weights(path):
    """Put other weights of the same shapes into a file, as another training run would."""
    tensors = {name: value + np.ones_like(value) for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def other_alpha(path):
    path.write_text(re.sub(r'"lora_alpha": \d+', '"lora_alpha": 77', path.read_text()))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-64])


CHANGES = {"other weights": (WEIGHTS, other_weights), "truncated": (WEIGHTS, truncated),
           "other alpha": (CONFIG, other_alpha)}  # fmt: skip


def state(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}


def pushed(hub, folder):
    """Push, and return what is published by then, without the card; None if it was refused."""
    try:
        lt.push(folder, "me/made", create=True, no_check=True)
    except LoratoolsError:
        repo = hub.repos.get("me/made")
        assert repo is None or len(repo.commits) == 1  # the one that makes the repository
        return None
    kept = {".gitattributes", "README.md"}
    return {n: data for n, data in hub.repos["me/made"].files().items() if n not in kept}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_check_refuses(hub, adapter, monkeypatch, change):
    name, act = CHANGES[change]
    monkeypatch.setattr(pushing, "_check", lambda *_, **__: act(adapter / name) or ())
    with pytest.raises(AdapterError, match="file changed while it was being published"):
        lt.push(adapter, "me/made", create=True)
    assert "me/made" not in hub.repos


def test_a_file_that_appears_after_the_check_refuses(hub, adapter, monkeypatch):
    monkeypatch.setattr(
        pushing, "_check", lambda *_, **__: (adapter / "tokenizer.json").write_text("{}") and ()
    )
    with pytest.raises(AdapterError, match="file appeared while"):
        lt.push(adapter, "me/made", create=True)
    assert "me/made" not in hub.repos


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", REQUESTS)
def test_a_change_at_a_request_publishes_what_was_read_or_nothing(hub, adapter, moment, change):
    name, act = CHANGES[change]
    before, done = state(adapter), []

    def fault(handler, method, path):
        if not done and re.search(REQUESTS[moment], path):
            done.append(path)
            act(adapter / name)
        return False

    hub.faults.append(fault)
    found = pushed(hub, adapter)
    assert done
    assert found in (None, before)
    if name == CONFIG:
        assert found == before  # it is small, and was in memory


def test_an_adapter_in_memory_that_is_another_on_disk(hub, adapter):
    read = lt.read(adapter)
    shutil.copyfile(RSLORA / WEIGHTS, adapter / WEIGHTS)
    with pytest.raises(AdapterError, match="file changed while"):
        lt.push(read, "me/made", create=True)
    assert "me/made" not in hub.repos
