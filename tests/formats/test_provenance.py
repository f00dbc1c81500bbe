"""The statement beside an output: digests of what was written, in JSON that everybody can read."""

import errno
import hashlib
import os

import pytest

from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.provenance import read_statement, statement
from loratools_formats.disk.strict_json import loads


def test_statement(tmp_path):
    names = ["a.safetensors", "模", os.fsdecode(b"\xff")]
    for name in names:
        (tmp_path / name).write_bytes(os.fsencode(name))
    predicate = {"operation": "squeeze", "options": {"include": "ü\udcff", "rank": 2}}
    text = statement(predicate, [tmp_path / name for name in names])
    found = loads(text)
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert [subject["name"] for subject in found["subject"]] == ["a.safetensors", "模", r"\udcff"]
    assert [subject["digest"]["sha256"] for subject in found["subject"]] == [
        hashlib.sha256(os.fsencode(name)).hexdigest() for name in names
    ]
    assert found["predicate"]["options"] == {"include": r"ü\udcff", "rank": 2}
    assert str(tmp_path) not in text.decode()
    assert text == statement(predicate, [tmp_path / name for name in names])


@pytest.mark.parametrize("call", ["open", "pread"])
def test_a_statement_that_the_system_fails_to_read_is_not_taken_for_none(
    call, tmp_path, monkeypatch
):
    place = tmp_path / "provenance.json"
    place.write_bytes(statement({"operation": "squeeze"}, []))
    assert read_statement(place) is not None

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(AdapterError, match="Input/output error"):
            read_statement(place)
    place.write_text("notes")
    assert read_statement(place) is None
