"""Outputs of fleets in a bucket of the Hub, through the real `HfFileSystem`.

Only the upload to the Hub's content store is not the real one: bytes go to the server's objects.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hub_server import LORA, RSLORA, lfs_oid

import loratools as lt
from loratools.pipeline.fleet.stores import store_of
from loratools.pipeline.fleet.task import _store

pytest.importorskip("fsspec")


class Uploads:
    """A stand-in for a session of `hf_xet`: it keeps content by its hash."""

    def __init__(self, server):
        self.server = server

    def new_upload_commit(self, **_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def start_upload_file(self, path, **_):
        with open(path, "rb") as file:
            return self.start_upload_bytes(file.read())

    def start_upload_bytes(self, data, **_):
        self.server.objects[lfs_oid(data)] = data
        info = SimpleNamespace(hash=lfs_oid(data), file_size=len(data))
        return SimpleNamespace(result=lambda: SimpleNamespace(xet_info=info))


@pytest.fixture
def bucket(here, monkeypatch):
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.utils import _xet

    if not hasattr(HfApi, "batch_bucket_files"):
        pytest.skip("this huggingface_hub knows no buckets")
    monkeypatch.setattr(_xet, "get_xet_session", lambda: Uploads(here))
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", here.endpoint)
    HfFileSystem.clear_instance_cache()
    _store.cache_clear()
    here.buckets["me/small"] = {}
    yield here.buckets["me/small"]
    HfFileSystem.clear_instance_cache()
    _store.cache_clear()


def squeezed(output, *sources, rank=4, **more):
    given = [str(source) for source in sources]
    return lt.fleet("squeeze", given, {"rank": rank}, output=output, workers=1, **more)


@pytest.mark.slow
def test_a_bucket_holds_the_bytes_of_single_runs(bucket, tmp_path):
    place = "hf://buckets/me/small/run"
    found = squeezed(place, LORA, RSLORA)
    assert (found.made, found.failed) == (2, 0), found.adapters
    for source in (LORA, RSLORA):
        lt.squeeze(source, rank=4, output=tmp_path / "a" / "b" / source.name)
    files = {name.removeprefix("run/"): data for name, data in bucket.items()}
    assert files.pop("fleet-squeeze.jsonl").count(b"\n") == 2
    here = {path.relative_to(tmp_path / "a" / "b").as_posix(): path.read_bytes()
            for path in (tmp_path / "a" / "b").rglob("*") if path.is_file()}  # fmt: skip
    assert files.keys() == here.keys()  # marks are gone, too
    for name, data in here.items():
        if not name.endswith("provenance.json"):  # it tells of inputs near the output
            assert files[name] == data, name
    again = squeezed(place, LORA, RSLORA)
    assert (again.made, again.done) == (0, 2)
    other = squeezed(place, LORA, RSLORA, rank=2)
    assert (other.made, other.failed) == (0, 2)
    assert squeezed(place, LORA, RSLORA, rank=2, overwrite=True).made == 2


@pytest.mark.slow
def test_adapters_in_a_bucket_are_members(bucket, tmp_path):
    for name, source in (("a", LORA), ("deep/b", RSLORA)):
        for path in source.iterdir():
            bucket[f"in/{name}/{path.name}"] = path.read_bytes()
    found = squeezed(tmp_path / "out", "hf://buckets/me/small/in/*")
    assert [(each.name, each.state) for each in found.adapters] == [
        ("in/a", "made"), ("in/deep/b", "made"),
    ]  # fmt: skip
    for name, source in (("in/a", LORA), ("in/deep/b", RSLORA)):
        lt.squeeze(source, rank=4, output=tmp_path / "alone" / name)
        weights = f"{name}/adapter_model.safetensors"
        assert (tmp_path / "out" / weights).read_bytes() == (
            tmp_path / "alone" / weights
        ).read_bytes()
    assert squeezed(tmp_path / "out", "hf://buckets/me/small/in/*").done == 2
    bucket["in/a/adapter_model.safetensors"] = (RSLORA / "adapter_model.safetensors").read_bytes()
    assert squeezed(tmp_path / "out", "hf://buckets/me/small/in/*").failed == 1
    with pytest.raises(lt.LoratoolsError, match="nothing on the Hub matches"):
        squeezed(tmp_path / "out", "hf://buckets/me/small/nowhere/*")


@pytest.mark.slow
def test_what_another_process_puts_is_seen_at_once(bucket):
    store = store_of("hf://buckets/me/small/run")
    assert store.read("a/provenance.json") is None
    assert not store.exists("a", b"ours")
    bucket["run/a/provenance.json"] = b"{}"
    assert store.exists("a", b"ours")
    assert store.read("a/provenance.json") == b"{}"
    assert not store.write("a/provenance.json", b"ours", new=True)
    bucket.clear()
    assert store.read("a/provenance.json") is None
    assert store.write("a/provenance.json", b"ours", new=True)
    assert bucket == {"run/a/provenance.json": b"ours"}


@pytest.mark.slow
def test_no_such_bucket(bucket, capsys):
    assert squeezed("hf://buckets/me/small/run", LORA).made == 1
    assert capsys.readouterr().err == ""  # no bars of the library
    with pytest.raises(lt.LoratoolsError, match="nobody"):
        squeezed("hf://buckets/me/nobody", LORA)
