"""Every kind has a golden fixture, and folds to the change that its own library makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule
from loratools.kinds import all_kinds, get_kind
from loratools.operations.to_lora import to_lora
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint

KINDS = Path(__file__).parent / "golden" / "kinds"
NAMES = sorted(folder.name for folder in KINDS.iterdir())
FULL_RANK = 16  # of the largest matrix in any fixture


def test_every_kind_has_a_golden_fixture_and_every_fixture_a_kind():
    assert {kind.name for kind in all_kinds()} == set(NAMES), "see CONTRIBUTING.md, Add a kind"


def test_fixtures_are_small():
    assert sum(file.stat().st_size for file in KINDS.rglob("*") if file.is_file()) < 400_000


@pytest.mark.parametrize("name", NAMES)
def test_folds_to_the_change_that_its_library_makes(name):
    folder = KINDS / name
    case = json.loads((folder / "case.json").read_text())
    source = folder / "adapter"
    if not source.exists():
        source = next(file for file in folder.iterdir() if file.stem == "adapter")
    adapter = read_adapter(source, case.get("format"))
    assert name in {delta.kind for delta in adapter.modules.values()}
    base = folder / "base.safetensors"
    result = to_lora(
        adapter,
        RankRule() if get_kind(name).low_rank else RankRule(rank=FULL_RANK),
        base=read_checkpoint(base) if base.exists() else None,
        given=case.get("settings"),
    )
    expected = load_file(folder / "expected.safetensors")
    modules = {key.rpartition(".")[0] for key in expected if key.endswith(".weight")}
    assert set(result.adapter.modules) == modules
    for module, delta in result.adapter.modules.items():
        want = expected[f"{module}.weight"].astype(np.float64)
        got = effective_delta(module, delta, want.shape)
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
        want_bias = expected.get(f"{module}.bias")
        part = delta.require_factors()
        assert (part.bias is None) == (want_bias is None)
        if part.bias is not None:
            got_bias = part.scale * part.bias.load(np.float64)
            assert np.linalg.norm(got_bias - want_bias) <= 1e-5 * np.linalg.norm(want_bias)
