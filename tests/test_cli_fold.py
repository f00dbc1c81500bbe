"""The commands to-lora, to-dora and extract: exit codes, streams, JSON, and what they import."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_cli import imported_by, loratools

from loratools.cli import cli

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"
DORA, LORA, BASE = TINY / "dora", TINY / "lora", TINY / "model"


def run(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), standalone_mode=False)


def test_to_lora_writes_and_reports(tmp_path):
    done = loratools(
        "to-lora", DORA, "--base", BASE, "-o", tmp_path / "out", "--rank", "8", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == 1
    assert set(report) == {
        "schema",
        "operation",
        "version",
        "inputs",
        "output",
        "options",
        "written",
        "seconds",
        "findings",
        "notes",
        "relative_error",
        "bytes_in",
        "bytes_out",
        "cautions",
        "modules",
    }
    module = report["modules"][0]
    assert set(module) == {
        "name",
        "kind",
        "rank",
        "energy",
        "relative_error",
        "low_rank_energy",
        "rescaling_energy",
    }
    assert report["bytes_out"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is False
    statement = json.loads((tmp_path / "out" / "provenance.json").read_text())
    roles = [entry["role"] for entry in statement["predicate"]["inputs"]]
    assert roles == ["base", "base", "adapter", "adapter"]
    assert "wrote" in done.stderr


def test_without_a_rule_it_prints_the_choices_and_writes_nothing(tmp_path):
    done = loratools("to-lora", DORA, "--base", BASE, "-o", tmp_path / "out", "--json")
    assert done.returncode == 2
    report = json.loads(done.stdout)
    assert [row["rank"] for row in report["choices"]] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert 0 < report["rescaling_energy"] < report["low_rank_energy"] < 1
    assert "loratools fuse" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes_whatever_the_threads(tmp_path):
    made = []
    for name, workers in (("one", "1"), ("two", "3")):
        out = tmp_path / name
        arguments = ["to-lora", DORA, "--base", BASE, "-o", out, "--rank", "4", "-q"]
        assert loratools(*arguments, "--workers", workers).returncode == 0
        made.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert made[0] == made[1]


def test_a_budget_is_kept(tmp_path):
    done = loratools(
        "to-lora", DORA, "--base", BASE, "-o", tmp_path / "out", "--budget", "200kB", "--json"
    )
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert 180_000 < size <= 200_000


def test_max_error_writes_nothing(tmp_path):
    arguments = ["--base", BASE, "-o", tmp_path / "out", "--rank", "2", "--max-error", "0.1"]
    done = loratools("to-lora", DORA, *arguments)
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()


ERRORS = {
    "no base": (["to-lora", DORA, "--rank", "2", "-o", "x"], "--base"),
    "no such setting": (["to-lora", LORA, "--set", "alpha=2", "--dry-run"], "alpha"),
    "whole in PEFT": (
        ["to-lora", DORA, "--base", BASE, "--exact", "-o", "x"],
        "no full differences",
    ),
    "whole at a rank": (
        ["to-lora", DORA, "--base", BASE, "--exact", "--rank", "2", "--dry-run"],
        "--exact",
    ),
    "not a setting": (["to-lora", LORA, "--set", "alpha", "--dry-run"], "KEY=VALUE"),
    "not the base": (
        ["to-lora", DORA, "--base", LORA, "--rank", "2", "--dry-run"],
        "is an adapter, not a model",
    ),
    "a DoRA": (["to-dora", DORA, "--base", BASE, "--dry-run"], "DoRA already"),
    "the same": (["extract", BASE, BASE, "--rank", "2", "--dry-run"], "nothing to extract"),
    "no workers": (["to-dora", LORA, "--base", BASE, "--workers", "0", "--dry-run"], "workers"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_gives_one_line(tmp_path, name):
    arguments, message = ERRORS[name]
    done = loratools(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_to_dora_and_extract_report_in_json(tmp_path):
    done = loratools("to-dora", LORA, "--base", BASE, "-o", tmp_path / "dora", "--json")
    report = json.loads(done.stdout)
    assert report["operation"] == "to-dora"
    told = {"name", "rank", "outputs", "least", "largest", "relative_error"}
    assert set(report["modules"][0]) == told
    assert 1e-8 < report["relative_error"] < 1e-6
    fused = loratools("fuse", BASE, tmp_path / "dora", "-o", tmp_path / "tuned", "-q")
    assert fused.returncode == 0, fused.stderr
    done = loratools(
        "extract", BASE, tmp_path / "tuned", "-o", tmp_path / "out", "--rank", "4", "--json"
    )
    report = json.loads(done.stdout)
    assert report["operation"] == "extract"
    assert set(report["modules"][0]) == {"name", "rank", "energy", "relative_error"}
    assert report["unchanged"] == 11
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert report["bytes_out"] == size
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(BASE)


@pytest.mark.slow
def test_folds_on_the_cpu_import_no_torch(tmp_path):
    heavy = {"torch", "scipy", "matplotlib", "huggingface_hub"}
    fold = ["to-lora", DORA, "--base", BASE, "-o", tmp_path / "one", "--rank", "4", "-q"]
    assert not imported_by(*fold) & heavy
    assert not imported_by("to-dora", LORA, "--base", BASE, "-o", tmp_path / "two", "-q") & heavy


def test_inputs_do_not_change(tmp_path):
    before = {p: p.read_bytes() for folder in (DORA, BASE) for p in folder.iterdir() if p.is_file()}
    run("to-lora", DORA, "--base", BASE, "-o", tmp_path / "out", "--rank", "4", "-q")
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("to-lora", DORA, "--rank", "4"),
        ("to-dora", LORA),
        ("convert", LORA, "--to", "kohya"),
        ("merge", DORA, LORA, "--rank", "4"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_adapter_replaces_the_model_that_is_read(tmp_path, arguments):
    model = tmp_path / "base.safetensors"
    model.write_bytes((BASE / "model.safetensors").read_bytes())
    before = model.read_bytes()
    command, *rest = map(str, arguments)
    if command == "convert":
        rest.insert(1, str(model))
    else:
        rest += ["-o", str(model)]
    done = loratools(command, *rest, "--base", model, "--overwrite")
    assert done.returncode == 2
    assert "inputs are never changed. Choose another output\n" in done.stderr
    assert model.read_bytes() == before


@pytest.mark.slow
def test_extract_writes_into_neither_model(tmp_path):
    tuned = tmp_path / "tuned"
    assert loratools("fuse", BASE, LORA, "-o", tuned, "--quiet").returncode == 0
    for place in (tuned, tuned / "lora"):
        done = loratools("extract", BASE, tuned, "-o", place, "--rank", "2", "--overwrite")
        assert done.returncode == 2
        assert "output" in done.stderr
    assert not (tuned / "lora").exists()
