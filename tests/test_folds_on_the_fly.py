"""Squeeze and merge take every kind that folds exactly without the base, and no other kind.

The loop is over the declarations of kinds, on the golden fixtures that every one must have.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule
from loratools.folding.without_base import needs_base, with_settings
from loratools.kinds import all_kinds
from loratools.operations.merge.align import MergeInput
from loratools.operations.merge.operation import merge
from loratools.operations.merge.options import MergeOptions
from loratools.operations.squeeze import squeeze
from loratools.operations.to_lora import to_lora
from loratools_formats import read_adapter, write_adapter
from loratools_formats.core.change import Missing
from loratools_formats.disk.errors import UnsupportedError

GOLDEN = Path(__file__).parent / "golden" / "kinds"
ALONE = [kind for kind in all_kinds() if kind.folds_alone]
OTHERS = [kind for kind in all_kinds() if not kind.folds_alone]
WHOLE = RankRule(rank=16)  # of the largest matrix in any fixture
OPERATIONS = {
    "squeeze": lambda adapter: squeeze(adapter, WHOLE).adapter,
    "merge": lambda adapter: (
        merge(
            [MergeInput(adapter, 0.25, "a"), MergeInput(adapter, 0.75, "b")],
            MergeOptions(rule=WHOLE),
        ).adapter
    ),
}


@cache
def fixture(name):
    """Return the adapter of a kind as it is in the file, and the settings that it lacks."""
    folder = GOLDEN / name
    case = json.loads((folder / "case.json").read_text())
    (source,) = (path for path in folder.iterdir() if path.stem == "adapter")
    return read_adapter(source, case.get("format")), case.get("settings", {})


def others(adapter):
    return [delta for delta in adapter.modules.values() if delta.factors is None]


def lacks_settings(adapter):
    return any(
        isinstance(v, Missing) for d in others(adapter) for v in d.direction.settings.values()
    )


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.name)
def test_a_folded_adapter_says_its_scale_and_what_it_was(kind, tmp_path):
    adapter, given = fixture(kind.name)
    result = to_lora(adapter, RankRule(), given=given)
    assert {report.kind for report in result.modules} >= {kind.name}
    assert result.adapter.provenance["operation"] == "to-lora"
    if result.adapter.format == "peft":
        write_adapter(result.adapter, tmp_path / "out", "peft")
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        ranks = {delta.rank for delta in result.adapter.modules.values()}
        assert config["lora_alpha"] == config["r"]
        assert config["alpha_pattern"] == config["rank_pattern"] or len(ranks) == 1
        assert all(
            d.direction.scale == 1.0 for d in read_adapter(tmp_path / "out").modules.values()
        )


def test_there_are_kinds_of_both_sorts():
    assert len(ALONE) > 15
    assert len(OTHERS) > 15


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_folds_alone_is_taken_as_it_is(kind, operation):
    adapter, given = fixture(kind.name)
    expected = load_file(GOLDEN / kind.name / "expected.safetensors")
    if lacks_settings(adapter):
        with pytest.raises(UnsupportedError, match=r"to-lora .*--set \w+=VALUE"):
            OPERATIONS[operation](adapter)
        adapter = with_settings(adapter, given)
    result = OPERATIONS[operation](adapter)
    assert set(result.modules) == set(adapter.modules)
    for module, delta in result.modules.items():
        want = expected[f"{module}.weight"].astype(np.float64)
        got = effective_delta(module, delta, want.shape)
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_for_other_kinds_the_command_to_run_first_is_named(kind, operation):
    if (operation, kind.name) == ("merge", "full"):
        pytest.skip("linear merges keep differences as they are: test_differences.py")
    adapter, given = fixture(kind.name)
    with pytest.raises(UnsupportedError, match="loratools to-lora") as raised:
        OPERATIONS[operation](with_settings(adapter, given))
    hint = raised.value.hint
    own = next(delta for delta in others(adapter) if delta.kind == kind.name)
    if "Make it a plain LoRA first" in hint and needs_base(own):
        assert "--base" in hint
    if "has no factors" in str(raised.value) and not kind.low_rank:
        assert "--rank" in hint
