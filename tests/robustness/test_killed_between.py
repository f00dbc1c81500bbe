"""A process that is killed before any line of publishing an output with a file beside it.

At no moment the statement of one output lies beside another, and the next run in the folder, of
whatever output, brings the pair together.
"""

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from loratools_formats.disk import beside, locks, publish, renames, temporaries
from loratools_formats.disk.publish import publish_file, publish_with

MARK = "statement"
TRACED = {module.__file__ for module in (beside, locks, publish, renames, temporaries)}
NAMES = ("x.bin", "x.bin.statement.json")


def _make(path, content, *, overwrite):
    with publish_with(path, {"statement.json": MARK.encode()}, overwrite=overwrite) as (new, files):
        new.write_text(content)
        files["statement.json"] += f"{MARK} {content}".encode()


def _killed(path, line, *, overwrite):
    """Make an output in a child that kills itself before a line; return whether it came so far."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        return os.WIFSIGNALED(status)
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename not in TRACED:
            return None
        count += event == "line"
        if count > line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    try:
        sys.settrace(trace)
        _make(path, "new", overwrite=overwrite)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - a child must not go on as its parent
        traceback.print_exc()
        os._exit(1)


def _pair(folder):
    found = [folder / name for name in NAMES]
    return tuple(path.read_text() if path.exists() else None for path in found)


SYSTEMS = ("renameat2", "links", "neither")
"""With renames that replace nothing, with hard links only, and with neither."""


def _refused(*_, **__):
    raise PermissionError(1, "no links here")


OLD = ("old", f"{MARK} old")
NEW = ("new", f"{MARK} new")
BEFORE = {
    "nothing": (None, None),
    "an output with its statement": OLD,
    "an output without one": ("old", None),
    "a statement without its output": (None, f"{MARK} old"),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("before", BEFORE)
def test_an_output_never_lies_beside_the_statement_of_another(tmp_path, before, system):
    running = _started("kill", tmp_path, before, system)
    _, told = running.communicate()
    assert running.returncode == 0, told


def _killed_before_each_line(place, before, system):
    if system != "renameat2":
        renames._renamed = lambda *_: False
    if system == "neither":
        os.link = _refused
    overwrite = BEFORE[before][0] is not None
    seen = set()
    for line in range(2000):
        folder = place / str(line)
        folder.mkdir()
        for name, content in zip(NAMES, BEFORE[before], strict=True):
            if content is not None:
                (folder / name).write_text(content)
        killed = _killed(folder / NAMES[0], line, overwrite=overwrite)
        output, said = _pair(folder)
        assert said in (None, f"{MARK} {output}", BEFORE[before][1]), line
        if BEFORE[before] == OLD or output == "new":
            assert said in (None, f"{MARK} {output}"), line
        with publish_file(folder / "another") as temporary:
            temporary.write_text("")
        after = _pair(folder)
        seen.add(after)
        assert after in (BEFORE[before], NEW), line
        assert set(os.listdir(folder)) <= {*NAMES, "another"}, line
        if not killed:
            assert after == NEW
            break
    else:
        raise AssertionError("it does not end")
    assert seen == {BEFORE[before], NEW}


def _started(*arguments):
    """Start this file as a process, since a fork of a large one takes long, and may live on."""
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_that_publish_at_once_leave_one_pair(tmp_path):
    running = [_started("make", tmp_path / NAMES[0], content) for content in ("old", "new")]
    for one in running:
        _, told = one.communicate()
        assert one.returncode == 0, told
    assert _pair(tmp_path) in (OLD, NEW)
    assert set(os.listdir(tmp_path)) == set(NAMES)


def _many_times(path, content):
    for _ in range(100):
        _make(path, content, overwrite=True)


def test_what_belongs_to_an_output_elsewhere_is_only_removed(tmp_path):
    """A link's target gets its name in another folder, so nothing tells how far its run came."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "y.bin").write_text("old")
    link = tmp_path / NAMES[0]
    link.symlink_to("real/y.bin")
    (tmp_path / NAMES[1]).write_text(f"{MARK} old")
    _make(link, "new", overwrite=True)
    assert _pair(tmp_path) == NEW
    assert sorted(os.listdir(tmp_path / "real")) == ["y.bin"]
    place = Path(f"{link}.statement.json")
    one = beside.Beside.of(place, b"", temporaries.temporary_beside(tmp_path / "real" / "y.bin"))
    assert not one.temporary.name.endswith("-new")


if __name__ == "__main__":
    does = {"kill": _killed_before_each_line, "make": _many_times}[sys.argv[1]]
    does(Path(sys.argv[2]), *sys.argv[3:])
