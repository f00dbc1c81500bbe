"""The console examples of the documents: what is typed, and what is printed.

Run as a script it runs each example and writes what it prints into its document; names of documents
limit it to those.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "examples" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
_BLOCK = re.compile(r"(```console\n)(.*?)(```)", re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*?)\n(.*?)(?=^\$ |\Z)", re.DOTALL | re.MULTILINE)


def blocks(document):
    """Return the (command, output) pairs of each console block of a document."""
    return [_COMMAND.findall(match[2]) for match in _BLOCK.finditer(document.read_text())]


def printed(command, folder):
    """Run one line of an example in `folder`, 100 columns wide; returns all that it prints."""
    program, *arguments = shlex.split(command)
    assert program == "loratools", command
    if arguments[0] == "push":
        return _with_a_hub(arguments, folder)
    return _printed(arguments, folder, {})


def _with_a_hub(arguments, folder):
    """Run a command that publishes, against a server of the tests."""
    sys.path.insert(0, str(ROOT / "tests" / "hub"))
    from hub_server import TOKEN, running

    with running() as hub, tempfile.TemporaryDirectory() as home:
        more = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }
        shown = _printed(arguments, folder, more)
    return shown.replace(hub.endpoint, "https://huggingface.co")


def _printed(arguments, folder, more):
    # Beside LINES, which readline sets in whatever loads it, COLUMNS says nothing of a pipe.
    others = {name: value for name, value in os.environ.items() if name != "LINES"}
    done = subprocess.run(
        [sys.executable, "-c", "from loratools.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=folder,
        env={**others, "COLUMNS": "100", "LORATOOLS_PROGRESS": "never", **more},
    )
    return done.stdout


def _rewritten(match):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "examples", Path(folder) / "examples")
        lines = [
            f"$ {command}\n{printed(command, folder)}" for command, _ in _COMMAND.findall(match[2])
        ]
    return match[1] + "".join(lines) + match[3]


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]] or DOCUMENTS:
        path.write_text(_BLOCK.sub(_rewritten, path.read_text()))
