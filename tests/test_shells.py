"""The guide's lines work in real shells: each completes methods, formats, types and paths."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "completion.md"
SECONDS = 120  # that a shell may take on a machine with much else to do

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="these shells are not for Windows"),
]


def lines_for(shell):
    """Return what the guide says to write for a shell."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    return next(block for block in blocks if f"{shell}_source" in block)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Make a home, with an adapter's file and a folder to complete, in which shells start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter.safetensors").touch()
    (tmp_path / "weights").mkdir()
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    command = bin_folder / "loratools"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loratools "$@"\n')
    command.chmod(0o755)
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(
        [package, str(Path(package, "formats")), *os.environ.get("PYTHONPATH", "").split(":")]
    )
    return {
        **os.environ, "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "dumb",
        "COLUMNS": "200", "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": path,
        "XDG_CONFIG_HOME": str(tmp_path / ".config"),
    }  # fmt: skip


class Session:
    """A shell on a terminal of its own, into which keys are typed."""

    def __init__(self, command, env):
        import pty

        self.text = ""
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.execvpe(command[0], command, env)

    def until(self, *wanted):
        """Read until each text was shown after what was shown before."""
        self.text, end = "", time.monotonic() + SECONDS
        while not all(one in self.text for one in wanted):
            left = end - time.monotonic()
            assert left > 0, f"{wanted} never came: {self.text}"
            if select.select([self.terminal], [], [], left)[0]:
                self.text += os.read(self.terminal, 65536).decode(errors="replace")

    def type(self, keys):
        """Send keys."""
        os.write(self.terminal, keys.encode())

    def close(self):
        """End the shell."""
        os.kill(self.process, signal.SIGKILL)
        os.close(self.terminal)
        os.waitpid(self.process, 0)


def started(shell, home):
    """Start a shell as somebody does who followed the guide."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} is installed")
    rc = Path(home["HOME"], ".zshrc" if shell == "zsh" else ".bashrc")
    prompt = "PROMPT='ready> '\n" if shell == "zsh" else "PS1='ready> '\n"
    # Bash rings, and lists only at the second key, unless it is told otherwise.
    more = "bind 'set show-all-if-ambiguous on'\n" if shell == "bash" else ""
    rc.write_text(prompt + more + lines_for(shell))
    options = ["--noprofile", "--rcfile", str(rc)] if shell == "bash" else []
    session = Session([shell, *options, "-i"], home)
    session.until("ready> ")
    return session


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("squ", ["squeeze"]),
        ("merge --method ti", ["ties"]),
        ("convert --to gg", ["gguf"]),
        ("convert --dtype q", ["q8_0"]),
        ("convert --dtype=q", ["q8_0"]),
        ("convert --to=", ["comfyui", "kohya", "peft"]),
        ("info ada", ["adapter.safetensors"]),
        ("squeeze --out-dir wei", ["weights"]),
        ("squeeze --out-dir=wei", ["weights"]),
        ("squeeze --max-r", ["--max-rank"]),
    ],
)
def test_a_key_completes_what_was_typed(shell, typed, shown, home):
    session = started(shell, home)
    try:
        session.type(f"loratools {typed}")
        session.until(typed)
        session.type("\t")
        if len(shown) > 1:
            session.until(*shown)
        else:
            # The whole line, as the shell would run it; Zsh takes a folder's slash away again.
            session.type("\001echo \005\r")
            whole = re.sub(r"[^ =]*$", "", f"loratools {typed}") + shown[0]
            session.until(f"\n{whole}")
    finally:
        session.close()


def test_fish_completes_what_was_typed(home):
    if shutil.which("fish") is None:
        pytest.skip("no fish is installed")

    def fish(line):
        return subprocess.run(
            ["fish", "-c", line],
            env=home,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()

    assert fish(lines_for("fish")) == []

    def offered(typed):
        return fish(f"complete -C 'loratools {typed}'")

    assert "ties\tTrim, elect signs, average what agrees." in offered("merge --method ti")
    assert [one.partition("\t")[0] for one in offered("convert --to gg")] == ["gguf"]
    assert [one.partition("\t")[0] for one in offered("convert --to=gg")] == ["--to=gguf"]
    assert offered("convert --dtype q") == ["q8_0"]
    assert offered("convert --dtype=q") == ["--dtype=q8_0"]
    assert offered("info ada") == ["adapter.safetensors"]
    assert offered("squeeze --out-dir wei") == ["weights/"]
    assert [one.partition("\t")[0] for one in offered("squ")] == ["squeeze"]
