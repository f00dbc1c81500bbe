"""Outputs appear whole or not at all, whatever fails and whenever the process ends."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from faults import CALLS, each_failure, watch

from loratools_formats.disk import publish, renames
from loratools_formats.disk.errors import AdapterError, OutputError, OutputExistsError
from loratools_formats.disk.publish import publish_file, publish_folder

OLD, NEW = {"a": b"old a", "b": b"old b"}, {"a": b"new a", "b": b"new b", "c": b"new c"}
DEAD_PID = 2**22 + 1  # above what Linux gives out


def fill(folder, files):
    if not folder.exists():
        folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


def write_folder(path, files=NEW, **options):
    with publish_folder(path, **options) as temporary:
        fill(temporary, files)


def write_file(path, data=b"new", **options):
    with publish_file(path, **options) as temporary:
        temporary.write_bytes(data)


LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can exchange names")
WAYS = [pytest.param("exchange", marks=LINUX_ONLY), "two renames"]


@pytest.fixture(params=WAYS)
def swap(request, monkeypatch):
    """Replace folders in both ways: in one step, and as systems do that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(publish, "exchange", lambda first, second: False)
    return request.param


def test_new_folder(tmp_path):
    write_folder(tmp_path / "out")
    assert content(tmp_path / "out") == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_replaced_folder(swap, tmp_path):
    fill(tmp_path / "out", OLD)
    os.chmod(tmp_path / "out", 0o750)
    write_folder(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == NEW
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="permissions of folders")
def test_an_empty_folder_is_filled_and_keeps_its_permissions(tmp_path):
    (tmp_path / "out").mkdir(mode=0o750)
    write_folder(tmp_path / "out")
    assert content(tmp_path / "out") == NEW
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_empty_no_more_at_the_end_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="appeared"), publish_folder(tmp_path / "out"):
        fill(tmp_path / "out", {"mine": b"precious"})
    assert content(tmp_path / "out") == {"mine": b"precious"}
    assert os.listdir(tmp_path) == ["out"]


def test_the_current_folder_is_not_taken_though_it_is_empty(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(OutputExistsError), publish_folder("."):
        pytest.fail("refused before any work is done")


def test_an_empty_folder_is_no_file(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="not a file"):
        write_file(tmp_path / "out")
    assert content(tmp_path / "out") == {}


def test_nothing_is_seen_before_the_end(tmp_path):
    fill(tmp_path / "out", OLD)
    with publish_folder(tmp_path / "out", overwrite=True) as temporary:
        fill(temporary, NEW)
        assert content(tmp_path / "out") == OLD
    with publish_file(tmp_path / "f") as temporary:
        temporary.write_bytes(b"")
        assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("error", [AdapterError("bad"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("publisher", [publish_file, publish_folder])
def test_errors_leave_nothing(publisher, error, tmp_path):
    def stop(temporary):
        (temporary if publisher is publish_file else temporary / "a").write_bytes(b"half")
        raise error

    with pytest.raises(type(error)), publisher(tmp_path / "out") as temporary:
        stop(temporary)
    assert os.listdir(tmp_path) == []


def test_foreign_files_are_not_lost(swap, tmp_path):
    fill(tmp_path / "out", OLD | {"mine": b"precious"})
    with pytest.raises(OutputExistsError, match="mine"):
        write_folder(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == OLD | {"mine": b"precious"}
    assert os.listdir(tmp_path) == ["out"]


def test_foreign_files_in_sub_folders_are_not_lost(tmp_path):
    fill(tmp_path / "out" / "sub", {"mine": b"precious"})
    with (
        pytest.raises(OutputExistsError, match="mine"),
        publish_folder(tmp_path / "out", overwrite=True) as temporary,
    ):
        fill(temporary / "sub", {"ours": b""})
    assert content(tmp_path / "out" / "sub") == {"mine": b"precious"}


@pytest.mark.parametrize("publisher", [publish_file, publish_folder])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_may_not_be_replaced(publisher, overwrite, tmp_path):
    fill(tmp_path / "folder", OLD)
    (tmp_path / "file").write_bytes(b"old")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    same = "file" if publisher is publish_file else "folder"
    for name in {"folder", "file", "fifo", "loop"} - ({same} if overwrite else set()):
        with pytest.raises(OutputExistsError), publisher(tmp_path / name, overwrite=overwrite):
            pytest.fail("refused before any work is done")
    assert content(tmp_path / "folder") == OLD
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("name", ["missing/out", "file/out", "n" * 256, "nul\0"])
@pytest.mark.parametrize("publisher", [publish_file, publish_folder])
def test_impossible_places(publisher, name, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError), publisher(tmp_path / name):
        pytest.fail("refused before any work is done")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["n" * 255, "模" * 85, os.fsdecode(b"\xff" * 255), "-x", " "])
def test_names(name, tmp_path):
    write_file(tmp_path / name)
    write_file(tmp_path / name, overwrite=True)
    assert os.listdir(tmp_path) == [name]
    (tmp_path / name).unlink()
    write_folder(tmp_path / name)
    write_folder(tmp_path / name, overwrite=True)
    assert os.listdir(tmp_path) == [name]


def test_links_are_followed(tmp_path):
    for name, write in (("file", write_file), ("folder", write_folder)):
        (tmp_path / f"link to {name}").symlink_to(name)
        write(tmp_path / f"link to {name}")
        write(tmp_path / f"link to {name}", overwrite=True)
        assert (tmp_path / f"link to {name}").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert content(tmp_path / "folder") == NEW


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o000])
def test_permissions(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_folder(tmp_path / "folder")
        with publish_file(tmp_path / "file") as temporary:
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_group_of_a_shared_folder_is_inherited(tmp_path):
    os.chmod(tmp_path, 0o2775)
    write_folder(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & stat.S_ISGID


STALE = [f".out.loratools-{DEAD_PID}-0123abcd", f".out.loratools-{DEAD_PID}-ffffffff"]
KEPT = [
    f".out.loratools-{os.getpid()}-0123abcd",
    f".out.loratools-1-{'0' * 8}",
    f".other.loratools-{DEAD_PID}-0123abcd",
    f".out.loratools-{DEAD_PID}-0123abcd.old",
    f".out.loratools-{DEAD_PID}-0123abc",
    f"xout.loratools-{DEAD_PID}-0123abcd",
    "out.bak",
]


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_stale_temporaries(write, tmp_path):
    fill(tmp_path / STALE[0], OLD)
    (tmp_path / STALE[1]).write_bytes(b"half")
    for name in KEPT:
        (tmp_path / name).write_bytes(b"")
    write(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*KEPT, "out"])


def test_a_stale_temporary_of_somebody_else_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / STALE[1]).write_bytes(b"")
    original = os.unlink

    def unlink(path, **options):
        if os.path.basename(path) == STALE[1]:
            raise PermissionError(1, "Operation not permitted", path)
        original(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    write_file(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted(["out", STALE[1]])


def test_flushed_before_it_appears(swap, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        made = watch(patch)
        write_folder(tmp_path / "out", overwrite=True)
    assert made.count("rename") == 1
    assert made[: made.index("rename")].count("fsync") == len(NEW) + 1
    assert made[made.index("rename") :].count("fsync") == 1


@pytest.mark.parametrize("old", [None, OLD])
def test_every_failing_call(old, swap, tmp_path, monkeypatch):
    out, failed = tmp_path / "out", []

    def reset():
        for folder in tmp_path.iterdir():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        if old is not None:
            fill(out, old)

    reset()
    for name, error in each_failure(monkeypatch, lambda: write_folder(out, overwrite=True)):
        if error is None:
            # Without an exchange in one step, two renames do; the old one may stay aside.
            may_fail = {"open", "rename"} if old and swap == "exchange" else {"open"}
            assert name in may_fail
            assert content(out) == NEW
        else:
            assert isinstance(error, OutputError)
            assert content(out) == (NEW if "in place" in str(error) else old)
            assert [left for left in os.listdir(tmp_path) if left != "out"] == []
        reset()
        failed.append(name)
    assert failed.count("fsync") == len(NEW) + 2
    renames = 1 if swap == "exchange" or not old else 2
    assert failed.count("rename") == renames


# Ends without cleaning up, as a killed process does, before the call number argv[2].
KILLED = f"""
import os, sys
from pathlib import Path
from loratools_formats.disk import publish, renames

left = int(sys.argv[2])
if sys.argv[3] == "two renames":
    publish.exchange = lambda first, second: False

def counted(original):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return original(*arguments, **options)
    return call

for name in {[*CALLS, "unlink", "rmdir"]}:
    setattr(os, name, counted(getattr(os, name)))
with publish.publish_folder(sys.argv[1], overwrite=True) as temporary:
    for name, data in {NEW}.items():
        (temporary / name).write_bytes(data)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_before_every_call(way, tmp_path):
    out, steps = tmp_path / "out", 0
    seen = []
    while True:
        if content(out) != OLD:
            write_folder(out, dict.fromkeys(NEW, b""), overwrite=True)
            (out / "c").unlink()
            fill(out, OLD)
        child = subprocess.run([sys.executable, "-c", KILLED, out, f"{steps}", way])
        if child.returncode == 0:
            break
        assert child.returncode == 9
        now = content(out)
        if now is None:
            (aside,) = tmp_path.glob(".*.old")
            assert way == "two renames"
            assert content(aside) == OLD
            aside.rename(out)
        else:
            assert now in (OLD, NEW)
        seen.append(now)
        steps += 1
    assert content(out) == NEW
    assert OLD in seen
    assert NEW in seen
    assert seen.count(None) == (way == "two renames")
    kept = [name for name in os.listdir(tmp_path) if name != "out"]
    assert all(name.endswith(".old") for name in kept)


def test_two_writers(tmp_path):
    with publish_folder(tmp_path / "out", overwrite=True) as first:
        fill(first, {"a": b"first"})
        with publish_folder(tmp_path / "out", overwrite=True) as second:
            fill(second, {"a": b"second"})
        assert content(tmp_path / "out") == {"a": b"second"}
    assert content(tmp_path / "out") == {"a": b"first"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_of_the_system_names_the_output(tmp_path):
    with pytest.raises(OutputError, match="out") as caught, publish_file(tmp_path / "out"):
        Path(tmp_path / "missing").read_bytes()
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.fixture(params=["one step", "link", "look"])
def without(request, monkeypatch):
    """Rename over nothing in each way: as Linux can, by a link, and by looking first."""
    if request.param != "one step":
        monkeypatch.setattr(renames, "_renamed", lambda *names_and_flags: False)
    if request.param == "look":

        def no_link(*names, **options):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_link)
    return request.param


def test_what_appears_during_the_run_is_not_replaced(without, tmp_path):
    out = tmp_path / "out"

    def write():
        with publish_file(out) as temporary:
            temporary.write_bytes(b"new")
            out.write_bytes(b"theirs")

    with pytest.raises(OutputExistsError, match="appeared"):
        write()
    assert out.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(OutputExistsError), publish.publish_folder(tmp_path / "folder"):
        (tmp_path / "folder").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["folder", "out"]
    write_file(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b"new"


def write_both(out, **options):
    with publish.publish_with(out, {"made": b"ours"}, **options) as (temporary, beside):
        temporary.write_bytes(b"new")
        beside["made"] += b"ours, new"


def test_a_file_beside_is_part_of_the_output(tmp_path):
    out, made = tmp_path / "out", tmp_path / "out.made"
    write_both(out)
    assert (out.read_bytes(), made.read_bytes()) == (b"new", b"ours, new")
    made.write_bytes(b"ours, old")
    write_both(out, overwrite=True)
    assert made.read_bytes() == b"ours, new"
    assert sorted(os.listdir(tmp_path)) == ["out", "out.made"]


@pytest.mark.parametrize("kind", ["theirs", "link", "folder", "pipe"])
def test_what_is_not_ours_beside_an_output_is_never_replaced(kind, tmp_path):
    out, made, victim = tmp_path / "out", tmp_path / "out.made", tmp_path / "victim"
    victim.write_bytes(b"ours to look at")
    make = {
        "theirs": lambda: made.write_bytes(b"notes"),
        "link": lambda: made.symlink_to(victim),
        "folder": made.mkdir,
        "pipe": lambda: os.mkfifo(made),
    }
    make[kind]()
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="not ours"):
            write_both(out, overwrite=overwrite)
    assert not out.exists()
    assert victim.read_bytes() == b"ours to look at"
    assert sorted(os.listdir(tmp_path)) == ["out.made", "victim"]


def test_a_file_beside_is_taken_back_if_the_output_fails(tmp_path, monkeypatch):
    out, made = tmp_path / "out", tmp_path / "out.made"
    out.write_bytes(b"old")
    made.write_bytes(b"ours, old")
    original = os.replace

    def fails(source, target):
        if os.fspath(target) == os.fspath(out):
            raise OSError(5, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OutputError, match="Nothing was changed"):
        write_both(out, overwrite=True)
    assert (out.read_bytes(), made.read_bytes()) == (b"old", b"ours, old")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.made"]


def test_a_name_too_long_for_what_goes_beside_is_refused_first(tmp_path):
    with pytest.raises(OutputError, match="too long"):
        write_both(tmp_path / ("n" * 252))
    assert os.listdir(tmp_path) == []


def test_any_run_beside_removes_what_a_killed_one_left(tmp_path):
    child = """
import os, sys
from pathlib import Path
from loratools_formats.disk.publish import publish_file
with publish_file(Path(sys.argv[1]) / "a") as outer, publish_file(outer) as inner:
    inner.write_bytes(b"half")
    os._exit(9)
"""
    subprocess.run([sys.executable, "-c", child, tmp_path], check=False)
    assert len(os.listdir(tmp_path)) == 1
    write_file(tmp_path / "other")
    assert os.listdir(tmp_path) == ["other"]
