"""`SqueezeCallback` in two processes that train copies of a model, as torchrun starts them."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_in_processes import train

HERE = Path(__file__).parent
MOST_SECONDS = 300


def finished(command, log):
    """Run a command; returns its exit code, and what it and its children printed.

    Children that stay would keep pipes open for ever: all print into a file. torchrun ends its own
    on SIGTERM, which lead sessions of their own.
    """
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        code = process.wait(MOST_SECONDS)
    except subprocess.TimeoutExpired:
        code = f"still running after {MOST_SECONDS} seconds"
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code, log.read_text(errors="replace")


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(HERE / "train_in_processes.py")
    code, printed = finished([*command, script, str(tmp_path), "rules"], tmp_path / "printed")
    assert code == 0, printed
    first, second = (torch.load(tmp_path / f"process-{rank}.pt") for rank in (0, 1))
    alone = train(tmp_path / "alone", "rules")
    assert first.keys() == second.keys() == alone.keys()
    for step, of_one in alone.items():
        for part, other, one in zip(first[step], second[step], of_one, strict=True):
            assert {n: p.shape for n, p in part.items()} == {n: p.shape for n, p in one.items()}
            assert all(torch.equal(other[n], p) for n, p in part.items()), step
            size = max(float(p.abs().max()) for p in one.values())
            apart = max(float((part[n] - p).abs().max()) for n, p in one.items())
            assert apart < 2e-6 * size, step  # some steps of float32, summed in another order
