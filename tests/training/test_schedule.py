"""Schedules, `plan-squeeze`, its snippets, and the example of a plain loop."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import loratools as lt
from loratools.algebra.ranks import Budget, RankRule
from loratools.operations.plan_squeeze import snippet
from loratools.operations.schedule import SqueezeSchedule, geometric_ranks
from loratools_formats.disk.errors import OptionError

ROOT = Path(__file__).parents[2]


def test_ranks_fall_by_equal_factors():
    assert geometric_ranks(64, 8) == (64, 32, 16, 8)
    assert geometric_ranks(64, 2) == (64, 32, 16, 8, 4, 2)
    assert geometric_ranks(128, 10, 3) == (128, 36, 10)
    assert geometric_ranks(64, 48) == (64, 48)
    assert geometric_ranks(5, 1, 5) == (5, 4, 3, 2, 1)
    assert geometric_ranks(9, 2, 8) == (9, 8, 7, 6, 5, 4, 3, 2)
    for start in range(2, 40):
        for target in range(1, start):
            for stages in range(2, min(start - target + 1, 6) + 1):
                ranks = geometric_ranks(start, target, stages)
                assert (ranks[0], ranks[-1], len(ranks)) == (start, target, stages)
                assert all(a > b for a, b in itertools.pairwise(ranks))


def test_steps_by_rank_sum_to_all_and_none_has_fewer_than_the_least():
    # 3000 · 64/126 is 1524; three stages would have fewer than 200, and the others share 2400.
    schedule = SqueezeSchedule.by_rank((64, 32, 16, 8, 4, 2), 3000)
    assert schedule.steps == (1371, 686, 343, 200, 200, 200)
    assert SqueezeSchedule.by_rank((4, 2, 1), 70, least_steps=1).steps == (40, 20, 10)
    assert SqueezeSchedule.by_rank((8, 4), 400).steps == (200, 200)
    assert SqueezeSchedule.equal_steps((8, 4, 2), 10).steps == (3, 3, 4)
    with pytest.raises(OptionError, match="at least 400"):
        SqueezeSchedule.by_rank((8, 4), 399)
    with pytest.raises(OptionError, match="too few steps for 3 stages"):
        SqueezeSchedule.equal_steps((8, 4, 2), 2)


def test_a_rule_is_due_once_its_steps_are_done():
    schedule = SqueezeSchedule((64, RankRule(energy=0.9), 8), (5, 3, 2))
    assert schedule.boundaries == (5, 8)
    assert [schedule.stage_after(step) for step in (0, 4, 5, 7, 8, 20)] == [0, 0, 1, 1, 2, 2]
    assert schedule.rule_after(5) == RankRule(energy=0.9)
    assert schedule.rule_after(8) == RankRule(rank=8)
    assert schedule.rule_after(6) is None
    assert (schedule.start, schedule.total) == (64, 10)


@pytest.mark.parametrize(
    "rule",
    [
        RankRule(budget=Budget.parse("33.3%"), max_rank=32),
        RankRule(budget=Budget.parse("1MB"), serve=True),
        RankRule(energy=0.9, patterns=(("q_proj$", 4), ("a=b", 2))),
        RankRule(threshold=True, min_rank=2, uniform=True),
    ],
    ids=str,
)
def test_json_holds_a_schedule(rule):
    schedule = SqueezeSchedule.at_boundaries(64, [rule, 4], 30)
    text = json.dumps(schedule.to_dict())
    assert SqueezeSchedule.from_dict(json.loads(text)) == schedule


@pytest.mark.parametrize(
    ("ranks", "steps"),
    [((8, 8), (1, 1)), ((4, 8), (1, 1)), ((8, 4), (1,)), ((8, 4), (1, 0)), ((), ()), ((0,), (1,)),
     ((8, RankRule()), (1, 1)), ((8, 4.0), (1, 1)), ((8, RankRule(energy=0.9), 9), (1, 1, 1))],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(ranks, steps):
    with pytest.raises(OptionError):
        SqueezeSchedule(ranks, steps)


def test_a_plan_says_what_is_missing():
    with pytest.raises(OptionError, match="no `steps`"):
        lt.plan_squeeze(start=64, target=8)
    with pytest.raises(OptionError, match="below the first"):
        lt.plan_squeeze(start=8, target=8, steps=10)
    with pytest.raises(OptionError, match="no such number of stages"):
        lt.plan_squeeze(start=8, target=4, steps=10, stages=9)


def commented(text):
    """Return the YAML that a snippet has in its last comments."""
    lines = text[text.rindex("\n# in ") :].splitlines()[2:]
    return yaml.safe_load("\n".join(line.removeprefix("#")[1:] for line in lines))


def test_the_snippet_of_axolotl_makes_the_callback(tmp_path, monkeypatch):
    # axolotl imports the class by its path, and asks it for callbacks before it makes the trainer.
    home = tmp_path / "axolotl" / "integrations"
    home.mkdir(parents=True)
    (tmp_path / "axolotl" / "__init__.py").touch()
    (home / "__init__.py").touch()
    (home / "base.py").write_text("class BasePlugin:\n    pass\n")
    plan = lt.plan_squeeze(start=64, target=8, steps=3000, trainer="axolotl")
    (tmp_path / "squeeze_plugin.py").write_text(plan.snippet)
    monkeypatch.syspath_prepend(tmp_path)
    config = commented(plan.snippet)
    module, name = config["plugins"][0].rsplit(".", 1)
    plugin = getattr(__import__(module), name)()
    (callback,) = plugin.add_callbacks_pre_trainer(None, None)
    plugin.post_train(SimpleNamespace(output_dir=tmp_path), None)
    assert not (tmp_path / "provenance.json").exists()  # nothing was squeezed
    assert callback.schedule == SqueezeSchedule.geometric(64, 8, 3000)
    assert (config["lora_r"], config["max_steps"]) == (64, 3000)


def test_the_snippet_of_llama_factory_hands_the_callback_over(tmp_path, monkeypatch):
    home = tmp_path / "llamafactory" / "train"
    home.mkdir(parents=True)
    (tmp_path / "llamafactory" / "__init__.py").touch()
    (home / "__init__.py").touch()
    (home / "tuner.py").write_text(
        "def run_exp(args=None, callbacks=None):\n    made[:] = callbacks\nmade = []\n"
    )
    plan = lt.plan_squeeze(start=32, target=4, steps=900, trainer="llama-factory", allot="rank",
                           least_steps=50)  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    exec(compile(plan.snippet, "train_squeezed.py", "exec"), {})
    from llamafactory.train.tuner import made

    assert made[0].schedule == SqueezeSchedule.by_rank((32, 16, 8, 4), 900, least_steps=50)
    assert commented(plan.snippet)["lora_rank"] == 32


def test_the_snippet_of_transformers_is_python():
    schedule = SqueezeSchedule.geometric(16, 4, 30)
    given = {"Trainer": lambda *args, **kw: kw["callbacks"], "model": 0, "args": 0}
    text = snippet(schedule, "transformers").replace("..., ", "")
    exec(compile(text, "snippet", "exec"), given)
    assert given["trainer"][0].schedule == schedule


@pytest.mark.slow
def test_the_example_trains_in_a_plain_loop(tmp_path):
    paths = [str(ROOT), str(ROOT / "formats"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "squeeze_while_training.py", tmp_path / "out",
         "--steps", "24"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 6", "step 12", "step 18", "step 24"]
    assert {module.rank for module in lt.info(tmp_path / "out").modules} == {4}
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert losses[-1] < losses[0]
