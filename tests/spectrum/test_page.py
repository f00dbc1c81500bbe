"""The page loads nothing, is well formed, escapes names and says what was found."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import dense
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loratools.operations.compare.operation import compare
from loratools.operations.spectrum.operation import spectrum
from loratools.page.html import page
from loratools.page.measured import compare_sections, spectrum_sections
from loratools_formats import read_adapter

VOID = {"meta", "link", "input", "br", "wbr"}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from loratools.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


class Reader(HTMLParser):
    """Reads a page, and fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the text of a page of each command."""
    folder = tmp_path_factory.mktemp("pages")
    paths = [dense.TINY / name for name in ("lora", "rslora", "dora")]
    base = dense.TINY / "model"
    for name, arguments in {
        "spectrum": ["spectrum", paths[0], "--base", base],
        "pair": ["compare", *paths[:2]],
        "shelf": ["compare", *paths],
    }.items():
        done = run(*arguments, "--html", folder / f"{name}.html", "-q")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return {file.stem: file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["spectrum", "pair", "shelf"])
def test_a_page_is_well_formed_and_loads_nothing(pages, name):
    found = Reader(pages[name])
    loading = [
        (tag, attribute, value)
        for tag, attribute, value in found.attributes
        if attribute in ("src", "href", "srcset", "action", "poster") and value != "data:,"
    ]
    assert loading == []
    assert not re.search(r"https?://|@import|url\(", pages[name])
    assert "default-src 'none'" in pages[name]
    assert found.tags.count("table") == found.tags.count("caption")
    labelled = {tag for tag, attribute, _ in found.attributes if attribute == "aria-label"}
    assert "svg" not in found.tags or "svg" in labelled
    headings = [text for tag, text in found.texts if tag == "h2"]
    assert "What stands out" in headings[:2]
    assert ("html", "lang", "en") in found.attributes
    assert "prefers-color-scheme:dark" in pages[name]


def test_the_table_has_every_module_and_its_numbers(pages):
    found = Reader(pages["spectrum"])
    changes = dense.peft_changes(dense.TINY / "lora")
    names = {
        text.replace("<wbr>", "") for text in re.findall("<th[^>]*>(.*?)</th>", pages["spectrum"])
    }
    assert set(changes) <= names
    values = {float(value) for _, name, value in found.attributes if name == "data-value"}
    for change in changes.values():
        assert min(abs(np.linalg.norm(change) - value) for value in values) < 1e-9


def test_hostile_names_are_text(make_folder):
    hostile = "<script>alert(1)</script>\"'&"
    folder = make_folder("one", dtype="f32")
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    renamed = {key.replace("layers.0.q", f"{hostile}.q"): value for key, value in stored.items()}
    save_file(renamed, file)
    adapter = read_adapter(folder)
    title = f"{hostile}\x1b[31m"
    text = page(title, spectrum_sections(spectrum(adapter)))
    text += page(title, compare_sections(compare({title: adapter, "b": adapter})))
    assert "<script>alert" not in text
    assert "\x1b" not in text
    assert text.count("<script>") == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_a_page_that_exists_is_kept(tmp_path):
    target = tmp_path / "report.html"
    target.write_text("mine")
    done = run("spectrum", dense.TINY / "lora", "--html", target)
    assert done.returncode == 2
    assert target.read_text() == "mine"
    done = run("spectrum", dense.TINY / "lora", "--html", target, "--overwrite", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["operation"] == "spectrum"
    assert target.read_text().startswith("<!doctype html>")
