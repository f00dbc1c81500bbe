"""Formats as installed packages register them: good, broken, and in each other's way."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from loratools_formats import (
    Context,
    TensorRef,
    find_format,
    format_for_output,
    get_format,
    read_adapter,
    registered_formats,
)
from loratools_formats.containers.sniffing import tensor_names
from loratools_formats.contract.files import check_output, write_adapter
from loratools_formats.contract.format import Format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import (
    AdapterError,
    MissingFileError,
    OutputError,
    OutputExistsError,
    PluginWarning,
    UnknownFormatError,
    UnsupportedError,
)

PLUGIN = """
from pathlib import Path
from loratools_formats import Adapter, Format, TensorRef
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import AdapterError

class Also(Format):
    name, description, suffixes = "also", "Another", (".toy",)

    def sniff(self, path):
        return path.is_file() and path.read_bytes()[:3] == b"toy"

class Toy(Also):
    name, description = "toy", "A toy"

    def read(self, path):
        if path.read_bytes() == b"toy bad":
            raise AdapterError("bad toy", path=path)
        toy = TensorRef("toy", DTYPES["F32"], (1,), lambda: bytes(4))
        return Adapter("toy", path, {}, carried={"toy": toy})

    def write(self, adapter, path):
        path.write_bytes(b"toy written")

class Rude(Format):
    name, description = "rude", "Raises"

    def sniff(self, path):
        return 1 / 0

FORMAT, ALSO, RUDE = Toy(), Also(), Rude()
NO_FORMAT = {"name": "toy"}
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that makes a package with entry points visible, as pip would."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def make(package, *points, code=PLUGIN):
        module = package.replace("-", "_")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [point.format(module=module) for point in points]
        (info / "entry_points.txt").write_text("\n".join(["[loratools.formats]", *lines, ""]))
        (site / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
        registered_formats.cache_clear()

    registered_formats.cache_clear()
    yield make
    registered_formats.cache_clear()


@pytest.fixture
def toy_file(tmp_path):
    path = tmp_path / "file.toy"
    path.write_bytes(b"toy")
    return path


def entry(name):
    (found,) = (entry for entry in registered_formats() if entry.name == name)
    return found


def test_third_party_format(install, toy_file, tmp_path):
    install("loratools-toy", "toy = {module}:FORMAT")
    assert entry("toy").package == "loratools-toy"
    assert entry("toy").error is None
    assert find_format(toy_file).name == "toy"
    adapter = read_adapter(toy_file)
    assert adapter.format == "toy"
    write_adapter(adapter, tmp_path / "out.toy", "toy")
    assert (tmp_path / "out.toy").read_bytes() == b"toy written"


BROKEN = {
    "no such module": ("x = no_such_module_at_all:FORMAT", PLUGIN, "ModuleNotFoundError"),
    "no such name": ("x = {module}:MISSING", PLUGIN, "AttributeError"),
    "no format": ("x = {module}:NO_FORMAT", PLUGIN, "is a dict, not a Format"),
    "no object": ("x = {module}", PLUGIN, "is a module, not a Format"),
    "no reference": ("x = not a reference", PLUGIN, ""),
    "syntax error": ("x = {module}:FORMAT", "def", "SyntaxError"),
    "raises": ("x = {module}:FORMAT", "raise RuntimeError('boom')", "RuntimeError: boom"),
    "exits": ("x = {module}:FORMAT", "raise SystemExit('bye')", "SystemExit: bye"),
    "endless recursion": ("x = {module}:FORMAT", "def f(): f()\nf()", "RecursionError"),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_broken_plugin(defect, install, make_folder):
    point, code, reason = BROKEN[defect]
    install("loratools-bad", point, code=code)
    assert entry("x").format is None
    assert entry("x").package == "loratools-bad"
    assert reason in entry("x").error
    assert find_format(make_folder()).name == "peft"
    with pytest.raises(UnknownFormatError, match="broken"):
        get_format("x")


def test_broken_plugin_does_not_take_a_name(install, make_folder):
    install("loratools-bad", "peft = {module}:MISSING")
    assert [e.name for e in registered_formats()].count("peft") == 2
    assert get_format("peft").is_folder
    assert read_adapter(make_folder()).format == "peft"


def test_two_packages_of_one_name(install):
    install("loratools-one", "toy = {module}:FORMAT")
    install("loratools-two", "toy = {module}:FORMAT")
    with pytest.raises(UnknownFormatError, match="loratools-one, loratools-two"):
        get_format("toy")


def test_several_formats_recognise_it(install, toy_file):
    install("loratools-toy", "toy = {module}:FORMAT", "also = {module}:ALSO")
    with pytest.raises(UnknownFormatError, match=r"also, toy.*`format`") as caught:
        find_format(toy_file)
    assert caught.value.path == str(toy_file)
    assert read_adapter(toy_file, "toy").format == "toy"


def test_sniff_that_raises(install, toy_file, capsys):
    install("loratools-toy", "rude = {module}:RUDE", "toy = {module}:FORMAT")
    with pytest.warns(PluginWarning, match="^format rude: sniff failed: division by zero$"):
        assert find_format(toy_file).name == "toy"
    assert capsys.readouterr() == ("", "")


def test_sniff_that_raises_on_the_command_line(install, toy_file, tmp_path):
    install("loratools-toy", "rude = {module}:RUDE", "toy = {module}:FORMAT")
    result = subprocess.run(
        [sys.executable, "-c", "from loratools.cli import main; main()", "info", toy_file],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == "note: format rude: sniff failed: division by zero\n"


def test_a_small_format_has_defaults(install, toy_file, tmp_path):
    install("loratools-toy", "toy = {module}:FORMAT")
    toy, adapter = get_format("toy"), read_adapter(toy_file, carry_unknown=True)
    assert toy.is_readable
    assert toy.is_writable
    assert not get_format("loralib").is_writable
    assert toy.losses(adapter) == []
    kept = TensorRef("kept", DTYPES["F32"], (2,), lambda: bytes(8))
    other = Adapter("peft", None, {}, carried={"kept": kept})
    assert [(loss.name, loss.reason) for loss in toy.losses(other)] == [
        ("kept", "has no place in an adapter of format toy")
    ]
    assert toy.weights_nbytes(other) == 8
    assert toy.to_model(adapter, Context()) is adapter
    assert toy.from_model(other, Context()).format == "toy"
    assert toy.left_to_loader(adapter) == ""
    assert toy.merged_config([replace(adapter, config={"a": 1}), adapter]) == {"a": 1}
    assert not Format.sniff(toy, toy_file)


def test_an_output_name_that_fits_several_formats(tmp_path):
    with pytest.raises(UnknownFormatError, match=r"fits several formats.*comfyui, diffusers"):
        format_for_output(tmp_path / "out.safetensors")
    with pytest.raises(UnknownFormatError, match=r"fits no format\. Name one with `to`: .*peft"):
        format_for_output(tmp_path / "out.xyz")


def test_errors_of_a_plugin_are_its_own(install, toy_file):
    install("loratools-toy", "toy = {module}:FORMAT")
    toy_file.write_bytes(b"toy bad")
    with pytest.raises(AdapterError, match="bad toy"):
        read_adapter(toy_file)


@pytest.mark.parametrize(("name", "hint"), [("petf", "Did you mean 'peft'?"), ("zzz", "")])
def test_unknown_name(name, hint):
    with pytest.raises(UnknownFormatError) as caught:
        get_format(name)
    assert str(caught.value).endswith(hint)
    assert "peft" in str(caught.value)


def test_unrecognised(tmp_path):
    (tmp_path / "file").write_bytes(b"\0?")
    with pytest.raises(UnknownFormatError, match="is not a weight file that loratools reads"):
        find_format(tmp_path / "file")
    with pytest.raises(UnknownFormatError, match="a folder without weights"):
        find_format(tmp_path)
    for name in ("missing", "nul\0"):
        with pytest.raises(MissingFileError):
            find_format(tmp_path / name)


def test_adapters_in_sub_folders_are_named(make_folder, tmp_path):
    for name in ("one", "two"):
        make_folder(name)
    with pytest.raises(UnknownFormatError, match=r"Name one of them: .*one, .*two"):
        find_format(tmp_path)


def test_halves_that_are_missing(install, toy_file, tmp_path):
    install("loratools-toy", "also = {module}:ALSO")
    with pytest.raises(UnsupportedError, match="not read"):
        read_adapter(toy_file, "also")
    with pytest.raises(UnsupportedError, match="not written"):
        write_adapter(Adapter("also", None, {}), tmp_path / "out", "also")


def test_format_is_what_plugins_register():
    assert all(isinstance(e.format, Format) for e in registered_formats() if e.error is None)


@pytest.mark.parametrize("place", ["in/adapter/out", "in", "."])
def test_outputs_around_and_inside_the_input(place, tmp_path):
    source = tmp_path / "in" / "adapter"
    source.mkdir(parents=True)
    adapter = Adapter("peft", source, {})
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            check_output(adapter, tmp_path / place, overwrite=overwrite)
    with pytest.raises(OutputExistsError):
        check_output(adapter, source)
    check_output(adapter, source, overwrite=True)
    check_output(adapter, tmp_path / "in" / "beside")


def test_outputs_through_links(tmp_path):
    source = tmp_path / "adapter"
    source.mkdir()
    (tmp_path / "alias").symlink_to(source)
    with pytest.raises(OutputExistsError, match="inside the input"):
        check_output(Adapter("peft", source, {}), tmp_path / "alias" / "out")


def test_output_that_cannot_be_named():
    with pytest.raises(OutputError):
        check_output(Adapter("peft", None, {}), "nul\0byte")


def test_an_input_that_changes_stops_the_write(make_folder, tmp_path):
    source = make_folder()
    adapter = read_adapter(source)
    weights = source / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(AdapterError, match="changed while"):
        write_adapter(adapter, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_names_are_found_after_escaped_quotes_of_metadata():
    header = rb'1, \"x\": {\"dtype\": 2}"}, "a.weight": {"dtype":"F32","shape":[1],"data_off'
    assert tensor_names(header) == [b"a.weight"]
