"""Outputs in an object store: moto's server of S3 on loopback, with the real s3fs."""

import json
import os
import threading
import urllib.request

import pytest
from fleet_runs import contents, fleet, start, write_adapters

import loratools as lt
from loratools.pipeline.fleet.object_store import Remote
from loratools.pipeline.fleet.stores import store_of

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytestmark = pytest.mark.slow
RANK = ("--", "--rank", "2")


SERVED = []
"""What the server was asked for, and how many bytes it sent: (method, path, bytes)."""


def counting(app):
    """Return a server's application that notes in `SERVED` what it sends."""

    def counted(environ, start_response):
        parts = list(app(environ, start_response))
        is_head = environ["REQUEST_METHOD"] == "HEAD"
        nbytes = 0 if is_head else sum(map(len, parts))
        SERVED.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], nbytes))
        return parts

    return counted


def served(end):
    """Return how many bytes were sent of objects whose names end so, and forget all of it."""
    nbytes = sum(n for method, path, n in SERVED if method == "GET" and path.endswith(end))
    SERVED.clear()
    return nbytes


@pytest.fixture(scope="module")
def endpoint():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    server._server.app = counting(server._server.app)
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


def test_what_a_killed_process_left_is_made_again(s3, adapters, monkeypatch):
    squeezed(adapters, "s3://shelf/whole")
    whole = objects(store_of("s3://shelf/whole"))
    store = store_of("s3://shelf/small")
    write = Remote.write

    def dies(self, name, data, *, new=False):
        if name == "a0001/provenance.json":
            raise KeyboardInterrupt
        return write(self, name, data, new=new)

    monkeypatch.setattr(Remote, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        squeezed(adapters, "s3://shelf/small")
    monkeypatch.undo()
    left = objects(store)
    assert "a0001/adapter_model.safetensors" in left
    assert "a0001/provenance.json" not in left
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    assert squeezed(adapters, "s3://shelf/small").made == 1
    again = objects(store)
    assert {k: v for k, v in again.items() if "fleet" not in k} == {
        k: v for k, v in whole.items() if "fleet" not in k
    }
    assert not [name for name in again if "begun" in name]


def test_what_another_run_began_is_not_mixed_with_ours(s3, adapters):
    store = store_of("s3://shelf/small")
    squeezed(adapters, "s3://shelf/small")
    store.remove("a0001/provenance.json")
    store.write(".loratools-fleet/begun/a0001", b"another run's claim")
    found = squeezed(adapters, "s3://shelf/small")
    assert (found.done, found.failed) == (1, 1)
    again = squeezed(adapters, "s3://shelf/small", overwrite=True)
    assert (again.done, again.made, again.failed) == (1, 1, 0)
    assert squeezed(adapters, "s3://shelf/small").done == 2


def test_of_two_runs_with_other_options_one_is_told_and_no_output_is_mixed(s3, adapters):
    store = store_of("s3://shelf/small")
    inside = []

    def work(path):
        """Make an output; meanwhile another run makes its own."""
        if not inside:
            inside.append(True)
            store.make("a", work, b"theirs", overwrite=False)
            inside.append("ours")
        path.mkdir(parents=True)
        (path / "adapter_model.safetensors").write_text(str(inside[-1]))
        (path / "provenance.json").write_text(str(inside[-1]))

    with pytest.raises(lt.LoratoolsError, match="another run"):
        store.make("a", work, b"ours", overwrite=False)
    assert store.read("a/adapter_model.safetensors") == store.read("a/provenance.json") == b"True"


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


@pytest.fixture
def large(tmp_path):
    """Put an adapter of 2 MB into the store; returns where it came from."""
    (source,) = write_adapters(tmp_path / "far" / "large", 1, rank=32, size=4096)
    for file in source.iterdir():
        store_of("s3://shelf/in").write(f"{source.name}/{file.name}", file.read_bytes())
    return source


def test_headers_come_by_ranges_and_what_is_done_is_not_read_again(s3, large):
    nbytes = (large / "adapter_model.safetensors").stat().st_size
    given, weights = "s3://shelf/in/a0000", "in/a0000/adapter_model.safetensors"
    for verb, settings in (("info", {}), ("check", {"headers_only": True})):
        SERVED.clear()
        found = lt.fleet(verb, given, settings, output=f"s3://shelf/{verb}", workers=1)
        assert (found.made + found.found, found.failed) == (1, 0), found.adapters
        assert 0 < served(weights) < nbytes / 8
        again = lt.fleet(verb, given, settings, output=f"s3://shelf/{verb}", workers=1)
        assert (again.made, again.failed) == (0, 0)
        assert [one.state for one in again.adapters] == [
            {"made": "done"}.get(one.state, one.state) for one in found.adapters
        ]
        assert served(weights) < nbytes / 8
    assert lt.fleet("info", given, output="s3://shelf/twice", workers=1).made == 1
    assert (
        objects(store_of("s3://shelf/twice"))["a0000.json"]
        == objects(store_of("s3://shelf/info"))["a0000.json"]
    )
    here = lt.info(large).to_dict()
    told = json.loads(store_of("s3://shelf/info").read("a0000.json"))
    assert told.pop("path") == given
    here = {key: value for key, value in json.loads(json.dumps(here)).items() if key in told}
    told = {key: value for key, value in told.items() if key in here}
    for name in ("input", "inputs", "output"):
        here.pop(name, None), told.pop(name, None)
    assert told == here
    SERVED.clear()
    assert lt.fleet("squeeze", given, {"rank": 2}, output="s3://shelf/out", workers=1).made == 1
    assert nbytes <= served(weights) < 1.2 * nbytes
    assert lt.fleet("squeeze", given, {"rank": 2}, output="s3://shelf/out", workers=1).done == 1
    assert served("") < nbytes / 10  # of all that was asked for


def test_another_object_in_its_place_is_another_input(s3, large):
    given = {"settings": {"rank": 2}, "output": "s3://shelf/out", "workers": 1}
    assert lt.fleet("squeeze", "s3://shelf/in/a0000", **given).made == 1
    name, store = "a0000/adapter_model.safetensors", store_of("s3://shelf/in")
    data = store.read(name)
    store.write(name, data[:-2] + b"\0\0")  # of the same size, and with the same header
    found = lt.fleet("squeeze", "s3://shelf/in/a0000", **given)
    assert found.failed == 1
    assert "other inputs" in found.adapters[0].error
    store.write(name, data)
    assert lt.fleet("squeeze", "s3://shelf/in/a0000", **given).done == 1


def test_an_adapter_that_changes_while_it_is_read_is_told(s3, large, monkeypatch):
    from loratools.pipeline.fleet.addresses import Fetched

    store, fetch = store_of("s3://shelf/in"), Fetched._fetch

    def replaced(self, path):
        fetch(self, path)
        store.write("a0000/adapter_config.json", b'{"peft_type": "LORA", "r": 32}')

    monkeypatch.setattr(Fetched, "_fetch", replaced)
    found = lt.fleet("squeeze", "s3://shelf/in", {"rank": 2}, output="s3://shelf/out", workers=1)
    assert "changed while it was being read" in found.adapters[0].error


def test_only_one_of_many_puts_what_must_be_new(s3):
    store = store_of("s3://shelf/marks")
    won = []

    def put(number):
        if store.write("one", b"%d" % number, new=True):
            won.append(number)

    racers = [threading.Thread(target=put, args=(number,), daemon=True) for number in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
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
