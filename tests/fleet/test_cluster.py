"""Fleets on a real scheduler with real workers, which are killed; the launcher, too."""

import os
import signal
import subprocess
import sys
import time

import pytest
from fleet_runs import (
    contents,
    environment,
    fleet,
    start,
    wait_until,
    write_adapters,
    write_slow,
)

from loratools.work.cluster import Engine, connected

pytestmark = pytest.mark.slow
RANK = ("--", "--rank", "2")


def outputs(folder):
    return {path.name for path in folder.glob("a*") if path.is_dir()}


def test_a_cluster_writes_the_bytes_of_single_runs(cluster, adapters, singles, tmp_path):
    given = ("squeeze", "adapters/*", "-o", "out", "--scheduler", cluster.address, *RANK)
    found = fleet(*given, cwd=tmp_path)
    assert (found["made"], found["failed"], found["total"]) == (6, 0, 6)
    assert contents(tmp_path / "out") == singles()
    again = fleet(*given, cwd=tmp_path)
    assert (again["made"], again["done"]) == (0, 6)
    assert [one["key"] for one in again["adapters"]] == [one["key"] for one in found["adapters"]]


def test_a_killed_worker_costs_its_task_only(cluster, tmp_path):
    slow = write_slow(tmp_path / "slow", write_adapters(tmp_path / "adapters", 10), seconds=0.2)
    process = start(
        "fleet", "squeeze", "slow/*", "-o", "out", "--scheduler", cluster.address, *RANK,
        cwd=tmp_path,
    )  # fmt: skip
    out = tmp_path / "out"
    victims = cluster.pids()
    wait_until(lambda: outputs(out))
    os.kill(victims[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert outputs(out) == {path.name for path in slow}
    again = fleet("squeeze", "slow/*", "-o", "out", "--workers", 1, *RANK, cwd=tmp_path)
    assert (again["made"], again["done"]) == (0, 10)
    assert not (out / ".loratools-fleet").exists()


def test_poison_is_reported_after_one_retry_and_the_others_are_made(cluster, tmp_path):
    adapters = write_adapters(tmp_path / "adapters", 4)
    write_slow(tmp_path / "slow", adapters[:2])
    write_slow(tmp_path / "slow", adapters[2:3], dies=True)
    write_slow(tmp_path / "slow", adapters[3:], dies_once=str(tmp_path / "died"))
    given = ("squeeze", "slow/*", "-o", "out", "--scheduler", cluster.address, *RANK)
    found = fleet(*given, cwd=tmp_path, code=1)
    # What a worker had done when it died is done again, and found.
    states = {one["name"]: one["state"].replace("done", "made") for one in found["adapters"]}
    assert states == {
        "a0000": "made", "a0001": "made", "a0002": "failed", "a0003": "made",
    }  # fmt: skip
    (error,) = [one["error"] for one in found["adapters"] if one["error"]]
    assert "died 2 times" in error


def test_a_killed_launcher_is_resumed(cluster, tmp_path):
    write_slow(tmp_path / "slow", write_adapters(tmp_path / "adapters", 8), seconds=0.3)
    given = ("fleet", "squeeze", "slow/*", "-o", "out", "--workers", "1", *RANK)
    process = start(*given, cwd=tmp_path)
    wait_until(lambda: len(outputs(tmp_path / "out")) >= 2)
    process.kill()
    process.communicate(timeout=60)
    before = len(outputs(tmp_path / "out"))
    assert 2 <= before < 8
    found = fleet(*given[1:5], "--scheduler", cluster.address, *RANK, cwd=tmp_path)
    assert found["done"] >= before
    assert found["done"] + found["made"] == 8


def test_two_launchers_at_once_share_the_work(adapters, tmp_path):
    slow = write_slow(tmp_path / "slow", write_adapters(tmp_path / "more", 8), seconds=0.15)
    given = ("fleet", "squeeze", "slow/*", "-o", "out", "--workers", "1", "--json", *RANK)
    running = [start(*given, cwd=tmp_path) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert outputs(tmp_path / "out") == {path.name for path in slow}
    assert not list((tmp_path / "out").glob(".*"))  # neither marks nor halves


def test_a_local_cluster_writes_the_bytes_of_single_runs(adapters, singles, tmp_path):
    begun = time.monotonic()
    found = fleet("squeeze", "adapters", "-o", "out", "--workers", 2, *RANK, cwd=tmp_path)
    assert (found["made"], found["failed"]) == (6, 0)
    assert contents(tmp_path / "out") == singles()
    assert time.monotonic() - begun < 200  # a hang is a failure of its own


def test_processes_have_one_blas_thread_and_a_limit_of_memory(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    with connected(Engine(2, None, 700_000_000)) as client:
        told = client.run(
            lambda: (
                __import__("numpy") and None,
                [one["num_threads"] for one in __import__("threadpoolctl").threadpool_info()],
            )
        )
        limits = [one["memory_limit"] for one in client.scheduler_info()["workers"].values()]
    assert [threads for _, threads in told.values()] == [[1], [1]]
    assert limits == [700_000_000, 700_000_000]


IMPATIENT = """
from loratools.work import cluster
cluster._START_SECONDS = 2  # a minute otherwise
from loratools.cli import main
main()
"""


def test_a_scheduler_that_is_not_there_is_told_in_one_line(adapters, tmp_path):
    given = ("fleet", "squeeze", "adapters/*", "-o", "out", "--scheduler", "tcp://127.0.0.1:9")
    command = [sys.executable, "-c", IMPATIENT, *given, *RANK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the scheduler cannot be reached")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists(), "exit 2 says that nothing was written"


def test_poison_in_a_local_cluster(tmp_path):
    adapters = write_adapters(tmp_path / "adapters", 3)
    write_slow(tmp_path / "slow", adapters[:2])
    write_slow(tmp_path / "slow", adapters[2:], dies=True)
    found = fleet("squeeze", "slow/*", "-o", "out", "--workers", 2, *RANK, cwd=tmp_path, code=1)
    # What a worker had done when it died is done again, and found.
    assert (found["made"] + found["done"], found["failed"]) == (2, 1)


BATCHES = """
import sys, loratools as lt
from loratools.pipeline.fleet import engine
engine._LEAST_AHEAD, engine._BATCH_SECONDS = 1, 1e6  # batches of 16 as soon as something ended
if __name__ == "__main__":
    found = lt.fleet("squeeze", "slow/*", {"rank": 2}, output="out", scheduler=sys.argv[1])
    print(found.made + found.done, [one.name for one in found.adapters if one.state == "failed"])
"""


def test_poison_among_small_ones_that_go_out_together(cluster, tmp_path):
    adapters = write_adapters(tmp_path / "adapters", 24, modules=1)
    write_slow(tmp_path / "slow", adapters[:14] + adapters[15:])
    write_slow(tmp_path / "slow", adapters[14:15], dies=True)
    done = subprocess.run(
        [sys.executable, "-c", BATCHES, cluster.address], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "23 ['a0014']", done.stderr
