"""A signal between any two steps of publishing leaves the old output or the new, and no more."""

import os
import sys
from pathlib import Path

import pytest

from loratools_formats.disk import publish, renames
from loratools_formats.disk.files import RegularFile
from loratools_formats.disk.publish import publish_folder, publish_with

# Between opening a file and the `with` that closes it, only the end of the process does.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FILES = {module.__file__ for module in (publish, renames)}
FILES |= {str(Path(publish.__file__).with_name("beside.py"))}
OLD, NEW = {"out": b"old", "out.made": b"ours, old"}, {"out": b"new", "out.made": b"ours, new"}


def never_between(work, old, new, place):
    """Interrupt some work before each of its lines; assert that the old or the new is all there."""
    seen = []
    for number in range(1000):
        folder = place / f"{number}"
        folder.mkdir()
        laid(folder, old)
        stopped = interrupted(lambda folder=folder: work(folder), number)
        found = state(folder)
        assert found in (old, new), f"after line {number}"
        assert {*os.listdir(folder)} <= {name.partition("/")[0] for name in (*old, *new)}
        seen.append(found == new)
        if not stopped:
            break
    assert not stopped
    assert True in seen[:-1]
    assert seen.count(False) > 30


def interrupted(work, number):
    """Do some work, with Ctrl-C before its line number `number`; return whether it got there."""
    left = number

    def line(frame, event, _):
        nonlocal left
        if event == "line":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return line

    def call(frame, _event, _argument):
        return line if frame.f_code.co_filename in FILES else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def state(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def laid(folder, files):
    for name, data in files.items():
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_a_file_and_what_belongs_beside_it(replaces, linked, tmp_path, monkeypatch):
    if linked:  # as systems do that cannot rename without replacing
        monkeypatch.setattr(renames, "_renamed", lambda *_: False)
    old = OLD if replaces else {}

    def work(folder):
        marks = {"made": b"ours"}
        with publish_with(folder / "out", marks, overwrite=replaces) as (temporary, beside):
            temporary.write_bytes(NEW["out"])
            beside["made"].extend(NEW["out.made"])

    never_between(work, old, NEW, tmp_path)


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("exchanges", [False, True])
def test_a_folder(replaces, exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    old = {"out/a": b"old", "out/b": b"old"} if replaces else {}
    new = {"out/a": b"new", "out/b": b"new", "out/c": b"new"}

    def work(folder):
        with publish_folder(folder / "out", overwrite=replaces) as temporary:
            for name in "abc":
                (temporary / name).write_bytes(b"new")

    never_between(work, old, new, tmp_path)


def test_a_file_that_was_closed_is_not_closed_again(tmp_path, monkeypatch):
    """A signal after the system has closed it: its number may be another file's by now."""
    (tmp_path / "x").write_bytes(b"x")
    file = RegularFile(tmp_path / "x")
    closed = []

    def close(descriptor):
        closed.append(descriptor)
        close_it(descriptor)
        raise KeyboardInterrupt

    close_it = os.close
    monkeypatch.setattr(os, "close", close)
    with pytest.raises(KeyboardInterrupt):
        file.close()
    file.close()
    del file
    assert len(closed) == 1
