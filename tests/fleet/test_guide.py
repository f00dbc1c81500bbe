"""The guide's files: sound, and as far as this machine can, run."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fleet_runs import contents, environment

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "fleet"
GUIDE = (ROOT / "docs" / "guides" / "fleets.md").read_text()
SCRIPTS = ["slurm.sbatch", "hf-jobs.sh", "parallel.sh"]


def manifest():
    return yaml.safe_load((FILES / "kubernetes.yaml").read_text())


def test_the_guide_shows_the_files_as_they_are():
    shown = re.findall(r"```(?:bash|yaml)\n(.*?)```", GUIDE, re.DOTALL)
    for file in FILES.iterdir():
        assert file.read_text() in shown, file.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_scripts(name):
    done = subprocess.run(["bash", "-n", FILES / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_reads_every_block_of_the_guide():
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="SLURM is not installed")
def test_slurm_would_take_the_script():
    subprocess.run(["sbatch", "--test-only", FILES / "slurm.sbatch"], check=True)


def test_the_manifest_is_one_that_kubernetes_takes():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for version in ("1.33", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(manifest(), version, strict=True)
    wrong = manifest()
    wrong["spec"]["completion"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="completion"):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


def test_the_manifest_is_an_indexed_job_whose_parts_are_all():
    spec = manifest()["spec"]
    pod = spec["template"]["spec"]
    # limits for each index need both
    assert (spec["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    (container,) = pod["containers"]
    told = {one["name"]: one["value"] for one in container["env"]}
    assert told == {"JOB_COMPLETION_COUNT": str(spec["completions"])}
    volumes = {one["name"] for one in pod["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == volumes


@pytest.mark.slow
def test_hf_jobs_has_the_flags_of_the_script():
    pytest.importorskip("huggingface_hub")
    shown = subprocess.run(
        [Path(sys.executable).parent / "hf", "jobs", "run", "--help"],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    text = (FILES / "hf-jobs.sh").read_text()
    call = text[text.index("hf jobs run") : text.index("python:3.12")]
    for flag in re.findall(r"--[a-z-]+", call):
        assert flag in shown.stdout, flag


@pytest.fixture
def programs(tmp_path):
    """Return variables with a `loratools` on the path that is this checkout's."""
    place = tmp_path / "bin" / "loratools"
    place.parent.mkdir()
    place.write_text(f'#!/bin/bash\nexec "{sys.executable}" -m loratools "$@"\n')
    place.chmod(place.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{place.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.slow
def test_the_scripts_do_the_whole_fleet(adapters, singles, programs, tmp_path):
    given = {**programs, "ADAPTERS": "adapters/*", "PARTS": "2", "SLURM_CPUS_PER_TASK": "1"}

    def bash(name, **more):
        variables = environment(**given, **more)
        done = subprocess.run(
            ["bash", FILES / name], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    bash("parallel.sh", OUT="parts")
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0", "OUT": "array"}
    for index in "01":
        bash("slurm.sbatch", SLURM_ARRAY_TASK_ID=index, **array)
    made = singles(rank=16)
    assert contents(tmp_path / "parts") == contents(tmp_path / "array") == made


@pytest.mark.slow
def test_the_command_of_the_job_does_its_part(adapters, tmp_path):
    (container,) = manifest()["spec"]["template"]["spec"]["containers"]
    places = {"/adapters": str(tmp_path / "adapters"), "/out": str(tmp_path / "out")}
    _, *arguments = [places.get(word, word) for word in container["command"]]
    told = {one["name"]: one["value"] for one in container["env"]}
    done = subprocess.run(
        [sys.executable, "-m", "loratools", *arguments], env=environment(**told,
        JOB_COMPLETION_INDEX="1"), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "out" / "fleet-squeeze.2-of-16.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "a0001"
