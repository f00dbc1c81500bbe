"""What is published says the truth of itself: extras, groups, addresses, workflows."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from loratools.cli.wording import DOCS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
WORKFLOWS = ROOT / ".github" / "workflows"
REPOSITORY = PROJECT["project"]["urls"]["Source"]


def names(requirements):
    return {Requirement(each).name for each in requirements if isinstance(each, str)}


def program(name):
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def workflow(name):
    # YAML 1.1 reads the key `on` as true.
    return yaml.safe_load((WORKFLOWS / name).read_text())


def test_all_is_every_extra():
    (whole,) = map(Requirement, EXTRAS["all"])
    assert whole.name == PROJECT["project"]["name"]
    assert whole.extras == set(EXTRAS) - {"all"}


def test_what_developers_need_is_no_extra():
    assert not {"lint", "test", "dev", "docs"} & set(EXTRAS)
    assert {"lint", "test", "fast"} == set(GROUPS)
    published = names(PROJECT["project"]["dependencies"]) | {
        name for each in EXTRAS.values() for name in names(each)
    }
    assert not {"pytest", "ruff", "mypy", "hypothesis"} & published


def test_make_and_ci_install_the_groups():
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"--group (\w+)", makefile)) == {"lint", "test"}
    assert "--group fast" in (WORKFLOWS / "ci.yml").read_text()


def test_every_package_of_ci_is_held_to_its_hash():
    """`python tests/release/make_lock.py` writes the lock anew."""

    def canonical(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    constraints = (ROOT / "tests" / "constraints.txt").read_text()
    versions = {
        canonical(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)", constraints, re.MULTILINE)
    }
    text = (ROOT / "tests" / "locked.txt").read_text()
    parts = re.split(r"^(?=[\w.-]+(?:\[.*\])?==)", text, flags=re.MULTILINE)[1:]
    locked = {}
    for part in parts:
        name, version, hashes = re.fullmatch(
            r"([\w.-]+)(?:\[.*\])?==(\S+)(.*)", part, re.DOTALL
        ).groups()
        locked[canonical(name)] = version
        assert re.fullmatch(r"( \\\n    --hash=sha256:[0-9a-f]{64})+\n", hashes), part
    assert locked.pop("torch") == f"{versions['torch']}+cpu"
    assert all(versions[name] == version for name, version in locked.items())
    needed = {
        canonical(Requirement(each).name)
        for group in ("lint", "fast", "test")
        for each in [*GROUPS[group], *PROJECT["project"]["dependencies"]]
        if isinstance(each, str)
    }
    assert needed <= {*locked, "torch"}
    makefile = (ROOT / "Makefile").read_text()
    assert "--require-hashes --no-deps --requirement tests/locked.txt" in makefile


def test_pythons_and_systems_of_ci_are_those_that_are_claimed():
    matrix = workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    claimed = PROJECT["project"]["classifiers"]
    of_python = {text.rpartition(" ")[2] for text in claimed if re.search(r":: 3\.\d+$", text)}
    assert set(matrix["python"]) == of_python == {"3.11", "3.12", "3.13", "3.14"}
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    systems = {"Linux": "ubuntu", "MacOS": "macos", "Windows": "windows"}
    told = {text.rpartition(" ")[2] for text in claimed if text.startswith("Operating System")}
    assert {systems[name] for name in told} == {os.partition("-")[0] for os in matrix["os"]}


def test_a_release_is_published_from_a_tag_without_a_token():
    release = workflow("release.yml")
    assert release[True]["push"]["tags"] == ["v*"]
    assert release["permissions"] == {}
    publish = release["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert "secrets." not in (WORKFLOWS / "release.yml").read_text()
    assert publish["needs"] == "build"


def test_actions_are_pinned():
    for path in WORKFLOWS.iterdir():
        for used in re.findall(r"uses: (.*)", path.read_text()):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used), (path.name, used)


def test_workflows_pass_actionlint():
    done = subprocess.run(
        [program("actionlint"), "-shellcheck=", "-pyflakes=", *map(str, WORKFLOWS.iterdir())],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_pass_zizmor():
    command = [program("zizmor"), "--offline", "--no-progress", *map(str, WORKFLOWS.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands_of_workflows_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in WORKFLOWS.iterdir():
        for line in re.findall(r"run: make (.*)", path.read_text()):
            assert set(line.split()) <= targets, (path.name, line)


def test_the_readme_has_no_link_that_the_registry_cannot_follow():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert link.startswith(f"{REPOSITORY}/blob/main/"), link
        path = link.removeprefix(f"{REPOSITORY}/blob/main/").partition("#")[0]
        assert (ROOT / path).is_file(), link


def test_addresses_are_of_one_repository():
    assert PROJECT["project"]["urls"]["Documentation"] == f"{DOCS}/index.md"
    for address in PROJECT["project"]["urls"].values():
        assert address.startswith(REPOSITORY)
        if "/blob/main/" in address:
            assert (ROOT / address.partition("/blob/main/")[2]).is_file()


@pytest.fixture(scope="module")
def tracked():
    """Every file that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    return [Path(name) for name in listed.stdout.decode().split("\0") if name]


def test_no_merge_was_left_half_done(tracked):
    texts = {".md", ".py", ".toml", ".yaml", ".yml", ".json", ".txt", ".pyi", ".cff"}
    marks = (b"\n<<<<<<< ", b"\n>>>>>>> ")
    found = [
        str(path)
        for path in tracked
        if path.suffix in texts and any(mark in (ROOT / path).read_bytes() for mark in marks)
    ]
    assert found == []


def test_the_repository_holds_no_outputs(tracked):
    """What a command wrote into the checkout is easily committed with all else."""
    strange = {".safetensors", ".gguf", ".bin", ".pt", ".log", ".npz", ".jsonl"}
    found = [path for path in tracked if path.suffix in strange]
    places = {"examples", "tests"}
    assert [str(path) for path in found if path.parts[0] not in places] == []
    sizes = {path: (ROOT / path).stat().st_size for path in tracked if (ROOT / path).is_file()}
    assert [str(path) for path, size in sizes.items() if size > 3_000_000] == []
