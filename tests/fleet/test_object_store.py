"""Outputs in an object store: moto's server of S3 on loopback, with the real s3fs."""

import json
import os
import threading
import urllib.request

import pytest
from conftest import contents, fleet, start, write_adapters

import loratools as lt
from loratools.pipeline.fleet.store import Remote, store_of

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytestmark = pytest.mark.slow
RANK = ("--", "--rank", "2")


@pytest.fixture(scope="module")
def endpoint():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint, monkeypatch):
    """Return variables that lead s3fs to an empty server with one bucket."""
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST"))
    variables = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "FSSPEC_S3_ENDPOINT_URL": endpoint,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem(endpoint_url=endpoint)
    fs.mkdir("shelf")
    return variables


def objects(store):
    """Return the bytes of all objects of a store's folder, by name."""
    fs, root = store._fs, store._root
    return {name[len(root) + 1 :]: fs.cat_file(name) for name in fs.find(root)}


@pytest.fixture
def adapters(tmp_path):
    return write_adapters(tmp_path / "far" / "away" / "adapters", 2)


def squeezed(adapters, place, **more):
    given = [str(path) for path in adapters]
    return lt.fleet("squeeze", given, {"rank": 2}, output=place, workers=1, **more)


def test_the_bytes_of_single_runs_are_put_whole_and_found_again(s3, adapters, tmp_path):
    found = squeezed(adapters, "s3://shelf/small")
    assert (found.made, found.failed) == (2, 0), found.adapters
    store = store_of("s3://shelf/small")
    for source in adapters:
        lt.squeeze(source, rank=2, output=tmp_path / "elsewhere" / "on" / "disk" / source.name)
    kept = objects(store)
    assert kept.pop("fleet-squeeze.jsonl").count(b"\n") == 2
    assert kept == contents(tmp_path / "elsewhere" / "on" / "disk")
    again = squeezed(adapters, "s3://shelf/small")
    assert (again.made, again.done) == (0, 2)
    assert objects(store).keys() - {"fleet-squeeze.jsonl"} == kept.keys()


def test_reports_and_files_are_put_too(s3, adapters):
    given = [str(path) for path in adapters[:2]]
    reports = lt.fleet("info", given, output="s3://shelf/reports", workers=1)
    assert reports.made == 2
    store = store_of("s3://shelf/reports")
    assert json.loads(store.read("a0000.json"))["operation"] == "info"
    assert lt.fleet("info", given, output="s3://shelf/reports", workers=1).done == 2


def test_what_a_killed_process_left_is_made_again(s3, adapters):
    store = store_of("s3://shelf/small")
    squeezed(adapters, "s3://shelf/small")
    whole = objects(store)
    store.remove("a0001/provenance.json")
    store.write(".loratools-fleet/begun/a0001", b"")
    assert squeezed(adapters, "s3://shelf/small").made == 1
    again = objects(store)
    assert {k: v for k, v in again.items() if "fleet" not in k} == {
        k: v for k, v in whole.items() if "fleet" not in k
    }


def test_objects_of_others_are_not_replaced(s3, adapters):
    store = store_of("s3://shelf/small")
    store.write("a0001/adapter_model.safetensors", b"somebody's")
    found = squeezed(adapters, "s3://shelf/small")
    assert (found.made, found.failed) == (1, 1)
    assert store.read("a0001/adapter_model.safetensors") == b"somebody's"


def test_adapters_come_from_the_store_too(s3, adapters, tmp_path):
    store = store_of("s3://shelf/in")
    for source in adapters:
        for file in source.iterdir():
            store.write(f"{source.name}/{file.name}", file.read_bytes())
    for source in adapters:
        lt.squeeze(source, rank=2, output=tmp_path / "elsewhere" / "on" / "disk" / source.name)
    for sources in ("s3://shelf/in/*", "s3://shelf/in"):
        found = lt.fleet("squeeze", sources, {"rank": 2}, output="s3://shelf/out", workers=1)
        assert [one.error for one in found.adapters] == [None, None]
    assert (found.made, found.done) == (0, 2)
    kept = objects(store_of("s3://shelf/out"))
    kept.pop("fleet-squeeze.jsonl")
    assert kept == contents(tmp_path / "elsewhere" / "on" / "disk")
    with pytest.raises(lt.LoratoolsError, match="no adapter is there"):
        lt.fleet("info", "s3://shelf/nothing", workers=1)


def test_only_one_of_many_puts_what_must_be_new(s3):
    store = store_of("s3://shelf/marks")
    won = []

    def put(number):
        if store.write("one", b"%d" % number, new=True):
            won.append(number)

    racers = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(won) == 1
    assert store.read("one") == b"%d" % won[0]


def test_a_store_that_is_not_there_is_told_in_one_line(s3, adapters):
    with pytest.raises(lt.LoratoolsError, match="nowhere"):
        squeezed(adapters[:1], "s3://nowhere/small")


def test_addresses_and_paths():
    assert isinstance(store_of("memory://a/b"), Remote)
    assert store_of("memory:/a/b").shown("c") == "memory://a/b/c"
    assert store_of("here/there").shown() == os.path.abspath("here/there")


def test_two_launchers_and_a_shard_at_once(s3, adapters, tmp_path):
    place = str(adapters[0].parent)
    given = ("fleet", "squeeze", place, "-o", "s3://shelf/small", "--workers", "1", *RANK)
    running = [start(*given, cwd=tmp_path, **s3) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    again = fleet(*given[1:], cwd=tmp_path, **s3)
    assert (again["done"], again["made"]) == (2, 0)
    names = objects(store_of("s3://shelf/small"))
    assert not [name for name in names if ".loratools" in name]
