"""What the merge tests share: the command line in this process, and third-party methods."""

from pathlib import Path

import pytest

from loratools.cli import main
from loratools.operations.merge.methods import registered_methods

PLUGINS = Path(__file__).parent / "plugin"
collect_ignore = ["plugin"]


@pytest.fixture
def loratools(capsys, monkeypatch):
    """Return a function that runs the command line: (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["loratools", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture
def plugins(monkeypatch):
    """Return a function that makes packages of merge methods visible, by folder."""

    def install(*names):
        for name in names:
            monkeypatch.syspath_prepend(str(PLUGINS / name))
        registered_methods.cache_clear()

    yield install
    registered_methods.cache_clear()
