"""One spelling for each option over all commands, older ones that keep working, and help."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from told import found

import loratools
import loratools_formats
from loratools.cli import cli
from loratools.cli.options import DeclaredOption
from loratools.cli.wording import DOCS
from loratools_formats import read_adapter
from loratools_formats.disk.errors import OutputExistsError
from loratools_formats.disk.publish import publish_file

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-llama"
MODEL, LORA, DORA = TINY / "model", TINY / "lora", TINY / "dora"
COMMANDS = {name: cli.get_command(None, name) for name in cli.list_commands(None)}

_spec = importlib.util.spec_from_file_location("write_help", ROOT / "tests/help/write_help.py")
write_help = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(write_help)


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def succeeded(*arguments):
    done = run(*arguments)
    assert done.exit_code == 0, done.exception or done.output
    return done.stdout


def options(name):
    return [p for p in COMMANDS[name].params if isinstance(p, DeclaredOption)]


def test_help_is_what_it_was():
    """`python tests/help/write_help.py` writes it anew after a change that is meant."""
    texts = write_help.help_texts()
    kept = {path.name: path.read_text() for path in write_help.FOLDER.glob("*.txt")}
    assert texts == kept


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_says_where_to_read_on(name):
    text = succeeded(name, "--help")
    assert re.search(rf"^  loratools {name}", text, re.MULTILINE)
    assert f"Learn more:\n  {DOCS}/commands/{name}.md\n" in text
    page = (ROOT / "docs" / "commands" / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")


def test_a_flag_means_one_thing_in_all_commands():
    by_flag = {}
    for name in COMMANDS:
        for option in options(name):
            shown = option.opts[0]
            by_flag.setdefault(shown, set()).add((option.name, option.heading, option.multiple))
    varied = {flag: seen for flag, seen in by_flag.items() if len(seen) > 1}
    # KEY=VALUE is of the input, of a method, or of the output. quantize takes several patterns.
    # to-lora keeps whole what is not of low rank; compare measures whole changes, not a sample.
    # convert says how an output stores experts, quantize that they are quantised, too.
    assert set(varied) <= {"--set", "--exclude", "--exact", "--experts"}


SHOWING = {"info", "formats", "fleet", "methods", "plan-squeeze", "provenance", "rule"}


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in SHOWING])
def test_every_command_that_computes_has_the_common_options(name):
    flags = {flag for option in options(name) for flag in option.opts}
    assert {"--json", "--quiet", "-q"} <= flags
    if name not in {"verify", "spectrum", "compare", "check", "replay", "push"}:
        assert {"--output", "-o", "--overwrite", "--dry-run"} <= flags
    if name not in {"convert", "replay"}:
        assert "--workers" in flags


def narrowed(path):
    return {c.direction.a.dtype.code for c in read_adapter(path).modules.values()}


@pytest.mark.parametrize("flag", ["--dtype", "--outtype"])
@pytest.mark.parametrize("spelling", ["f16", "FP16", "float16", "Half"])
def test_types_have_several_spellings(tmp_path, flag, spelling):
    succeeded("squeeze", LORA, "-o", tmp_path / "a", "--rank", 1, flag, spelling)
    succeeded("convert", LORA, "-o", tmp_path / "b", flag, spelling)
    assert narrowed(tmp_path / "a") == narrowed(tmp_path / "b") == {"F16"}


@pytest.mark.slow
def test_old_spellings_mean_what_they_did(tmp_path):
    pairs = [
        (
            ["squeeze", LORA, "--rank", 2, "--method", "rsvd"],
            ["squeeze", LORA, "--rank", 2, "--svd", "RSVD"],
        ),
        (["squeeze", LORA, "--threshold-rank"], ["squeeze", LORA, "--threshold"]),
        (["squeeze", LORA, "--energy", "0.9"], ["squeeze", LORA, "--energy", "90%"]),
        (
            ["to-lora", DORA, "--base", MODEL, "--rank", 2, "--method", "exact"],
            ["to-lora", DORA, "--base", MODEL, "--rank", 2, "--svd", "exact"],
        ),
        (
            ["merge", LORA, DORA, "--base", MODEL, "--method", "slerp", "-p", "t=0.3", "-r", 2],
            ["merge", LORA, DORA, "--base", MODEL, "--method", "slerp", "--set", "t=0.3", "-r", 2],
        ),
        (
            ["merge", LORA, LORA, "--method", "ties", "--param", "density=0.3", "-r", 2],
            ["merge", LORA, LORA, "--method", "ties", "--set", "density=0.3", "-r", 2],
        ),
        (
            ["quantize", MODEL, "--skip", "layers.[1-3]"],
            ["quantize", MODEL, "--exclude", "layers.[1-3]"],
        ),
        (["fuse", MODEL, LORA, "--outtype", "f32"], ["fuse", MODEL, LORA, "--dtype", "float"]),
    ]
    for old, new in pairs:
        before, after = (succeeded(*words, "--dry-run", "--json") for words in (old, new))
        assert found(before) == found(after)


def test_old_metadata_and_new(tmp_path):
    for flag in ("--metadata", "--set"):
        out = tmp_path / f"{flag[2:]}.safetensors"
        succeeded("convert", LORA, out, "--to", "safetensors", flag, "note=a=b")
        assert read_adapter(out).metadata["note"] == "a=b"


@pytest.mark.parametrize(
    "arguments",
    [["squeeze", LORA, "--rank", 1], ["convert", LORA], ["dequantize", "four-bit"]],
    ids=lambda arguments: arguments[0],
)
def test_an_output_is_an_option_or_the_last_argument(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "dequantize":
        succeeded("quantize", MODEL, "-o", "four-bit", "--exclude", "layers.[1-3]")
    succeeded(*arguments[:2], "one", *arguments[2:], "-q")
    succeeded(*arguments, "--output", "two", "-q")
    assert {p.name for p in Path("one").iterdir()} == {p.name for p in Path("two").iterdir()}
    refused = run(*arguments[:2], "three", *arguments[2:], "-o", "four")
    assert "several outputs are given; got three, four" in str(refused.exception)


def test_verify_takes_its_base_and_adapters_either_way(tmp_path):
    succeeded("fuse", MODEL, LORA, "-o", tmp_path / "fused", "--dtype", "f32", "-q")
    fused = tmp_path / "fused"
    old = succeeded("verify", fused, "--base", MODEL, "--adapter", LORA, "--json")
    assert found(succeeded("verify", fused, MODEL, LORA, "--json")) == found(old)
    assert json.loads(old)["contained"] is True
    assert "no adapter given" in str(run("verify", fused, MODEL).exception)
    assert "no base given" in str(run("verify", fused).exception)


def test_names_of_formats_in_any_case(tmp_path):
    succeeded("convert", LORA, "-o", tmp_path / "out", "--to", "MLX", "-q")
    assert read_adapter(tmp_path / "out", "Mlx").format == "mlx"


@pytest.mark.parametrize(
    "arguments",
    [
        ("fuse", "base", "a", "-o", "base"),
        ("quantize", "base", "-o", "base"),
        ("convert", "a", "-o", "a"),
        ("merge", "a", "-o", "a"),
        ("squeeze", "a", "-o", "a", "--rank", "1"),
    ],
)
def test_no_input_is_an_output(tmp_path, monkeypatch, arguments):
    (tmp_path / "base").symlink_to(MODEL)
    (tmp_path / "a").symlink_to(LORA)
    monkeypatch.chdir(tmp_path)
    done = run(*arguments, "--overwrite")
    assert isinstance(done.exception, OutputExistsError)
    assert "the output is an input" in str(done.exception)


def test_results_are_not_named_as_other_files(tmp_path):
    done = run("squeeze", LORA, "-o", tmp_path / "out.gguf", "--rank", 1)
    assert "format peft is a folder, and the output is named as a file" in str(done.exception)
    hint = run("squeeze", LORA, "-o", tmp_path / "out.bin", "--rank", 1).exception.hint
    assert hint.endswith(f"--to safetensors {tmp_path}/out -o {tmp_path}/out.safetensors")
    assert "cannot go to stdout" in str(run("squeeze", LORA, "-o", "-", "--rank", 1).exception)
    assert list(tmp_path.iterdir()) == []


def python_m(*arguments):
    command = [sys.executable, "-m", "loratools", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_bare_command_shows_its_help():
    bare = python_m()
    assert (bare.returncode, bare.stderr) == (0, "")
    assert bare.stdout == python_m("--help").stdout
    assert python_m("-V").stdout.split()[-1] == loratools.__version__
    wrong = python_m("squeze")
    assert wrong.returncode == 2
    assert "Did you mean 'squeeze'?" in wrong.stderr


def test_errors_word_parameters_for_whoever_reads_them(tmp_path):
    (tmp_path / "there").write_text("")
    with pytest.raises(OutputExistsError, match=r"Pass `overwrite=True` to replace it"):
        publish_file(tmp_path / "there").__enter__()
    shown = python_m("squeeze", str(LORA), "-o", str(tmp_path / "there"), "--rank", "1").stderr
    assert "Pass --overwrite to replace it" in shown


def strings_of_libraries():
    for package in (loratools, loratools_formats):
        for path in Path(package.__file__).parent.rglob("*.py"):
            if "cli" in path.parts:
                continue
            tree = ast.parse(path.read_text())
            documented = {
                id(node.body[0].value)
                for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                and node.body
                and isinstance(node.body[0], ast.Expr)
            }
            calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
            made = {
                id(part)
                for call in calls
                if getattr(call.func, "id", "") in {"command_on", "option"}
                for part in ast.walk(call)
            }
            for node in ast.walk(tree):
                is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
                if is_text and id(node) not in documented | made:
                    yield path, node.value


@pytest.mark.slow
def test_the_library_names_parameters_and_not_flags():
    """Only whole commands have flags; a parameter is named as Python writes it, in backquotes."""
    known = {
        word for name in COMMANDS for o in options(name) for word in (o.name, o.name.strip("_"))
    }
    fleet = COMMANDS["fleet"]
    commands = (fleet.get_command(None, name) for name in fleet.list_commands(None))
    known |= {option.name for command in commands for option in command.params}
    for path, text in strings_of_libraries():
        if path.name in ("commands.py", "suggested.py", "path_kinds.py", "facts.py", "spelling.py"):
            continue  # rules and commands to paste, put together from pieces
        assert "loratools " in text or not re.search(r"(^|[\s(`])--[a-z]", text), (path, text)
        for word in re.findall(r"`([a-z_]+)=", text):
            assert word in known, (path, text)
