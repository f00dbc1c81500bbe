"""kill -9 and Ctrl-C at any moment: the output is absent, old or new, but always whole."""

import os
import random
import re
import shutil
import signal
import subprocess
import time

import fuse_bases
import pytest
import synthetic
from fuse_bases import content, state

ROUNDS = 7
TEMPORARY = re.compile(r"\.out\.loratools-\d+-[0-9a-f]{8}")
HIDDEN, LAYERS = 1024, 12


class Squeezing:
    """`squeeze` to one rank or another."""

    old, new = 8, 16

    def __init__(self, root):
        self.adapter = root / "adapter"
        synthetic.make(self.adapter, rank=32, layers=2)
        self.inputs = [self.adapter]

    def arguments(self, out, rank):
        return ["squeeze", self.adapter, "-o", out, "--rank", str(rank)]


class Fusing:
    """`fuse` by one weight or another into 25 MB in three shards, all linears."""

    old, new = 1, 2

    def __init__(self, root):
        self.base = fuse_bases.sharded(root / "base", fuse_bases.weights(LAYERS, HIDDEN))
        self.adapter = fuse_bases.adapter(root / "adapter", LAYERS, HIDDEN)
        self.inputs = [self.base, self.adapter]

    def arguments(self, out, weight):
        return ["fuse", self.base, f"{self.adapter}:{weight}", "-o", out]


@pytest.fixture(scope="module", params=[Squeezing, Fusing])
def work(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("given"))


@pytest.fixture
def start(work, executable, tmp_path):
    """Return a function that starts the work with one value or another."""

    def run(value):
        command = [executable, *work.arguments(tmp_path / "out", value), "--overwrite", "--quiet"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)

    return run


def temporaries(folder):
    return [name for name in os.listdir(folder) if TEMPORARY.fullmatch(name)]


def wait_for_temporary(process, folder):
    own = f".out.loratools-{process.pid}-"
    while process.poll() is None and not any(n.startswith(own) for n in os.listdir(folder)):
        time.sleep(0.0005)


@pytest.mark.parametrize("moment", ["any", "while writing"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_kill(moment, overwrite, work, start, tmp_path):
    draw = random.Random(f"{moment} {overwrite}")
    out = tmp_path / "out"
    given = [state(path) for path in work.inputs]

    def finish(value):
        process = start(value)
        assert process.communicate(timeout=300) == (None, b"")
        assert process.returncode == 0
        return content(out)

    started = time.monotonic()
    old = finish(work.old)
    duration = time.monotonic() - started
    new = finish(work.new)
    ends = []
    for _ in range(ROUNDS):
        if not overwrite:
            shutil.rmtree(out, ignore_errors=True)
        elif content(out) != old:
            finish(work.old)
        process = start(work.new)
        if moment == "any":
            time.sleep(draw.uniform(0, duration))
        else:
            wait_for_temporary(process, tmp_path)
            time.sleep(draw.uniform(0, 0.03))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        left = temporaries(tmp_path)
        assert content(out) in (old if overwrite else None, new)
        assert set(os.listdir(tmp_path)) <= {"out", *left}
        assert len(left) <= 1, "temporaries of killed runs pile up"
        ends.append((content(out) == new, bool(left)))
    print(ends)
    if moment == "while writing":
        assert (False, True) in ends, "no run was killed between the first byte and the rename"
    assert finish(work.new) == new
    assert os.listdir(tmp_path) == ["out"]
    assert [state(path) for path in work.inputs] == given


@pytest.mark.parametrize("round_", range(4))
def test_interrupt(round_, work, start, tmp_path):
    """Ctrl-C while writing, by several threads where there are, leaves nothing behind at all."""
    process = start(work.new)
    wait_for_temporary(process, tmp_path)
    time.sleep(0.007 * round_)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    if process.returncode in (0, -signal.SIGINT):  # it was done, or on its way out
        assert os.listdir(tmp_path) == ["out"]
    else:
        assert process.returncode == 130
        assert err.split() == [b"interrupted"]
        assert os.listdir(tmp_path) in ([], ["out"])
