"""`loratools merge` and `loratools methods` on the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from merge_cases import (
    MODULES,
    config_of,
    distance,
    linear,
    save,
    total_distance,
    true_deltas,
    weighted_sum,
)
from merge_definitions import elected, trimmed
from merge_models import saved_base, saved_by_peft
from told import found

from loratools.cli import cli
from loratools.operations.merge.methods import Method, get_method, registered_methods
from loratools_formats.disk.errors import OptionError

OURS = {
    "linear": ("span", {"normalize": False}),
    "cat": ("span", {}),
    "fedex": ("span", {}),
    "slerp": ("span", {"t": None}),
    "karcher": ("span", {"max_iter": 10, "tol": 1e-5}),
    "model_stock": ("span", {}),
    "knots": ("core", {"density", "majority_sign", "flavor", "lambda"}),
    "tsv": ("core", {"lambda"}),
    "iso": ("core", {"lambda"}),
    "ties": ("elementwise", {"density", "majority_sign", "flavor", "lambda"}),
    "magnitude_prune": ("elementwise", {"density", "flavor", "lambda"}),
    "dare_linear": ("elementwise", {"density", "flavor", "lambda"}),
    "dare_ties": ("elementwise", {"density", "majority_sign", "flavor", "lambda"}),
    "della": ("elementwise", {"density", "epsilon", "majority_sign", "flavor", "lambda"}),
    "breadcrumbs": ("elementwise", {"density", "gamma", "lambda"}),
    "sce": ("elementwise", {"density", "lambda"}),
}


def pair(folder, **config):
    return [
        save(folder / name, MODULES, seed=seed, **config) for seed, name in enumerate(["a", "b"])
    ]


def merged(loratools, folder, *arguments):
    """Merge into a fresh folder and return its true ΔW."""
    out = folder / f"out{len(list(folder.iterdir()))}"
    code, _, err = loratools("merge", *arguments, "-o", out, "-q")
    assert (code, err) == (0, "")
    return true_deltas(out)


def only_line(err):
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


# ------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("suffix", "weight"),
    [("", 1.0), (":0.7", 0.7), (":-0.3", -0.3), (":2", 2.0), (":1e-2", 0.01), (":-.5", -0.5)],
)
def test_a_weight_follows_the_path_after_a_colon(tmp_path, loratools, suffix, weight):
    first, second = pair(tmp_path)
    got = merged(loratools, tmp_path, f"{first}{suffix}", f"{second}:0.25")
    assert total_distance(got, weighted_sum([(first, weight), (second, 0.25)])) <= 1e-6


@pytest.mark.parametrize("name", ["with:colon", "ends:1", "a:b:0.5", "1:2:3"])
def test_existing_paths_may_hold_colons(tmp_path, loratools, name):
    first = save(tmp_path / name, MODULES, seed=1)
    second = save(tmp_path / "plain", MODULES, seed=2)
    got = merged(loratools, tmp_path, first, f"{second}:0.5")
    assert total_distance(got, weighted_sum([(first, 1.0), (second, 0.5)])) <= 1e-6
    got = merged(loratools, tmp_path, f"{first}:0.5", second)
    assert total_distance(got, weighted_sum([(first, 0.5), (second, 1.0)])) <= 1e-6


def test_relative_paths_and_the_current_folder(tmp_path, loratools, monkeypatch):
    first, second = pair(tmp_path)
    monkeypatch.chdir(first)
    code, _, err = loratools("merge", ".:0.5", "../b:0.5", "-o", "../out", "--json")
    assert (code, err) == (0, "note: wrote ../out\n")
    assert (
        total_distance(true_deltas(tmp_path / "out"), weighted_sum([(first, 0.5), (second, 0.5)]))
        <= 1e-6
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("{a}:much", "not a weight; got much; expected ADAPTER:NUMBER"),
        ("{a}:", "not a weight; got ; expected ADAPTER:NUMBER"),
        ("{a}:nan", "not a finite weight; got nan"),
        ("{a}:-inf", "not a finite weight; got -inf"),
        ("{a}/missing", "no such file or folder"),
        ("missing:0.5", "missing: no such file or folder"),
    ],
)
def test_wrong_references_are_named_in_one_line(tmp_path, loratools, argument, message):
    first, _ = pair(tmp_path)
    code, out, err = loratools("merge", argument.format(a=first), "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in only_line(err)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------- options


def test_options_reach_the_method(tmp_path, loratools):
    first, second = pair(tmp_path)
    got = merged(
        loratools, tmp_path, f"{first}:0.6", f"{second}:-0.4", "--method", "ties",
        "--density", "0.3", "--lambda", "2", "--majority-sign", "frequency",
        "--flavor", "mergekit", "--rank", "64",
    )  # fmt: skip
    one, other = true_deltas(first), true_deltas(second)
    for name, delta in got.items():
        x = np.stack([one[name], other[name]]).astype(np.float32)
        want = 2 * elected(trimmed(x, 0.3), (0.6, -0.4), "frequency", "mergekit")
        assert distance(delta, want) <= 1e-6


@pytest.mark.parametrize("name", ["max-iter", "max_iter"])
def test_any_parameter_can_be_given_by_name(tmp_path, loratools, name):
    first, second = pair(tmp_path)
    arguments = [first, f"{second}:3", "--method", "karcher"]
    none = merged(loratools, tmp_path, *arguments, "-p", f"{name}=0")
    many = merged(loratools, tmp_path, *arguments, "-p", f"{name}=50", "--param", "tol=1e-9")
    assert 1e-4 < total_distance(none, many) < 0.5


def test_lambda_is_a_parameter_by_its_name(tmp_path, loratools):
    first, second = pair(tmp_path)
    plain = merged(loratools, tmp_path, first, second, "--method", "tsv")
    for option in (["--lambda", "0.5"], ["-p", "lambda=0.5"]):
        half = merged(loratools, tmp_path, first, second, "--method", "tsv", *option)
        for name, delta in half.items():
            assert distance(delta, 0.5 * plain[name]) <= 1e-6


def test_normalize_and_weight_patterns(tmp_path, loratools):
    first, second = pair(tmp_path)
    got = merged(
        loratools, tmp_path, f"{first}:3", f"{second}:1", "--normalize",
        "--weight-pattern", "down=1,4",
    )  # fmt: skip
    one, other = true_deltas(first), true_deltas(second)
    assert (
        distance(got["layers.0.q"], 0.75 * one["layers.0.q"] + 0.25 * other["layers.0.q"]) <= 1e-6
    )
    want = 0.2 * one["layers.1.down"] + 0.8 * other["layers.1.down"]
    assert distance(got["layers.1.down"], want) <= 1e-6


def test_seeds_are_repeated_and_matter(tmp_path, loratools):
    first, second = pair(tmp_path)
    found = [
        merged(
            loratools, tmp_path, first, second, "--method", "dare_linear", "--seed", seed,
            "--rank", "64",
        )
        for seed in (0, 1, 0, 2**63)
    ]  # fmt: skip
    assert total_distance(found[0], found[2]) == 0.0
    assert total_distance(found[0], found[1]) > 0.1


def test_replacements_take_the_names_of_the_report(tmp_path, loratools):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    paths = []
    for index, folder in enumerate(["x", "y", "y"]):
        extra = {"head.weight": np.full((3, 20), index, np.float32)}
        name = "same" if index < 2 else "other"
        paths.append(
            save(tmp_path / folder / name, seed=index, extra=extra, modules_to_save=["head"])
        )
    code, _, err = loratools("merge", *paths, "-o", tmp_path / "out")
    assert code == 2
    assert "got same, same#2, other" in only_line(err)
    from merge_cases import stored

    for index, name in enumerate(["same", "same#2", "other"]):
        out = tmp_path / f"out{index}"
        assert loratools("merge", *paths, "-o", out, "-q", "--replacements", name)[0] == 0
        assert np.all(stored(out)["head.weight"] == index)


def test_a_base_for_doras(tmp_path, loratools):
    dora, changes = saved_by_peft(tmp_path / "dora", "linear", 1, use_dora=True)
    code, _, err = loratools("merge", dora, "-o", tmp_path / "out")
    assert code == 2
    assert "--base" in only_line(err)
    base = saved_base(tmp_path / "base", "linear")
    for given in (base, base / "model.safetensors"):
        got = merged(loratools, tmp_path, dora, "--base", given, "--rank", "20")
        assert total_distance(got, changes) <= 1e-6
    code, _, err = loratools("merge", dora, "--base", tmp_path / "nothing", "-o", tmp_path / "out")
    assert code == 2
    assert "no such file or folder" in only_line(err)


def test_different_base_models_are_noted_once_forced(tmp_path, loratools):
    paths = [
        save(tmp_path / name, seed=seed, base_model_name_or_path=f"some/{name}")
        for seed, name in enumerate(["one", "two"])
    ]
    code, _, err = loratools("merge", *paths, "-o", tmp_path / "out")
    assert code == 2
    assert "--force-base" in only_line(err)
    code, _, err = loratools("merge", *paths, "-o", tmp_path / "out", "--force-base")
    assert code == 0
    assert "note: the adapters name different base models: some/one, some/two\n" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no output given"),
        (["--method", "tyes", "--dry-run"], "no merge method named 'tyes'"),
        (["--density", "0.5", "--dry-run"], "method linear has no parameter density"),
        (["--method", "ties", "--density", "2", "--dry-run"], "density is a share"),
        (["--method", "ties", "--normalize", "--dry-run"], "no parameter normalize"),
        (
            ["--method", "ties", "-p", "density", "--dry-run"],
            "not a pair; got density",
        ),
        (["--method", "ties", "-p", "lambda=inf", "--dry-run"], "expected a finite number"),
        (
            ["--method", "karcher", "-p", "max_iter=inf", "--dry-run"],
            "expected a value of type int",
        ),
        (["--method", "della", "--flavor", "peft", "--dry-run"], "expected paper or mergekit"),
        (["--method", "sce", "--weight-pattern", "q=1,2", "--dry-run"], "takes no weights"),
        (["--space", "core", "--dry-run"], "--space core is for elementwise methods"),
        (["--method", "cat", "--rank", "4", "--dry-run"], "cat keeps all ranks"),
        (["--rank", "0", "--dry-run"], "rank is too small"),
        (["--rank", "4", "--energy", "0.5", "--dry-run"], "rank rules exclude each other"),
        (["--budget", "10B", "--dry-run"], "the budget is too small"),
        (["--weight-pattern", "q", "--dry-run"], "not a weight pattern"),
        (["--weight-pattern", "(=1", "--dry-run"], "not a regular expression"),
        (["--weight-pattern", "q=1,2,3", "--dry-run"], "wrong number of weights"),
        (["--replacements", "nobody", "--dry-run"], "no such way to settle replacements"),
        (["--recipe", "x.yaml"], "the recipe states this already"),
    ],
)
def test_wrong_options_give_one_line(tmp_path, loratools, arguments, message):
    code, out, err = loratools("merge", *pair(tmp_path), *arguments)
    assert (code, out) == (2, "")
    assert message in only_line(err)


def test_no_adapters_and_no_recipe(loratools):
    code, _, err = loratools("merge", "--dry-run")
    assert code == 2
    assert only_line(err) == "error: no adapters to merge. Name some, or pass --recipe FILE"


@pytest.mark.slow
def test_nan_is_one_line_without_warnings(tmp_path):
    broken = save(tmp_path / "a", extra={"layers.0.q.lora_A.weight": np.full((8, 20), np.nan)})
    huge = save(
        tmp_path / "b", dtype="f64", extra={"layers.0.q.lora_A.weight": np.full((8, 20), 1e300)}
    )
    for path, message in ((broken, "NaN or infinite values"), (huge, "overflows")):
        for method in ("linear", "ties", "tsv"):
            done = subprocess.run(
                [
                    sys.executable, "-c", "from loratools.cli import main; main()", "merge", path,
                    "-o", tmp_path / "out", "--method", method,
                ],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stdout) == (2, "")
            assert message in only_line(done.stderr)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------- reports


def test_the_json_report_has_the_documented_keys(tmp_path, loratools):
    first = save(tmp_path / "a", {"q": linear(24, 20, 4), "k": linear(9, 20, 4)}, seed=1)
    second = save(tmp_path / "b", {"q": linear(24, 20, 6)}, seed=2)
    out = tmp_path / "out"
    code, text, _ = loratools(
        "merge", f"{first}:0.5", f"{second}:-2", "-o", out, "--rank", "5", "--json"
    )
    assert code == 0
    report = json.loads(text)
    assert list(report) == [
        "schema", "operation", "version", "inputs", "output", "written", "seconds", "options",
        "notes", "findings", "method", "adapters", "relative_error", "energy",
        "factor_residual", "bytes_in", "bytes_out", "modules",
    ]  # fmt: skip
    assert report["schema"] == 1
    assert (report["operation"], report["method"]) == ("merge", "linear")
    assert report["adapters"] == [{"name": "a", "weight": 0.5}, {"name": "b", "weight": -2.0}]
    assert report["factor_residual"] is None
    weights = "adapter_model.safetensors"
    assert report["bytes_in"] == sum((p / weights).stat().st_size for p in (first, second))
    assert report["bytes_out"] == (out / weights).stat().st_size
    k, q = report["modules"]
    assert list(k) == ["name", "ranks_in", "rank_out", "energy", "relative_error", "absent"]
    assert (k["name"], k["ranks_in"], k["rank_out"], k["absent"]) == ("k", [4, None], 4, ["b"])
    assert (q["name"], q["ranks_in"], q["rank_out"], q["absent"]) == ("q", [4, 6], 5, [])
    want = weighted_sum([(first, 0.5), (second, -2.0)])
    lost = total_distance(true_deltas(out), want)
    assert report["relative_error"] == pytest.approx(lost, rel=1e-4)
    assert report["energy"] == pytest.approx(1 - lost**2, rel=1e-6)


def test_the_report_tells_ranks_absence_energy_and_error(tmp_path, loratools):
    first = save(tmp_path / "a", {"q": linear(24, 20, 4), "k": linear(9, 20, 4)}, seed=1)
    second = save(tmp_path / "b", {"q": linear(24, 20, 6)}, seed=2)
    code, out, err = loratools("merge", first, second, "-o", tmp_path / "out", "--method", "ties")
    assert code == 0
    assert "4 + – → 4" in out
    assert "4 + 6 → 6" in out
    assert "energy kept: " in out
    assert "relative error: " in out
    assert "size: " in out
    assert err.splitlines() == [
        "note: b lacks 1 of 2 modules; they count as zero",
        f"note: wrote {tmp_path / 'out'}",
    ]


def test_fedex_reports_what_averaging_factors_would_lose(tmp_path, loratools):
    first, second = pair(tmp_path)
    code, out, _ = loratools("merge", first, second, "--method", "fedex", "--dry-run")
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("error of averaging factors"))
    assert 0.5 < float(line.rpartition(" ")[2]) < 2.0
    _, text, _ = loratools("merge", first, second, "--method", "fedex", "--dry-run", "--json")
    assert json.loads(text)["factor_residual"] == pytest.approx(
        float(line.rpartition(" ")[2]), rel=1e-2
    )


def test_quiet_prints_nothing_and_a_dry_run_writes_nothing(tmp_path, loratools):
    first, second = pair(tmp_path)
    assert loratools("merge", first, second, "-o", tmp_path / "out", "-q") == (0, "", "")
    code, dry, err = loratools("merge", first, second, "--dry-run", "--json")
    assert (code, err) == (0, "note: dry run, nothing was written\n")
    _, wet, _ = loratools("merge", first, second, "-o", tmp_path / "again", "--json")
    place = ("output", "written")
    assert found(dry, *place) == found(wet, *place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "again", "b", "out"]


def test_max_error_exits_with_1_and_writes_nothing(tmp_path, loratools):
    first, second = pair(tmp_path)
    out = tmp_path / "out"
    code, text, err = loratools(
        "merge", first, second, "-o", out, "--rank", "2", "--max-error", "0.01", "--json"
    )
    assert code == 1
    assert "above --max-error 0.01; nothing was written" in err
    assert json.loads(text)["relative_error"] > 0.01
    assert not out.exists()
    # Weights 0.7 need rounding to float32, which is not 0, however small.
    code, _, _ = loratools("merge", f"{first}:0.7", second, "-o", out, "--max-error", "0", "-q")
    assert code == 1
    assert loratools("merge", first, second, "-o", out, "--max-error", "0", "-q")[0] == 0


def test_existing_outputs_and_inputs_as_outputs(tmp_path, loratools):
    first, second = pair(tmp_path)
    out = tmp_path / "out"
    assert loratools("merge", first, second, "-o", out, "-q")[0] == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    code, _, err = loratools("merge", first, f"{second}:2", "-o", out)
    assert code == 2
    assert "--overwrite" in only_line(err)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert loratools("merge", first, f"{second}:2", "-o", out, "--overwrite", "-q")[0] == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before
    code, _, err = loratools("merge", first, second, "-o", second / "inside")
    assert code == 2
    assert "lies inside the input or around it" in only_line(err)


def test_merging_merges_can_go_on(tmp_path, loratools):
    first, second = pair(tmp_path, lora_alpha=11)
    third = save(tmp_path / "c", MODULES, seed=7, use_rslora=True)
    one = tmp_path / "one"
    assert loratools("merge", f"{first}:0.7", f"{second}:0.3", "-o", one, "-q")[0] == 0
    got = merged(loratools, tmp_path, one, f"{third}:-0.5")
    want = weighted_sum([(first, 0.7), (second, 0.3), (third, -0.5)])
    assert total_distance(got, want) <= 1e-6
    assert (one / "recipe.yaml").exists()


def test_provenance_is_in_the_output(tmp_path, loratools):
    first, second = pair(tmp_path)
    out = tmp_path / "out"
    loratools("merge", f"{first}:0.7", second, "-o", out, "-q", "--method", "ties", "--lambda", "2")
    _, text, _ = loratools("info", out, "--json")
    provenance = json.loads(text)["provenance"]
    assert provenance["loratools.operation"] == "merge"
    options = json.loads(provenance["loratools.options"])
    assert options["weights"] == [0.7, 1.0]
    assert options["parameters"] == {"lambda_": 2.0}


def test_the_first_adapters_card_is_not_taken_over(tmp_path, loratools):
    first, second = pair(tmp_path)
    (first / "README.md").write_text("about the first")
    (first / "tokenizer.json").write_text("{}")
    merged(loratools, tmp_path, first, second)
    (out,) = (path for path in tmp_path.iterdir() if path.name.startswith("out"))
    assert not (out / "README.md").exists()
    assert (out / "tokenizer.json").read_text() == "{}"


def test_merge_on_the_cpu_imports_no_torch(tmp_path):
    arguments = ["merge", *map(str, pair(tmp_path)), "--method", "ties", "-q", "--dry-run"]
    code = (
        "import sys\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "from loratools.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "scipy", "peft", "mergekit", "transformers"}


def test_the_help_says_that_core_space_is_another_method():
    text = " ".join(CliRunner().invoke(cli, ["merge", "--help"]).output.split())
    assert "another method than on full weights" in text
    for option in (
        "--method", "--density", "--lambda", "--majority-sign", "--flavor", "--normalize",
        "--space", "--weight-pattern", "--replacements", "--base", "--force-base", "--recipe",
        "--save-recipe", "--rank", "--energy", "--budget", "--seed",
    ):  # fmt: skip
        assert f"{option} " in text or f"{option}," in text


# ------------------------------------------------------------------------- methods


def test_methods_lists_all_with_class_parameters_and_paper(loratools):
    code, text, _ = loratools("methods", "--json")
    assert code == 0
    listed = {entry["name"]: entry for entry in json.loads(text)["methods"]}
    ours = {name: entry for name, entry in listed.items() if entry["package"] == "loratools"}
    assert ours.keys() == OURS.keys()
    for name, (kind, parameters) in OURS.items():
        entry = ours[name]
        assert entry["class"] == kind
        if isinstance(parameters, dict):
            assert entry["parameters"] == parameters
        assert set(entry["parameters"]) == set(parameters)
        assert entry["paper"]
        assert entry["summary"]
        assert (entry["broken"], entry["error"]) == (False, None)
    code, out, _ = loratools("methods")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert rows.keys() == OURS.keys()
    assert "2306.01708" in rows["ties"]
    assert "density=0.2, majority_sign=total, flavor=peft, lambda=1.0" in rows["ties"]


def test_summaries_are_one_line_and_functions_say_what_they_do():
    for entry in registered_methods():
        method = entry.method
        assert isinstance(method, Method)
        assert method.name == entry.name
        assert "\n" not in method.summary
        assert method.function.__doc__


def test_broken_methods_stay_visible_and_stop_nothing(tmp_path, loratools, plugins):
    plugins("broken")
    _, text, _ = loratools("methods", "--json")
    listed = {entry["name"]: entry for entry in json.loads(text)["methods"]}
    assert listed.keys() >= OURS.keys()
    messages = {
        "broken_import": "a library these methods need is missing",
        "broken_exit": "not on this machine",
        "broken_type": "is a str",
    }
    for name, message in messages.items():
        entry = listed[name]
        assert (entry["broken"], entry["class"], entry["parameters"]) == (True, None, {})
        assert entry["package"] == "loratools-broken-methods"
        assert message in entry["error"]
    code, out, err = loratools("methods")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[-3:]] == sorted(messages)
    first, second = pair(tmp_path)
    code, _, err = loratools("merge", first, second, "--method", "broken_import", "--dry-run")
    assert code == 2
    assert "merge method 'broken_import' is broken; got ImportError" in only_line(err)
    assert loratools("merge", first, second, "--dry-run", "-q")[0] == 0


def test_third_party_methods_of_each_class_work(tmp_path, loratools, plugins):
    plugins("demo")
    first, second = pair(tmp_path)
    pairs = [(first, 1.0), (second, 0.5)]
    given = [first, f"{second}:0.5"]
    got = merged(loratools, tmp_path, *given, "--method", "demo_alternate")
    assert total_distance(got, weighted_sum([(first, 1.0), (second, -0.5)])) <= 1e-6
    got = merged(
        loratools,
        tmp_path,
        *given,
        "--method",
        "demo_alternate",
        "-p",
        "flip=true",
        "-p",
        "factor=2",
    )
    assert total_distance(got, weighted_sum([(first, -2.0), (second, 1.0)])) <= 1e-6
    got = merged(loratools, tmp_path, *given, "--method", "demo_first_basis")
    assert total_distance(got, weighted_sum(pairs)) <= 1e-6
    got = merged(loratools, tmp_path, *given, "--method", "demo_largest", "--rank", "64")
    for name, delta in got.items():
        x = np.stack([true_deltas(first)[name], 0.5 * true_deltas(second)[name]])
        want = np.where(np.abs(x[0]) >= np.abs(x[1]), x[0], x[1])
        assert distance(delta, want) <= 1e-6
    cored = merged(loratools, tmp_path, *given, "--method", "demo_largest", "--space", "core")
    assert cored.keys() == got.keys()


def test_third_party_methods_are_listed_and_checked(tmp_path, loratools, plugins):
    plugins("demo")
    _, text, _ = loratools("methods", "--json")
    listed = {entry["name"]: entry for entry in json.loads(text)["methods"]}
    entry = listed["demo_alternate"]
    assert (entry["class"], entry["package"]) == ("span", "loratools-demo-methods")
    assert entry["parameters"] == {"flip": False, "factor": 1.0}
    assert entry["paper"] == "nobody 2026"
    assert listed["demo_largest"]["parameters"] == {"lambda": 1.0}
    first, second = pair(tmp_path)
    given = ["merge", "--method", "demo_alternate", "--dry-run"]
    for arguments, message in (
        ([first], "wrong number of adapters; got 1; expected at least 2"),
        ([first, second, "-p", "flip=maybe"], "demo_alternate: flip; got maybe"),
        ([first, second, "-p", "fctor=1"], "Did you mean factor"),
    ):
        code, _, err = loratools(*given, *arguments)
        assert code == 2
        assert message in only_line(err)


def test_a_third_party_method_has_recipes_too(tmp_path, loratools, plugins):
    plugins("demo")
    first, second = pair(tmp_path)
    out, again = tmp_path / "out", tmp_path / "again"
    arguments = ["--method", "demo_alternate", "-p", "flip=true"]
    assert loratools("merge", first, second, "-o", out, "-q", *arguments)[0] == 0
    assert loratools("merge", "--recipe", out / "recipe.yaml", "-o", again, "-q")[0] == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }


def test_a_name_claimed_twice_is_refused(plugins):
    plugins("demo", "rival")
    with pytest.raises(OptionError, match="several packages: loratools-demo-methods, loratools-r"):
        get_method("demo_alternate")
    assert get_method("demo_largest").kind == "elementwise"


def test_config_of_a_merge_has_no_traces_of_training(tmp_path, loratools):
    first = save(tmp_path / "a", MODULES, seed=1, init_lora_weights="gaussian", lora_dropout=0.1)
    second = save(tmp_path / "b", MODULES, seed=2, use_rslora=True)
    merged(loratools, tmp_path, f"{first}:0.7", second)
    (out,) = (path for path in tmp_path.iterdir() if path.name.startswith("out"))
    config = config_of(out)
    assert not config.get("use_rslora")
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"]) == (16, 16)
