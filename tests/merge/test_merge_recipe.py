"""Recipes: what they say, what is refused and where, and that they repeat a merge exactly."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_cases import DTYPES, linear, run, save, total_distance, weighted_sum
from merge_models import saved_base, saved_by_peft

from loratools.algebra.ranks import Budget, RankRule
from loratools.cli.merge import command
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge.options import MergeOptions, Override
from loratools.operations.merge.recipe import Recipe, RecipeAdapter, load_recipe
from loratools.operations.merge.recipe_text import recipe_text
from loratools_formats.disk.errors import (
    AdapterError,
    LoratoolsError,
    MissingFileError,
    OptionError,
)

GOOD = {"version": 1, "method": "linear", "adapters": [{"path": "a"}, {"path": "b"}]}


def written(folder, content):
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_recipe_says_everything(tmp_path):
    path = written(
        tmp_path,
        """
version: 1
method: ties
parameters: {density: 0.3, majority_sign: frequency, lambda: 2}
space: core
adapters:
- {path: ../chat, weight: 0.6, sha256: abc}
- path: /elsewhere/code
  weight: -1
- path: plain
ranks: {energy: 0.9, max_rank: 64, patterns: [[down, 4], [q, 8]], uniform: true, serve: false}
compute: {dtype: bf16, method: rsvd, oversample: 5, seed: 7, keep_alpha: true}
overrides:
- {match: mlp, weights: [0.3, 0.7, 1], parameters: {density: 0.1}}
- {match: attn, weights: [2]}
replacements: average
base: ../model
force_base: true
""",
    )
    assert load_recipe(path) == Recipe(
        (
            RecipeAdapter(tmp_path / "../chat", 0.6, "abc"),
            RecipeAdapter(Path("/elsewhere/code"), -1.0),
            RecipeAdapter(tmp_path / "plain", 1.0),
        ),
        MergeOptions(
            method="ties",
            parameters={"density": 0.3, "majority_sign": "frequency", "lambda_": 2.0},
            rule=RankRule(energy=0.9, max_rank=64, patterns=(("down", 4), ("q", 8)), uniform=True),
            compute=ComputeOptions(
                dtype="bf16", method="rsvd", oversample=5, seed=7, keep_alpha=True
            ),
            space="core",
            overrides=(
                Override("mlp", (0.3, 0.7, 1.0), {"density": 0.1}),
                Override("attn", (2.0,)),
            ),
            replacements="average",
            force_base=True,
        ),
        tmp_path / "../model",
    )


def changed(**fields):
    return GOOD | fields


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"\$: must be a map; got list"),
        ("", r"\$: must be a map; got NoneType"),
        ({}, r"\$.version: is missing"),
        (changed(version=2), r"\$.version: is not supported; got 2; expected 1"),
        (changed(version=True), r"\$.version: is not supported; got True"),
        (changed(version="1"), r"\$.version: is not supported"),
        ({"version": 1, "adapters": [{"path": "a"}]}, r"\$.method: is missing"),
        (changed(methd="ties"), r"\$.methd: unknown field; expected version, method, adapters"),
        (changed(method="tyes"), r"\$.method: no merge method named 'tyes'.*Did you mean 'ties'"),
        (changed(method=3), r"\$.method: must be a string; got 3"),
        (changed(adapters=[]), r"\$.adapters: is empty"),
        (changed(adapters={"path": "a"}), r"\$.adapters: must be a list; got dict"),
        (changed(adapters=["a"]), r"\$.adapters\[0\]: must be a map; got str"),
        (
            changed(adapters=[{"path": "a", "weigth": 1}]),
            r"\$.adapters\[0\].weigth: unknown field; expected path, weight, sha256",
        ),
        (changed(adapters=[{"path": "a"}, {"weight": 1}]), r"\$.adapters\[1\].path: is missing"),
        (changed(adapters=[{"path": 4}]), r"\$.adapters\[0\].path: must be a string; got 4"),
        (
            changed(adapters=[{"path": "a", "weight": "much"}]),
            r"\$.adapters\[0\].weight: must be a finite number; got much",
        ),
        (
            changed(adapters=[{"path": "a", "weight": True}]),
            r"\$.adapters\[0\].weight: must be a finite number",
        ),
        (
            changed(adapters=[{"path": "a", "weight": float("nan")}]),
            r"\$.adapters\[0\].weight: must be a finite number",
        ),
        (
            changed(adapters=[{"path": "a", "weight": 10**400}]),
            "not a recipe: number of 401 characters",
        ),
        (
            changed(adapters=[{"path": "a", "sha256": 5}]),
            r"\$.adapters\[0\].sha256: must be a string",
        ),
        (changed(parameters=[1]), r"\$.parameters: must be a map"),
        (changed(parameters={1: 2}), r"\$.parameters: must be a map"),
        (
            changed(parameters={"normalise": True}),
            r"\$.parameters.normalise: method linear has no .* Did you mean normalize",
        ),
        (
            changed(method="ties", parameters={"density": "much"}),
            r"\$.parameters.density: ties: density; got much; expected a finite number",
        ),
        (
            changed(method="ties", parameters={"density": [0.5]}),
            r"\$.parameters.density: ties: density",
        ),
        (
            changed(method="ties", parameters={"flavor": "salty"}),
            r"\$.parameters.flavor: .*expected peft or paper or mergekit",
        ),
        (changed(space="half"), r"\$.space: is wrong; got half; expected full or core"),
        (changed(ranks=8), r"\$.ranks: must be a map; got int"),
        (changed(ranks={"rnak": 8}), r"\$.ranks.rnak: unknown field; expected rank, energy"),
        (changed(ranks={"rank": "8"}), r"\$.ranks.rank: is wrong; got 8; expected a whole number"),
        (changed(ranks={"rank": 8.5}), r"\$.ranks.rank: is wrong; got 8.5"),
        (changed(ranks={"rank": True}), r"\$.ranks.rank: is wrong; got True"),
        (changed(ranks={"rank": 0}), r"\$.ranks: rank is too small; got 0"),
        (changed(ranks={"energy": "all"}), r"\$.ranks.energy: must be a finite number"),
        (changed(ranks={"energy": 2}), r"\$.ranks: energy is a share; got 2"),
        (changed(ranks={"rank": 2, "energy": 0.5}), r"\$.ranks: rank rules exclude each other"),
        (changed(ranks={"uniform": "yes"}), r"\$.ranks.uniform: is wrong; .*true or false"),
        (changed(ranks={"budget": "much"}), r"\$.ranks.budget: not a budget; got much"),
        (changed(ranks={"budget": True}), r"\$.ranks.budget: not a"),
        (changed(ranks={"patterns": "q"}), r"\$.ranks.patterns: must be a list"),
        (changed(ranks={"patterns": [["q", 2], ["k"]]}), r"\$.ranks.patterns\[1\]: must be"),
        (changed(ranks={"patterns": [["q", "2"]]}), r"\$.ranks.patterns\[0\]: must be a regular"),
        (changed(ranks={"patterns": [["(", 2]]}), r"\$.ranks.patterns\[0\]: not a regular"),
        (changed(ranks={"patterns": [["q", 0]]}), r"\$.ranks: rank pattern q is too small"),
        (changed(compute={"workers": 3}), r"\$.compute.workers: unknown field"),
        (changed(compute={"device": "cuda"}), r"\$.compute.device: unknown field"),
        (changed(compute={"dtype": "f8"}), r"\$.compute.dtype: is wrong; got f8; expected f32 or"),
        (changed(compute={"method": "fast"}), r"\$.compute.method: .*expected exact or rsvd"),
        (changed(compute={"seed": 1.5}), r"\$.compute.seed: is wrong; got 1.5"),
        (changed(compute={"seed": -1}), r"\$.compute: seed is negative"),
        (changed(compute={"keep_alpha": 1}), r"\$.compute.keep_alpha: is wrong"),
        (changed(overrides={"match": "q"}), r"\$.overrides: must be a list"),
        (changed(overrides=[{"weights": [1]}]), r"\$.overrides\[0\].match: is missing"),
        (
            changed(overrides=[{"match": "q", "weigths": [1]}]),
            r"\$.overrides\[0\].weigths: unknown",
        ),
        (changed(overrides=[{"match": "("}]), r"\$.overrides\[0\].match: not a regular expression"),
        (changed(overrides=[{"match": 3}]), r"\$.overrides\[0\].match: must be a string"),
        (
            changed(overrides=[{"match": "q", "weights": 1}]),
            r"\$.overrides\[0\].weights: must be a list",
        ),
        (
            changed(overrides=[{"match": "q", "weights": [1, "x"]}]),
            r"\$.overrides\[0\].weights\[1\]: must be a finite number; got x",
        ),
        (
            changed(overrides=[{"match": "q", "weights": [1, 2, 3]}]),
            r"\$.overrides\[0\].weights: wrong number; got 3; expected 1 or 2",
        ),
        (
            changed(overrides=[{"match": "q"}, {"match": "k", "parameters": {"norm": 1}}]),
            r"\$.overrides\[1\].parameters.norm: method linear has no parameter norm",
        ),
        (changed(replacements=1), r"\$.replacements: must be a string"),
        (changed(base=["x"]), r"\$.base: must be a string"),
        (changed(force_base="yes"), r"\$.force_base: must be true or false"),
    ],
)
def test_errors_name_their_place(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(LoratoolsError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nmethod: &m ties\nadapters: [*m]", "aliases are not allowed"),
        (
            "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: [*c, *c, *c]",
            "aliases are not allowed",
        ),
        ("version: 1\nversion: 1", "duplicate key 'version'"),
        ("version: 1\nadapters:\n- {path: a, path: b}", "duplicate key 'path'"),
        ("? [a]\n: 1", "found unhashable key in line 1"),
        ("version: !!python/object/apply:os.getcwd []", "tags are not allowed"),
        ("version: !!int ''", "tags are not allowed"),
        ("version: !!timestamp x", "tags are not allowed"),
        ("version: !mine 1", "tags are not allowed"),
        ("version: 1\n  method: linear", "mapping values are not allowed .* in line 2"),
        ("version: [1", "expected ',' or ']'.* in line [12]"),
        ("version: 1\n--- \nversion: 2", "found another document in line 2"),
        ("version: 0001-01-01T00:00:00+99:99", "not a recipe"),
        ("version: 2020-13-45", "not a recipe"),
        ("version: " + "9" * 5000, "not a recipe"),
        ("[" * 20000, "not a recipe"),
        ("{a: " * 20000, "not a recipe"),
        ("version: 1\x00", "not a recipe"),
        ("<<: 1", "not a recipe"),
        ("=: =", "not a recipe"),
    ],
)
def test_yaml_that_is_not_plain_data_is_refused(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(AdapterError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: not a recipe: ")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"version: \xff\xfe1")
    with pytest.raises(AdapterError, match="not a recipe"):
        load_recipe(path)


def test_large_recipes_are_refused_and_many_keys_are_read_in_time(tmp_path):
    path = written(tmp_path, "version: 1\n" + "# filler\n" * 120_000)
    with pytest.raises(AdapterError, match="file is too large"):
        load_recipe(path)
    keys = "".join(f"k{index}: 0\n" for index in range(20_000))
    start = time.monotonic()
    with pytest.raises(OptionError, match="unknown field"):
        load_recipe(written(tmp_path, keys))
    # Comparing each key with each other would take minutes.
    assert time.monotonic() - start < 30


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"nothing\.yaml"):
        load_recipe(tmp_path / "nothing.yaml")


# ------------------------------------------------------------------- there and back


finite = st.floats(-1e6, 1e6)
rules = st.one_of(
    st.builds(RankRule, rank=st.integers(1, 99), uniform=st.booleans(), serve=st.booleans()),
    st.builds(RankRule, energy=st.floats(0.01, 1.0), max_rank=st.none() | st.integers(9, 99)),
    st.builds(RankRule, sv_ratio=st.floats(1.0, 100.0), min_rank=st.none() | st.integers(1, 9)),
    st.builds(RankRule, threshold=st.booleans()),
    st.builds(
        RankRule,
        patterns=st.lists(
            st.tuples(st.sampled_from(["q", r"layers\.\d+", "a: b", "é=1"]), st.integers(1, 9))
        ).map(tuple),
    ),
    st.builds(
        RankRule,
        budget=st.one_of(
            st.sampled_from(["25%", "12MB", "33.333333%", "12.3456789%", "0.07%", "800KiB", "150%"])
        ).map(Budget.parse),
    ),
)
computes = st.builds(
    ComputeOptions,
    dtype=st.sampled_from([None, "f32", "bf16"]),
    method=st.sampled_from(["exact", "rsvd"]),
    seed=st.integers(0, 2**64 - 1),
    oversample=st.integers(0, 20),
    keep_alpha=st.booleans(),
)
parameters = st.fixed_dictionaries(
    {},
    optional={
        "density": st.floats(0.0, 1.0),
        "lambda_": finite,
        "flavor": st.sampled_from(["peft", "paper", "mergekit"]),
    },
)
overrides = st.lists(
    st.builds(
        Override,
        match=st.sampled_from(["q", "mlp.*up", "'", '"', "#", "yes", "1"]),
        weights=st.none() | st.tuples(finite) | st.tuples(finite, finite),
        parameters=parameters,
    )
).map(tuple)


@given(
    options=st.builds(
        MergeOptions,
        method=st.just("ties"),
        parameters=parameters,
        rule=rules,
        compute=computes,
        space=st.sampled_from(["full", "core"]),
        overrides=overrides,
        replacements=st.none() | st.sampled_from(["first", "average", "on", "null", "a b"]),
        force_base=st.booleans(),
        allow_missing=st.booleans(),
    ),
    weights=st.tuples(finite, finite),
    has_base=st.booleans(),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_written_is_read_again(tmp_path_factory, options, weights, has_base):
    folder = tmp_path_factory.mktemp("recipe")
    adapters = tuple(
        RecipeAdapter(folder / "deep" / name, weight)
        for name, weight in zip(["a: b", "ü"], weights, strict=True)
    )
    recipe = Recipe(adapters, options, folder / "base" if has_base else None)
    path = folder / "recipe.yaml"
    path.write_bytes(recipe_text(recipe, ["11", "0x1"], folder))
    again = load_recipe(path)
    assert again.options == options
    assert again.base == recipe.base
    assert again.adapters == tuple(
        RecipeAdapter(item.path, item.weight, digest)
        for item, digest in zip(adapters, ["11", "0x1"], strict=True)
    )


@pytest.mark.parametrize(
    "text", ["25%", "33.333333%", "12.3456789%", "0.07%", "150%", "12MB", "800KiB", "123456"]
)
def test_budgets_are_written_exactly(tmp_path, text):
    options = MergeOptions(rule=RankRule(budget=Budget.parse(text)))
    recipe = Recipe((RecipeAdapter(tmp_path / "a", 1.0),), options)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(recipe_text(recipe, ["0"], tmp_path))
    assert load_recipe(path).options.rule == options.rule


def test_parameters_go_by_the_names_that_users_type(tmp_path):
    options = MergeOptions(
        method="ties",
        parameters={"lambda_": 2.0},
        overrides=(Override("q", None, {"lambda_": 3.0}),),
    )
    recipe = Recipe((RecipeAdapter(tmp_path / "a", 1.0),), options)
    content = yaml.safe_load(recipe_text(recipe, ["0"], tmp_path))
    assert content["parameters"] == {"lambda": 2.0}
    assert content["overrides"][0]["parameters"] == {"lambda": 3.0}


def test_defaults_are_left_out(tmp_path):
    recipe = Recipe((RecipeAdapter(tmp_path / "a", 1.0),), MergeOptions())
    assert yaml.safe_load(recipe_text(recipe, ["0"], tmp_path)) == {
        "version": 1,
        "method": "linear",
        "adapters": [{"path": "a", "weight": 1.0, "sha256": "0"}],
    }


# ------------------------------------------------------------------- merging by one


MODULES = {"layers.0.q": linear(24, 20, 8), "layers.1.mlp.down": linear(16, 40, 8)}


def pair(folder, **config):
    return [
        save(folder / name, MODULES, seed=seed, dtype="bf16", lora_alpha=11, **config)
        for seed, name in enumerate(["chat", "co:de"])
    ]


def contents(folder, *, without=()):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


CASES = {
    "linear": ["--normalize"],
    "slerp": ["--method", "slerp", "-p", "t=0.3"],
    "ties": [
        "--method", "ties", "--density", "0.3", "--lambda", "1.5", "--majority-sign", "frequency",
        "--flavor", "paper", "--rank", "6", "--dtype", "f32", "--weight-pattern", "mlp=0.5",
        "--weight-pattern", "q=0.25,-1",
    ],
    "dare": ["--method", "dare_ties", "--seed", "9", "--energy", "0.5", "--max-rank", "12"],
    "core": ["--method", "della", "--space", "core", "-p", "epsilon=0.2", "--keep-alpha"],
    "tsv": ["--method", "tsv", "--rank-pattern", r"q$=3", "--serve-ranks"],
    "budget": ["--budget", "77.7777777%", "--uniform"],
    "rsvd": ["--svd", "rsvd", "--rank", "4", "--oversample", "3", "--power-iterations", "1"],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_output_has_a_recipe_that_repeats_it_byte_for_byte(tmp_path, loratools, case):
    big = {"layers.0.q": linear(300, 200, 8), "layers.1.mlp.down": linear(160, 140, 8)}
    for seed, name in enumerate(["chat", "co:de"]):
        modules = big if case == "budget" else MODULES
        save(tmp_path / name, modules, seed=seed, dtype="bf16", lora_alpha=11)
    first, second = tmp_path / "chat", tmp_path / "co:de"
    out, again = tmp_path / "out", tmp_path / "again"
    code, _, err = loratools(
        "merge", f"{first}:0.7", f"{second}:-0.3", "-o", out, "-q", *CASES[case]
    )
    assert (code, err) == (0, "")
    code, _, err = loratools("merge", "--recipe", out / "recipe.yaml", "-o", again, "-q")
    assert (code, err) == (0, "")
    assert contents(again) == contents(out)
    # From another folder only the paths inside the recipe differ, and what digests it.
    (tmp_path / "deep").mkdir()
    os.rename(out / "recipe.yaml", tmp_path / "moved.yaml")
    (tmp_path / "moved.yaml").write_bytes(again.joinpath("recipe.yaml").read_bytes())
    text = (tmp_path / "moved.yaml").read_text().replace("path: ../", "path: ")
    (tmp_path / "moved.yaml").write_text(text)
    code, _, err = loratools(
        "merge", "--recipe", tmp_path / "moved.yaml", "-o", tmp_path / "deep" / "out", "-q"
    )
    assert (code, err) == (0, "")
    assert _weights_and_config(tmp_path / "deep" / "out") == _weights_and_config(again)


def _weights_and_config(folder):
    return [
        (folder / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    ]


def test_paths_are_relative_to_the_recipe_whatever_the_folder(tmp_path, loratools, monkeypatch):
    (tmp_path / "work").mkdir()
    pair(tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    assert loratools("merge", "chat:2", "co:de", "-o", "out", "-q")[0] == 0
    recipe = yaml.safe_load((tmp_path / "work" / "out" / "recipe.yaml").read_text())
    assert [item["path"] for item in recipe["adapters"]] == ["../chat", "../co:de"]
    os.rename(tmp_path / "work", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    code, _, err = loratools("merge", "--recipe", "moved/out/recipe.yaml", "-o", "again", "-q")
    assert (code, err) == (0, "")
    assert _weights_and_config(tmp_path / "again") == _weights_and_config(
        tmp_path / "moved" / "out"
    )


def test_a_symbolic_link_to_the_folder_makes_no_difference(tmp_path, loratools):
    pair(tmp_path / "real")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    os.symlink(tmp_path / "real", tmp_path / "deep" / "er" / "link")
    link = tmp_path / "deep" / "er" / "link"
    code, _, err = loratools("merge", link / "chat", link / "co:de", "-o", link / "out", "-q")
    assert (code, err) == (0, "")
    for number, seen in enumerate((link, tmp_path / "real")):
        again = tmp_path / f"again{number}"
        code, _, err = loratools(
            "merge", "--recipe", seen / "out" / "recipe.yaml", "-o", again, "-q"
        )
        assert (code, err) == (0, "")
        assert _weights_and_config(again) == _weights_and_config(link / "out")


def test_a_recipe_written_by_hand_is_the_merge_on_the_command_line(tmp_path, loratools):
    first, second = pair(tmp_path)
    loratools(
        "merge", f"{first}:2", second, "-o", tmp_path / "out", "-q",
        "--method", "ties", "--lambda", "2", "--density", "0.5",
    )  # fmt: skip
    recipe = written(
        tmp_path,
        "version: 1\nmethod: ties\nparameters: {lambda: 2, density: 0.5}\n"
        "adapters:\n- {path: chat, weight: 2}\n- {path: 'co:de'}\n",
    )
    assert loratools("merge", "--recipe", recipe, "-o", tmp_path / "again", "-q")[0] == 0
    assert _weights_and_config(tmp_path / "again") == _weights_and_config(tmp_path / "out")


def test_overrides_in_a_recipe_are_used(tmp_path, loratools):
    first, second = (
        save(tmp_path / name, MODULES, seed=seed) for seed, name in enumerate(["one", "two"])
    )
    recipe = written(
        tmp_path,
        "version: 1\nmethod: linear\nadapters: [{path: one}, {path: two, weight: 0.5}]\n"
        "overrides:\n- {match: mlp, weights: [0.25], parameters: {normalize: true}}\n",
    )
    assert loratools("merge", "--recipe", recipe, "-o", tmp_path / "out", "-q")[0] == 0
    _, got = run(tmp_path / "itself", [(tmp_path / "out", 1.0)])
    plain, half = (
        weighted_sum([(first, 1.0), (second, 0.5)]),
        weighted_sum([(first, 0.5), (second, 0.5)]),
    )
    want = {"layers.0.q": plain["layers.0.q"], "layers.1.mlp.down": half["layers.1.mlp.down"]}
    assert total_distance(got, want) <= 1e-6


def test_workers_may_be_given_beside_a_recipe_and_change_nothing(tmp_path, loratools):
    first, second = pair(tmp_path)
    loratools("merge", first, second, "-o", tmp_path / "out", "-q", "--method", "ties")
    recipe = tmp_path / "out" / "recipe.yaml"
    code, _, err = loratools(
        "merge", "--recipe", recipe, "-o", tmp_path / "again", "-q", "--workers", 1
    )
    assert (code, err) == (0, "")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_an_adapter_that_is_not_the_one_is_refused(tmp_path, loratools):
    first, second = pair(tmp_path)
    loratools("merge", first, second, "-o", tmp_path / "out", "-q")
    weights = second / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    recipe = tmp_path / "out" / "recipe.yaml"
    code, out, err = loratools("merge", "--recipe", recipe, "-o", tmp_path / "again")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "co:de" in line
    assert "not the one that the recipe was made with; expected weights with sha256" in line
    assert not (tmp_path / "again").exists()
    text = recipe.read_text()
    recipe.write_text("\n".join(line for line in text.splitlines() if "sha256" not in line) + "\n")
    assert loratools("merge", "--recipe", recipe, "-o", tmp_path / "again", "-q")[0] == 0


def test_an_adapter_that_is_gone_is_named(tmp_path, loratools):
    recipe = written(tmp_path, GOOD)
    code, _, err = loratools("merge", "--recipe", recipe, "-o", tmp_path / "out")
    assert code == 2
    assert err == f"error: {tmp_path / 'a'}: no such file or folder\n"


BESIDE = [
    ["--method", "ties"], ["--density", "0.5"], ["--lambda", "2"], ["--majority-sign", "total"],
    ["--flavor", "peft"], ["--normalize"], ["-p", "t=1"], ["--space", "core"],
    ["--weight-pattern", "q=1"], ["--replacements", "first"], ["--base", "x"], ["--force-base"],
    ["--rank", "4"], ["--energy", "0.5"], ["--sv-ratio", "2"], ["--sv-fro", "0.5"],
    ["--sv-cumulative", "0.5"], ["--threshold-rank"], ["--budget", "50%"], ["--max-rank", "4"],
    ["--min-rank", "1"], ["--rank-pattern", "q=1"], ["--uniform"], ["--serve-ranks"],
    ["--svd", "exact"], ["--dtype", "f32"], ["--oversample", "10"], ["--power-iterations", "2"],
    ["--seed", "0"], ["--keep-alpha"], ["--linear-differences"], ["--drop", "q"], ["--keep", "q"],
    ["some/adapter"],
]  # fmt: skip
FREE = {
    "revision",
    "from_", "output", "overwrite", "dry_run", "recipe", "save_recipe", "max_error", "json",
    "quiet", "verbose", "workers", "device", "carry_unknown", "ignore_key", "allow_missing",
    "html", "plot",
}  # fmt: skip


@pytest.mark.parametrize("given", BESIDE, ids=lambda given: given[0])
def test_what_a_recipe_says_cannot_be_said_beside_it(tmp_path, loratools, given):
    recipe = written(tmp_path, GOOD)
    code, _, err = loratools("merge", "--recipe", recipe, "-o", tmp_path / "out", *given)
    assert code == 2
    (line,) = err.splitlines()
    assert "the recipe states this already" in line


def test_every_option_is_either_in_recipes_or_free():
    names = {parameter.name for parameter in command.params} - FREE
    given = {option for each in BESIDE for option in each}
    said = {p.name for p in command.params if set(p.opts) & given} | {"adapters"}
    assert said == names


def test_save_recipe_writes_it_elsewhere_too(tmp_path, loratools):
    first, second = pair(tmp_path)
    (tmp_path / "recipes").mkdir()
    saved = tmp_path / "recipes" / "mine.yaml"
    code, _, _ = loratools(
        "merge", f"{first}:0.5", second, "-o", tmp_path / "out", "--save-recipe", saved, "-q",
        "--method", "ties",
    )  # fmt: skip
    assert code == 0
    content = yaml.safe_load(saved.read_text())
    assert [item["path"] for item in content["adapters"]] == ["../chat", "../co:de"]
    assert [item["weight"] for item in content["adapters"]] == [0.5, 1.0]
    assert loratools("merge", "--recipe", saved, "-o", tmp_path / "again", "-q")[0] == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_recipe_that_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, loratools):
    first, second = pair(tmp_path)
    saved = tmp_path / "mine.yaml"
    saved.write_text("mine")
    arguments = ["merge", first, second, "-o", tmp_path / "out", "-q", "--save-recipe"]
    code, _, err = loratools(*arguments, saved)
    assert code == 2
    assert err == f"error: {saved}: output exists. Pass --overwrite to replace it\n"
    code, _, err = loratools(*arguments, tmp_path / "missing" / "mine.yaml")
    assert code == 2
    assert "the folder to write into does not exist" in err
    assert not (tmp_path / "out").exists()
    assert saved.read_text() == "mine"
    assert loratools(*arguments, saved, "--overwrite")[0] == 0
    assert yaml.safe_load(saved.read_text())["method"] == "linear"


def test_a_dry_run_saves_no_recipe(tmp_path, loratools):
    first, second = pair(tmp_path)
    saved = tmp_path / "mine.yaml"
    assert loratools("merge", first, second, "--dry-run", "--save-recipe", saved, "-q")[0] == 0
    assert not saved.exists()


def test_max_error_saves_no_recipe(tmp_path, loratools):
    first, second = pair(tmp_path)
    saved = tmp_path / "mine.yaml"
    code, _, _ = loratools(
        "merge", first, second, "-o", tmp_path / "out", "--rank", 1, "--max-error", 0.001,
        "--save-recipe", saved,
    )  # fmt: skip
    assert code == 1
    assert not saved.exists()
    assert not (tmp_path / "out").exists()


def test_the_base_of_a_dora_is_in_the_recipe(tmp_path, loratools):
    dora, _ = saved_by_peft(tmp_path / "dora", "linear", 1, use_dora=True)
    base = saved_base(tmp_path / "base", "linear")
    code, _, err = loratools(
        "merge", dora, "--base", base, "-o", tmp_path / "out", "-q", "--rank", 12
    )
    assert (code, err) == (0, "")
    recipe = tmp_path / "out" / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["base"] == "../base"
    assert loratools("merge", "--recipe", recipe, "-o", tmp_path / "again", "-q")[0] == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_replacements_and_forced_bases_are_in_the_recipe(tmp_path, loratools):
    import numpy as np

    for index, name in enumerate(["one", "two"]):
        extra = {"head.weight": np.full((3, 20), index, DTYPES["f32"])}
        save(
            tmp_path / name, MODULES, seed=index, extra=extra, modules_to_save=["head"],
            base_model_name_or_path=f"some/{name}",
        )  # fmt: skip
    code, _, _ = loratools(
        "merge", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "out", "-q",
        "--replacements", "two", "--force-base",
    )  # fmt: skip
    assert code == 0
    recipe = tmp_path / "out" / "recipe.yaml"
    content = yaml.safe_load(recipe.read_text())
    assert (content["replacements"], content["force_base"]) == ("two", True)
    assert loratools("merge", "--recipe", recipe, "-o", tmp_path / "again", "-q")[0] == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_the_provenance_digests_the_recipe(tmp_path, loratools):
    import hashlib

    first, second = pair(tmp_path)
    loratools("merge", first, second, "-o", tmp_path / "out", "-q")
    digest = hashlib.sha256((tmp_path / "out" / "recipe.yaml").read_bytes()).hexdigest()
    statements = [
        p for p in (tmp_path / "out").iterdir() if "provenance" in p.name or "intoto" in p.name
    ]
    assert any(digest in json.dumps(json.loads(path.read_text())) for path in statements)
