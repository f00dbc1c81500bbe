"""YAML, TOML and JSON of strangers: what takes for ever or means two things is refused."""

import time

import pytest

from loratools_formats.core.factors import alpha_of
from loratools_formats.disk import strict_json, strict_toml, strict_yaml
from loratools_formats.disk.errors import AdapterError, printable

CPU_SECONDS = 10


@pytest.fixture(autouse=True)
def quick():
    """No text here may take long, whatever else the machine does."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < CPU_SECONDS


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"a: 0x" + b"f" * 5000, "5002 characters"),
        (b"a: " + b"1" * 21, "21 digits"),
        (b"a: 1.0e+999", "too large"),
        (b"a: {<<: {b: 1}, b: 2}", "merge keys"),
        (b"a: " + b"1_" * 30, "digits"),
        (b"[" * 100_000, "levels"),
        (b"- " * 100_000, "levels"),
    ],
)
def test_yaml(text, word):
    with pytest.raises(strict_yaml.StrictYamlError, match=word):
        strict_yaml.loads(text)


def test_numbers_of_yaml_are_those_of_both_its_versions():
    text = b"[1:30, 1:30.5, 12, -3, 0.5, 1.5e+3, .inf, 0x10, 18446744073709551615]"
    expected = ["1:30", "1:30.5", 12, -3, 0.5, 1500.0, float("inf"), 16, 2**64 - 1]
    assert strict_yaml.loads(text) == expected
    many = b"a: 1" + b":0" * 100_000
    assert strict_yaml.loads(many)["a"] == many[3:].decode()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"a = " + b"[" * 10_000, "deeply"),
        (b"a = " + b"{b=" * 10_000, "deeply"),
        (b"a = " + b"9" * 5000, "5000 digits"),
        (b"a = 0x" + b"f" * 5000, "digits"),
        (b"a = -0b" + b"1" * 5000, "digits"),
        (b"[" + b"a." * 200_000 + b"b]", "parts"),
        (b".".join([b"a"] * 250_000) + b" = 1", "parts"),
        (b'"a"' + b'."a"' * 100_000 + b" = 1", "parts"),
        (b"a" + b" . a" * 100_000 + b" = 1", "parts"),
        (b"'a'" + b" .'a'" * 100_000 + b" = 1", "parts"),
        (b"a = '''" + b"'" * 2, "end of document"),
        (b"\xff", "UTF-8"),
    ],
)
def test_toml(text, word):
    with pytest.raises(strict_toml.StrictTomlError, match=word):
        strict_toml.loads(text)


def test_strings_and_comments_of_toml_are_not_looked_into():
    name = ".".join(["a"] * 100)
    text = f"x = \"{name}\" # {name} {'[' * 99} {'9' * 99}\ny = ['{name}', '''{'[' * 50}''']\n"
    expected = {"x": name, "y": [name, "[" * 50]}
    assert strict_toml.loads(text.encode()) == expected


def test_json_of_many_values_is_refused_before_it_is_parsed():
    text = b"[" + b"{}," * strict_json.MOST_VALUES + b"1]"
    with pytest.raises(strict_json.StrictJsonError, match="values"):
        strict_json.loads(text)
    assert len(strict_json.loads(b"[" + b"1," * 400_000 + b"1]")) == 400_001


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**20, -(10**20)])
def test_what_we_would_not_read_is_not_written(value):
    with pytest.raises(AdapterError):
        strict_json.dumps({"a": [value]})
    assert strict_json.loads(strict_json.dumps({"a": 10**20 - 1}).encode()) == {"a": 10**20 - 1}


@pytest.mark.parametrize("alpha", [1e22, 2.0**53, 1e300, -1e22, 3.0, 0.1, 0.0])
def test_an_alpha_is_written_as_json_that_we_read(alpha):
    written = alpha_of(1, alpha)
    assert strict_json.loads(strict_json.dumps([written]).encode()) == [alpha]


def test_an_alpha_beyond_float64_is_refused():
    with pytest.raises(AdapterError, match="overflows"):
        alpha_of(16, 1e308)


def test_an_integer_that_python_does_not_write_can_be_in_an_error():
    assert "too long" in printable(16**5000)
    assert "too long" in str(AdapterError("wrong", got=[16**5000]))
