"""YAML parsing for files from strangers: plain data only.

Aliases can expand without bound, tags make objects, merge keys (`<<`) override silently, and of
duplicate keys the last would win, so all four are errors here. Numbers are those that readers of
YAML 1.1 and 1.2 agree on: `1:30` is 90 to one and a text to the other, and is left a text; an
integer that no 64 bits hold, or a number beyond float64, is an error.
libyaml does the parsing where PyYAML has it, ten times faster; its composer calls itself for each
level, so levels are counted first.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import yaml


class StrictYamlError(ValueError):
    """The text is not plain YAML."""


_MOST_LEVELS = 100
_Parsing: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_NUMBER_CHARACTERS = 64
_MAX_INTEGER_DIGITS = 20


class _StrictLoader(_Parsing):  # type: ignore[misc]
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(str(key.value) for key, _ in node.value)
        repeated = [key for key, count in counts.items() if count > 1]
        if repeated:
            raise yaml.YAMLError(f"duplicate key {repeated[0]!r}")
        if "<<" in counts:
            raise yaml.YAMLError("merge keys are not allowed")
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """Return a number of at most 20 digits; a text for base 60."""
        text = str(node.value)
        if ":" in text:
            return text
        digits = text.replace("_", "").lstrip("+-")
        if len(text) > _MAX_NUMBER_CHARACTERS:
            raise yaml.YAMLError(f"number of {len(text)} characters")
        if node.tag == _INTEGER:
            if len(digits) > _MAX_INTEGER_DIGITS:
                raise yaml.YAMLError(f"integer of {len(digits)} digits")
            return self.construct_yaml_int(node)
        value = self.construct_yaml_float(node)
        if math.isinf(value) and "inf" not in text.lower():
            raise yaml.YAMLError("a number is too large for float64")
        return value


_INTEGER, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
for _tag in (_INTEGER, _FLOAT):
    _StrictLoader.add_constructor(_tag, _StrictLoader.construct_number)


def _refuse_more_than_data(data: bytes) -> None:
    """Raise `YAMLError` for aliases, tags and too many levels, before anything is made of them."""
    levels = 0
    for event in yaml.parse(data, _Parsing):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError("tags are not allowed")
        if isinstance(event, yaml.CollectionStartEvent):
            levels += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            levels -= 1
        if levels > _MOST_LEVELS:
            raise yaml.YAMLError(f"more than {_MOST_LEVELS} levels")


def loads(data: bytes) -> Any:
    """Parse YAML.

    Raises:
        StrictYamlError: aliases, tags, merge or duplicate keys, numbers too large, nesting too
            deep, or no YAML.
    """
    try:
        _refuse_more_than_data(data)
        return yaml.load(data, _StrictLoader)  # noqa: S506
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise StrictYamlError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return str(error).partition("\n")[0]
