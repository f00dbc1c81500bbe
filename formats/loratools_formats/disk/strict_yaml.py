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
        for key, _ in reversed(node.value):
            if counts[str(key.value)] > 1:
                raise _refused(f"duplicate key {str(key.value)!r}", key)
            if key.value == "<<":
                raise _refused("merge keys are not allowed", key)
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """Return a number of at most 20 digits; a text for base 60."""
        text = str(node.value)
        if ":" in text:
            return text
        digits = text.replace("_", "").lstrip("+-")
        if len(text) > _MAX_NUMBER_CHARACTERS:
            raise _refused(f"number of {len(text)} characters", node)
        if node.tag == _INTEGER:
            if len(digits) > _MAX_INTEGER_DIGITS:
                raise _refused(f"integer of {len(digits)} digits", node)
            return self.construct_yaml_int(node)
        value = self.construct_yaml_float(node)
        if math.isinf(value) and "inf" not in text.lower():
            raise _refused("a number is too large for float64", node)
        return value


_INTEGER, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
for _tag in (_INTEGER, _FLOAT):
    _StrictLoader.add_constructor(_tag, _StrictLoader.construct_number)


def _refuse_more_than_data(data: bytes) -> None:
    """Raise `YAMLError` for aliases, tags and too many levels, before anything is made of them."""
    levels = 0
    for event in yaml.parse(data, _Parsing):
        if isinstance(event, yaml.AliasEvent):
            raise _refused("aliases are not allowed", event)
        if getattr(event, "tag", None) is not None:
            raise _refused("tags are not allowed", event)
        if isinstance(event, yaml.CollectionStartEvent):
            levels += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            levels -= 1
        if levels > _MOST_LEVELS:
            raise _refused(f"more than {_MOST_LEVELS} levels", event)


def _refused(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


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


Place = tuple[str | int, ...]
"""Where a value is: keys of maps and indices of lists, from the top."""


def loads_with_lines(data: bytes) -> tuple[Any, dict[Place, int]]:
    """Parse YAML, and say where its values are.

    Returns:
        the value, and the line of every key and item, counted from 1, by its place.

    Raises:
        StrictYamlError: as `loads`.
    """
    try:
        _refuse_more_than_data(data)
        loader = _StrictLoader(data)
        node = loader.get_single_node()
        lines: dict[Place, int] = {(): 1}
        if node is None:
            return None, lines
        value = loader.construct_document(node)
        _add_lines(node, (), lines)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise StrictYamlError(_reason(error)) from error
    return value, lines


def _add_lines(node: yaml.Node, place: Place, lines: dict[Place, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            lines[inner] = key.start_mark.line + 1
            _add_lines(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            inner = (*place, index)
            lines[inner] = value.start_mark.line + 1
            _add_lines(value, inner, lines)


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return str(error).partition("\n")[0]
