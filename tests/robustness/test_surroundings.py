"""Every command that writes, where there is little of something, and where outputs must not go.

Few file descriptors, a full disk, a disk that cannot be written to, another file system; an output
in an input, an input as output, hard links of inputs.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import campaign_commands as table
import numpy as np
import pytest
from campaign import tree
from fuse_bases import state
from safetensors.numpy import save_file

LIMIT_AT_7B = 600 << 20
LOCAL = [name for name in table.COMMANDS if name != "push"]  # whose output is a repository

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with inputs, and an empty one for outputs."""
    here, root = Path.cwd(), tmp_path_factory.mktemp("place")
    table.make_inputs(root, os.chdir)
    os.chdir(here)
    return root


@pytest.fixture
def out(place):
    folder = place / "out"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def words(name, n=2):
    return [*table.COMMANDS[name].format(n=n).split(), "-q"]


def assert_refused(run):
    assert run.code == 2
    (line,) = run.remarks
    assert line.startswith("error: ")
    assert "--traceback" not in line


@pytest.mark.parametrize("name", LOCAL)
def test_thirty_two_descriptors_are_enough(name, place, out, loratools):
    assert loratools(*words(name), cwd=place).code in (0, 1)
    usual = tree(out)
    shutil.rmtree(out)
    out.mkdir()
    given = state(place / "in")
    run = loratools(*words(name), cwd=place, limits={"RLIMIT_NOFILE": 32})
    assert run.code in (0, 1), run.err
    assert tree(out) == usual
    assert state(place / "in") == given


@pytest.fixture
def disk(out):
    """Return a function that mounts a small disk at `out`."""
    mounted = []

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", out]
        if os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(out)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", LOCAL)
def test_a_full_disk(name, place, out, disk, loratools):
    disk("size=4k")
    (out / "full").write_bytes(b"x" * 4096)
    given = state(place / "in")
    assert_refused(loratools(*words(name), cwd=place))
    assert os.listdir(out) == ["full"]
    assert state(place / "in") == given


@pytest.mark.parametrize("name", LOCAL)
def test_a_disk_that_cannot_be_written_to(name, place, out, disk, loratools):
    disk("ro")
    assert_refused(loratools(*words(name), cwd=place))
    assert os.listdir(out) == []


@pytest.mark.parametrize("name", LOCAL)
def test_another_file_system_gives_the_same_bytes(name, place, out, disk, loratools):
    assert loratools(*words(name), cwd=place).code in (0, 1)
    usual = tree(out)
    shutil.rmtree(out)
    out.mkdir()
    disk("size=4m")
    assert loratools(*words(name), cwd=place).code in (0, 1)
    assert tree(out) == usual


@pytest.mark.parametrize("name", LOCAL)
def test_outputs_in_inputs_and_over_them(name, place, out, loratools):
    """The first word is an input of every command; a folder's output lies in it, a file's over it.

    With --overwrite, where there is such a flag.
    """
    given = state(place / "in")
    line = words(name)
    first = place / line[2 if line[0] == "fleet" else 1].partition(":")[0]
    at = next(i for i, word in enumerate(line) if word.startswith("out/"))
    overwrite = [] if name in table.NEVER_REPLACES else ["--overwrite"]
    targets = [first] if first.is_file() else [first, first / "inside"]
    if name == "run":  # results go beside the recipe
        targets = [first]
    if name in ("check", "spectrum"):  # a report is no output of the adapter
        targets = [next(p for p in sorted(first.iterdir()) if p.suffix == ".safetensors")]
    for target in targets:
        run = loratools(*line[:at], target, *line[at + 1 :], *overwrite, cwd=place)
        assert_refused(run)
        assert state(place / "in") == given
    assert os.listdir(out) == [] or name == "merge"


@pytest.mark.parametrize("name", LOCAL)
def test_a_hard_link_of_an_input_as_output(name, place, out, loratools):
    """The link may be replaced, the input's bytes stay."""
    line = words(name)
    at = next(i for i, word in enumerate(line) if word.startswith("out/"))
    target = place / line[at]
    given = table_files(place / "in")
    source = next(p for p in sorted((place / "in").rglob("*")) if p.suffix == ".safetensors")
    if "." in target.name:
        os.link(source, target)
    else:
        target.mkdir()
        os.link(source, target / source.name)
    overwrite = [] if name in table.NEVER_REPLACES else ["--overwrite"]
    run = loratools(*line, *overwrite, cwd=place)
    assert run.code in (0, 1, 2)
    assert "--traceback" not in run.err
    assert table_files(place / "in") == given


def table_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_600_megabytes_are_enough_for_an_adapter_of_a_7b_model(tmp_path, loratools):
    """320 MB of factors, of the shapes of Llama 7B at rank 64: squeezed, merged, converted."""
    source = tmp_path / "lora"
    source.mkdir()
    shapes = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096),
              "self_attn.v_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096),
              "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
              "mlp.down_proj": (4096, 11008)}  # fmt: skip
    rng, tensors = np.random.default_rng(0), {}
    noise = (rng.standard_normal(11008 * 64) * 0.02).astype("f2")
    for layer in range(32):
        for name, (rows, columns) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = noise[: 64 * columns].reshape(64, columns)
            tensors[f"{key}.lora_B.weight"] = noise[: rows * 64].reshape(rows, 64)
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 64}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in shapes})
    (source / "adapter_config.json").write_text(json.dumps(config))
    del tensors
    for command in (
        ["squeeze", source, "-o", tmp_path / "small", "--rank", "8", "--overwrite"],
        ["merge", source, source, "-o", tmp_path / "both", "--rank", "8", "--overwrite"],
        ["convert", source, tmp_path / "mlx", "--to", "mlx", "--overwrite"],
    ):
        limits = {"RLIMIT_DATA": LIMIT_AT_7B}
        workers = [] if command[0] == "convert" else ["--workers", "2"]
        run = loratools(*command, *workers, "-q", limits=limits, seconds=600)
        assert run.code == 0, run.err
        shutil.rmtree(next(tmp_path.glob("[!l]*")))
