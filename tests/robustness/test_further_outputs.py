"""Recipes and reports beside an output: refused in time, never over what was read or made."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from loratools.cli import cli
from loratools_formats.disk.errors import LoratoolsError

EXAMPLES = Path(__file__).parents[2] / "examples"
LORA = EXAMPLES / "tiny-llama" / "lora"
RECIPE = "version: 1\nmethod: linear\nadapters:\n- {path: a}\n- {path: b}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a folder of two adapters in folders, two in files, and a recipe of the former."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in "ab":
        run("squeeze", LORA, "-o", name, "--rank", 2 if name == "a" else 3)
        module = "lora_unet_mid_block_attentions_0_proj_in"
        tensors = {
            f"{module}.lora_down.weight": rng.standard_normal((2, 8)).astype("f4"),
            f"{module}.lora_up.weight": rng.standard_normal((8, 2)).astype("f4"),
            f"{module}.alpha": np.asarray(2, "f4"),
        }
        save_file(tensors, f"{name}0.safetensors", metadata={"ss_network_dim": "2"})
        run("squeeze", f"{name}0.safetensors", "-o", f"{name}.safetensors", "--rank", 1)
    Path("recipe").write_text(RECIPE)
    return tmp_path


def run(*words):
    return CliRunner().invoke(cli, [*map(str, words), "-q"], standalone_mode=False)


def state(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


IN_FOLDERS, BY_RECIPE, IN_FILES = ["a", "b", "-o", "o"], ["--recipe", "recipe", "-o", "o"], [
    "a.safetensors", "b.safetensors", "-o", "o.safetensors",
]  # fmt: skip
REFUSED = [
    *((words, place) for words in (IN_FOLDERS, BY_RECIPE) for place in (
        "a/x", "a/adapter_model.safetensors", "b", "o", "o/x", ".", "nowhere/x", "x" * 256,
        "/proc/x",
    )),
    (BY_RECIPE, "recipe"),
    *((IN_FILES, place) for place in (
        "o.safetensors", "o.safetensors.provenance.json", "o.safetensors.recipe.yaml",
        "a.safetensors", "a.safetensors.provenance.json", "b.safetensors.recipe.yaml",
    )),
]  # fmt: skip


@pytest.mark.parametrize("option", ["--save-recipe", "--html"])
@pytest.mark.parametrize(("words", "place"), REFUSED)
def test_it_is_refused_before_the_output_is_there(here, words, place, option):
    before = state(here)
    done = run("merge", *words, option, place, "--overwrite")
    assert done.exception is not None
    assert "written before" not in str(done.exception)
    assert state(here) == before


@pytest.mark.parametrize("option", ["--save-recipe", "--html"])
def test_it_is_not_the_folder_of_somebody_else(here, option):
    Path("other").mkdir()
    Path("other/file").write_text("mine")
    before = state(here)
    assert run("merge", *IN_FOLDERS, option, "other", "--overwrite").exception is not None
    assert state(here) == before


@pytest.mark.parametrize("option", ["--save-recipe", "--html"])
def test_two_do_not_go_to_one_place(here, option):
    before = state(here)
    done = run("merge", *IN_FOLDERS, "--save-recipe", "x", "--html", "x", "--overwrite")
    assert done.exception is not None
    assert state(here) == before


@pytest.mark.parametrize("name", ["a.safetensors.provenance.json", "a.safetensors.recipe.yaml"])
def test_an_output_is_not_what_belongs_to_its_input(here, name):
    before = state(here)
    done = run("squeeze", "a.safetensors", "-o", name, "--rank", 1, "--overwrite")
    assert "belongs to the input" in str(done.exception)
    assert state(here) == before


@pytest.mark.parametrize("option", ["--save-recipe", "--html"])
def test_an_error_after_the_output_says_that_it_is_there(here, option, monkeypatch):
    from loratools.face import merge
    from loratools_formats.disk import publish

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    written = merge.MergeResult.written

    def then_full(self, writing):
        done = written(self, writing)
        monkeypatch.setattr(publish, "sync_file", fails)
        return done

    monkeypatch.setattr(merge.MergeResult, "written", then_full)
    done = run("merge", *IN_FOLDERS, option, "x")
    assert "Nothing was changed" not in str(done.exception)
    assert "o was written before that" in str(done.exception)
    assert Path("o").is_dir()


@pytest.mark.parametrize("option", ["--save-recipe", "--html"])
@pytest.mark.parametrize("line", ['base: "x\\0"', 'base: "\\0"'])
def test_a_recipe_whose_paths_no_file_can_have(here, option, line):
    Path("recipe").write_text(RECIPE + line + "\n")
    done = run("merge", *BY_RECIPE, option, "x")
    assert isinstance(done.exception, LoratoolsError)
    assert not Path("o").exists()
