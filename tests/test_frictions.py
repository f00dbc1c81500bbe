"""What first meetings stumbled over, one test for each that no other file holds.

The others are in `test_cli_spelling`, `test_many`, `test_widths`, `test_hints`, `test_completion`
and `formats/test_path_kinds`. Next steps are taken from the messages and run.
"""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import loratools as lt
from loratools.cli import cli
from loratools.cli.errors import describe
from loratools.cli.progress import Lines
from loratools_formats.disk.errors import OptionError

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY / "lora", "a")
    shutil.copytree(TINY / "rslora", "shelf/one")
    shutil.copytree(TINY / "rslora", "shelf/two")
    (tmp_path / "base").symlink_to(TINY / "model")
    return tmp_path


def typed(line):
    """Return the exit code of a command, and the line that tells its error, if there is one."""
    done = CliRunner().invoke(cli, shlex.split(line))
    if done.exception is None or isinstance(done.exception, SystemExit):
        return done.exit_code, done.output
    return 2, describe(done.exception)


def command_in(message):
    """Return the command that ends a message."""
    return re.search(r"loratools (.*)$", message)[1]


@pytest.mark.parametrize("output", ["empty", "link"])
def test_an_empty_folder_is_a_fine_output(room, output):
    (room / "empty").mkdir(mode=0o750)
    (room / "link").symlink_to("empty")
    assert typed(f"squeeze a -o {output} --rank 4 -q")[0] == 0
    assert sorted(os.listdir("empty"))[:2] == ["README.md", "adapter_config.json"]
    assert (room / "empty").stat().st_mode & 0o777 == 0o750
    code, message = typed(f"squeeze a -o {output} --rank 4 -q")
    assert (code, "output exists" in message) == (2, True)


def test_an_empty_folder_is_not_skipped_as_done(room):
    (room / "out/one").mkdir(parents=True)
    assert typed("squeeze shelf --out-dir out --rank 4 --skip-existing -q")[0] == 0
    assert (room / "out/one/adapter_config.json").is_file()


@pytest.mark.parametrize("given", ["-o small ", "--dry-run "])
def test_a_folder_of_adapters_says_how_to_take_all(room, given):
    code, message = typed(f"squeeze shelf {given}--rank 4")
    assert code == 2
    assert "shelf: is a folder that holds 2 adapters" in message
    option = re.search(r"--out-dir (\S+)", message)[0].replace("DIR", "small")
    assert typed(f"squeeze shelf {option} --rank 4 -q")[0] == 0
    assert sorted(os.listdir("small")) == ["one", "two"]
    assert typed(f"squeeze {message.split()[-1]} -o one --rank 4 -q")[0] == 0


@pytest.mark.parametrize("ending", [".gguf", ".bin"])
def test_a_model_is_not_written_under_the_name_of_another_kind(room, ending):
    for line in ("fuse base a -o made", "quantize base -o made"):
        code, message = typed(line + ending)
        assert (code, "the result is a folder" in message) == (2, True)
        assert "Pass --output made" in message
        assert not (room / f"made{ending}").exists()
        assert typed(f"{line} -q --overwrite")[0] == 0


def test_a_file_without_the_ending_of_its_format_is_told(room):
    line = "convert a -o {} --to safetensors --overwrite"
    told = "made does not end in .safetensors, by which other programs know it"
    assert told in typed(line.format("made"))[1]
    assert told not in typed(line.format("made.safetensors"))[1]


def test_a_diffusion_checkpoint_is_told_from_an_adapter(room):
    block = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
    save_file({block: np.ones((4, 4), "f4")}, "checkpoint.safetensors")
    code, message = typed("squeeze checkpoint.safetensors -o small.safetensors --rank 2")
    assert code == 2
    assert "is a model's weights, not an adapter" in message
    assert typed("info checkpoint.safetensors")[0] == 0


def test_llama_cpp_names_lead_to_the_conversion(room):
    assert typed("convert a chat.gguf --base base -q")[0] == 0
    code, message = typed("fuse base chat.gguf -o fused -q")
    assert code == 2
    assert message.startswith("chat.gguf: is in llama.cpp's names")
    assert typed(command_in(message) + " -q")[0] == 0
    assert typed("fuse base renamed -o fused -q")[0] == 0


def test_a_key_of_a_newer_peft_is_ignored_by_name_and_recorded(room):
    path = room / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"brand_new": 1}))
    code, message = typed("squeeze a -o small --rank 4 -q")
    assert code == 2
    option = re.search(r"--ignore-key \S+", message)[0]
    assert typed(f"squeeze a -o small --rank 4 -q {option}")[0] == 0
    assert "brand_new" in (room / "small/provenance.json").read_text()


def test_a_model_given_to_merge_leads_to_fuse(room):
    code, message = typed("merge base a -o both")
    assert code == 2
    assert typed(command_in(message) + " -q")[0] == 0


def test_the_suffix_of_another_format_leads_to_a_conversion(room):
    code, message = typed("squeeze a -o small.gguf --rank 4 -q")
    assert code == 2
    assert typed("squeeze a -o small --rank 4 -q")[0] == 0
    assert typed(command_in(message).replace("MODEL", "base") + " -q")[0] == 0
    assert (room / "small.gguf").is_file()


def test_a_share_that_is_read_as_bytes_is_asked_about(room):
    code, message = typed("squeeze a -o small --budget 0.25")
    assert code == 2
    share = re.search(r"did you mean (\S+)\?", message)[1]
    assert typed(f"squeeze a -o small --budget {share} -q")[0] == 0
    with pytest.raises(OptionError, match="did you mean 25%"):
        lt.squeeze("a", budget=0.25)
    by_text, by_number = lt.squeeze("a", budget="40000"), lt.squeeze("a", budget=40000)
    assert by_number.modules == by_text.modules
    assert typed("squeeze a -o other --energy 90% -q")[0] == 0


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


def told(capsys, steps, total, unit="module"):
    """Return the lines of a run; `steps` are (seconds, done)."""
    clock = Clock()
    lines = Lines("squeeze", unit, clock)
    for clock.now, done in steps:
        lines(done, total)
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_without_a_terminal_every_tenth_is_a_line(capsys):
    found = told(capsys, [(2.0 * done, done) for done in range(1, 201)], 200)
    assert [line.split(",")[0] for line in found] == [
        f"squeeze: {tenth}0 %" for tenth in range(1, 10)
    ]
    assert found[0] == "squeeze: 10 %, 0.5 modules/s, 6 min 0 s left"
    assert found[-1] == "squeeze: 90 %, 0.5 modules/s, 40 s left"


def test_what_takes_less_than_a_second_says_nothing(capsys):
    assert told(capsys, [(0.0049 * done, done) for done in range(1, 201)], 200) == []


def test_steps_over_several_tenths_are_one_line_and_none_comes_twice(capsys):
    found = told(capsys, [(1, 35), (2, 35), (3, 39), (4, 95), (5, 99), (6, 100)], 100)
    assert [line.split(",")[0] for line in found] == ["squeeze: 30 %", "squeeze: 90 %"]


def test_bytes_have_a_rate_of_bytes_and_nothing_is_divided_by_zero(capsys):
    assert told(capsys, [(4, 20_000_000)], 40_000_000, "B") == ["squeeze: 50 %, 5.0 MB/s, 4 s left"]
    assert told(capsys, [(0, 0), (2, 0), (3, 0)], 0) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resize a", "Did you mean 'squeeze'"),
        ("compress a", "Did you mean 'squeeze'"),
        ("show a", "Did you mean 'info'"),
        ("version", "Did you mean '--version'"),
        ("help merge", "Did you mean 'merge --help'"),
        ("help", "Did you mean '--help'"),
        ("squeeze a -o b --rank 4 --force", "Did you mean '--overwrite'"),
        ("squeeze a -o b --target-rank 4", "Did you mean '--rank'"),
        ("squeeze a -o b --rank 4 --to kohya", "loratools convert ADAPTER -o NEW --to FORMAT"),
        ("merge a shelf/one -o b --weights 0.5", "A weight follows its adapter: ADAPTER:0.5"),
        ("fuse base a -o b --scale 0.5", "A weight follows its adapter: ADAPTER:0.5"),
        ("to-lora a -o b --alpha 8", "Did you mean '--set alpha=VALUE'"),
        ("quantize base -o b --bits 4", "Did you mean '--quant-type'"),
        (
            "fleet squeeze shelf -o b --rank 4",
            "loratools fleet squeeze shelf -o b -- --rank 4",
        ),
        ("merge a=0.5 shelf/one -o b", "A weight follows a colon: a:0.5"),
        ("squeeze a -o b --energy 90", "Did you mean 90%?"),
        ("merge a shelf/one both", "If both is the output, write --output both in its place"),
        ("fuse base a fused", "If fused is the output, write --output fused in its place"),
        ("merge a shelf/one", "no output given. Add --output PATH"),
        ("info shelf/on", r"Did you mean shelf/one\?"),
        ("info https://civitai.com/models/1", "https://civitai.com/models/1: is an address"),
        ("convert a -o b --to gguv", "Did you mean 'gguf'"),
        ("convert a -o b --to foo", "Known formats: comfyui, diffusers"),
    ],
)
def test_other_names_lead_to_ours(room, line, message):
    code, told = typed(line)
    assert code == 2
    assert re.search(message, told), told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("squeeze a -o b --rank 8 --max-error 1%", "above --max-error 0.01; nothing was written"),
        ("squeeze a -o b --rank 8 --max-error 90%", "wrote b"),
        ("merge a shelf/one -o b --method TIES --set density=50%", "wrote b"),
        ("merge a shelf/one -o b --method dare-ties --set density=0.5", "wrote b"),
    ],
)
def test_shares_and_names_are_read_as_they_are_written(room, line, told):
    assert told in typed(line)[1]


def test_a_table_names_the_components_of_a_file_without_dotted_paths(room):
    files = ("one.safetensors", "two.safetensors")
    for name in files:
        pairs = {"lora_down": (4, 8), "lora_up": (8, 4)}
        save_file(
            {
                f"{prefix}_x_to_q.{part}.weight": np.ones(shape, "f4")
                for prefix in ("lora_unet", "lora_te")
                for part, shape in pairs.items()
            },
            name,
        )
    assert "te, unet" in typed(f"info {' '.join(files)}")[1]


def test_info_tells_how_an_output_was_made(room):
    assert typed("squeeze a -o b --rank 4 -q")[0] == 0
    told = typed("info b")[1]
    assert re.search(r"made by +loratools \S+ squeeze device=cpu method=exact rank=4\n", told), told
    history = re.search(r"history +loratools (provenance b)\n", told)
    assert history is not None
    assert "squeeze" in typed(history[1])[1]
