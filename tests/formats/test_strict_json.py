"""JSON that every parser reads alike, or an error."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools_formats.disk import strict_json
from loratools_formats.disk.strict_json import StrictJsonError, loads

BAD = {
    "empty": (b"", "Expecting value"),
    "two values": (b"1 2", "Extra data"),
    "not UTF-8": (b'"\xff"', "UTF-8 at byte 1"),
    "overlong UTF-8": (b'"\xc0\xaf"', "UTF-8"),
    "raw surrogate": (b'"\xed\xa0\x80"', "UTF-8"),
    "escaped lone surrogate": (rb'["a", {"b": "\uD800"}]', "surrogate"),
    "escaped lone surrogate as key": (rb'{"\udfff": 1}', "surrogate"),
    "byte order mark": (b"\xef\xbb\xbf1", "byte order mark"),
    "duplicate key": (b'{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
    "duplicate key inside": (b'[{"x": {"a": 1, "a": 1}}]', "duplicate"),
    "duplicate key by escape": (rb'{"a": 1, "\u0061": 2}', "duplicate"),
    "duplicate empty key": (b'{"": 1, "": 2}', "duplicate"),
    "NaN": (b"NaN", "NaN"),
    "Infinity": (b"[Infinity]", "Infinity"),
    "minus Infinity": (b"[-Infinity]", "-Infinity"),
    "integer of 21 digits": (b"1" * 21, "21 digits"),
    "integer of 100,000 digits": (b"-" + b"1" * 100_000, "100001 digits"),
    "minus zero": (b'{"data_offsets": [-0, 128]}', "-0"),
    "100,000 lists": (b"[" * 100_000, "deep"),
    "100,000 objects": (b'{"a":' * 100_000, "deep"),
    "control character": (b'"a\nb"', "control"),
    "comment": (b"1 // one", "Extra data"),
    "trailing comma": (b"[1,]", "."),
    "single quotes": (b"{'a': 1}", "."),
}


@pytest.mark.parametrize("defect", BAD)
def test_bad(defect):
    text, word = BAD[defect]
    with pytest.raises(StrictJsonError, match=word):
        loads(text)


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_depth(depth):
    text = b'{"a":[' * depth + b"1" + b"]}" * depth
    assert loads(text, max_depth=2 * depth) == json.loads(text)
    if depth:
        with pytest.raises(StrictJsonError, match="deep"):
            loads(text, max_depth=2 * depth - 1)


def test_pairs_of_surrogates_are_characters():
    assert loads(rb'"\ud83d\ude00"') == "😀"


def test_large_numbers():
    assert loads(b"18446744073709551615") == (1 << 64) - 1
    with pytest.raises(StrictJsonError, match="too large for float64"):
        loads(b"1e400")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), 1 << 63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(value=values, escaped=st.booleans(), indent=st.none() | st.just(2))
def test_whatever_is_sound_is_read(value, escaped, indent):
    text = json.dumps(value, ensure_ascii=escaped, indent=indent).encode()
    assert loads(text) == value


@given(st.binary(max_size=20) | st.text('{}[]",:\\u0dea1-+.eNI ', max_size=30).map(str.encode))
def test_anything_is_read_as_json_does_or_refused(text):
    try:
        value = loads(text)
    except StrictJsonError:
        return
    assert value == json.loads(text)


def test_negative_zeros_within_text_cost_nothing_and_are_kept(monkeypatch):
    """Kohya's SDXL files say `sdxl_base_v1-0`, and reading every integer by hand takes time."""
    monkeypatch.setattr(strict_json, "_integer", None)  # would fail if it were asked
    assert loads(b'{"v1-0": ["v1-0", -0.5, -0e1, 10]}') == {"v1-0": ["v1-0", -0.5, 0.0, 10]}


@pytest.mark.parametrize("text", ["-0", "[-0]", '{"a":-0}', '{"a": -0 }', "[1,-0]", "\n-0"])
def test_negative_zero_is_no_integer(text):
    with pytest.raises(StrictJsonError, match="-0 is no integer"):
        loads(text.encode())
