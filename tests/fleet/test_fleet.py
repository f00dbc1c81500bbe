"""Fleets in one process: what is done, what is refused, shards, lists, manifests, reports."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from fleet_runs import contents, start, write_adapters, write_slow

import loratools as lt
from loratools.pipeline.fleet.stores import store_of
from loratools.pipeline.fleet.verbs import VERBS
from loratools.work.shard import Shard, shard_of_environment
from loratools_formats.disk.errors import LoratoolsError, OptionError

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
MODEL, LORA, DORA = TINY / "model", TINY / "lora", TINY / "dora"


def states(found):
    return {one.name: one.state for one in found.adapters}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)


def squeeze(tmp_path, *, rank=2, output="out", sources="adapters/*", **more):
    return lt.fleet(
        "squeeze", str(tmp_path / sources), {"rank": rank}, output=tmp_path / output, workers=1,
        **more,
    )  # fmt: skip


def test_outputs_are_those_of_single_runs_and_single_runs_count(adapters, singles, tmp_path):
    (tmp_path / "out").mkdir()
    lt.squeeze(adapters[2], rank=2, output=tmp_path / "out" / adapters[2].name)
    found = squeeze(tmp_path)
    assert (found.made, found.done, found.failed, found.left) == (5, 1, 0, 0)
    assert states(found)["a0002"] == "done"
    assert contents(tmp_path / "out") == singles()


CASES = {
    "check": ({}, LORA),
    "convert": ({"to": "gguf", "base": MODEL}, LORA),
    "extract": ({"base": MODEL, "rank": 2}, "tuned"),
    "fuse": ({"base": MODEL}, LORA),
    "info": ({}, LORA),
    "quantize": ({"quant_type": "fp4"}, MODEL),
    "dequantize": ({}, "quantised"),
    "repair": ({"base": MODEL, "intruders": 2}, LORA),
    "spectrum": ({"base": MODEL}, LORA),
    "squeeze": ({"budget": "30%"}, LORA),
    "to-dora": ({"base": MODEL}, LORA),
    "to-lora": ({"base": str(MODEL), "rank": 4}, DORA),
    "verify": ({"base": MODEL, "adapters": [LORA]}, "tuned"),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", CASES)
def test_every_operation_is_done_once_and_made_again_when_anything_changes(verb, tmp_path):
    settings, source = CASES[verb]
    if source == "tuned":
        lt.fuse(MODEL, LORA, output=tmp_path / "in")
    elif source == "quantised":
        lt.quantize(MODEL, output=tmp_path / "in")
    else:
        shutil.copytree(source, tmp_path / "in")
    given = {"output": tmp_path / "out", "workers": 1}

    def run(**more):
        return lt.fleet(verb, str(tmp_path / "in"), settings, **given, **more).adapters[0]

    first = run()
    assert (first.state, first.error) == ("made", None)
    assert first.key is not None
    assert (run().state, run().key) == ("done", first.key)
    single = getattr(lt, verb.replace("-", "_"))
    item = VERBS[verb].item
    (tmp_path / "single").mkdir()
    place = tmp_path / "single" / Path(first.output).name
    if VERBS[verb].reports:
        told = json.loads(json.dumps(single(**{item: tmp_path / "in"}, **settings).to_dict()))
        written = json.loads(Path(first.output).read_text())
        written["options"].pop("cache", None)  # which the fleet has beside its outputs
        del told["seconds"]
        assert written == told
    else:
        single(**{item: tmp_path / "in"}, **settings, output=place)
        made = contents(tmp_path / "out")
        assert {k: v for k, v in made.items() if "fleet-" not in k} == contents(tmp_path / "single")
    config = next(p for p in sorted((tmp_path / "in").iterdir()) if p.name.endswith("config.json"))
    config.write_text(config.read_text() + "\n")
    changed = run()
    assert changed.state == "failed"
    assert "other inputs" in changed.error
    again = run(overwrite=True)
    assert (again.state, again.error) == ("made", None)
    assert again.key != first.key


def test_an_output_that_was_damaged_is_not_done(adapters, tmp_path):
    squeeze(tmp_path)
    weights = tmp_path / "out" / "a0003" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert states(squeeze(tmp_path))["a0003"] == "failed"
    assert squeeze(tmp_path, overwrite=True).made == 1


def test_other_options_are_another_output(adapters, tmp_path):
    squeeze(tmp_path, rank=2)
    found = squeeze(tmp_path, rank=3)
    assert found.failed == 6
    assert "from other inputs, with other options" in found.adapters[0].error
    assert squeeze(tmp_path, rank=3, overwrite=True).made == 6
    assert squeeze(tmp_path, rank=3).done == 6


def test_shards_are_all_and_each_once(adapters, singles, tmp_path):
    parts = [squeeze(tmp_path, shard=f"{i}/4") for i in (1, 2, 3, 4)]
    names = [one.name for part in parts for one in part.adapters]
    assert sorted(names) == [path.name for path in adapters]
    assert [len(part.adapters) for part in parts] == [2, 2, 1, 1]
    assert contents(tmp_path / "out") == singles()
    manifests = sorted(path.name for path in (tmp_path / "out").glob("*.jsonl"))
    assert manifests == [f"fleet-squeeze.{i}-of-4.jsonl" for i in (1, 2, 3, 4)]


@pytest.mark.slow
def test_shards_in_processes_of_a_batch_system(adapters, singles, tmp_path):
    def environment(i):
        if i % 2:
            return {"JOB_COMPLETION_INDEX": str(i), "JOB_COMPLETION_COUNT": "3"}
        return {"SLURM_ARRAY_TASK_ID": str(10 + i), "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_COUNT": "3"}  # fmt: skip

    given = ("fleet", "squeeze", "adapters/*", "-o", "out", "--workers", "1", "--", "--rank", "2")
    running = [start(*given, cwd=tmp_path, **environment(i)) for i in range(3)]
    assert [p.communicate(timeout=120) and p.returncode for p in running] == [0, 0, 0]
    assert contents(tmp_path / "out") == singles()


def test_shards_of_an_environment():
    slurm = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0"}
    assert shard_of_environment(slurm) == Shard(8, 8)
    assert shard_of_environment({**slurm, "SLURM_ARRAY_TASK_MIN": "1"}) == Shard(7, 8)
    assert shard_of_environment({}) == Shard(1, 1)
    for wrong in ({"JOB_COMPLETION_INDEX": "1"}, {**slurm, "SLURM_ARRAY_TASK_ID": "x"},
                  {**slurm, "SLURM_ARRAY_TASK_ID": "8"},
                  {**slurm, "JOB_COMPLETION_INDEX": "0", "JOB_COMPLETION_COUNT": "2"}):  # fmt: skip
        with pytest.raises(OptionError):
            shard_of_environment(wrong)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/4", "²/3"])
def test_shards_that_are_none(adapters, tmp_path, text):
    with pytest.raises(OptionError):
        squeeze(tmp_path, shard=text)


def test_a_failing_adapter_costs_itself_only(adapters, tmp_path):
    (adapters[1] / "adapter_model.safetensors").write_bytes(b"rubbish")
    found = squeeze(tmp_path)
    assert (found.made, found.failed, found.passed) == (5, 1, False)
    assert not (tmp_path / "out" / "a0001").exists()
    assert squeeze(tmp_path, output="fast", fail_fast=True).left == 4


def test_the_manifest_has_a_line_for_each(adapters, tmp_path):
    (adapters[1] / "adapter_model.safetensors").write_bytes(b"\x81rubbish")
    found = squeeze(tmp_path)
    text = (tmp_path / "out" / "fleet-squeeze.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["name"] for line in lines] == [path.name for path in adapters]
    assert [line["state"] for line in lines] == [one.state for one in found.adapters]
    assert {line["verb"] for line in lines} == {"squeeze"}
    assert lines[0]["options"] == {"rank": 2}
    assert lines[0]["result"]["relative_error"] > 0
    assert lines[0]["seconds"] > 0
    assert "rubbish" not in text
    assert lines[1]["error"]
    squeeze(tmp_path)
    again = (tmp_path / "out" / "fleet-squeeze.jsonl").read_text().splitlines()
    assert json.loads(again[0])["result"] == lines[0]["result"]  # remembered


def test_base_weights_are_decomposed_once_for_all(tmp_path, monkeypatch):
    from loratools.base import decompositions

    for name in ("a", "b", "c"):
        shutil.copytree(LORA, tmp_path / "in" / name)
    count = []
    base_svd = decompositions.base_svd
    monkeypatch.setattr(decompositions, "base_svd", lambda w: count.append(1) or base_svd(w))
    given = ("spectrum", str(tmp_path / "in"), {"base": MODEL, "include": "q_proj"})
    found = lt.fleet(*given, output=tmp_path / "out", workers=1)
    assert found.made == 3
    modules = json.loads((tmp_path / "out" / "a.json").read_text())["modules"]
    assert len(count) == len(modules)
    alone = lt.spectrum(LORA, base=MODEL, include="q_proj").to_dict()
    for name in ("a", "b", "c"):
        told = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert told["modules"] == json.loads(json.dumps(alone["modules"]))
    assert not (tmp_path / "out" / ".loratools-fleet").exists()


def test_lists_name_adapters(adapters, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text(f"# chosen\n{adapters[0]}\n\n{adapters[3]}\n")
    assert list(states(squeeze(tmp_path, sources="some.txt"))) == ["a0000", "a0003"]


def test_outputs_inside_the_inputs_are_no_inputs(adapters, tmp_path):
    for _ in range(2):
        found = squeeze(tmp_path, sources="adapters", output="adapters/small")
        assert found.total == 6


def test_outputs_do_not_change_the_names_of_inputs_below_the_same_folder(adapters, tmp_path):
    shutil.copytree(tmp_path / "adapters", tmp_path / "in" / "deep" / "deeper")
    found = [squeeze(tmp_path, sources="in", output="in/small") for _ in range(2)]
    assert [(one.made, one.done) for one in found] == [(6, 0), (0, 6)]


def test_inputs_in_the_folder_of_outputs_are_not_left_out_silently(adapters, tmp_path):
    squeeze(tmp_path)
    made = [str(path) for path in sorted((tmp_path / "out").iterdir()) if path.is_dir()]
    for given in (made[0], [str(adapters[0]), made[1]], str(tmp_path / "out" / "*")):
        with pytest.raises(OptionError, match="lies in the folder of outputs"):
            lt.fleet("check", given, output=tmp_path / "out", workers=1)
    with pytest.raises(OptionError, match="no adapters are given"):
        lt.fleet("check", str(tmp_path / "out"), output=tmp_path / "out", workers=1)
    # a shell's adapters/* names the outputs' folder, too, once it is there
    given = [*map(str, adapters), str(tmp_path / "out")]
    again = lt.fleet("squeeze", given, {"rank": 2}, output=tmp_path / "out", workers=1)
    assert (again.total, again.done) == (6, 6)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_that_would_have_one_output_are_refused(tmp_path, overwrite):
    lt.convert(LORA, to="gguf", base=MODEL, output=tmp_path / "lora.gguf")
    given = [str(LORA), str(tmp_path / "lora.gguf")]
    with pytest.raises(OptionError, match="same output"):
        lt.fleet(
            "convert", given, {"to": "peft"}, output=tmp_path / "o", workers=1, overwrite=overwrite
        )
    assert not (tmp_path / "o").exists()
    found = lt.fleet("squeeze", given, {"rank": 2}, output=tmp_path / "o", workers=1)
    assert (found.made, found.failed) == (2, 0)


def test_outputs_in_one_another_are_refused(adapters, tmp_path):
    below = shutil.copytree(adapters[1], adapters[0] / "checkpoints" / "a0000")
    given = [str(adapters[0]), str(below)]
    with pytest.raises(OptionError, match="lie in"):
        lt.fleet("squeeze", given, {"rank": 2}, output=tmp_path / "o", workers=1, overwrite=True)
    assert not (tmp_path / "o").exists()


def test_names_that_clash_are_refused_before_any_work(adapters, tmp_path):
    given = [str(adapters[0]), str(shutil.copytree(adapters[0], tmp_path / "b" / "a0000"))]
    found = lt.fleet("squeeze", given, {"rank": 2}, output=tmp_path / "out", workers=1)
    assert [one.name for one in found.adapters] == ["adapters/a0000", "b/a0000"]
    assert (tmp_path / "out" / "b" / "a0000").is_dir()


@pytest.mark.parametrize(
    ("verb", "settings", "message"),
    [
        ("merge", {}, "no such operation"),
        ("squeeze", {"rnk": 2}, "no such option"),
        ("squeeze", {"rank": "x"}, "rank"),
        ("squeeze", {"output": "x"}, "no such option"),
        ("squeeze", {}, "no rule for the ranks"),
        ("fuse", {}, "needs `base`"),
        ("convert", {"to": "nothing"}, "nothing"),
    ],
)
def test_what_is_refused_before_any_work(adapters, tmp_path, verb, settings, message):
    with pytest.raises(LoratoolsError, match=message):
        lt.fleet(verb, str(tmp_path / "adapters"), settings, output=tmp_path / "o", workers=1)
    assert not (tmp_path / "o").exists()


def test_nothing_is_written_on_a_dry_run_or_without_an_output(adapters, tmp_path):
    found = squeeze(tmp_path, dry_run=True)
    assert (found.left, found.made, (tmp_path / "out").exists()) == (6, 0, False)
    assert lt.fleet("info", str(tmp_path / "adapters"), workers=1).made == 6
    with pytest.raises(OptionError, match="no output"):
        lt.fleet("squeeze", str(tmp_path / "adapters"), {"rank": 2}, workers=1)


def test_a_check_that_finds_something_is_told_and_remembered(adapters, tmp_path):
    (adapters[0] / "adapter_config.json").write_text("{}")
    given = ("check", str(tmp_path / "adapters"))
    found = [lt.fleet(*given, output=tmp_path / "out", workers=1) for _ in range(2)]
    assert not found[0].passed
    assert found[0].found >= 1
    assert (found[1].found, found[1].passed) == (found[0].found, False)


def test_two_versions_do_not_mix(adapters, tmp_path, monkeypatch):
    squeeze(tmp_path)
    statement = tmp_path / "out" / "a0000" / "provenance.json"
    statement.write_text(statement.read_text().replace('"version": "', '"version": "0.'))
    assert states(squeeze(tmp_path))["a0000"] == "failed"


def test_slow_files_are_only_of_the_plugin(tmp_path):
    write_slow(tmp_path / "slow", write_adapters(tmp_path / "adapters", 1))
    found = squeeze(tmp_path, sources="slow/*")  # the plugin is not here: told, not raised
    assert found.failed == 1


@pytest.mark.slow
def test_marks_are_made_while_others_take_the_empty_folder_away(tmp_path):
    store = store_of(tmp_path)
    stopped = threading.Event()

    def others():
        while not stopped.is_set():
            store.write(".loratools-fleet/attempts/run/other", b"")
            store.remove(".loratools-fleet/attempts/run/other")

    racers = [threading.Thread(target=others, daemon=True) for _ in range(3)]
    for racer in racers:
        racer.start()
    try:
        for number in range(200):
            assert store.write(f".loratools-fleet/attempts/run/{number}", b"", new=True)
            store.remove(f".loratools-fleet/attempts/run/{number}")
    finally:
        stopped.set()
        for racer in racers:
            racer.join(60)
    assert not (tmp_path / ".loratools-fleet").exists()


def test_a_first_error_is_told_where_a_second_try_succeeds(adapters, tmp_path, monkeypatch):
    call, calls = VERBS["squeeze"].call, []

    def fails_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the disk was away")
        return call(*args, **kwargs)

    fails_once.declaration = call.declaration
    monkeypatch.setitem(VERBS["squeeze"].__dict__, "call", fails_once)
    found = squeeze(tmp_path)
    assert (found.made, found.failed) == (6, 0)
    told = [one.retried for one in found.adapters]
    assert told == ["OSError: the disk was away", *[None] * 5]
    line = (tmp_path / "out" / "fleet-squeeze.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["retried"] == told[0]
