"""The statement beside an output: digests of what was written, in JSON that everybody can read."""

import hashlib
import os

from loratools_formats.disk.provenance import statement
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
