"""A recipe: operations one after another, read and checked whole before anything runs.

    version: 1
    variables: {rank: 16}
    steps:
    - {name: small, do: squeeze, source: ../chat, rank: "${rank}"}
    - name: both
      do: merge
      adapters:
      - {path: "${small}", weight: 0.7}
      - ../code

`${NAME}` is a variable, or, where a step reads something, the result of an earlier step. Paths are
relative to the recipe's folder. Every error names its line and key.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from loratools.pipeline.places import Places
from loratools.pipeline.schema import recipe_type
from loratools.pipeline.steps import Step, StepReader
from loratools.pipeline.variables import filled, variables_of
from loratools_formats.disk import strict_yaml
from loratools_formats.disk.errors import AdapterError, OptionError
from loratools_formats.disk.files import read_small_file

MOST_BYTES = 256 << 10


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read.

    Attributes:
        path: of its file.
        steps: in order; each reads results of earlier ones only.
    """

    path: Path
    steps: tuple[Step, ...]


def load_recipe(path: Path, given: Mapping[str, Any]) -> Recipe:
    """Read a recipe and check all that can be checked before anything runs.

    Args:
        path: of its file.
        given: values of variables, or their texts, by name, over those of the recipe.

    Raises:
        MissingFileError: it is not there.
        AdapterError: it is too large, or no plain YAML.
        OptionError: something in it is not known or wrong; names the line and the key.
    """
    if path.is_dir():
        inside = sorted(path.glob("*.y*ml"))[:1]
        raise AdapterError(
            "is a folder",
            path=path,
            expected="a recipe, a YAML file",
            hint=f"Name the file: loratools run {shlex.quote(str(inside[0]))}" if inside else None,
        )
    try:
        content, lines = strict_yaml.loads_with_lines(read_small_file(path, MOST_BYTES))
    except strict_yaml.StrictYamlError as error:
        raise AdapterError(f"not a recipe: {error}", path=path) from error
    at = Places(path, lines)
    if not isinstance(content, dict):
        raise at.fail((), "must be a map", got=type(content).__name__, expected="steps: …")
    if "method" in content and "steps" not in content:
        hint = f"Run it with: loratools merge --recipe {shlex.quote(str(path))} -o OUTPUT"
        raise OptionError("this is a recipe of merge alone", path=path, hint=hint)
    made = _converted(content, given, at)
    reader = StepReader(at)
    steps = [reader.read(step, ("steps", index)) for index, step in enumerate(made.steps)]
    return Recipe(path, tuple(steps))


def _converted(content: Mapping[Any, Any], given: Mapping[str, Any], at: Places) -> Any:
    """Return a recipe in the types of its schema, with variables put in."""
    variables = variables_of(content, given, at)
    steps = content.get("steps")
    names = _names(steps, at) if isinstance(steps, list) else []
    for name in names:
        if name in variables:
            raise at.fail(("steps",), "a variable and a step have one name", got=name)
    whole = {
        key: value if key == "variables" else filled(value, (str(key),), variables, names, at)
        for key, value in content.items()
    }
    try:
        return msgspec.convert(whole, recipe_type())
    except msgspec.ValidationError as error:
        raise at.worded(error, whole) from error


def _names(steps: Sequence[Any], at: Places) -> list[str]:
    names: list[str] = []
    for index, step in enumerate(steps):
        name = step.get("name") if isinstance(step, dict) else None
        if name in names:
            raise at.fail(("steps", index, "name"), "another step has this name", got=name)
        if isinstance(name, str):
            names.append(name)
    return names
