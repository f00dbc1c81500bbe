"""Next steps for what `test_first_lines.py` has no room for: experts, clusters, trainers' files.

Each is followed as somebody does who pastes: the command or the option that a message names is
run, until something succeeds.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import test_first_lines as first
from click.testing import CliRunner
from safetensors.numpy import load_file

import loratools as lt
from loratools.cli import cli
from loratools_formats.disk.errors import LoratoolsError

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples/tiny-llama"


def followed(line):
    """Do what messages say, from a first line on; returns the lines that were typed."""
    taken = []
    while True:
        code, message = first.typed(line)
        taken.append((line, message))
        if code in (0, 1):
            return [before for before, _ in taken]
        assert len(taken) <= first.MOST_STEPS, taken
        line = first.next_line(line, message)
        assert line not in [before for before, _ in taken], taken


EXPERTS = [
    "squeeze a -o made --rank 2",
    "convert a -o made --to mlx",
    "convert a -o made.gguf",
    "convert a -o made --to kohya",
    "convert a -o made --for vllm",
    "convert a -o made --for sglang",
    "convert a -o made --experts each",
    "convert a -o made --experts stacked",
    "convert a -o made --names-of 4",
    "fuse each a -o made",
    "merge a b -o made --method ties",
    "to-dora mixed -o made --base base",
    "repair a -o made --base base",
    "to-lora a -o made",
    "fleet share a b -o made.safetensors --rank 2",
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["PEFT 0.21", "Unsloth, unmarked", "one by one", "Tinker"])
@pytest.mark.parametrize("line", EXPERTS)
def test_of_experts(layout, line, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/experts")
    import expert_files as files
    import numpy as np

    monkeypatch.chdir(tmp_path)
    change, other = files.Change(width=8, inner=4), files.Change(width=8, inner=4, seed=1)
    make = files.LAYOUTS[layout]
    files.save(Path("a"), make(change))
    files.save(Path("b"), make(other))
    tensors, config = make(change)
    query = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    pair = {query.format("A"): np.ones((2, 8), "f4"), query.format("B"): np.ones((8, 2), "f4")}
    targets = [*(config.get("target_modules") or []), "q_proj"]
    files.save(Path("mixed"), (tensors | pair, {**config, "target_modules": targets}))
    files.base(Path("base"), change, stacks=True)
    files.base(Path("each"), change, stacks=False)
    followed(line)


def scripted(command):
    """Run a command of a message that is Python's."""
    program, *arguments = shlex.split(command)
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("around", [None, "model"])
def test_of_a_checkpoint_in_pieces(around, tmp_path):
    import torch
    from torch.distributed import checkpoint

    whole = load_file(EXAMPLES / "lora/adapter_model.safetensors")
    state = {key: torch.from_numpy(value.astype("f4")) for key, value in whole.items()}
    with pytest.warns(UserWarning, match="single process"):
        checkpoint.save(
            state if around is None else {around: state}, checkpoint_id=tmp_path / "in pieces"
        )
    for command in ("info", "fuse"):
        rest = (str(EXAMPLES / "lora"), "-o", str(tmp_path / "f")) if command == "fuse" else ()
        error = CliRunner().invoke(cli, [command, str(tmp_path / "in pieces"), *rest]).exception
        assert isinstance(error, LoratoolsError)
        assert "distributed checkpoint of torch" in error.message
        assert error.hint.startswith("Put them together: ")
    scripted(error.hint.removeprefix("Put them together: "))
    found = load_parts(tmp_path / "in pieces-gathered.bin")
    assert found == {key: value.astype("f4").tobytes() for key, value in whole.items()}


def load_parts(path):
    """Return the bytes of PEFT's weights in a pickled file, beside which its configuration is."""
    shutil.copy(EXAMPLES / "lora/adapter_config.json", path.parent)
    return {
        f"base_model.model.{name}.lora_{side}.weight": getattr(change.factors, part)
        .load()
        .tobytes()
        for name, change in lt.read(path).modules.items()
        for side, part in (("A", "a"), ("B", "b"))
    }


def test_of_a_checkpoint_of_megatron(tmp_path):
    folder = tmp_path / "iter_0000100"
    folder.mkdir()
    for name in (".metadata", "__0_0.distcp", "metadata.json"):
        (folder / name).touch()
    with pytest.raises(LoratoolsError, match="of Megatron") as found:
        lt.read(folder)
    assert "export_adapter_ckpt of Megatron-Bridge" in found.value.hint


SHARDS = [
    {"SLURM_ARRAY_TASK_ID": "3"},
    {"JOB_COMPLETION_INDEX": "1"},
    {"SLURM_ARRAY_TASK_ID": "3", "JOB_COMPLETION_INDEX": "1"},
]


@pytest.mark.parametrize("variables", SHARDS, ids=[" ".join(each) for each in SHARDS])
def test_of_a_shard_that_a_batch_system_does_not_tell_whole(variables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EXAMPLES / "lora", "shelf/lora")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, message = first.typed("fleet squeeze shelf -o results --workers 1 -- --rank 4")
    assert code == 2
    option = re.search(r"pass --shard (\S+)", message)[1].replace("I/N", "1/1")
    line = f"fleet squeeze shelf -o results --workers 1 --shard {option} -- --rank 4"
    assert first.typed(line)[0] == 0
    assert Path("results/lora/adapter_config.json").is_file()


@pytest.mark.parametrize("shard", ["0/4", "3/2"])
def test_of_a_shard_that_cannot_be(shard):
    code, message = first.typed(f"fleet squeeze x -o results --shard {shard} -- --rank 4")
    assert (code, f"no such shard; got {shard}; expected 1/N to N/N" in message) == (2, True)


def test_of_a_scheduler_that_is_nowhere(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EXAMPLES / "lora", "shelf/lora")
    line = "fleet squeeze shelf -o results --scheduler nowhere {} -- --rank 4"
    code, message = first.typed(line.format(""))
    assert code == 2
    assert "or leave out --scheduler" in message
    program, command = re.search(r"Start one with `(\S+) (\S+)`", message).groups()
    done = subprocess.run(
        [Path(sys.executable).with_name(program), command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "scheduler" in done.stdout
    assert first.typed(line.format("--workers 1").replace("--scheduler nowhere ", ""))[0] == 0


def test_every_extra_that_messages_name_is_published():
    published = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {
        extra
        for package in ("loratools", "formats")
        for path in (ROOT / package).rglob("*.py")
        for extra in re.findall(r"loratools\[(\w+)\]", path.read_text())
    }
    assert named
    assert named <= set(published)


@pytest.mark.slow
def test_of_a_live_model_that_changed_its_base(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    import torch

    from loratools.training import squeeze_model

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    config = peft.LoraConfig(r=8, target_modules=["0", "1"], init_lora_weights="pissa")
    model = peft.get_peft_model(inner, config)
    model.save_pretrained("first")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained("trained")
    with pytest.raises(LoratoolsError) as found:
        squeeze_model(model, rank=4)
    command = found.value.hint.partition("loratools ")[2]
    line = command.replace("ADAPTER", "trained").replace("FIRST", "first")
    assert first.typed(line)[0] == 0
    assert lt.info("plain").modules
