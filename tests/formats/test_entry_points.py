"""Entry points are those that `importlib.metadata` finds."""

import importlib.metadata
import sys
import zipfile

import pytest

from loratools_formats.contract.entry_points import entry_points

LISTED = """\
[console_scripts]
tool = package:main

[some.group]
# a comment
plain = package.module:NAME
nested=package:Class.attribute [extra]
whole = json

[other.group]
plain = package:OTHER
"""


def _distribution(site, folder, text, name="A-Name"):
    info = site / folder
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(text)


def _theirs(group):
    return sorted(
        (p.name, p.value, p.dist.name) for p in importlib.metadata.entry_points(group=group)
    )


def _ours(group):
    return sorted((point.name, point.value, point.package()) for point in entry_points(group))


@pytest.mark.parametrize("group", ["console_scripts", "loratools.formats", "pytest11", "no.such"])
def test_of_this_environment(group):
    assert _ours(group) == _theirs(group)


def test_of_written_ones(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    _distribution(first, "a_name-1.0.dist-info", LISTED)
    _distribution(second, "A.Name-0.9.dist-info", LISTED.replace("plain", "older"))
    _distribution(
        second, "other-1.0.dist-info", "[some.group]\nx = json.decoder:JSONDecoder.decode"
    )
    monkeypatch.setattr(
        sys, "path", [str(first), str(second), str(tmp_path / "missing"), *sys.path]
    )
    assert len(_ours("some.group")) == 4
    assert _ours("some.group") == _theirs("some.group")
    loaded = {point.name: point for point in entry_points("some.group")}
    import json

    assert loaded["whole"].load() is json
    assert loaded["x"].load() is json.JSONDecoder.decode
    assert loaded["plain"].package() == "A-Name"


def test_of_an_archive(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.writestr("packed-1.0.dist-info/METADATA", "Name: packed\nVersion: 1.0\n")
        packed.writestr("packed-1.0.dist-info/entry_points.txt", "[some.group]\none = json:loads")
    monkeypatch.syspath_prepend(tmp_path / "packed.zip")
    assert _ours("some.group") == _theirs("some.group") == [("one", "json:loads", "packed")]
