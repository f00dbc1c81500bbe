"""Modules whose names are full of a regular expression's characters: PEFT reads what is written."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import peft_oracle
import pytest

import loratools as lt

pytestmark = [pytest.mark.filterwarnings(line) for line in peft_oracle.WARNINGS]

LEAVES = [
    "b+c", "x[0]", "(y)", "z$", r"q\d", "^s", "a|b", "{2}", "t*", "u?", "слой", "層", "e-1", "e_1",
    "e1", "e11", "w w", r"q\\d", "[^a]", "\\", "(?i)Y", "é",
]  # fmt: skip
ALL = [f"{number}.{block}.{leaf}" for number in "01" for block in ("a", "a+") for leaf in LEAVES]
ODD = ["0.a.b+c", "0.a+.x[0]", "1.a.(y)", "0.a.z$", r"1.a+.q\d", "0.a.\\", "0.a.a|b", "1.a.{2}"]


@pytest.fixture(scope="module")
def base():
    """Return a model that has all of the modules."""
    import torch

    def block():
        made = torch.nn.Module()
        for index, leaf in enumerate(LEAVES):
            made.add_module(leaf, torch.nn.Linear(12, 10 + index % 3))
        return made

    def pair():
        made = torch.nn.Module()
        made.add_module("a", block())
        made.add_module("a+", block())
        return made

    torch.manual_seed(0)
    return torch.nn.ModuleList([pair(), pair()])


def deltas(model):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        .detach()
        .double()
        .numpy()
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }


@pytest.fixture(scope="module")
def given(base, tmp_path_factory):
    """Return an adapter that PEFT wrote, with spectra that differ, and its ΔW."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=6, lora_alpha=12, target_modules=LEAVES, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_B" in name:
                weight.mul_(torch.logspace(0, -2 - 2 * torch.rand(1).item(), 6))
    folder = tmp_path_factory.mktemp("odd") / "given"
    model.save_pretrained(folder)
    return folder, deltas(model)


def read(base, folder):
    from peft import PeftModel

    return deltas(PeftModel.from_pretrained(copy.deepcopy(base), folder))


def error(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize(
    "rule",
    [{"rank": 3}, {"energy": 0.999}, {"budget": "60%"}, {"rank_pattern": [("a\\+", 2)], "rank": 5}],
    ids=str,
)
def test_squeezed_with_ranks_of_their_own(base, given, tmp_path, rule):
    folder, truth = given
    done = lt.squeeze(folder, output=tmp_path / "small", **rule)
    found = read(base, tmp_path / "small")
    assert set(found) == set(truth) == set(ALL)
    if "rank" not in rule:
        assert len({module.rank_out for module in done.modules}) > 1
    for module in done.modules:
        told = error(found[module.name], truth[module.name])
        assert module.relative_error == pytest.approx(told, abs=1e-6)


@pytest.mark.parametrize("name", ODD)
def test_patterns_of_options_meet_one_module(base, given, tmp_path, name):
    folder, truth = given
    pattern = f"^{re.escape(name)}$"
    lt.squeeze(folder, output=tmp_path / "one", rank=6, rank_pattern=[(pattern, 1)])
    found = read(base, tmp_path / "one")
    assert {n for n in found if error(found[n], truth[n]) > 1e-5} == {name}
    lt.squeeze(folder, output=tmp_path / "kept", rank=1, exclude=pattern)
    found = read(base, tmp_path / "kept")
    assert {n for n in found if error(found[n], truth[n]) < 1e-5} == {name}
    lt.squeeze(folder, output=tmp_path / "dropped", rank=6, drop=pattern)
    assert set(truth) - set(read(base, tmp_path / "dropped")) == {name}
    lt.merge([folder], output=tmp_path / "half", weight_pattern=[f"{pattern}=0.5"])
    found = read(base, tmp_path / "half")
    assert {n for n in found if error(found[n], truth[n]) > 1e-5} == {name}
    assert error(found[name], truth[name] / 2) < 1e-5


def test_there_and_back_through_mlx(base, given, tmp_path):
    folder, truth = given
    lt.squeeze(folder, output=tmp_path / "small", rank=4)
    lt.convert(tmp_path / "small", to="mlx", output=tmp_path / "mlx")
    lt.convert(tmp_path / "mlx", to="peft", output=tmp_path / "back")
    found, before = read(base, tmp_path / "back"), read(base, tmp_path / "small")
    assert set(found) == set(truth)
    assert max(error(found[name], before[name]) for name in truth) < 1e-6
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["r"] == 4
