"""Next steps in errors about the Hub are done as they are printed, and lead on."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import LORA, MODEL, RSLORA, TOKEN, environment
from safetensors.numpy import load_file, save_file

HF = shutil.which("hf", path=str(Path(sys.executable).parent)) or shutil.which("hf")


@pytest.fixture
def hub(server):
    files = {path.name: path.read_bytes() for path in LORA.iterdir()}
    server.add("me/tiny", LORA)
    server.add("me/other", RSLORA)
    server.add("me/model", MODEL)
    server.add(
        "me/many", {f"runs/{run}/{k}": v for run in ("first", "last") for k, v in files.items()}
    )
    weights = files["adapter_model.safetensors"]
    server.add("me/files", {"one.safetensors": weights, "two.safetensors": weights})
    model = {path.name: path.read_bytes() for path in MODEL.iterdir() if path.is_file()}
    server.add("me/pipe", {
        **{f"{part}/{k}": v for part in ("transformer", "vae") for k, v in model.items()},
        "model_index.json": b'{"_class_name": "FluxPipeline", "transformer": ["diffusers", "X"]}',
    })  # fmt: skip
    return server


def refused(program, *line):
    """Return what a command says that fails."""
    done = program(*line)
    assert done.returncode == 2, (done.stdout, done.stderr)
    return done.stderr.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("info me/model", {"ADAPTER": "me/tiny"}),
        ("merge me/tiny me/model -o made", {"ADAPTER": "me/tiny"}),
        ("to-dora me/other --base me/tiny -o made", {"MODEL": "me/model"}),
        ("extract me/model me/tiny -o made --rank 4", {"MODEL": "me/model"}),
        ("info me/many", {}),
        ("info hf://me/many/runs/las", {}),
        ("info me/files", {}),
        ("info hf://me/files/one.safetensor", {}),
        ("info {endpoint}/me/tiny/blobs", {}),
        ("quantize me/pipe -o made", {}),
    ],
)
def test_what_is_named_instead_is_taken(hub, program, line, values):
    line = line.format(endpoint=hub.endpoint)
    message = refused(program, *shlex.split(line))
    command = re.search(r"loratools (.*)$", message)
    if command:
        words = [values.get(word, word) for word in shlex.split(command[1])]
    else:
        named = re.search(r"(?:such as|Did you mean|what you mean:) ([^\s?]+)", message)[1]
        verb, _, *more = shlex.split(line)
        words = [verb, named, *more]
    done = program(*words)
    assert done.returncode == 0, (message, words, done.stderr)


@pytest.mark.slow
def test_a_revision_is_written_to_one_of_several(hub, program):
    line = ["merge", "me/tiny", "me/other", "-o", "made", "-q"]
    message = refused(program, *line, "--revision", "main")
    form = re.search(r"Write (\S+)$", message)[1]
    line[1] = form.replace("USER/NAME", "me/tiny").replace("REVISION", "main")
    assert program(*line).returncode == 0


@pytest.mark.slow
def test_what_lies_on_the_hub_is_published_instead_of_written_over(hub, program):
    line = ["squeeze", "me/tiny", "--rank", "4", "-q"]
    message = refused(program, *line, "--in-place")
    option = re.search(r"(--output) (\S+)", message)
    place = option[2].replace("USER/NAME", "me/small")
    done = program(*line, option[1], place)
    assert done.returncode == 0, done.stderr
    assert program("info", "me/small").returncode == 0


@pytest.mark.slow
def test_publishing_works_once_logged_in(hub, program):
    program.token = None
    message = refused(program, "push", LORA, "me/new")
    assert "set HF_TOKEN" in message
    program.token = TOKEN
    message = refused(program, "push", LORA, "me/new")
    assert program("push", LORA, "me/new", re.search("--create", message)[0]).returncode == 0
    assert program("info", "me/new").returncode == 0


@pytest.mark.slow
def test_what_the_check_finds_is_shown_or_left(hub, program, tmp_path):
    folder = tmp_path / "a b"
    shutil.copytree(LORA, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    done = program("push", folder, "me/new", "--create")
    assert done.returncode == 1
    assert "error LT" in done.stdout
    option = re.search(r"pass (--no-check)", done.stderr)[1]
    assert program("push", folder, "me/new", "--create", option).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(HF is None, reason="huggingface_hub brings no hf here")
def test_offline_what_was_fetched_as_told_is_read(hub, program, tmp_path):
    program.more = {"HF_HUB_OFFLINE": "1"}
    message = refused(program, "info", "me/tiny")
    command = re.search(r"hf (download \S+?),? or unset HF_HUB_OFFLINE", message)[1]
    online = environment(hub, tmp_path / "home")
    subprocess.run([HF, *shlex.split(command)], env=online, check=True, capture_output=True)
    assert program("info", "me/tiny").returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(HF is None, reason="huggingface_hub brings no hf here")
def test_a_part_of_a_repository_that_the_cache_lacks_is_fetched_as_told(hub, program, tmp_path):
    assert program("info", "hf://me/many/runs/last").returncode == 0
    program.more = {"HF_HUB_OFFLINE": "1"}
    message = refused(program, "info", "hf://me/many/runs/first")
    command = re.search(r"hf (download \S+)", message)[1].rstrip(",")
    online = environment(hub, tmp_path / "home")
    subprocess.run([HF, *shlex.split(command)], env=online, check=True, capture_output=True)
    assert program("info", "hf://me/many/runs/first").returncode == 0
