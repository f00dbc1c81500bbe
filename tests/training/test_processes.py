"""`SqueezeCallback` in two processes that train copies of a model, as torchrun starts them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_in_processes import train

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(HERE / "train_in_processes.py")
    done = subprocess.run(
        [*command, script, str(tmp_path), "rules"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
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
