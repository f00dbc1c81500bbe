"""Manifests and statements in a fleet's folder that are not ours, or spoiled."""

import json
import os
import random
import shutil

import pytest
from fleet_runs import write_adapters

import loratools as lt
from loratools_formats.disk.errors import AdapterError, LoratoolsError

VALUES = (None, 5, "x", [], [5], {"a": 5}, "../../x")


@pytest.fixture
def made(tmp_path, monkeypatch):
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    write_adapters(tmp_path / "adapters", 2)
    assert squeeze(tmp_path).made == 2
    return tmp_path


def squeeze(folder):
    given = str(folder / "adapters" / "*")
    return lt.fleet("squeeze", given, {"rank": 2}, output=folder / "out", workers=1)


def spoiled(line, key, value):
    return json.dumps({**json.loads(line), key: value}).encode()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"[" * 200_000,
        lambda _: b'{"a":' * 50_000,
        lambda _: b'[1]\n5\nnull\n"x"\n\xff\xfe\n{"a": 1' + b"0" * 9_999 + b"}",
        *(
            lambda line, key=key, value=value: spoiled(line, key, value)
            for key in ("name", "result", "seen", "key", "seconds", "state", "schema")
            for value in VALUES
        ),
    ],
)
def test_lines_of_a_manifest_that_are_not_ours_decide_nothing(made, spoil):
    place = made / "out" / "fleet-squeeze.jsonl"
    place.write_bytes(spoil(place.read_bytes().splitlines()[0]))
    found = squeeze(made)
    assert (found.done, found.failed) == (2, 0)
    assert not (made / "out" / ".loratools-fleet").exists()
    told = [json.loads(line)["name"] for line in place.read_text().splitlines()]
    assert {"a0000", "a0001"} <= set(told)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_read_as_a_manifest(made, kind):
    place = made / "out" / "fleet-squeeze.jsonl"
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/zero")
    with pytest.raises(AdapterError, match=r"fleet-squeeze\.jsonl: is a"):
        squeeze(made)
    assert not (made / "out" / ".loratools-fleet").exists()


def test_a_pipe_in_the_place_of_a_statement_is_not_waited_for(made):
    place = made / "out" / "a0000" / "provenance.json"
    place.unlink()
    os.mkfifo(place)
    found = squeeze(made)
    assert (found.done, found.failed) == (1, 1)
    assert "from other inputs, with other options or by another version" in found.adapters[0].error


def places(value, path=()):
    """Yield the path of everything in a JSON value."""
    if path:
        yield path
    items = enumerate(value) if isinstance(value, list) else ()
    for key, item in value.items() if isinstance(value, dict) else items:
        yield from places(item, (*path, key))


@pytest.mark.slow
def test_statements_with_anything_of_another_type_end_in_words(made):
    place = made / "out" / "a0000" / "provenance.json"
    good = place.read_bytes()
    cases = [(p, v) for p in places(json.loads(good)) for v in VALUES]
    for path, value in random.Random(0).sample(cases, 40):
        statement = json.loads(good)
        inner = statement
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        place.write_text(json.dumps(statement))
        errors = [one.error or "" for one in squeeze(made).adapters]
        assert "Error: " not in "".join(errors), (path, value, errors)
        for ask in (lt.provenance, lt.replay):
            try:
                ask(made / "out" / "a0000")
            except LoratoolsError as error:
                assert "\n" not in str(error)  # noqa: PT017 - it may end well, too
    assert not list((made / "adapters").rglob("x"))


def test_names_that_are_no_utf8_are_done_and_done_again(made):
    odd = os.fsdecode(b"\xff\xfe")
    shutil.copytree(made / "adapters" / "a0000", made / "adapters" / odd)
    assert (squeeze(made).made, squeeze(made).done) == (1, 3)
    index = made / "index.safetensors"
    lt.fleet_index([made / "adapters" / "a0000", made / "adapters" / odd], output=index)
    assert lt.fleet_dedup(index).to_dict()["groups"] == [["adapters/a0000", f"adapters/{odd}"]]
