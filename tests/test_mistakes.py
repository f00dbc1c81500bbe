"""Mistakes that people make when they type a command, and what they are told."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import loratools as lt
from loratools.cli import cli
from loratools.cli.errors import describe
from loratools_formats.disk.errors import OptionError

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
KOHYA = TINY.parent / "tiny-flux" / "kohya.safetensors"


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(TINY / "lora", "a")
    shutil.copytree(TINY / "rslora", "shelf/one")
    shutil.copytree(TINY / "rslora", "shelf/two")
    shutil.copy(KOHYA, "style.safetensors")
    (tmp_path / "base").symlink_to(TINY / "model")
    return tmp_path


def typed(line):
    """Return the exit code of a command, and the line that tells its error, if there is one."""
    done = CliRunner().invoke(cli, shlex.split(line), prog_name="loratools")
    if done.exception is None or isinstance(done.exception, SystemExit):
        return done.exit_code, " ".join(done.output.rpartition("Error: ")[2].split())
    return 2, describe(done.exception)


@pytest.mark.parametrize(
    ("line", "then"),
    [
        ("a", "info a"),
        ("a info", "info a"),
        ("a squeeze --rank 4 -o b -q", "squeeze a --rank 4 -o b -q"),
        ("fleet shelf", "fleet info shelf"),
        ("compare base base", "compare ADAPTER --bases base MODEL"),
        ("fleet dedup shelf", "fleet index shelf -o INDEX"),
        ("check a -o findings.sarif", "check a --output-format sarif > findings.sarif"),
        ("spectrum a -o found.json", "spectrum ADAPTER --json > FILE"),
        ("fleet squeeze shelf --rank 4 --out-dir b", "fleet squeeze shelf -o b -- --rank 4"),
    ],
)
def test_a_command_is_told_that_does_what_was_meant(room, line, then):
    code, told = typed(line)
    assert code == 2
    command = re.findall(r"loratools ((?:(?!\. ).)+)", told)[0]
    assert command == then
    for word, value in {"ADAPTER": "a", "MODEL": "base", "INDEX": "i.safetensors"}.items():
        command = command.replace(word, value)
    command, _, file = command.partition(" > ")
    code, printed = typed(command)
    assert code == 0, printed
    if file.endswith(".sarif"):
        assert json.loads(printed)["version"] == "2.1.0"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("squeeze a b 8", "If 8 is a rank, write --rank 8 in its place"),
        ("squeeze a b c", "If c is where results go, write --out-dir c in its place"),
        ("squeeze a --include '*.q_proj' --rank 4 -o b", r"Did you mean '.*\.q_proj'?"),
        ("squeeze a --include q_proj,v_proj --rank 4 -o b", "as in --include 'q_proj|v_proj'"),
        ("squeeze a --include qproj --rank 4 -o b", "such as model.layers.0.mlp.down_proj"),
        ("spectrum a --include qproj", "Module paths are listed by: loratools info a -v"),
        ("repair a --base base --include qproj -o b", "no module to repair; got 28 modules in"),
        ("compare a shelf/one --include qproj", "no module to compare; got 28 modules in"),
        ("info '~/b'", "the shell left ~ as it is in ~/b. Write "),
        ("squeeze a --output=~/b --rank 4", "the shell left ~ as it is in ~/b. Write "),
        ("info -", "-: adapters and models are not read from stdin. Name the folder"),
        ("squeeze a --rank 4 -o -", "cannot go to stdout; got -. Name a place: --output PATH"),
        ("squeeze a --rank 4 -o /dev/null", "/dev/null: exists, and is neither a file nor a"),
        ("info 'shelf\\one'", "Did you mean shelf/one?"),
        ("verify base --adapters a", "'--adapter'"),
        ("fuse --model base --lora a -o b", "without a flag: loratools fuse BASE ADAPTER[:WEIGHT]"),
        ("fuse base --adapter-path a", "without a flag: loratools fuse BASE ADAPTER[:WEIGHT]"),
        ("squeeze --input a --rank 4", "without a flag: loratools squeeze ADAPTER [OUTPUT]"),
        ("convert a -t mlx b", "Did you mean '--to'?"),
        ("check a --severity error", "Did you mean '--fail-on'?"),
        ("squeeze a --rank 4 --save-path b", "Did you mean '--output'?"),
    ],
)  # fmt: skip
def test_what_was_meant_is_told(room, line, told):
    code, printed = typed(line)
    assert (code, told in printed) == (2, True), printed


def test_an_address_of_a_file_is_no_path(room):
    code, told = typed(f"info file://{room}/a")
    assert (code, told.partition("Did you mean ")[2]) == (2, f"{room}/a?")


@pytest.mark.parametrize(
    ("line", "better"),
    [
        ("squeeze a -o b.json --rank 2", "b"),
        ("squeeze a -o v1.5/b.tar.gz --rank 2", "v1.5/b"),
        ("merge a shelf/one -o b.yaml", "b"),
        ("fuse base a -o b.json", "b"),
        ("convert a b.npz --to mlx", "b"),
        ("squeeze style.safetensors -o b.gguf --rank 2", "b.safetensors"),
        ("squeeze style.safetensors -o b.json --rank 2", "b.safetensors"),
        ("squeeze style.safetensors -o b.ckpt --rank 2", "b.safetensors"),
    ],
)
def test_an_output_is_not_named_as_another_kind_of_file(room, line, better):
    code, told = typed(line)
    assert (code, told.split()[-1]) == (2, better), told
    assert not list(room.glob("b[!a]*"))
    wrong = re.search(r"\S*b\.(json|tar\.gz|yaml|npz|gguf|ckpt)", line)[0]
    assert typed(line.replace(wrong, better))[0] == 0
    assert (room / better).exists()


@pytest.mark.parametrize("name", [".gguf", ".safetensors"])
def test_a_name_that_is_but_an_ending_is_none(room, name):
    code, told = typed(f"squeeze a -o {name} --rank 2")
    assert (code, f"Pass --output {name[1:]}, " in told) == (2, True), told
    assert not (room / name).exists()


def test_a_gguf_is_not_named_as_safetensors(room):
    assert typed("convert a a.gguf --base base -q")[0] == 0
    code, told = typed("squeeze a.gguf b.safetensors --rank 2")
    assert (code, told.split()[-1]) == (2, "b.gguf"), told
    with pytest.raises(OptionError, match="named as another kind"):
        lt.squeeze("a.gguf", rank=2, output="b.safetensors")


@pytest.mark.parametrize("name", ["b", "v1.5", "b.2026-12-01", "b.safetensor"])
def test_other_names_with_dots_are_names(room, name):
    source = "style.safetensors" if name.endswith("r") else "a"
    assert typed(f"squeeze {source} -o {name} --rank 2 -q")[0] == 0
    assert (room / name).exists()


def test_a_folder_that_may_not_be_looked_into_spoils_no_other(room, monkeypatch):
    """Its permissions are told by `os.access`; whoever is root may look into all."""
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "two" not in str(path) and may(path, mode))
    told = "is a folder that may not be looked into"
    printed = typed("info shelf")[1]
    assert (printed.count("shelf/one"), printed.count(told)) == (1, 1)
    done = CliRunner().invoke(
        cli, shlex.split("squeeze shelf --out-dir out --rank 2 --keep-going"), standalone_mode=False
    )
    assert (done.return_value, told in done.output) == (1, True)
    assert os.listdir("out") == ["one"]


@pytest.mark.parametrize("line", ["squeeze . --rank 2 --in-place", "squeeze . ../a --rank 2"])
def test_the_folder_that_a_shell_is_in_is_not_replaced(room, monkeypatch, line):
    before = (room / "a/adapter_model.safetensors").read_bytes()
    monkeypatch.chdir(room / "a")
    code, told = typed(f"{line} --overwrite" if ".." in line else line)
    assert (code, "name" in told) == (2, True)
    assert (room / "a/adapter_model.safetensors").read_bytes() == before
    monkeypatch.chdir(room)
    assert typed(f"squeeze {told.split()[-2]} --rank 2 --in-place")[0] == 0


def run(arguments, **streams):
    """Run a command in a process of its own, as a shell does."""
    return subprocess.run(
        [sys.executable, "-m", "loratools", *arguments], timeout=120, check=False, **streams
    )


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_the_work_is_done_when_nobody_reads_on(room, name):
    """As with `| head`: the reader of a report is not the reader of the results."""
    (room / "shelf/three").mkdir()
    read, write = os.pipe()
    os.close(read)
    other = {"stdout": "stderr", "stderr": "stdout"}[name]
    done = run(
        ["squeeze", "shelf", "--out-dir", "out", "--rank", "2", "--keep-going", "-v"]
        if name == "stdout"
        else ["squeeze", "shelf/one", "shelf/two", "shelf/three", "--out-dir", "out",
              "--rank", "2", "--keep-going"],
        **{name: write, other: subprocess.DEVNULL},
    )  # fmt: skip
    os.close(write)
    assert done.returncode == (1 if name == "stderr" else 0)
    assert sorted(os.listdir("out")) == ["one", "two"]


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_the_exit_code_is_true_when_nobody_reads_on(room):
    os.remove("shelf/one/adapter_model.safetensors")
    read, write = os.pipe()
    os.close(read)
    done = run(["check", "shelf", "--no-config"], stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    assert done.returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="descriptors of POSIX")
def test_closed_streams_are_not_the_numbers_of_files(room):
    """The first file that is opened would be number 1 or 2, and get what a library prints."""
    code = (
        "import os, sys\n"
        "sys.argv = ['loratools', 'squeeze', 'a', '-o', 'b', '--rank', '2', '-q']\n"
        "from loratools.cli import main\n"
        "from loratools_formats.disk import publish\n"
        "synced = publish.sync_file\n"
        "def printed(path):\n"
        "    for number in (1, 2): os.write(number, b'a library prints this')\n"
        "    synced(path)\n"
        "publish.sync_file = printed\n"
        "main()\n"
    )
    command = shlex.join([sys.executable, "-c", code])
    done = subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], timeout=120, check=False)
    assert done.returncode == 0
    assert {module.rank for module in lt.info("b").modules} == {2}
    assert len(load_file("b/adapter_model.safetensors")) == 56


@pytest.mark.skipif(os.name == "nt", reason="no folder is removed there while somebody is in it")
def test_a_current_folder_that_is_gone_is_told(room):
    script = f"cd gone && rmdir ../gone && {sys.executable} -m loratools info ../b"
    (room / "gone").mkdir()
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"The current folder is gone; enter it again, or another: cd {room}/gone" in done.stderr
