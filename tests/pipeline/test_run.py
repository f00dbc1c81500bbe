"""Recipes of `run`: the same bytes however often it was stopped, and one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import loratools as lt
from loratools.cli import cli
from loratools.face.declare import declaration_of
from loratools.pipeline.functions import writing_functions
from loratools.pipeline.recipe import MOST_BYTES, load_recipe
from loratools.pipeline.schema import json_schema, step_types
from loratools.pipeline.state import STATE_FOLDER
from loratools_formats.disk.errors import (
    AdapterError,
    LoratoolsError,
    MissingFileError,
    OptionError,
    OutputExistsError,
)

LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"

RECIPE = """\
version: 1
variables:
  rank: 8
  base: in/model
steps:
- name: small
  do: squeeze
  source: in/lora
  rank: ${rank}
- name: both
  do: merge
  method: ties
  density: 0.5
  rank: ${rank}
  adapters:
  - {path: "${small}", weight: 0.7}
  - in/rslora
- name: good
  do: check
  sources: ${both}
  fail_on: error
- name: file
  do: convert
  source: ${both}
  base: ${base}
  to: gguf
"""


@pytest.fixture
def place(tmp_path):
    """Return a folder with the inputs and a recipe."""
    shutil.copytree(LLAMA, tmp_path / "in")
    (tmp_path / "release.yaml").write_text(RECIPE)
    return tmp_path


def states(result):
    return {step.name: step.state for step in result.steps}


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_steps_run_and_are_passed_over_when_nothing_changed(place):
    first = lt.run(place / "release.yaml")
    assert states(first) == {"small": "made", "both": "made", "good": "passed", "file": "made"}
    assert first.folder == place / "release"
    before = content(place / "release")
    second = lt.run(place / "release.yaml")
    assert set(states(second).values()) == {"up to date"}
    assert content(place / "release") == before
    assert [step.bytes for step in second.steps] == [step.bytes for step in first.steps]
    assert lt.replay(place / "release" / "both").identical
    chain = lt.provenance(place / "release" / "file.gguf").steps
    assert [step.operation for step in chain] == ["squeeze", "merge", "convert"]


def test_results_are_those_of_the_operations_alone(place):
    lt.run(place / "release.yaml")
    lt.squeeze(place / "in/lora", rank=8, output=place / "small")
    lt.merge(
        [(place / "small", 0.7), (place / "in/rslora", 1.0)],
        method="ties", density=0.5, rank=8, output=place / "both",
    )  # fmt: skip
    for name in ("small", "both"):
        weights = f"{name}/adapter_model.safetensors"
        assert (place / weights).read_bytes() == (place / "release" / weights).read_bytes()


@pytest.mark.slow
def test_what_changed_runs_again_and_nothing_else(place):
    lt.run(place / "release.yaml")
    recipe = place / "release.yaml"
    recipe.write_text(RECIPE.replace("density: 0.5", "density: 0.4"))
    found = states(lt.run(recipe))
    assert found == {"small": "up to date", "both": "made", "good": "passed", "file": "made"}
    readme = place / "in/rslora/adapter_config.json"
    readme.write_text(readme.read_text() + "\n")
    found = states(lt.run(recipe))
    assert found == {"small": "up to date", "both": "made", "good": "passed", "file": "made"}
    # A result that somebody touched is made again, with the bytes that it had.
    weights = place / "release/small/adapter_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before + b"x")
    found = states(lt.run(recipe))
    assert found["small"] == "made"
    assert found["both"] == "up to date"
    assert weights.read_bytes() == before
    shutil.rmtree(place / "release/both")
    assert states(lt.run(recipe))["both"] == "made"


CHILD = """
import os, signal, sys
import loratools.pipeline.run as run
from loratools_formats.disk import publish
counts = {{"state": 0, "sync": 0}}
def counted(name, function, when):
    def inner(*args, **kwargs):
        counts[name] += 1
        if counts[name] == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return inner
run.write_state = counted("state", run.write_state, {state})
publish.sync_file = counted("sync", publish.sync_file, {sync})
run.run(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "sync"), [(n, 0) for n in range(1, 9)] + [(0, n) for n in (1, 2, 4, 7, 9, 12, 14)]
)
def test_killed_half_way_and_run_again_ends_with_the_same_bytes(place, state, sync):
    whole = place / "whole"
    whole.mkdir()
    shutil.copytree(LLAMA, whole / "in")
    (whole / "release.yaml").write_text(RECIPE)
    lt.run(whole / "release.yaml")
    code = CHILD.format(state=state, sync=sync)
    recipe = str(place / "release.yaml")
    done = subprocess.run([sys.executable, "-c", code, recipe], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    reached = states(lt.run(recipe))
    assert "made" in reached.values() or "passed" in reached.values()
    assert content(place / "release") == content(whole / "release")
    assert set(states(lt.run(recipe)).values()) == {"up to date"}


def test_a_dry_run_writes_nothing_and_tells_the_sizes(place):
    planned = lt.run(place / "release.yaml", dry_run=True)
    assert not (place / "release").exists()
    assert set(states(planned).values()) == {"planned"}
    made = lt.run(place / "release.yaml")
    sizes = {step.name: step.bytes for step in made.steps}
    told = {step.name: step.bytes for step in planned.steps}
    assert told["good"] is sizes["good"] is None
    for name in ("small", "both", "file"):
        # The record of an input that is in memory only is shorter or longer by its digests.
        assert abs(told[name] - sizes[name]) < 1000, name
    assert (
        lt.run(place / "release.yaml", dry_run=True).steps == lt.run(place / "release.yaml").steps
    )


def test_one_step_alone(place):
    recipe = place / "release.yaml"
    with pytest.raises(OptionError, match="reads the result of small, which is not up to date"):
        lt.run(recipe, only="both")
    assert states(lt.run(recipe, only="small"))["small"] == "made"
    found = states(lt.run(recipe, only="both"))
    assert found == {
        "small": "up to date", "both": "made", "good": "not chosen", "file": "not chosen"
    }  # fmt: skip
    with pytest.raises(OptionError, match="no such step; got bth; expected small, both"):
        lt.run(recipe, only="bth")


def test_variables_from_outside(place):
    recipe = place / "release.yaml"
    lt.run(recipe, set={"rank": "4"}, output=place / "four")
    assert {change.rank for change in lt.read(place / "four/small").modules.values()} == {4}
    with pytest.raises(OptionError, match="no such variable; got rnk; expected rank, base"):
        lt.run(recipe, set={"rnk": "4"})
    with pytest.raises(OptionError, match=r"line 9, steps\[0\].rank: expected `int \| null`, got"):
        lt.run(recipe, set={"rank": "many"})
    recipe.write_text(RECIPE.replace("rank: 8", "rank:"))
    with pytest.raises(OptionError, match=r"line 3, variables.rank: has no value"):
        lt.run(recipe)
    assert states(lt.run(recipe, set={"rank": "4"}, output=place / "four"))["small"] == "up to date"


def test_a_check_that_finds_something_stops_the_run(place):
    recipe = place / "release.yaml"
    recipe.write_text(RECIPE.replace("fail_on: error", "fail_on: note"))
    found = lt.run(recipe)
    assert not found.passed
    assert states(found)["good"] == "failed"
    assert states(found)["file"] == "not reached"
    assert not (place / "release/file.gguf").exists()
    done = CliRunner().invoke(cli, ["run", str(recipe)], standalone_mode=False)
    assert done.return_value == 1


def test_a_recipe_of_merge_is_one_step(place):
    lt.merge({place / "in/lora": 0.5, place / "in/rslora": 0.5}, output=place / "sum").write_recipe(
        place / "mix.yaml"
    )
    recipe = place / "release.yaml"
    recipe.write_text("version: 1\nsteps: [{name: sum, do: merge, adapters: mix.yaml}]")
    assert states(lt.run(recipe)) == {"sum": "made"}
    weights = "sum/adapter_model.safetensors"
    assert (place / "release" / weights).read_bytes() == (place / weights).read_bytes()
    assert states(lt.run(recipe)) == {"sum": "up to date"}
    config = place / "in/lora/adapter_config.json"
    config.write_text(config.read_text() + "\n")
    assert states(lt.run(recipe)) == {"sum": "made"}
    with pytest.raises(OptionError, match=r"recipe of merge alone.*loratools merge --recipe"):
        lt.run(place / "mix.yaml")


def test_results_of_others_are_not_replaced(place):
    (place / "release/both").mkdir(parents=True)
    (place / "release/both/mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="result of step both exists, and no run"):
        lt.run(place / "release.yaml")
    assert not (place / "release/small").exists()
    with pytest.raises(LoratoolsError, match="would lose files"):
        lt.run(place / "release.yaml", overwrite=True)
    assert (place / "release/both/mine.txt").read_text() == "mine"


def test_a_step_that_failed_makes_no_file_its_own(place):
    """Its key was left; the next run took a user's file for its own and replaced it."""
    recipe, mine = place / "release.yaml", place / "release/a.safetensors"
    mine.parent.mkdir()
    mine.write_text("mine")
    (place / "in/bad.safetensors").write_text("no adapter")
    steps = "version: 1\nsteps: [{name: a, do: squeeze, source: in/bad.safetensors, rank: 2}]"
    recipe.write_text(steps)
    for _ in range(2):
        with pytest.raises(LoratoolsError, match="is a text and holds no weights"):
            lt.run(recipe, overwrite=True)
        with pytest.raises(OutputExistsError, match="no run of a recipe made it"):
            lt.run(recipe)
    assert [path.name for path in mine.parent.iterdir()] == ["a.safetensors"]
    assert mine.read_text() == "mine"


def step(text):
    return f"version: 1\nsteps:\n- name: a\n  {text}"


SQUEEZE = "do: squeeze\n  source: in/lora\n  "

WRONG = [
    ("", "line 1: must be a map"),
    ("version: 1", r"line 1: steps is missing"),
    ("version: 2\nsteps: []", r"line 1, version: "),
    ("version: 1\nsteps: []", r"line 2, steps: "),
    ("version: 1\nsteps: 7", r"line 2, steps: "),
    ("version: 1\nsteps: [7]", r"line 2, steps\[0\]: expected `object`, got `int`"),
    ("version: 1\nextra: 1\nsteps: []", r"line 2, extra: unknown key; got extra"),
    (step("do: squeez\n  source: in/lora"), r"line 4, steps\[0\].do: no such operation"),
    (step("source: in/lora"), r"line 3, steps\[0\]: do is missing"),
    (step("do: squeeze\n  rank: 4"), r"line 3, steps\[0\]: source is missing"),
    (step(SQUEEZE + "rnk: 4"), r"line 6, steps\[0\].rnk: unknown key; got rnk. Did you mean rank"),
    (step(SQUEEZE + "rank: four"), r"line 6, steps\[0\].rank: expected `int \| null`.*got four"),
    (step(SQUEEZE + "rank: true"), r"line 6, steps\[0\].rank: expected `int \| null`"),
    (step(SQUEEZE + "rank: 0"), r"line 6, steps\[0\].rank: rank is too small"),
    (step(SQUEEZE + "energy: 2"), r"line 6, steps\[0\].energy: energy is a share"),
    (step(SQUEEZE + "rank: 4\n  energy: 0.5"), r"steps\[0\].rank: rank rules exclude each other"),
    (step(SQUEEZE + "budget: 1.5"), r"line 6, steps\[0\].budget: "),
    (step(SQUEEZE + "budget: lots"), r"line 6, steps\[0\].budget: not a budget; got lots"),
    (step(SQUEEZE + "rank: 4\n  include: '('"), r"line 7, steps\[0\].include: not a regular"),
    (step(SQUEEZE + "rank: 4\n  dtype: i8"), r"line 7, steps\[0\].dtype: "),
    (step(SQUEEZE + "rank: 4\n  output: ../x"), r"line 7, steps\[0\].output: "),
    (step(SQUEEZE + "rank: 4\n  output: /elsewhere/x"), r"line 7, steps\[0\].output: "),
    (step(SQUEEZE + "rank: 4\n  output: .hidden"), r"line 7, steps\[0\].output: "),
    (step(SQUEEZE + "rank: 4\n  overwrite: true"), r"line 7, steps\[0\].overwrite: unknown key"),
    (step(SQUEEZE), r"line 3, steps\[0\]: no rule for the ranks"),
    (step("do: squeeze\n  source: in/nothing\n  rank: 4"), r"line 5, steps\[0\].source: no such"),
    (step("do: squeeze\n  source: ''\n  rank: 4"), r"line 5, steps\[0\].source: no such"),
    (step("do: squeeze\n  source: \"a\\0\"\n  rank: 4"), r"line 5, steps\[0\].source: "),
    (step("do: squeeze\n  source: ${a}\n  rank: 4"), r"reads results of earlier steps only; got a"),
    (step("do: squeeze\n  source: ${b}\n  rank: 4"), r"no such variable or step; got b"),
    (step("do: squeeze\n  source: ${a}/x\n  rank: 4"), r"stands alone, not within a path"),
    (step("do: squeeze\n  source: [in/lora]\n  rank: 4"), r"steps\[0\].source: expected `str`"),
    (step(SQUEEZE + "include: ${a}\n  rank: 4"), r"include: a step's result is no value of it"),
    (step("do: merge\n  adapters: []"), r"steps\[0\].adapters: names nothing"),
    (step("do: merge\n  adapters: {}"), r"steps\[0\].adapters: names nothing"),
    (step("do: fuse\n  base: in/model\n  adapters: []"), r"steps\[0\].adapters: names nothing"),
    (step("do: merge\n  adapters: {in/lora: heavy}"), r"steps\[0\].adapters: expected `float`"),
    (step("do: merge\n  adapters: [{path: in/lora, wieght: 1}]"), r"unknown key.*mean weight"),
    (step("do: merge\n  method: tiez\n  adapters: [in/lora]"), r"line 5, steps\[0\].method: "),
    (step("do: merge\n  adapters: [in/lora]\n  set: {densty: 1}"), r"steps\[0\]"),
    (step("do: convert\n  source: in/lora\n  to: kohia"), r"line 6, steps\[0\].to: .*kohia"),
    ("version: 1\nsteps:\n- name: ../a\n  do: squeeze", r"line 3, steps\[0\].name: "),
    ("version: 1\nsteps:\n- name: a b\n  do: squeeze", r"line 3, steps\[0\].name: "),
    ("version: 1\nvariables: [1]\nsteps: []", r"line 2, variables: must be a map"),
    ("version: 1\nvariables: {a: [1]}\nsteps: []", r"line 2, variables.a: must be a text"),
    ("version: 1\nvariables: {a b: 1}\nsteps: []", r"variables.a b: not a name of a variable"),
    ("version: 1\nvariables: {a: ${b}}\nsteps: []", r"."),
    (step(SQUEEZE + "rank: 4\n- name: a\n  do: check\n  sources: ${a}"), r"another step has this"),
    (step(SQUEEZE + "rank: 4\n- name: b\n  do: check\n  sources: in/lora\n- name: c\n"
          "  do: squeeze\n  source: ${b}\n  rank: 4"), r"line 12, .*this step makes no file"),
    (step(SQUEEZE + "rank: 4\n- name: b\n  do: to-lora\n  source: ${a}\n  output: a"),
     r"line 10, steps\[1\].output: another step writes there"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WRONG, ids=range(len(WRONG)))
def test_wrong_recipes_are_refused_by_line_and_key_before_anything_runs(place, text, expected):
    (place / "release.yaml").write_text(text)
    with pytest.raises(LoratoolsError, match=expected) as caught:
        lt.run(place / "release.yaml")
    assert "\n" not in str(caught.value)
    assert not (place / "release").exists()
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "run", str(place / "release.yaml")],
        capture_output=True, text=True,
    ) if text in (WRONG[0][0], WRONG[9][0]) else None  # fmt: skip
    if done is not None:
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1


HOSTILE = {
    "cycle": (step("do: squeeze\n  source: ${b}\n  rank: 4\n- name: b\n  do: squeeze\n"
                   "  source: ${a}\n  rank: 4"), r"earlier steps only; got b"),
    "alias": ("version: &v 1\nsteps: *v", "aliases are not allowed in line 2"),
    "bomb": ("a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: [*b,*b,*b,*b]", "aliases are not allowed"),
    "merge key": ("version: 1\nsteps: [{<<: {name: a}}]", "."),
    "tag": ("version: !!python/object/apply:os.getcwd []", "tags are not allowed in line 1"),
    "deep": ("[" * 5000, "not a recipe"),
    "deep maps": ("steps: " + "{a: " * 2000 + "}" * 2000, "."),
    "one megabyte": ("# " + "x" * (1 << 20), "file is too large"),
    "no text": ("\x00\x01", "not a recipe"),
    "twice": ("version: 1\nversion: 1\nsteps: []", "duplicate key 'version' in line 2"),
    "documents": ("version: 1\n---\nversion: 1", "not a recipe"),
    "number": ("version: 1\nsteps: [{name: a, do: squeeze, source: in/lora, rank: 1e999}]", "."),
    "long number": (f"version: {'9' * 5000}\nsteps: []", "."),
    "date": ("version: 2020-01-01\nsteps: []", "line 1, version"),
    "key": ("version: 1\nsteps: [{[a]: 1}]", "."),
    "number keys": ("version: 1\nsteps: [{1: 2}]", "."),
    "null keys": ("version: 1\n~: 1\nsteps: []", "."),
    "control": ("version: 1\nsteps: [{name: \"a\\e[31m\", do: squeeze}]", "."),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_recipes_are_refused_in_one_line(place, case):
    text, expected = HOSTILE[case]
    (place / "release.yaml").write_text(text)
    with pytest.raises(LoratoolsError, match=expected) as caught:
        lt.run(place / "release.yaml")
    assert str(caught.value).isprintable()
    assert not (place / "release").exists()


def test_files_that_are_no_recipes(place):
    with pytest.raises(MissingFileError):
        lt.run(place / "nothing.yaml")
    with pytest.raises(AdapterError, match=r"is a folder; expected a recipe, a YAML file$"):
        lt.run(place / "in")
    with pytest.raises(AdapterError, match=r"Name the file: loratools run .*/release\.yaml"):
        lt.run(place)
    os.mkfifo(place / "pipe.yaml")
    with pytest.raises(AdapterError, match="pipe"):
        lt.run(place / "pipe.yaml")
    (place / "large.yaml").write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(AdapterError, match="too large"):
        lt.run(place / "large.yaml")
    shutil.copy(place / "release.yaml", place / "bare")
    with pytest.raises(OptionError, match="has no suffix"):
        lt.run(place / "bare")


def test_a_spoiled_state_means_that_the_step_runs_again(place):
    lt.run(place / "release.yaml")
    for text in ("", "[]", '{"key": 1}', '{"key": "x", "files": 7}'):
        (place / "release" / STATE_FOLDER / "small.json").write_text(text)
        try:
            assert states(lt.run(place / "release.yaml", overwrite=True))["small"] == "made"
        except OutputExistsError:
            pytest.fail("a result of ours was not known")


def test_files_get_the_suffix_of_what_they_are_made_from(place):
    (place / "release.yaml").write_text(
        "version: 1\nsteps:\n"
        "- {name: one, do: convert, source: in/lora, to: safetensors}\n"
        "- {name: two, do: squeeze, source: '${one}', rank: 4}\n"
        "- {name: three, do: fuse, base: in/model/model.safetensors, adapters: ['${two}']}\n"
        "- {name: four, do: extract, base: in/model, tuned: '${three}', rank: 4}\n"
        "- {name: five, do: merge, adapters: {'${two}': 0.5}, output: last.safetensors}\n"
    )
    names = [one.output.name for one in lt.run(place / "release.yaml").steps]
    assert names == [
        "one.safetensors", "two.safetensors", "three.safetensors", "four", "last.safetensors"
    ]  # fmt: skip


def test_the_schema_has_every_option_that_is_declared_and_no_other():
    known = {"name", "do", "output"}
    never = {"output", "overwrite", "in_place", "dry_run", "workers", "fix"}
    made = json_schema()["$defs"]
    assert set(writing_functions()) <= {name.replace("-", "_") for name in step_types()}
    for name, (function, _) in writing_functions().items():
        declaration = declaration_of(function)
        options = {word.rstrip("_") for word in declaration.options} - never
        assert set(made[name.replace("_", "-")]["properties"]) == {
            *known, *options, *declaration.inputs
        }  # fmt: skip


@pytest.mark.slow
def test_the_schema_takes_the_recipe(place):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    recipe = {"version": 1, "steps": [{"name": "a", "do": "squeeze", "source": "x", "rank": 4}]}
    validator.validate(recipe)
    assert list(validator.iter_errors({**recipe, "more": 1}))
    recipe["steps"][0]["rank"] = "four"
    assert list(validator.iter_errors(recipe))


def test_options_in_every_spelling_that_python_takes(place):
    (place / "release.yaml").write_text(
        "version: 1\nsteps:\n"
        "- name: a\n  do: squeeze\n  source: in/lora\n  budget: 40%\n"
        "  rank_pattern: {q_proj: 2}\n"
        "- name: b\n  do: merge\n  adapters: {in/lora: 0.5, in/rslora: 1}\n  method: ties\n"
        "  set: {density: 0.5}\n  weight_pattern: [{match: mlp, weights: [1, 2]}, 'q=0.5']\n"
        "  lambda: 2\n  budget: 200000\n"
    )
    first, second = load_recipe(place / "release.yaml", {}).steps
    assert first.options["budget"].share == 0.4
    assert first.options["rank_pattern"] == (("q_proj", 2),)
    assert second.options["lambda_"] == 2.0
    assert second.options["budget"].nbytes == 200_000
    assert [one.match for one in second.options["weight_pattern"]] == ["mlp", "q"]
    assert set(states(lt.run(place / "release.yaml")).values()) == {"made"}


def test_the_command_prints_what_the_function_returns(place):
    recipe = str(place / "release.yaml")
    done = CliRunner().invoke(cli, ["run", recipe, "--json"], standalone_mode=False)
    assert done.exception is None
    assert json.loads(done.stdout)["steps"][0]["state"] == "made"
    again = json.loads(json.dumps(lt.run(recipe).to_dict()))
    assert again["steps"][0]["state"] == "up to date"
