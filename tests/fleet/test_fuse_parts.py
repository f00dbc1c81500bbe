"""One base fused by several processes: the bytes of a single run."""

from pathlib import Path

import pytest
from fleet_runs import contents, run, start

import loratools as lt
from loratools.face.fuse_parts import FusePart
from loratools_formats.disk.errors import OptionError, OutputExistsError

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
MODEL, LORA, RSLORA = TINY / "model", TINY / "lora", TINY / "rslora"
SPLIT = {"max_shard_size": "150kB"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a base of several weight files, which stands for a giant one."""
    place = tmp_path_factory.mktemp("base") / "model"
    lt.fuse(MODEL, {LORA: 1e-30}, output=place, allow_lossy=True, **SPLIT)
    assert len(list(place.glob("*.safetensors"))) > 3
    return place


@pytest.fixture
def single(base, tmp_path):
    place = tmp_path / "single" / "fused"
    lt.fuse(base, [(LORA, 0.5), (RSLORA, 2.0)], output=place)
    return contents(place)


def part(base, output, shard, **more):
    return lt.fuse(base, [(LORA, 0.5), (RSLORA, 2.0)], output=output, shard=shard, **more)


@pytest.mark.slow
def test_parts_in_any_order_make_the_bytes_of_one_run(base, single, tmp_path):
    output = tmp_path / "parts" / "fused"
    first, third = (part(base, output, shard) for shard in ("1/3", "3/3"))
    assert isinstance(first, FusePart)
    assert first.written
    assert set(third.awaited) < set(first.awaited)
    assert not output.exists()
    last = part(base, output, "2/3")
    assert contents(output) == single
    assert not list(output.parent.glob(".*"))
    whole = lt.fuse(base, [(LORA, 0.5), (RSLORA, 2.0)], output=tmp_path / "again")
    told = last.content()
    lost = told.pop("lost_to_rounding")
    again = whole.content()
    assert lost == pytest.approx(again.pop("lost_to_rounding"), rel=1e-14)  # a sum in another order
    assert told == again


def test_a_part_that_is_there_is_not_written_again(base, tmp_path):
    output = tmp_path / "fused"
    assert part(base, output, "1/2").written
    assert part(base, output, "1/2").written == ()


def test_parts_of_other_options_do_not_meet(base, tmp_path):
    output = tmp_path / "fused"
    part(base, output, "1/2")
    assert isinstance(part(base, output, "2/2", dtype="f32"), FusePart)
    assert not output.exists()


@pytest.mark.slow
def test_what_is_refused(base, tmp_path):
    part(base, tmp_path / "fused", "1/1")
    with pytest.raises(OutputExistsError):
        part(base, tmp_path / "fused", "1/1")
    part(base, tmp_path / "fused", "1/1", overwrite=True)
    with pytest.raises(OptionError, match="weight files"):
        part(MODEL / "model.safetensors", tmp_path / "x.safetensors", "1/2")


@pytest.mark.slow
def test_processes_at_once_make_the_bytes_of_one_run(base, single, tmp_path):
    given = ("fuse", base, f"{LORA}:0.5", f"{RSLORA}:2", "-o", "parts/fused")
    running = [start(*given, "--shard", f"{i}/3", cwd=tmp_path) for i in (1, 2, 3)]
    ended = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], ended
    assert contents(tmp_path / "parts" / "fused") == single


@pytest.mark.slow
def test_a_cluster_makes_the_bytes_of_one_run(cluster, base, single, tmp_path):
    given = ("fuse", base, f"{LORA}:0.5", f"{RSLORA}:2", "-o", "parts/fused")
    code, out, err = run(*given, "--scheduler", cluster.address, cwd=tmp_path)
    assert code == 0, err
    assert "lost to rounding" in out
    assert contents(tmp_path / "parts" / "fused") == single
