"""Pictures of reports: of each kind, the same twice, refused in one line where they cannot be."""

import sys

import dense
import pytest
from click.testing import CliRunner

import loratools as lt
from loratools.cli import cli
from loratools_formats.disk.errors import MissingDependencyError, OptionError, OutputExistsError

LORA, RSLORA = dense.TINY / "lora", dense.TINY / "rslora"
STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def run(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), standalone_mode=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", STARTS)
def test_a_picture_is_drawn_twice_alike(kind, tmp_path):
    pytest.importorskip("matplotlib")
    found = lt.compare({"a": LORA, "$x^2$ <b>": RSLORA, "c": dense.TINY / "dora"})
    files = [found.plot(tmp_path / f"{name}.{kind}") for name in "ab"]
    contents = [file.read_bytes() for file in files]
    assert contents[0].startswith(STARTS[kind])
    assert contents[0] == contents[1]
    if kind == "svg":
        assert b"$x^2$ &lt;b&gt;" in contents[0]
    with pytest.raises(OutputExistsError):
        found.plot(files[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["spectrum", LORA, "--include=layers.0"],
        ["compare", LORA, RSLORA, "--include=layers.0"],
        ["squeeze", LORA],
        ["squeeze", LORA, "--rank=8", "--dry-run"],
        ["merge", LORA, RSLORA, "--rank=8", "--dry-run"],
        ["repair", LORA, "--base", dense.TINY / "model", "--include=layers.0", "--dry-run"],
    ],
)
def test_commands_draw_their_reports(arguments, tmp_path):
    pytest.importorskip("matplotlib")
    target, page = tmp_path / "out.png", tmp_path / "out.html"
    done = run(*arguments, "--plot", target, "--html", page)
    assert done.exception is None
    assert done.return_value in (None, 0)
    assert target.read_bytes().startswith(STARTS["png"])
    assert page.read_text().startswith("<!doctype html>")
    assert f"wrote {target}" in done.stderr


def test_what_cannot_be_drawn_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("loratools.cli.spectrum.spectrum", None)
    done = run("spectrum", LORA, "--plot", tmp_path / "out.jpeg")
    assert isinstance(done.exception, OptionError)
    assert "a name in .png or .svg or .pdf" in str(done.exception)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("spectrum", LORA, "--plot", tmp_path / "out.png")
    assert isinstance(done.exception, MissingDependencyError)
    assert "loratools[report]" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_a_report_goes_over_no_input_and_not_over_the_output(option, tmp_path):
    if option == "--plot":
        pytest.importorskip("matplotlib")
    source = tmp_path / "adapter.png"
    source.write_bytes((LORA / "adapter_model.safetensors").read_bytes())
    before = source.read_bytes()
    done = run("spectrum", source, option, source, "--overwrite")
    assert isinstance(done.exception, OptionError)
    out = tmp_path / "out.png"
    done = run("squeeze", LORA, "--rank=4", "-o", out, option, out, "--overwrite")
    assert isinstance(done.exception, OptionError)
    done = run("spectrum", LORA, option, LORA / "report.png")
    assert isinstance(done.exception, OutputExistsError)
    assert source.read_bytes() == before
    assert not out.exists()
