"""From a first line to success by doing what the messages say, as somebody does who pastes.

Each line fails, or succeeds at once. Its message names a command, an option, or what was meant;
that is done, and again with the next message. What only the user knows stands in VALUES.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from loratools.cli import cli
from loratools.cli.errors import describe

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST_STEPS = 4
VALUES = {
    "MODEL": "base", "BASE": "base", "ADAPTER": "a", "ADAPTERS": "shelf", "INDEX": "index",
    "PATH": "made", "DIR": "made", "FOLDER": "made", "RESULTS": "results", "NEW": "made",
    "RANK": "4", "FORMAT": "mlx", "VALUE": "8", "--base": "base", "--output": "made",
    "--rank": "4", "--to": "mlx", "--out-dir": "made",
}  # fmt: skip


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "rslora"):
        shutil.copytree(EXAMPLES / "tiny-llama" / name, f"shelf/{name}")
    shutil.copytree("shelf/lora", "a")
    shutil.copytree(EXAMPLES / "tiny-llama/dora", "d")
    (tmp_path / "base").symlink_to(EXAMPLES / "tiny-llama/model")
    shutil.copy(EXAMPLES / "tiny-flux/kohya.safetensors", "style.safetensors")
    weights = load_file("a/adapter_model.safetensors")
    dead = {k: v for k, v in weights.items() if "layers.0.self_attn.q_proj" not in k}
    save_file(dead, "chat.safetensors")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/x.txt").write_text("x")
    return tmp_path


def typed(line):
    """Return the exit code of a command, and what it says."""
    done = CliRunner().invoke(cli, shlex.split(line), standalone_mode=False)
    if done.exception is None:
        return done.return_value or 0, done.output
    error = done.exception
    if isinstance(error, SystemExit):
        return error.code, done.output
    text = error.format_message() if hasattr(error, "format_message") else describe(error)
    return 2, text


def filled(text):
    """Return a command with what only the user knows."""
    return re.sub(r"\b[A-Z]+\b", lambda found: VALUES.get(found[0], found[0]), text)


def command_of(line):
    """Return the click command that a line calls."""
    command = cli
    for word in shlex.split(line):
        found = command.get_command(None, word) if hasattr(command, "get_command") else None
        if found is None:
            return command
        command = found
    return command


def with_flag(line, flag, text):
    """Return a line with a flag, and with the value that a text gives it, or the user."""
    (option,) = (one for one in command_of(line).params if flag in one.opts)
    if option.is_flag:
        return f"{line} {flag}"
    given = r"([\w%./^$|:-]*[\dA-Z%/=^][\w%./^$|:=-]*|[a-z]+(?=$|[.,;]))"
    value = re.search(rf"{flag}[ =]{given}", text)
    bare = re.sub(rf" (?:{'|'.join(option.opts)})[ =]\S+", "", line)
    return f"{bare} {flag} {filled(value[1].rstrip('.')) if value else VALUES[flag]}"


def next_line(line, message):
    """Return the line that a message says to type next."""
    ends = r"(?=, or |\. [A-Z]|; |, which|$)"
    found = re.findall(rf"loratools ([a-z-]+(?: .*?)?){ends}", message)
    commands = [one for one in found if one.split()[0] in cli.list_commands(None)]
    if commands:
        return filled(commands[-1])
    words = shlex.split(line)
    named = re.search(
        r"(?:[Dd]id you mean|Name (?:one of them|it|its folder|one):|A weight follows a colon:"
        r"|name one:) '?([^'?, ]+)",
        message,
    )
    if named:
        got = r"(?:option|command|named|got) '?([^'; ]+?)(?:'|[;.] |$|\.0;)"
        places = (got, r"^(\S+?): ", r"^(\S+)")
        wrong = next(filter(None, (re.search(one, message) for one in places)))[1]
        weighted = wrong if ":" in named[1] else ""
        return shlex.join(
            named[1] if one == wrong or (weighted and one.endswith(weighted)) else one
            for one in words
        )
    instead = re.search(r"write (--\S+) (\S+) in its place", message)
    if instead:
        return shlex.join([*(one for one in words if one != instead[2]), *instead.groups()])
    flags = re.findall(r"--[a-z-]+", message.rpartition(". ")[2] or message)
    known = {flag for one in command_of(line).params for flag in one.opts}
    wanted = [flag for flag in flags if flag in known and flag not in words]
    assert flags, f"no next step: {message}"
    if "in place of --output" in message:
        line = re.sub(r" -o \S+", "", line)
    if not wanted:  # of the operation of a fleet
        return f"{line} {flags[0]} 4"
    return with_flag(line, wanted[0], message)


LINES = [
    "squeeze a",
    "squeeze a --rank 4",
    "squeeze a -o made",
    "squeeze a -o made --energy 90",
    "squeeze a -o made --budget 0.25",
    "squeeze a -o made --target-size 100kB",
    "squeeze a -o a --rank 4",
    "squeeze shelf -o made --rank 4",
    "squeeze shelf/lora shelf/rslora --rank 4",
    "squeeze shelf/lora shelf/rslora made --rank 4",
    "squeeze base -o made --rank 4",
    "squeeze d -o made --rank 4",
    "resize a -o made --rank 4",
    "squeeze shelf/lor -o made --rank 4",
    "merge a d -o made",
    "merge a:70% shelf/rslora:30% -o made",
    "merge a shelf/rslora",
    "merge base a -o made",
    "merge a base -o made",
    "merge a shelf/rslora -o made --method tyes",
    "merge a shelf/rslora -o made --method ties --rank 4",
    "merge a=0.7 shelf/rslora -o made",
    "fuse base a",
    "fuse a base -o made",
    "fuse a d -o made",
    "fuse base d:0.5",
    "compare a",
    "compare base base",
    "compare shelf",
    "extract base a -o made --rank 4",
    "to-lora d -o made",
    "to-dora a -o made",
    "repair a -o made",
    "convert a -o made.gguf",
    "convert a -o made --to gguff --base base",
    "convert a -o made --to mlx --dtype fp16",
    "convert a --to mlx",
    "convert a -o made",
    "check a --for vllm",
    "check a --target vllmm",
    "check a --format json",
    "check a --fix",
    "check a --fail-on warnings",
    "rule lt50",
    "rule LT5055",
    "quantize a -o made",
    "quantize base",
    "dequantize base -o made",
    "provenance a",
    "replay a",
    pytest.param("fleet squeeze shelf -o results", marks=pytest.mark.slow),
    pytest.param("fleet squeeze shelf --rank 4", marks=pytest.mark.slow),
    "fleet share shelf -o made.safetensors",
    "fleet similar a",
    "fleet index shelf",
    "methods ties",
    "methods tyes",
    "formats pefft",
    "info",
    "spectrum shelf",
    "spectrum a/adapter_config.json",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_what_messages_say_leads_to_success(room, line):
    taken = []
    while True:
        code, message = typed(line)
        taken.append((line, message))
        if code in (0, 1):
            return
        assert len(taken) <= MOST_STEPS, taken
        line = next_line(line, message)
        assert line not in [before for before, _ in taken], taken
