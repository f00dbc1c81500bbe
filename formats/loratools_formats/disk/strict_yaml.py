"""YAML parsing for files from strangers: plain data only.

Aliases can expand without bound, tags make objects, and of duplicate keys the last would win
silently, so all three are errors here. libyaml does the parsing where PyYAML has it, ten times
faster; its composer calls itself for each level, so levels are counted first.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml


class StrictYamlError(ValueError):
    """The text is not plain YAML."""


_MOST_LEVELS = 100
_Parsing: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _StrictLoader(_Parsing):  # type: ignore[misc]
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(str(key.value) for key, _ in node.value)
        repeated = [key for key, count in counts.items() if count > 1]
        if repeated:
            raise yaml.YAMLError(f"duplicate key {repeated[0]!r}")
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values


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
        StrictYamlError: aliases, tags, duplicate keys, nesting too deep, or no YAML.
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
