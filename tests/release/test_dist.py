"""What `make dist` makes: the wheel alone works elsewhere, and the bill names all that it needs."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import make_dist
import pytest

import loratools

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "examples" / "tiny-llama" / "lora"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder that `make dist` fills."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, make_dist.__file__, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2  # twine's word
    return folder


@pytest.fixture(scope="module")
def wheel(made):
    (path,) = made.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """Return a new environment with the wheel and what it says it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run(
        [*pip, "--no-index", "--no-deps", "--disable-pip-version-check", wheel],
        check=True,
        env=bare(),
    )
    (site,) = folder.glob("lib/python*/site-packages")
    # Linked from here instead of downloaded.
    for each in make_dist.closure(make_dist.metadata_of(wheel)).values():
        for name in {file.parts[0] for file in each.files if file.parts[0] != ".."}:
            if name != "__pycache__":
                (site / name).symlink_to(each.locate_file(name))
    return folder


def bare():
    """Return the surroundings without what leads to this checkout."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def tracked():
    """Return all files of both packages, by their paths in a wheel."""
    found = set()
    for package in (ROOT / "loratools", ROOT / "formats" / "loratools_formats"):
        files = (p for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc")
        found |= {str(p.relative_to(package.parent)) for p in files}
    return found


def test_wheel_and_sdist_hold_every_file_of_both_packages(made, wheel):
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert inside == tracked()
    (sdist,) = made.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2].removeprefix("formats/") for name in file.getnames()}
    assert tracked() <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= names


def test_the_wheel_alone_squeezes(elsewhere, tmp_path):
    def run(*command):
        done = subprocess.run(
            [elsewhere / "bin" / command[0], *command[1:]],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=bare(),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    places = "import loratools, loratools_formats as f; print(loratools.__file__, f.__file__)"
    assert all(str(elsewhere) in place for place in run("python", "-c", places).split())
    told = json.loads(run("loratools", "squeeze", ADAPTER, "-o", "out", "--rank", "4", "--json"))
    known = loratools.squeeze(ADAPTER, rank=4, output=tmp_path / "known")
    assert told["relative_error"] == known.relative_error
    for file in (tmp_path / "known").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_bill_is_valid_and_names_what_the_wheel_needs(made, wheel):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator  # slow to import

    (path,) = made.glob("*.cdx.json")
    text = path.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    top = bill["metadata"]["component"]
    assert top["purl"] == f"pkg:pypi/loratools@{loratools.__version__}"
    assert text == make_dist.bill_of(wheel)  # no time, no random number
    needed = {each["ref"]: each.get("dependsOn", []) for each in bill["dependencies"]}
    names = {ref.removeprefix("pkg:pypi/").partition("@")[0] for ref in needed[top["bom-ref"]]}
    assert names == {
        "click", "ml-dtypes", "msgspec", "numpy", "pyyaml", "safetensors", "threadpoolctl", "tqdm",
    }  # fmt: skip
    known = {each["bom-ref"]: each for each in bill["components"]}
    assert set(known) == {ref for refs in needed.values() for ref in refs}
    assert all(each["version"] and each["licenses"] for each in known.values())
