"""kill -9 at any moment: the output is absent, old or new, but always whole."""

import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import synthetic

ROUNDS = 7
TEMPORARY = re.compile(r"\.out\.loratools-\d+-[0-9a-f]{8}")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "adapter"
    synthetic.make(folder, rank=32, layers=2)
    return folder


@pytest.fixture
def start(source, executable, tmp_path):
    """Return a function that starts squeezing to a rank."""

    def run(rank):
        command = [executable, "squeeze", source, "-o", tmp_path / "out", "--rank", str(rank)]
        return subprocess.Popen(
            [*command, "--overwrite", "--quiet"], stderr=subprocess.PIPE, start_new_session=True
        )

    return run


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else None


def temporaries(folder):
    return [name for name in os.listdir(folder) if TEMPORARY.fullmatch(name)]


def wait_for_temporary(process, folder):
    own = f".out.loratools-{process.pid}-"
    while process.poll() is None and not any(n.startswith(own) for n in os.listdir(folder)):
        time.sleep(0.001)


@pytest.mark.parametrize("moment", ["any", "while writing"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_kill(moment, overwrite, start, tmp_path):
    draw = random.Random(f"{moment} {overwrite}")
    out = tmp_path / "out"

    def finish(rank):
        process = start(rank)
        assert process.communicate() == (None, b"")
        assert process.returncode == 0
        return content(out)

    started = time.monotonic()
    old = finish(8)
    duration = time.monotonic() - started
    new = finish(16)
    before = old if overwrite else None
    ends = []
    for _ in range(ROUNDS):
        if not overwrite:
            shutil.rmtree(out, ignore_errors=True)
        elif content(out) != old:
            finish(8)
        process = start(16)
        if moment == "any":
            time.sleep(draw.uniform(0, duration))
        else:
            wait_for_temporary(process, tmp_path)
            time.sleep(draw.uniform(0, 0.03))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        left = temporaries(tmp_path)
        assert content(out) in (before, new)
        assert set(os.listdir(tmp_path)) <= {"out", *left}
        assert len(left) <= 1, "temporaries of killed runs pile up"
        ends.append((content(out) == new, bool(left)))
    print(ends)
    if moment == "while writing":
        assert (False, True) in ends, "no run was killed between the first byte and the rename"
    assert finish(16) == new
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("round_", range(4))
def test_interrupt(round_, start, tmp_path):
    """Ctrl-C while writing leaves nothing behind at all."""
    process = start(16)
    wait_for_temporary(process, tmp_path)
    time.sleep(0.005 * round_)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    if process.returncode in (0, -signal.SIGINT):  # it was done, or on its way out
        assert os.listdir(tmp_path) == ["out"]
    else:
        assert process.returncode == 130
        assert err.split() == [b"interrupted"]
        assert os.listdir(tmp_path) in ([], ["out"])
