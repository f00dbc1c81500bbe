"""Several adapters in one call: where results go, what fails, and what is printed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_cli import loratools

EXAMPLES = Path(__file__).parent.parent / "examples" / "tiny-llama"


@pytest.fixture
def shelf(tmp_path):
    """Return a folder with two adapters, and one that is broken."""
    for name in ("one", "two"):
        shutil.copytree(EXAMPLES / "lora", tmp_path / name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    return tmp_path


def test_every_result_is_that_of_a_command_of_its_own(shelf):
    done = loratools("squeeze", "one", "two", "--rank", "4", "--out-dir", "out", cwd=shelf)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["one", "two"]
    assert loratools("squeeze", "one", "alone", "--rank", "4", cwd=shelf).returncode == 0
    for file in (shelf / "alone").iterdir():
        if file.name == "provenance.json":
            continue  # which names the input by its place beside the output
        assert file.read_bytes() == (shelf / "out" / "one" / file.name).read_bytes()
        assert file.read_bytes() == (shelf / "out" / "two" / file.name).read_bytes()


def test_a_failure_stops_unless_told_to_go_on(shelf):
    arguments = ("squeeze", "broken", "one", "--rank", "4", "--out-dir", "out")
    stopped = loratools(*arguments, cwd=shelf)
    assert stopped.returncode == 2
    assert "no weights in the folder" in stopped.stderr
    assert not (shelf / "out" / "one").exists()
    went_on = loratools(*arguments, "--keep-going", cwd=shelf)
    assert went_on.returncode == 1
    assert "failed: broken: no weights in the folder" in went_on.stderr
    assert (shelf / "out" / "one").is_dir()
    assert not (shelf / "out" / "broken").exists()


@pytest.mark.slow
def test_results_that_exist_are_left_out_if_told_so(shelf):
    arguments = ("squeeze", "one", "two", "--rank", "4", "--out-dir", "out")
    assert loratools(*arguments, cwd=shelf).returncode == 0
    times = [path.stat().st_mtime_ns for path in sorted((shelf / "out").rglob("*"))]
    again = loratools(*arguments, cwd=shelf)
    assert again.returncode == 2
    assert "exists" in again.stderr
    skipped = loratools(*arguments, "--skip-existing", cwd=shelf)
    assert skipped.returncode == 0
    assert "0 adapters written, 2 skipped, 0 failed" in skipped.stderr
    assert times == [path.stat().st_mtime_ns for path in sorted((shelf / "out").rglob("*"))]


@pytest.mark.slow
def test_wildcards_folders_and_equal_names(shelf):
    shutil.copytree(shelf / "one", shelf / "runs" / "a" / "lora")
    shutil.copytree(shelf / "one", shelf / "runs" / "b" / "lora")
    found = loratools("to-lora", "runs", "--out-dir", "runs/out", "--exact", "--json", cwd=shelf)
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["inputs"] for line in lines] == [["runs/a/lora"], ["runs/b/lora"]]
    assert (shelf / "runs/out/a/lora/adapter_config.json").is_file()
    again = loratools("squeeze", "runs/*/lora", "--rank", "2", "--out-dir", "small", cwd=shelf)
    assert [line.split()[0] for line in again.stdout.splitlines()] == ["runs/a/lora", "runs/b/lora"]
    nothing = loratools("squeeze", "none*", "--rank", "2", "--out-dir", "small", cwd=shelf)
    assert nothing.returncode == 2
    assert "nothing matches" in nothing.stderr


def test_conversion_names_files_as_their_format_does(shelf):
    done = loratools("convert", "one", "--to", "gguf", "--base", EXAMPLES / "model",
                     "--out-dir", "out", cwd=shelf)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (shelf / "out" / "one.gguf").is_file()


def test_two_results_never_go_to_one_place(tmp_path):
    shutil.copy(EXAMPLES.parent / "tiny-flux" / "kohya.safetensors", tmp_path / "one.safetensors")
    shutil.copytree(EXAMPLES / "lora", tmp_path / "one")
    given = ("convert", "one.safetensors", "one", "--to", "peft", "--out-dir", "out", "--overwrite")
    done = loratools(*given, cwd=tmp_path)
    assert done.returncode == 2
    assert "two would have the same output; got one.safetensors, one" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_result_never_goes_into_another(shelf):
    shutil.copytree(EXAMPLES / "lora", shelf / "one" / "inner" / "two")
    shutil.copytree(EXAMPLES / "lora", shelf / "one" / "inner" / "inner" / "two")
    given = ("squeeze", "one/inner/two", "one/inner/inner/two", "one", "--rank", "4")
    done = loratools(*given, "--out-dir", "out", "--overwrite", cwd=shelf)
    assert done.returncode == 2
    assert "the output of one would lie in that of another; got one, one/inner/two" in done.stderr


def test_three_paths_without_a_folder_are_refused(shelf):
    done = loratools("squeeze", "one", "two", "three", "--rank", "4", cwd=shelf)
    assert done.returncode == 2
    assert "write --out-dir three in its place" in done.stderr


def test_info_of_a_folder_is_a_table(shelf):
    done = loratools("info", ".", "missing", cwd=shelf)
    assert done.returncode == 1
    header, *rows = done.stdout.splitlines()
    assert header.split()[0] == "adapter"
    assert [row.split()[0] for row in rows] == ["broken", "one", "two", "missing"]
    assert "no weights in the folder" in rows[0]
    assert "lora  32    2" in rows[1]
    printed = loratools("info", "one", "two", "--json", cwd=shelf).stdout
    objects = [json.loads(line) for line in printed.splitlines()]
    assert [found["inputs"] for found in objects] == [["one"], ["two"]]
    assert all(found["format"] == "peft" for found in objects)


@pytest.mark.slow
def test_folders_above_an_output_are_made_and_go_again_if_it_fails(shelf):
    failed = loratools(
        "squeeze", "one", "-o", "a/b/c", "--rank", "2", "--max-error", "0.1", cwd=shelf
    )
    assert failed.returncode == 1
    assert not (shelf / "a").exists()
    assert loratools("squeeze", "one", "-o", "a/b/c", "--rank", "2", cwd=shelf).returncode == 0
    assert [path.name for path in (shelf / "a" / "b").iterdir()] == ["c"]
    dry = loratools("squeeze", "one", "-o", "d/e", "--rank", "2", "--dry-run", cwd=shelf)
    assert dry.returncode == 0
    assert not (shelf / "d").exists()
    through_a_file = loratools("squeeze", "one", "-o", "one/README.md/c", "--rank", "2", cwd=shelf)
    assert through_a_file.returncode == 2
    assert through_a_file.stderr.count("\n") == 1


def test_broken_weight_files_and_links_to_nothing_are_rows(shelf):
    (shelf / "empty.safetensors").touch()
    (shelf / "page.safetensors").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (shelf / "pointer.gguf").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    )
    (shelf / "gone.safetensors").symlink_to("nowhere.safetensors")
    (shelf / "lost").symlink_to("../nowhere")
    (shelf / "notes.txt").touch()  # no weight file, whole or broken
    (shelf / "notes.md").symlink_to("../nowhere.md")
    save_file({"model.layers.0.mlp.up_proj.weight": np.zeros((2, 2))}, shelf / "m.safetensors")
    done = loratools("info", ".", "--json", cwd=shelf)
    assert done.returncode == 1
    found = {Path(one["inputs"][0]).name: one for one in map(json.loads, done.stdout.splitlines())}
    said = {
        "empty.safetensors": "is an empty file", "gone.safetensors": "is a link to nowhere",
        "lost": "is a link to ../nowhere", "page.safetensors": "is a web page",
        "pointer.gguf": "is a Git LFS pointer",
    }  # fmt: skip
    assert found.keys() == {"broken", "one", "two"} | said.keys()
    for name, message in said.items():
        assert message in found[name]["error"]["message"]
    squeezed = loratools("squeeze", ".", "--rank", "2", "--out-dir", "o", "--keep-going", cwd=shelf)
    assert squeezed.returncode == 1
    assert "2 adapters written, 0 skipped, 6 failed" in squeezed.stderr
