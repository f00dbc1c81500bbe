"""The command line: exit codes, streams, JSON, and what it must not import."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from told import found

from loratools.cli import cli

EXAMPLES = Path(__file__).parent.parent / "examples"
HEAVY = ("torch", "scipy", "numpy", "gguf", "matplotlib", "huggingface_hub", "safetensors")


PLACE = ("output", "written")


def loratools(*arguments, **kwargs):
    command = [sys.executable, "-c", "from loratools.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def imported_by(*arguments):
    code = (
        "import sys\n"
        f"sys.argv[1:] = {list(map(str, arguments))!r}\n"
        "from loratools.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "print(code, *sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, *names = done.stderr.splitlines()[-1].split()
    assert status == "0", done.stderr
    return set(names)


def test_help_imports_nothing_heavy():
    assert not imported_by("--help") & set(HEAVY)


def test_info_and_formats_import_no_numpy(make_folder):
    assert not imported_by("info", make_folder()) & set(HEAVY)
    assert not imported_by("formats") & set(HEAVY)


def test_squeeze_on_the_cpu_imports_no_torch(make_folder, tmp_path):
    names = imported_by("squeeze", make_folder(), "-o", tmp_path / "out", "--rank", "2", "-q")
    assert not names & {"torch", "scipy", "gguf", "matplotlib", "huggingface_hub"}
    assert "numpy" in names


def test_an_adapter_alone_imports_nothing_of_bases(make_folder, tmp_path):
    of_bases = {"loratools.base.weights", "loratools.base.codecs", "loratools.naming"}
    of_bases |= {"loratools.hub.resolve", "loratools_formats.formats.singlefile.read"}
    adapter = make_folder()
    squeezed = imported_by("squeeze", adapter, "-o", tmp_path / "out", "--rank", "2", "-q")
    assert not (squeezed | imported_by("info", adapter)) & of_bases


@pytest.mark.parametrize("name", ["", "info", "squeeze", "formats"])
def test_every_command_has_help(name):
    done = CliRunner().invoke(cli, [*([name] if name else []), "--help"])
    assert done.exit_code == 0
    assert "Usage:" in done.output


def test_listed_summaries_are_those_of_the_commands():
    listing = CliRunner().invoke(cli, ["--help"]).output
    for name, command in ((n, cli.get_command(None, n)) for n in cli.list_commands(None)):
        assert f"  {name}" in listing
        assert command.help.splitlines()[0] in " ".join(listing.split())


def test_report_and_note_go_to_their_streams(make_folder, tmp_path):
    done = loratools("squeeze", make_folder(), "-o", tmp_path / "out", "--rank", 2)
    assert done.returncode == 0
    assert "layers.0.q" in done.stdout
    assert "8 → 2" in done.stdout
    assert done.stderr == f"note: wrote {tmp_path / 'out'}\n"


def test_quiet_prints_nothing(make_folder, tmp_path):
    done = loratools("squeeze", make_folder(), "-o", tmp_path / "out", "--rank", 2, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_json_report_has_the_documented_keys(make_folder, tmp_path):
    folder = make_folder()
    done = loratools("squeeze", folder, "-o", tmp_path / "out", "--rank", 2, "--json")
    result = json.loads(done.stdout)
    assert result["schema"] == 1
    assert result["operation"] == "squeeze"
    weights = "adapter_model.safetensors"
    assert result["bytes_in"] == (folder / weights).stat().st_size
    assert result["bytes_out"] == (tmp_path / "out" / weights).stat().st_size
    assert 0 < result["relative_error"] < 1
    (module,) = result["modules"]
    assert module["name"] == "layers.0.q"
    assert (module["rank_in"], module["rank_out"]) == (8, 2)
    assert module["relative_error"] == pytest.approx((1 - module["energy"]) ** 0.5, rel=1e-3)


@pytest.mark.slow
def test_without_a_rule_it_prints_the_choices_and_writes_nothing(make_folder, tmp_path):
    folder = make_folder()
    refused = loratools("squeeze", folder, "-o", tmp_path / "out")
    assert refused.returncode == 2
    assert "no rule for the ranks, so nothing was written. Choose with --rank" in refused.stderr
    done = loratools("squeeze", folder)
    assert done.returncode == 0
    assert done.stdout == refused.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["rank", "1", "2", "4", "8"]
    assert "Choose with --rank" in done.stderr
    assert not (tmp_path / "out").exists()
    done = loratools("squeeze", folder, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    choices = json.loads(done.stdout)["choices"]
    assert loratools("squeeze", folder, "-q").stdout == ""
    assert [choice["rank"] for choice in choices] == [1, 2, 4, 8]


def test_max_error_writes_nothing_and_exits_with_1(make_folder, tmp_path):
    folder = make_folder()
    out = tmp_path / "out"
    done = loratools("squeeze", folder, "-o", out, "--rank", 1, "--max-error", 0.01)
    assert done.returncode == 1
    assert "above --max-error 0.01; nothing was written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert loratools("squeeze", folder, "-o", out, "--rank", 8, "--max-error", 0).returncode == 0


@pytest.mark.slow
def test_dry_run_reports_the_same_and_writes_nothing(make_folder, tmp_path):
    folder = make_folder()
    dry = loratools("squeeze", folder, "--rank", 2, "--json", "--dry-run")
    assert "nothing was written" in dry.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    wet = loratools("squeeze", folder, "--rank", 2, "--json", "-o", tmp_path / "out")
    assert found(dry.stdout, *PLACE) == found(wet.stdout, *PLACE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "2"], "no output given"),
        (["--rank", "0", "--dry-run"], "rank is too small"),
        (["--rank", "2", "--energy", "0.5", "--dry-run"], "rank rules exclude each other"),
        (["--budget", "much", "--dry-run"], "not a budget"),
        (["--budget", "10B", "--dry-run"], "the budget is too small"),
        (["--rank-pattern", "q", "--rank", "2", "--dry-run"], "not a rank pattern"),
        (["--include", "(", "--rank", "2", "--dry-run"], "not a regular expression"),
        (["--exclude", "q", "--rank", "2", "--dry-run"], "no module to squeeze"),
        pytest.param(
            ["--device", "cuda", "--rank", "2", "--dry-run"], "no cuda device",
            marks=pytest.mark.slow,  # imports torch
        ),
    ],
)  # fmt: skip
def test_wrong_options_give_one_line(make_folder, arguments, message):
    done = loratools("squeeze", make_folder(), *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_usage_errors_exit_with_2():
    for arguments in (["nonsense"], ["squeeze"], ["squeeze", "x", "--rank", "many"]):
        done = loratools(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["info", ""],
        ["fuse", "", "x"],
        ["fuse", "x", "", "--dry-run"],
        ["merge", ":2", "x"],
        ["squeeze", "x", "-o", ""],
    ],
)
def test_an_empty_path_is_not_the_current_folder(arguments):
    done = loratools(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "empty" in line


def test_traceback_is_shown_when_asked_for(tmp_path):
    plain = loratools("info", tmp_path / "missing")
    assert plain.returncode == 2
    assert len(plain.stderr.splitlines()) == 1
    full = loratools("--traceback", "info", tmp_path / "missing")
    assert full.returncode != 0
    assert "Traceback (most recent call last)" in full.stderr


@pytest.mark.slow
def test_existing_output_needs_overwrite(make_folder, tmp_path):
    folder, out = make_folder(), tmp_path / "out"
    assert loratools("squeeze", folder, "-o", out, "--rank", 2).returncode == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    refused = loratools("squeeze", folder, "-o", out, "--rank", 1)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert loratools("squeeze", folder, "-o", out, "--rank", 1, "--overwrite").returncode == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before


@pytest.mark.slow
def test_an_input_is_replaced_only_in_place(make_folder, tmp_path):
    folder = make_folder()
    before = (folder / "adapter_model.safetensors").read_bytes()
    for options in ([], ["--overwrite"]):
        done = loratools("squeeze", folder, "-o", folder, "--rank", 2, *options)
        assert done.returncode == 2
        assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert "inputs are never changed. Choose another output, or pass --in-place" in done.stderr
    both = loratools("squeeze", folder, "-o", tmp_path / "out", "--rank", 2, "--in-place")
    assert both.returncode == 2
    assert loratools("squeeze", folder, "--rank", 2, "--in-place").returncode == 0
    info = json.loads(loratools("info", folder, "--json").stdout)
    assert [module["rank"] for module in info["modules"]] == [2]


@pytest.mark.slow
def test_info_shows_what_an_adapter_is(make_folder):
    folder = make_folder(
        modules={"layers.0.q": (24, 20, 8), "layers.1.down": (16, 40, 4)},
        use_rslora=True,
        rank_pattern={"down": 4},
        base_model_name_or_path="somebody/model",
        some_new_key={"x": 1},
    )
    text = loratools("info", folder).stdout
    for expected in ("somebody/model", "8 (1×), 4 (1×)", "5.65685", "down, q", "some_new_key"):
        assert expected in text
    info = json.loads(loratools("info", folder, "--json").stdout)
    assert info["parameters"] == 8 * 44 + 4 * 56
    assert info["dtypes"] == {"BF16": 4}
    (finding,) = info["findings"]
    assert finding["code"] == "unknown-config-key"
    assert (finding["severity"], finding["where"]) == ("error", "some_new_key")
    assert "layers.1.down" in loratools("info", folder, "-v").stdout


@pytest.mark.slow
def test_provenance_is_shown_by_info(make_folder, tmp_path):
    loratools("squeeze", make_folder(), "-o", tmp_path / "out", "--rank", 2)
    info = json.loads(loratools("info", tmp_path / "out", "--json").stdout)
    assert info["provenance"]["loratools.operation"] == "squeeze"
    assert json.loads(info["provenance"]["loratools.options"])["rule"] == {"rank": 2}


@pytest.mark.slow
def test_initial_adapter_on_the_command_line(make_folder, tmp_path):
    trained = make_folder("trained", init_lora_weights="pissa")
    first = make_folder("first", seed=1)
    refused = loratools("squeeze", trained, "-o", tmp_path / "out", "--rank", 2)
    assert refused.returncode == 2
    assert "--initial" in refused.stderr
    done = loratools(
        "squeeze", trained, "--initial", first, "-o", tmp_path / "out", "--rank", 2, "--json"
    )
    assert json.loads(done.stdout)["modules"][0]["rank_in"] == 16


def test_formats_lists_peft():
    entries = json.loads(loratools("formats", "--json").stdout)["formats"]
    (entry,) = [entry for entry in entries if entry["name"] == "peft"]
    assert (entry["read"], entry["write"], entry["broken"]) == (True, True, False)
    assert "read+write" in loratools("formats").stdout


@pytest.mark.slow
def test_interrupt_exits_with_130(make_folder, tmp_path):
    modules = {f"layers.{i}.q": (2000, 2000, 64) for i in range(40)}
    folder = make_folder(modules=modules, r=64)
    out = tmp_path / "out"
    code = "from loratools.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "squeeze", folder, "-o", out, "--rank", "32"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    time.sleep(0.6)
    os.kill(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    # Python itself may be interrupted while it starts or ends; then it dies of the signal.
    assert child.returncode in (130, -signal.SIGINT, 0)
    assert "Traceback" not in errors or child.returncode == -signal.SIGINT
    assert not out.exists() or (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("verbose", [False, True])
def test_many_modules_are_a_line_for_each_type_unless_all_are_asked_for(verbose):
    lora = EXAMPLES / "tiny-llama" / "lora"
    done = loratools("squeeze", lora, "--rank", "4", "--dry-run", *(["-v"] if verbose else []))
    listed = [line for line in done.stdout.splitlines() if line.startswith("model.")]
    assert len({line.split()[0] for line in listed}) == len(listed) == (28 if verbose else 5)
    errors = [float(line.split()[-1]) for line in listed]
    assert verbose or errors == sorted(errors, reverse=True)
    assert verbose == ("q_proj           4           32" not in done.stdout)
