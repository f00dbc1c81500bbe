"""Recipes that read from the Hub and publish there."""

from __future__ import annotations

import pytest
from hub_server import LORA, RSLORA

import loratools as lt
from loratools_formats.disk.errors import LoratoolsError

RECIPE = """\
version: 1
steps:
- name: both
  do: merge
  rank: 4
  adapters: {me/tiny: 0.7, "hf://me/other": 0.3}
- name: published
  do: push
  source: ${both}
  repo: me/both
  create: true
  no_check: true
"""


@pytest.fixture
def recipe(here, tmp_path):
    here.add("me/tiny", LORA)
    here.add("me/other", RSLORA)
    path = tmp_path / "release.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.slow
def test_a_recipe_reads_from_the_hub_and_publishes_there(here, recipe):
    planned = lt.run(recipe, dry_run=True)
    assert [step.state for step in planned.steps] == ["planned", "planned"]
    assert "me/both" not in here.repos
    first = lt.run(recipe)
    assert [step.state for step in first.steps] == ["made", "passed"]
    commit = here.repos["me/both"].sha("main")
    weights = (recipe.parent / "release/both/adapter_model.safetensors").read_bytes()
    assert here.repos["me/both"].files()["adapter_model.safetensors"] == weights
    # What is published already gets no commit, and a merge of unchanged commits is not repeated.
    again = lt.run(recipe)
    assert [step.state for step in again.steps] == ["up to date", "passed"]
    assert here.repos["me/both"].sha("main") == commit
    files = dict(here.repos["me/tiny"].files())
    files["adapter_model.safetensors"] = (RSLORA / "adapter_model.safetensors").read_bytes()
    files["adapter_config.json"] = (RSLORA / "adapter_config.json").read_bytes()
    here.repos["me/tiny"].commit(files)
    assert [step.state for step in lt.run(recipe).steps] == ["made", "passed"]
    assert here.repos["me/both"].sha("main") != commit


def test_what_is_not_on_the_hub_is_told_before_any_step(here, recipe):
    recipe.write_text(
        "version: 1\nsteps:\n"
        f"- {{name: a, do: squeeze, source: {LORA}, rank: 4}}\n"
        "- {name: b, do: squeeze, source: me/nothing, rank: 4}\n"
    )
    with pytest.raises(LoratoolsError, match="step b: ") as caught:
        lt.run(recipe)
    assert "me/nothing" in str(caught.value)
    assert not (recipe.parent / "release").exists()
