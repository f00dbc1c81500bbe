"""rank_pattern and alpha_pattern, against PEFT's own matching."""

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.peft_patterns import PatternsOf
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import AdapterError
from loratools_formats.formats.peft import patterns
from loratools_formats.formats.peft.loading import loading_findings
from loratools_formats.formats.peft.patterns import match_patterns, matching
from loratools_formats.formats.peft.targets import narrowed_config

NAMES = st.text("ab.1_", min_size=1, max_size=8)
PLAIN_KEYS = st.from_regex(re.compile(r"\^?([ab1_.-]|\\[.-]){1,6}", re.ASCII), fullmatch=True)


@settings(max_examples=200, deadline=None)
@given(
    keys=st.lists(PLAIN_KEYS, max_size=5, unique=True),
    names=st.lists(NAMES, max_size=5, unique=True),
)
def test_plain_patterns_as_peft(keys, names):
    assert match_patterns({key: i for i, key in enumerate(keys)}, names, None) == {
        name: next(i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name))
        for name in names
        if any(re.match(rf"(.*\.)?({key})$", name) for key in keys)
    }


@settings(max_examples=200, deadline=None)
@given(
    keys=st.lists(PLAIN_KEYS, max_size=5, unique=True),
    names=st.lists(NAMES, max_size=5, unique=True),
)
def test_patterns_that_match_any_name(keys, names):
    assert matching(keys, names) == {
        key for key in keys if any(re.match(rf"(.*\.)?({key})$", name) for name in names)
    }


def test_a_pattern_and_a_target_for_each_of_thousands_of_experts(monkeypatch):
    """All are looked up at once: one by one, 20,000 patterns and modules take minutes."""
    names = [f"model.layers.{i // 64}.mlp.experts.{i % 64}.up_proj" for i in range(20_000)]
    a, b = (in_memory("x", np.zeros(shape, "f4")) for shape in ((1, 2), (3, 1)))
    change = ModuleChange(LowRank(a, b, 1.0, Layer("linear")))
    config = {
        "rank_pattern": dict.fromkeys([*names, "nowhere"], 1),
        "target_modules": [*names, "nothing"],
    }
    adapter = Adapter("peft", None, dict.fromkeys(names, change), config=config)
    monkeypatch.setattr(patterns, "match_patterns", None)
    found = {each.code: each.message for each in loading_findings(adapter)}
    assert set(found) == {"pattern-unmatched", "target-without-tensors"}
    assert found["pattern-unmatched"].endswith(": nowhere")
    assert "names nothing," in found["target-without-tensors"]
    assert set(narrowed_config(adapter)["rank_pattern"]) == set(names)


def test_regular_expressions_as_peft():
    names = [
        f"model.layers.{i}.{part}" for i in range(12) for part in ("q_proj", "v_proj", "mlp.up")
    ]
    keys = [
        r"layers\.[0-3]\.q_proj",
        r".*\.v_proj",
        r"1.\.q_proj",
        r"(model|x)\.layers.1\d.mlp.up",
        "up",
    ]
    found = match_patterns(dict(zip(keys, range(5), strict=True)), names, None)
    for name in names:
        key = get_pattern_key(keys, name)
        assert found.get(name) == (keys.index(key) if key in keys else None)
    assert set(found.values()) == set(range(5))


def test_plain_names_need_no_child(monkeypatch):
    monkeypatch.setattr(patterns, "_match_in_child", None)
    assert match_patterns({"q": 1, r"^a\.v": 2, "a-b_c": 3}, ["x.q", "a.v", "b.a.v"], None) == {
        "x.q": 1,
        "a.v": 2,
    }


BAD = {
    "no regular expression": ({"(": 1}, "unterminated"),
    "too many repeats": ({"a{99999999999}": 1}, "repeat"),
    "unknown group": ({"(?P=ü)": 1}, "group"),
    "takes for ever": ({r"(\w+\w*)+#": 1}, "too long to match"),
    "too long": ({"a" * 513: 1}, "too long"),
    "too many": ({f"{i}": 1 for i in range(100_001)}, "too long"),
}


@pytest.mark.parametrize("defect", BAD)
def test_bad(defect, tmp_path):
    values, word = BAD[defect]
    with pytest.raises(AdapterError, match=word) as caught:
        match_patterns(values, ["a" * 50], tmp_path)
    assert caught.value.path == str(tmp_path)


@example(["\\", "\\\\"])
@given(st.lists(st.text("ab.-_1\\*(", min_size=1, max_size=7), min_size=1, max_size=6, unique=True))
def test_written_patterns_mean_one_module(names):
    for name in names:
        key = PatternsOf(names).pattern_for(name)
        assert [n for n in names if get_pattern_key([key], n) == key] == [name]
