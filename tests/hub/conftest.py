"""A Hub on a real socket for the tests of this folder, and a program that talks to it."""

import json
import subprocess
import sys

import pytest
from hub_server import TOKEN, environment, running


class Program:
    """Runs `loratools` in a process of its own, against a server."""

    def __init__(self, server, home, folder):
        self.server, self.home, self.folder, self.token = server, home, folder, TOKEN
        self.more = {}
        self.printed = ""

    def __call__(self, *arguments, timeout=120):
        variables = environment(self.server, self.home, self.token) | self.more
        done = subprocess.run(
            [sys.executable, "-m", "loratools", *map(str, arguments)],
            env=variables, cwd=self.folder, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        self.printed += done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *arguments):
        done = self(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def server():
    with running() as hub:
        yield hub


@pytest.fixture
def program(server, tmp_path):
    made = Program(server, tmp_path / "home", tmp_path)
    yield made
    # Whatever a test does, the token shows in nothing that was printed or written.
    assert TOKEN not in made.printed
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "token":
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.fixture
def here(server, tmp_path, monkeypatch):
    """Send the library of this process to the server, and return the server."""
    from huggingface_hub import constants

    home = tmp_path / "home"
    for name, value in environment(server, home).items():
        if name.startswith("HF_"):
            monkeypatch.setenv(name, value)
    values = {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return server
