"""YAML parsing for files from strangers: plain data only.

Aliases can expand without bound, tags make objects, and of duplicate keys the last would win
silently, so all three are errors here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml


class StrictYamlError(ValueError):
    """The text is not plain YAML."""


class _StrictLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("aliases are not allowed")
        if getattr(self.peek_event(), "tag", None) is not None:  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("tags are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(str(key.value) for key, _ in node.value)
        repeated = [key for key, count in counts.items() if count > 1]
        if repeated:
            raise yaml.YAMLError(f"duplicate key {repeated[0]!r}")
        return super().construct_mapping(node, deep)


def loads(data: bytes) -> Any:
    """Parse YAML.

    Raises:
        StrictYamlError: aliases, tags, duplicate keys, nesting too deep, or no YAML.
    """
    try:
        return yaml.load(data, _StrictLoader)  # noqa: S506
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise StrictYamlError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return str(error).partition("\n")[0]
