"""`import loratools as lt`: the same results as the command line, typed, documented, light."""

import doctest
import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path

import make_schemas
import make_stub
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from validation import faults

import loratools as lt
from loratools.algebra.ranks import RankRule
from loratools.cli import cli
from loratools_formats import write_adapter
from loratools_formats.disk.errors import (
    InexactError,
    LossyError,
    OptionError,
    OutputExistsError,
    ResultError,
    UnsupportedError,
)

LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"
LORA, RSLORA, DORA, MODEL = (LLAMA / name for name in ("lora", "rslora", "dora", "model"))
MODULE = "model.layers.0.self_attn.q_proj"
FUNCTIONS = [name for name in lt.__all__ if inspect.isfunction(getattr(lt, name))]
RESULTS = ("check", "compare", "compare_bases", "convert", "dequantize", "extract", "formats",
           "fuse", "info", "info_base", "merge", "methods", "plan_squeeze", "provenance",
           "quantize", "repair", "replay", "rule", "run", "spectrum", "squeeze", "to_dora",
           "to_lora", "verify", "write")  # fmt: skip


def command_line(*arguments):
    """Return the exit code and the JSON object that a command prints."""
    done = CliRunner().invoke(cli, [*map(str, arguments), "--json"], standalone_mode=False)
    assert done.exception is None, done.exception
    return done.return_value or 0, json.loads(done.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a fused and a four-bit model."""
    folder = tmp_path_factory.mktemp("made")
    lt.fuse(MODEL, LORA, output=folder / "fused")
    lt.quantize(MODEL, output=folder / "nf4")
    return folder


def recipe(folder):
    """Return a recipe of one step in a folder."""
    text = f"version: 1\nvariables: {{rank: 8}}\nsteps: [{{name: small, do: squeeze, source: {LORA}"
    path = folder / "recipe.yaml"
    path.write_text(f"{text}, rank: '${{rank}}'}}]\n")
    return path


# Each case: what is called, and the command line that says it too. OUT stands for a new path.
OUT = object()
CASES = {
    "check": (
        lambda m, o: lt.check([LORA, RSLORA], target=["vllm"], base=MODEL),
        lambda m: ["check", LORA, RSLORA, "--target=vllm", "--base", MODEL, "--no-config"],
    ),
    "rule": (lambda m, o: lt.rule("scale-dropped"), lambda m: ["rule", "scale-dropped"]),
    "info": (lambda m, o: lt.info(LORA), lambda m: ["info", LORA]),
    "info, a base": (lambda m, o: lt.info_base(m / "nf4"), lambda m: ["info", m / "nf4"]),
    "formats": (lambda m, o: lt.formats(), lambda m: ["formats"]),
    "methods": (lambda m, o: lt.methods(), lambda m: ["methods"]),
    "plan-squeeze": (
        lambda m, o: lt.plan_squeeze(start=64, target=8, steps=3000, allot="rank"),
        lambda m: ["plan-squeeze", "--from=64", "--to=8", "--steps=3000", "--allot=rank"],
    ),
    "squeeze": (
        lambda m, o: lt.squeeze(LORA, energy=0.9, dtype="f32", include="mlp", output=o),
        lambda m: ["squeeze", LORA, "--energy=0.9", "--dtype=f32", "--include=mlp", "-o", OUT],
    ),
    "squeeze, choices": (lambda m, o: lt.squeeze_choices(LORA), lambda m: ["squeeze", LORA]),
    "merge": (
        lambda m, o: lt.merge({LORA: 0.7, RSLORA: 0.3}, method="ties", density=0.3, rank=8),
        lambda m: ["merge", f"{LORA}:0.7", f"{RSLORA}:0.3", "--method=ties", "--density=0.3",
                   "--rank=8", "--dry-run"],
    ),
    "to-lora": (
        lambda m, o: lt.to_lora(DORA, base=MODEL, rank=4),
        lambda m: ["to-lora", DORA, "--base", MODEL, "--rank=4", "--dry-run"],
    ),
    "to-lora, choices": (
        lambda m, o: lt.to_lora_choices(DORA, base=MODEL),
        lambda m: ["to-lora", DORA, "--base", MODEL],
    ),
    "to-dora": (
        lambda m, o: lt.to_dora(LORA, base=MODEL, output=o),
        lambda m: ["to-dora", LORA, "--base", MODEL, "-o", OUT],
    ),
    "extract": (
        lambda m, o: lt.extract(MODEL, m / "fused", rank=4),
        lambda m: ["extract", MODEL, m / "fused", "--rank=4", "--dry-run"],
    ),
    "extract, choices": (
        lambda m, o: lt.extract_choices(MODEL, m / "fused"),
        lambda m: ["extract", MODEL, m / "fused"],
    ),
    "convert": (
        lambda m, o: lt.convert(LORA, to="mlx", output=o),
        lambda m: ["convert", LORA, "-o", OUT, "--to=mlx"],
    ),
    "convert, dry run": (
        lambda m, o: lt.convert(LORA, to="mlx"),
        lambda m: ["convert", LORA, "--to=mlx", "--dry-run"],
    ),
    "fuse": (
        lambda m, o: lt.fuse(MODEL, {LORA: 0.5}, output=o),
        lambda m: ["fuse", MODEL, f"{LORA}:0.5", "-o", OUT],
    ),
    "fuse, dry run": (
        lambda m, o: lt.fuse(MODEL, LORA),
        lambda m: ["fuse", MODEL, LORA, "--dry-run"],
    ),
    "spectrum": (
        lambda m, o: lt.spectrum(DORA, base=MODEL, entries=True, intruders=4, include="layers.0"),
        lambda m: ["spectrum", DORA, "--base", MODEL, "--entries", "--intruders=4",
                   "--include=layers.0"],
    ),
    "spectrum, factors alone": (lambda m, o: lt.spectrum(DORA), lambda m: ["spectrum", DORA]),
    "compare": (
        lambda m, o: lt.compare([LORA, RSLORA], include="layers.0", exact=True),
        lambda m: ["compare", LORA, RSLORA, "--include=layers.0", "--exact"],
    ),
    "compare, a shelf": (
        lambda m, o: lt.compare([LORA, RSLORA, DORA], base=MODEL),
        lambda m: ["compare", LORA, RSLORA, DORA, "--base", MODEL],
    ),
    "compare, bases": (
        lambda m, o: lt.compare_bases(LORA, MODEL, m / "fused", include="mlp"),
        lambda m: ["compare", LORA, "--bases", MODEL, m / "fused", "--include=mlp"],
    ),
    "repair": (
        lambda m, o: lt.repair(LORA, base=MODEL, lambda_=0.5, rebalance=True, include="mlp",
                               output=o),
        lambda m: ["repair", LORA, "--base", MODEL, "--lambda=0.5", "--rebalance", "--include=mlp",
                   "-o", OUT],
    ),
    "verify": (
        lambda m, o: lt.verify(m / "fused", base=MODEL, adapters=LORA),
        lambda m: ["verify", m / "fused", "--base", MODEL, "--adapter", LORA],
    ),
    "quantize": (
        lambda m, o: lt.quantize(MODEL, quant_type="fp4"),
        lambda m: ["quantize", MODEL, "--quant-type=fp4", "--dry-run"],
    ),
    "provenance": (lambda m, o: lt.provenance(m / "fused"), lambda m: ["provenance", m / "fused"]),
    "replay": (
        lambda m, o: lt.replay(m / "fused", input=[LLAMA]),
        lambda m: ["replay", m / "fused", "--input", LLAMA],
    ),
    "run": (
        lambda m, o: lt.run(recipe(m), dry_run=True, set={"rank": "4"}),
        lambda m: ["run", recipe(m), "--dry-run", "--set=rank=4"],
    ),
    "fleet": (
        lambda m, o: lt.fleet("info", str(LLAMA / "*lora"), dry_run=True),
        lambda m: ["fleet", "info", LLAMA / "*lora", "--dry-run"],
    ),
    "dequantize": (
        lambda m, o: lt.dequantize(m / "nf4", dtype="f16"),
        lambda m: ["dequantize", m / "nf4", "--dtype=f16", "--dry-run"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_function_gives_what_the_command_prints(case, made, tmp_path):
    function, arguments = CASES[case]
    (tmp_path / "python").mkdir()
    (tmp_path / "shell").mkdir()
    result = function(made, tmp_path / "python" / "out").to_dict()
    given = [tmp_path / "shell" / "out" if one is OUT else one for one in arguments(made)]
    _, printed = command_line(*given)
    known = json.loads(json.dumps(result))
    places = {str(tmp_path / where / "out") for where in ("python", "shell")}
    assert known.pop("output") in {printed["output"], *places}
    assert all(0 <= one["seconds"] < 600 for one in (known, printed))
    known |= {"output": printed["output"], "seconds": printed["seconds"]}
    assert known == printed
    schema = json.loads(make_schemas.schemas()[result["operation"]])
    assert faults(printed, schema) == []
    assert faults({**printed, "schema": 2}, schema) != []
    assert faults({**printed, "more": None}, schema) != []


def test_every_command_has_a_case():
    cases = {name.partition(",")[0] for name in CASES}
    assert cases == set(cli.list_commands(None)) - {"push"}  # tests/hub has its own


def test_the_files_made_from_the_code_are_up_to_date():
    assert make_stub.PATH.read_text() == make_stub.stub(), "run tests/interface/make_stub.py"
    written = {path.stem: path.read_text() for path in make_schemas.FOLDER.iterdir()}
    assert written == make_schemas.schemas(), "run tests/interface/make_schemas.py"


def test_importing_imports_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import loratools; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("loratools")}
    assert ours == {"loratools"}
    assert not {"numpy", "click", "typing", "inspect"} & set(done.stdout.split())


def test_every_name_can_be_had_and_is_listed():
    assert set(lt.__all__) <= set(dir(lt))
    for name in lt.__all__:
        assert getattr(lt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'squeze'"):
        lt.squeze  # noqa: B018
    stub = make_stub.PATH.read_text()
    assert all(f"def {name}(" in stub for name in FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_does_and_has_an_example_that_runs(name, monkeypatch):
    monkeypatch.chdir(LLAMA.parents[1])
    function = getattr(lt, name)
    (found,) = doctest.DocTestFinder().find(function, name, globs={}, module=False)
    assert found.examples
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=flags, verbose=False).run(found, out=failures.append)
    assert not failures, "".join(failures)
    options = inspect.signature(function).parameters
    assert all(f"    {option}: " in function.__doc__ for option in options)
    assert name in ("formats", "methods") or "Raises:" in function.__doc__


def test_options_are_those_of_the_declarations():
    options = inspect.signature(lt.squeeze).parameters
    assert {"rank", "energy", "budget", "rank_pattern", "svd", "workers", "include"} <= set(options)
    assert options["svd"].annotation == typing.Literal["exact", "rsvd"]
    assert all(p.kind is p.KEYWORD_ONLY for name, p in options.items() if name != "source")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: lt.squeeze(LORA, 4), TypeError, r"takes source by position; .* such as rank=4"),
        (lambda: lt.convert(LORA, "x.gguf"), TypeError, r"such as output='x.gguf'"),
        (lambda: lt.verify("m", "b"), TypeError, r"takes fused by position; .* such as base='b'"),
        (lambda: lt.merge([LORA], [0.5]), TypeError, r"weights go with their adapters: \{adapter"),
        (lambda: lt.fuse("m", LORA, weights=[1]), TypeError, r"no option 'weights'; .*adapters"),
        (lambda: lt.squeeze(LORA, rnk=4), TypeError, r"no option 'rnk'; did you mean 'rank'"),
        (lambda: lt.squeeze(LORA, rank="4"), OptionError, r"rank is of the wrong type.*whole"),
        (lambda: lt.squeeze(LORA, rank=True), OptionError, r"rank is of the wrong type"),
        (lambda: lt.squeeze(LORA), OptionError, r"no rule for the ranks"),
        (lambda: lt.squeeze(7, rank=4), OptionError, r"not an adapter; got 7"),
        (lambda: lt.squeeze(LORA, rank=4, output=""), OptionError, r"output is an empty path"),
        (lambda: lt.squeeze(LORA, rank=4, dtype="i8"), OptionError, r"dtype.*i8.*f32 or f16"),
        (lambda: lt.squeeze(lt.read(LORA), rank=4, format="peft"), OptionError, r"read already"),
        (lambda: lt.merge([]), OptionError, r"no adapters"),
        (lambda: lt.merge({LORA: float("nan")}), OptionError, r"not a finite weight"),
        (lambda: lt.merge({LORA: "1"}), OptionError, r"not an adapter with its weight"),
        (lambda: lt.fuse(7, LORA), OptionError, r"not a base model; got 7"),
        (lambda: lt.fuse(MODEL, LORA, fallback="q8_0"), OptionError, r"fallback.*no meaning"),
        (lambda: lt.delta(lt.read(LORA), "q"), OptionError, r"no such module; got q"),
        (lambda: lt.delta(lt.read(DORA), MODULE), UnsupportedError, r"depends on the base model"),
        (lambda: lt.factors(lt.read(DORA), MODULE), UnsupportedError, r"not a product of two"),
        (lambda: lt.convert(LORA), OptionError, r"no output given"),
        (lambda: RankRule(rank="8"), OptionError, r"rank is of the wrong type; got '8'"),
        (lambda: RankRule(budget="much"), OptionError, r"not a budget; got much"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_values_that_mean_the_right_thing_are_taken():
    assert RankRule(budget="30%").budget.share == 0.3
    rank = lt.squeeze(str(LORA), rank=np.int64(8), rank_pattern={"q_proj$": 2}).modules
    assert {m.rank_out for m in rank} == {8, 2}
    whole, read = lt.squeeze(LORA, rule=RankRule(rank=8)), lt.squeeze(lt.read(LORA), rank=8)
    assert whole.content() == read.content()
    assert whole.ran.inputs == read.ran.inputs == (str(LORA),)
    assert whole.ran.options == read.ran.options == {"rank": 8}


def test_nothing_is_printed_and_nothing_written_unasked(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lt.squeeze(LORA, rank=4)
    lt.merge([LORA, RSLORA], rank=4)
    lt.fuse(MODEL, LORA)
    lt.convert(LORA, to="mlx")
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_result_writes_what_output_writes(tmp_path):
    lt.squeeze(LORA, rank=4, output=tmp_path / "a")
    assert lt.squeeze(LORA, rank=4).write(tmp_path / "b") == tmp_path / "b"
    for name in ("adapter_model.safetensors", "adapter_config.json", "provenance.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(OutputExistsError):
        lt.squeeze(LORA, rank=4).write(tmp_path / "b")
    lt.fuse(MODEL, LORA, output=tmp_path / "fused")
    assert lt.fuse(MODEL, LORA).write(tmp_path / "planned").relative_change > 0
    written = [tmp_path / name / "model.safetensors" for name in ("fused", "planned")]
    assert written[0].read_bytes() == written[1].read_bytes()


def test_an_error_above_the_limit_carries_the_result_and_writes_nothing(tmp_path):
    with pytest.raises(InexactError) as caught:
        lt.squeeze(LORA, rank=2, max_error=0.01, output=tmp_path / "out")
    assert isinstance(caught.value, ResultError | ArithmeticError)
    assert caught.value.result.relative_error > 0.01
    assert not (tmp_path / "out").exists()


def test_a_merge_is_repeated_from_its_recipe(tmp_path):
    lt.merge({LORA: 0.7, RSLORA: 0.3}, rank=8, output=tmp_path / "a")
    lt.merge(tmp_path / "a" / "recipe.yaml", output=tmp_path / "b")
    weights = [tmp_path / name / "adapter_model.safetensors" for name in "ab"]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(OptionError, match="the recipe states all settings"):
        lt.merge(tmp_path / "a" / "recipe.yaml", rank=4)


def test_a_merge_of_what_is_in_no_file_has_no_recipe_and_records_the_steps(tmp_path):
    small = lt.squeeze(LORA, rank=4).adapter
    result = lt.merge([small, RSLORA], rank=8, output=tmp_path / "out")
    assert result.recipe is None
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    with pytest.raises(OptionError, match="no recipe"):
        result.write_recipe(tmp_path / "recipe.yaml")
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())["predicate"]
    assert record["steps"]["0"]["operation"] == "squeeze"
    assert "1" not in record["steps"]


def test_writing_in_another_format_converts_and_refuses_losses(make_folder, tmp_path):
    extra = {"base_model.model.lm_head.weight": np.ones((4, 20), np.float32)}
    source = lt.read(make_folder(extra=extra, modules_to_save=["lm_head"]))
    with pytest.raises(LossyError, match="lm_head") as caught:
        lt.write(source, tmp_path / "mlx", format="mlx")
    assert isinstance(caught.value, NotImplementedError)
    assert caught.value.result.losses
    assert not (tmp_path / "mlx").exists()
    written = lt.write(source, tmp_path / "mlx", format="mlx", allow_lossy=True)
    assert (written.format, written.relative_error) == ("mlx", 0.0)
    assert written.losses[0].name.endswith("lm_head.weight")
    assert not lt.read(tmp_path / "mlx").replacements
    with pytest.raises(UnsupportedError, match="Convert it first"):
        write_adapter(source, tmp_path / "lost", "mlx")
    assert lt.write(source, tmp_path / "same").format == "peft"
    assert lt.read(tmp_path / "same").replacements


def test_a_change_is_the_product_of_its_factors_and_what_fusing_adds(tmp_path):
    adapter = lt.read(LORA)
    b, a = lt.factors(adapter, MODULE)
    change = adapter.modules[MODULE]
    assert np.array_equal(lt.delta(adapter, MODULE), b @ a)
    assert lt.delta(adapter, MODULE, dtype=np.float32).dtype == np.float32
    assert change is adapter.modules[MODULE]
    before = load_file(MODEL / "model.safetensors")[f"{MODULE}.weight"].astype(np.float64)
    for source in (LORA, DORA):
        lt.fuse(MODEL, source, dtype="f32", output=tmp_path / source.name)
        after = load_file(tmp_path / source.name / "model.safetensors")[f"{MODULE}.weight"]
        dense = lt.delta(lt.read(source), MODULE, base=MODEL)
        # Fusing rounds W + ΔW to float32 once, and computes in float32 where that is enough.
        assert np.abs(after - before - dense).max() <= 4 * 2.0**-23 * np.abs(after).max()


def test_reprs_are_short_and_tensors_are_arrays():
    adapter = lt.read(LORA)
    assert repr(adapter).startswith("Adapter(peft, 28 modules, lora, rank 32, scale 2, ")
    assert len(repr(lt.squeeze(LORA, rank=8))) < 300
    tensor = next(adapter.tensors())
    assert len(repr(adapter.modules[MODULE])) < 80
    assert repr(tensor).endswith(", BF16, (32, 352))")
    assert np.array_equal(np.asarray(tensor), tensor.load())
    assert np.asarray(tensor, np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="copies"):
        np.array(tensor, copy=False)
    table = adapter._repr_html_()
    assert table.count("<tr>") == 21
    assert "and 8 more" in table
