"""What a second run finds: no outputs among its inputs, and the lines of what it did not reach."""

import json
import os
import signal
import subprocess
import sys

import pytest
from fleet_runs import environment, wait_until, write_adapters, write_slow

import loratools as lt
from loratools.pipeline.fleet.stores import store_of
from loratools_formats.disk.errors import OptionError

RANK = {"rank": 2}


@pytest.fixture
def shelf(tmp_path):
    """Put two adapters into a store in memory, and return its address."""
    fsspec = pytest.importorskip("fsspec")
    store = store_of("memory://shelf")
    for source in write_adapters(tmp_path / "adapters", 2):
        for file in source.iterdir():
            store.write(f"{source.name}/{file.name}", file.read_bytes())
    yield "memory://shelf"
    fsspec.filesystem("memory").rm("/shelf", recursive=True)


@pytest.mark.parametrize("output", ["out", "out/deep"])
@pytest.mark.parametrize("given", ["", "/*"])
def test_outputs_in_a_store_are_no_inputs(shelf, given, output):
    place = f"{shelf}/{output}"
    found = [lt.fleet("squeeze", shelf + given, RANK, output=place, workers=1) for _ in range(3)]
    assert [(one.total, one.made, one.done) for one in found] == [(2, 2, 0), (2, 0, 2), (2, 0, 2)]
    names = [[one.name for one in run.adapters] for run in found]
    assert names == [["a0000", "a0001"]] * 3


def test_what_is_given_in_the_outputs_of_a_store_is_told(shelf):
    lt.fleet("squeeze", shelf, RANK, output=f"{shelf}/out", workers=1)
    for given in ("out/a0000", "out/*"):
        with pytest.raises(OptionError, match="lies in the folder of outputs"):
            lt.fleet("check", f"{shelf}/{given}", output=f"{shelf}/out", workers=1)


def test_marks_in_a_store_are_no_adapters(shelf):
    for name in (".loratools-fleet/begun/a.safetensors", ".b.safetensors"):
        store_of(shelf).write(name, b"a claim")
    for given in (shelf, f"{shelf}/*"):
        assert [one.name for one in lt.fleet("info", given, workers=1).adapters] == [
            "a0000", "a0001",
        ]  # fmt: skip


def test_outputs_on_the_hub_are_no_inputs(monkeypatch):
    from loratools.pipeline.fleet import sources

    there = {f"hf://buckets/me/shelf/{place}": place for place in ("a", "out/a", "outer/b")}
    monkeypatch.setattr(sources, "_on_the_hub", lambda *_: dict(there))
    output = "hf://buckets/me/shelf/out"
    found = sources.members(["hf://buckets/me/shelf/*"], "adapter", output)
    assert [one.name for one in found] == ["a", "outer/b"]
    with pytest.raises(OptionError, match="lies in the folder of outputs"):
        sources.members([f"{output}/a"], "adapter", output)


def lines(folder, name="fleet-squeeze.jsonl"):
    told = map(json.loads, (folder / name).read_text().splitlines())
    return {line["name"]: line for line in told}


def test_lines_stay_of_what_a_run_did_not_reach(tmp_path):
    adapters = write_adapters(tmp_path / "in", 4)
    given = {"output": tmp_path / "out", "workers": 1}
    lt.fleet("squeeze", str(tmp_path / "in"), RANK, **given)
    before = lines(tmp_path / "out")
    weights = adapters[1] / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    stopped = lt.fleet("squeeze", str(tmp_path / "in"), RANK, fail_fast=True, **given)
    assert (stopped.done, stopped.failed, stopped.left) == (1, 1, 2)
    after = lines(tmp_path / "out")
    assert after["a0001"]["state"] == "failed"
    assert [after[name] for name in ("a0002", "a0003")] == [
        before[name] for name in ("a0002", "a0003")
    ]
    for key in ("result", "seconds"):  # of the run that made it, whoever finds it
        assert after["a0000"][key] == before["a0000"][key]
    lt.fleet("squeeze", str(adapters[3]), RANK, **given)  # others keep theirs, but for failures
    assert lines(tmp_path / "out").keys() == {"a0000", "a0002", "a0003"}


def test_lines_that_stay_keep_their_options(tmp_path):
    write_adapters(tmp_path / "in", 2)
    given = {"output": tmp_path / "out", "workers": 1}
    lt.fleet("squeeze", str(tmp_path / "in"), RANK, **given)
    lt.fleet("squeeze", str(tmp_path / "in"), {"rank": 3}, fail_fast=True, **given)
    found = lines(tmp_path / "out")
    assert [found[name]["options"] for name in ("a0000", "a0001")] == [{"rank": 3}, {"rank": 2}]


def test_an_address_of_a_file_is_an_absolute_path(tmp_path, monkeypatch):
    write_adapters(tmp_path / "in", 2)
    monkeypatch.chdir(tmp_path)
    for place in (f"file://{tmp_path}/in/out", f"file:{tmp_path}/in/out"):
        found = lt.fleet("squeeze", f"file://{tmp_path}/in", RANK, output=place, workers=1)
        assert (found.total, found.failed) == (2, 0)
        assert found.output == str(tmp_path / "in" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_is_told_in_one_line(tmp_path):
    pytest.importorskip("distributed")
    write_slow(tmp_path / "slow", write_adapters(tmp_path / "in", 8), seconds=0.5)
    process = subprocess.Popen(
        [sys.executable, "-m", "loratools", "fleet", "squeeze", "slow/*", "-o", "out",
         "--workers", "2", "--", "--rank", "2"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(lambda: list((tmp_path / "out").glob("a*")))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to launcher and workers
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err
    assert (tmp_path / "out" / "fleet-squeeze.jsonl").exists()
