"""Regular expressions of strangers: those that could run for ever are stopped by CPU time."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.work.regexes import _is_quick, check_regex, is_found
from loratools.work.selection import Selection
from loratools_formats.disk.errors import OptionError

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [r"^((\w|\.)+)+#", r"(aa|a|\w|\.)*#", "(?:.?){60}#"])
def test_a_search_without_end_is_refused(pattern):
    assert not _is_quick(pattern)
    with pytest.raises(OptionError, match=r"too long to match.*got"):
        is_found(pattern, NAME + "a" * 30)
    assert is_found(r"(layers\.(\d)+)+\.", NAME), "the next pattern gets a process of its own"


@given(st.sampled_from(["q", r"\d+", "(q|k)_proj", r"^model\..*", "(x|y)+", r"layers\.[01]\.", ""]))
def test_what_is_found_is_what_python_finds(pattern):
    assert is_found(pattern, NAME) == (re.search(pattern, NAME) is not None)


@pytest.mark.parametrize("pattern", ["(", "a" * 5000, "(" * 3000 + ")" * 3000, "a{999999999999}"])
def test_what_is_no_expression_is_refused(pattern):
    with pytest.raises(OptionError, match="regular expression"):
        check_regex(pattern)


def test_selections_use_it():
    assert NAME in Selection(include="(q|k)+_proj")
    assert NAME not in Selection(exclude="(q|k)+_proj")
