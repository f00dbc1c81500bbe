"""kill -9 and Ctrl-C while `fuse` works: the output is absent, old or new, the base as it was."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from fuse_bases import adapter, content, sharded, state, weights

HIDDEN, LAYERS = 1024, 12
ROUNDS = 6


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A base of 25 MB in three shards and an adapter of all its linears; not to be changed."""
    root = tmp_path_factory.mktemp("given")
    base = sharded(root / "base", weights(LAYERS, HIDDEN))
    return base, adapter(root / "adapter", LAYERS, HIDDEN)


@pytest.fixture
def start(given, executable, tmp_path):
    def run(weight):
        base, source = given
        command = [executable, "fuse", base, f"{source}:{weight}", "-o", tmp_path / "out"]
        return subprocess.Popen(
            [*command, "--overwrite", "--quiet"], stderr=subprocess.PIPE, start_new_session=True
        )

    return run


def wait_for_temporary(process, folder):
    own = f".out.loratools-{process.pid}-"
    while process.poll() is None and not any(n.startswith(own) for n in os.listdir(folder)):
        time.sleep(0.0005)


@pytest.mark.parametrize("moment", ["any", "while writing"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_kill(moment, overwrite, start, given, tmp_path):
    draw = random.Random(f"{moment} {overwrite}")
    out, before = tmp_path / "out", state(given[0])

    def finish(weight):
        process = start(weight)
        assert process.communicate() == (None, b"")
        assert process.returncode == 0
        return content(out)

    started = time.monotonic()
    old = finish(1)
    duration = time.monotonic() - started
    new = finish(2)
    ends = []
    for _ in range(ROUNDS):
        if not overwrite:
            shutil.rmtree(out, ignore_errors=True)
        elif content(out) != old:
            finish(1)
        process = start(2)
        if moment == "any":
            time.sleep(draw.uniform(0, duration))
        else:
            wait_for_temporary(process, tmp_path)
            time.sleep(draw.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        left = [name for name in os.listdir(tmp_path) if name.startswith(".out.loratools-")]
        assert content(out) in (old if overwrite else None, new)
        assert set(os.listdir(tmp_path)) <= {"out", *left}
        assert len(left) <= 1, "temporaries of killed runs pile up"
        ends.append((content(out) == new, bool(left)))
    if moment == "while writing":
        assert (False, True) in ends, "no run was killed between the first byte and the rename"
    assert finish(2) == new
    assert os.listdir(tmp_path) == ["out"]
    assert state(given[0]) == before


@pytest.mark.parametrize("round_", range(4))
def test_interrupt(round_, start, tmp_path):
    """Ctrl-C while shards are written, by several threads, leaves nothing behind at all."""
    process = start(1)
    wait_for_temporary(process, tmp_path)
    time.sleep(0.01 * round_)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    if process.returncode in (0, -signal.SIGINT):  # it was done, or on its way out
        assert os.listdir(tmp_path) == ["out"]
    else:
        assert process.returncode == 130
        assert err.split() == [b"interrupted"]
        assert os.listdir(tmp_path) in ([], ["out"])
