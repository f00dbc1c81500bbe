"""`loratools check`: exit codes, output formats, settings, baselines, fixes, hooks."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import make_docs
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from handmade_adapters import MODULES, OUT, folder, tensors

import loratools as lt
from loratools.cli import cli, hook
from loratools.operations.check import outcome
from loratools.operations.check.rules import RULES
from loratools_formats.disk.errors import OptionError, OutputExistsError

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LLAMA = EXAMPLES / "tiny-llama"


def run(*arguments):
    done = CliRunner().invoke(cli, ["check", *map(str, arguments)], standalone_mode=False)
    return (2 if done.exception else done.return_value or 0), done.stdout, done.exception


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("change", ["truncated", "extended", "replaced"])
def test_what_changes_while_it_is_checked_is_not_checked(change, name, tmp_path, monkeypatch):
    """No finding tells of it, and no baseline accepts what rules could not look at."""
    path, known = folder(tmp_path / "a"), tmp_path / "known.json"
    file, read = path / name, outcome.subject_of

    def then_changed(*given, **more):
        subject = read(*given, **more)
        content = file.read_bytes()
        if change == "replaced":
            (tmp_path / "other").write_bytes(content[::-1])
            (tmp_path / "other").replace(file)
        else:
            file.write_bytes(content[:-9] if change == "truncated" else content + b" ")
        return subject

    monkeypatch.setattr(outcome, "subject_of", then_changed)
    code, printed, _ = run(path, "--json", "--write-baseline", known)
    found = json.loads(printed)
    assert code == 3
    assert not found["findings"]
    assert re.search("(changed|replaced) while", found["unchecked"][0]["reason"])
    assert not known.exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
@pytest.mark.parametrize("trouble", [errno.EIO, errno.EMFILE])
def test_what_the_system_cannot_read_is_not_checked(trouble, name, tmp_path, monkeypatch):
    """A failing disk says nothing of an adapter: no finding, and no baseline that accepts it."""
    path, known, opened = folder(tmp_path / "a"), tmp_path / "known.json", os.open

    def failing(place, *given, **more):
        if str(place).endswith(name):
            raise OSError(trouble, os.strerror(trouble))
        return opened(place, *given, **more)

    monkeypatch.setattr(os, "open", failing)
    code, text, _ = run(path, "--write-baseline", known)
    assert code == 3
    assert f"not checked: {path / name}: cannot be opened: {os.strerror(trouble)}" in text
    assert "LT" not in text
    assert not known.exists()


def test_exit_codes(tmp_path):
    clean = folder(tmp_path / "clean")
    dead = folder(tmp_path / "dead", {k: v * ("lora_A" in k) for k, v in tensors().items()})
    assert run(clean)[0] == 0
    assert run(clean, dead)[0] == 1
    assert run(dead, "--fail-on=never")[0] == 0
    code, text, _ = run(clean, tmp_path / "missing")
    assert code == 3
    assert "missing: not checked: no such file or folder" in text
    assert isinstance(run(clean, "--select=LT999")[2], OptionError)
    assert isinstance(run(clean, "--target=nobody")[2], OptionError)


def test_what_a_reader_refuses_is_a_finding_and_no_crash(tmp_path):
    broken = folder(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"<html>")
    (tmp_path / "page.safetensors").write_bytes(b"<html>not found</html>")
    for path in (broken, tmp_path / "page.safetensors"):
        code, text, _ = run(path, "--ignore=LT0", "--fail-on=error")
        assert code == 1
        assert "error LT001 unreadable" in text


def test_a_folder_stands_for_the_adapters_below_it(tmp_path):
    for name in ("a", "b", "c/d"):
        folder(tmp_path / "all" / name)
    found = json.loads(run(tmp_path / "all", "--json")[1])
    assert [Path(a["adapter"]).name for a in found["adapters"]] == ["a", "b", "d"]


def test_headers_only_reads_no_tensor(tmp_path):
    path = folder(tmp_path / "a", {k: v * np.float32(np.nan) for k, v in tensors().items()})
    assert run(path)[0] == 1
    assert run(path, "--headers-only")[0] == 0


def test_settings_are_the_callers_and_never_the_adapters(tmp_path, monkeypatch):
    path = folder(tmp_path / "adapter", lora_alpha=0)
    (path / "loratools.toml").write_text("[check]\nselect = ['LT7']\n")
    monkeypatch.chdir(path)
    assert run(".")[0] == 1
    monkeypatch.chdir(tmp_path)
    assert run(path)[0] == 1
    (tmp_path / "pyproject.toml").write_text("[tool.loratools.check]\nignore = ['LT2', 'LT3']\n")
    assert run(path)[0] == 0
    assert run(path, "--no-config")[0] == 1
    assert run(path, "--ignore=LT7")[0] == 1
    (tmp_path / "loratools.toml").write_text("[check]\nselekt = []\n")
    assert isinstance(run(path)[2], OptionError)


def test_a_baseline_accepts_what_is_known_and_nothing_else(tmp_path):
    path = folder(tmp_path / "a", lora_alpha=0)
    assert run(path, "--write-baseline", tmp_path / "known.json")[0] == 1
    assert isinstance(run(path, "--write-baseline", tmp_path / "known.json")[2], OutputExistsError)
    code, text, _ = run(path, "--baseline", tmp_path / "known.json")
    assert (code, "in the baseline" in text) == (0, True)
    (path / "optimizer.pt").write_bytes(b"x")
    assert run(path, "--baseline", tmp_path / "known.json")[0] == 1


def test_sarif_has_what_github_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "my adapter", {k: v * np.float32(np.nan) for k, v in tensors().items()})
    log = json.loads(run("my adapter", "--output-format=sarif")[1])
    (one,) = log["runs"]
    rules = one["tool"]["driver"]["rules"]
    assert log["version"] == "2.1.0"
    assert one["invocations"][0]["executionSuccessful"] is True
    assert one["results"]
    for result in one["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        location = result["locations"][0]
        assert location["physicalLocation"]["artifactLocation"]["uri"].startswith("my%20adapter/")
        assert location["physicalLocation"]["region"] == {"startLine": 1}
        assert result["partialFingerprints"]["loratools/v1"]
    assert str(tmp_path) not in json.dumps(log)
    again = json.loads(run("my adapter", "--output-format=sarif")[1])
    assert again == log


def test_junit_counts_its_cases(tmp_path):
    dead = folder(tmp_path / "dead", {k: v * ("lora_A" in k) for k, v in tensors().items()})
    root = ET.fromstring(run(folder(tmp_path / "a"), dead, tmp_path / "no",
                             "--output-format=junit")[1])  # fmt: skip
    assert [suite.get("tests") for suite in root] == [str(len(list(suite))) for suite in root]
    assert root.get("failures") == str(len(list(root.iter("failure")))) != "0"
    assert root.get("errors") == "1"


def test_annotations_escape_what_would_end_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "a,b", lora_alpha=0)
    lines = run("a,b", "--output-format=github")[1].splitlines()
    assert lines[0].startswith("::error file=a%2Cb/adapter_config.json,line=1,title=LT203")
    assert all(re.match(r"::(error|warning|notice) .*::.", line) for line in lines)


def test_names_that_control_a_terminal_are_escaped(tmp_path):
    folder(tmp_path / "a", base_model_name_or_path="/x\x1b[2J\u202e")
    for kind in ("text", "github", "junit"):
        text = run(tmp_path / "a", f"--output-format={kind}")[1]
        assert "\x1b" not in text
        assert "\u202e" not in text


FIXED = {
    "scale": ({"rank_pattern": {MODULES[0]: 2}}, "vllm@0.26", "LT506"),
    "format": ({}, "mlx", "LT502"),
    "both": ({"alpha_pattern": {MODULES[0]: 2}}, "mlx", "LT502"),
}


@pytest.mark.parametrize("case", FIXED)
def test_a_fix_mends_what_it_says_and_keeps_the_change(case, tmp_path):
    config, target, code = FIXED[case]
    weights = tensors()
    if "rank_pattern" in config:
        name = f"base_model.model.{MODULES[0]}"
        weights |= {f"{name}.lora_A.weight": np.ones((2, 8), np.float32),
                    f"{name}.lora_B.weight": np.ones((OUT, 2), np.float32)}  # fmt: skip
    path = folder(tmp_path / "a", weights, **config)
    assert code in {f.code for f in lt.check(path, target=[target]).findings}
    fixed = lt.check(path, target=[target], fix=True, output=tmp_path / "fixed")
    assert fixed.counts["error"] == 0
    assert all(step.taken for step in fixed.steps)
    before, after = lt.read(path), lt.read(tmp_path / "fixed")
    for name in before.modules:
        true = lt.delta(before, name)
        error = np.linalg.norm(lt.delta(after, name) - true) / np.linalg.norm(true)
        assert error < 16 * np.finfo(np.float32).eps


def test_dead_modules_are_dropped_and_one_sided_factors_balanced(tmp_path):
    weights = tensors()
    weights[f"base_model.model.{MODULES[0]}.lora_B.weight"] *= 0
    weights[f"base_model.model.{MODULES[1]}.lora_B.weight"] *= 100_000
    path = folder(tmp_path / "a", weights)
    assert {"LT303", "LT307"} <= {f.code for f in lt.check(path).findings}
    fixed = lt.check(path, fix=True, output=tmp_path / "fixed")
    assert not {"LT303", "LT307"} & {f.code for f in fixed.findings}
    kept = [module.name for module in lt.info(tmp_path / "fixed").modules]
    assert kept == sorted(set(MODULES) - {MODULES[0]})


def test_a_lossy_fix_is_asked_for_by_name(tmp_path):
    options = {"target": ["vllm"], "base": LLAMA / "model", "fix": True}
    refused = lt.check(LLAMA / "dora", output=tmp_path / "no", **options)
    assert [step.taken for step in refused.steps] == [False]
    assert not (tmp_path / "no").exists()
    done = lt.check(LLAMA / "dora", output=tmp_path / "yes", allow_lossy=True, **options)
    assert done.steps[0].taken
    assert done.steps[0].relative_error < 0.02
    assert "LT503" not in {f.code for f in done.findings}
    assert lt.read(tmp_path / "yes").modules[f"{MODULES[0]}"].kind == "lora"


ADAPTERS = [LLAMA / "lora", LLAMA / "dora", LLAMA / "rslora", EXAMPLES / "minilm-lora",
            EXAMPLES / "tiny-flux" / "kohya.safetensors"]  # fmt: skip


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.name)
def test_bundled_adapters_have_no_errors(path):
    options = {"base": LLAMA / "model"} if path.parent == LLAMA else {}
    found = lt.check(path, **options).findings
    assert [(f.code, f.message) for f in found if f.severity != "note"] == []


@pytest.mark.parametrize("target", ["diffusers", "comfyui"])
def test_a_kohya_file_is_served_by_both_kinds_of_pipelines(target):
    found = lt.check(EXAMPLES / "tiny-flux" / "kohya.safetensors", target=[target]).findings
    assert not any(f.target for f in found)


OLD = sorted(
    path
    for path in (ROOT / "tests" / "golden" / "outputs").rglob("adapter_config.json")
    if (path.parent / "adapter_model.safetensors").exists()
)


def test_outputs_of_every_version_have_no_errors():
    assert OLD
    for path in OLD:
        found = lt.check(path.parent).findings
        assert [(path, f.code, f.message) for f in found if f.severity == "error"] == []


def test_the_page_of_rules_is_up_to_date():
    assert make_docs.PATH.read_text() == make_docs.rules(), "run tests/check/make_docs.py"


def test_checking_imports_no_torch(tmp_path):
    code = (
        "import sys, loratools as lt; lt.check(sys.argv[1]); "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, folder(tmp_path / "a")], check=True)


def test_the_hook_and_the_action_name_what_exists():
    (of_hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert of_hook["entry"].split()[-1] == hook.__name__
    for name in ("a/adapter_config.json", "b.safetensors", "c.gguf"):
        assert re.search(of_hook["files"], name)
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    scripts = [step["run"] for step in action["runs"]["steps"]]
    assert not any("${{" in script for script in scripts)
    commands = [cli.get_command(None, name) for name in ("check", "push")]
    flags = {flag for each in commands for p in each.params for flag in p.opts}
    assert {flag for s in scripts for flag in re.findall(r"--[a-z-]+", s)} - {"--quiet"} <= flags


def test_the_hook_checks_the_folder_of_a_file(tmp_path):
    path = folder(tmp_path / "a", lora_alpha=0)
    files = [str(path / "adapter_config.json"), str(path / "adapter_model.safetensors")]
    done = subprocess.run([sys.executable, "-m", "loratools.cli.hook", *files],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.count("LT203") == 1


def test_rules_are_explained():
    for rule in RULES:
        assert lt.rule(rule.code).to_dict()["summary"] == rule.summary
    with pytest.raises(OptionError, match="Did you mean 'not-targeted'"):
        lt.rule("not-targetted")
