"""Variables of a recipe: their values, and the texts that they stand in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.pipeline.places import Places, closest
from loratools.pipeline.schema import NAME
from loratools_formats.disk import strict_yaml
from loratools_formats.disk.errors import OptionError
from loratools_formats.disk.strict_yaml import Place

REFERENCE = re.compile(rf"\$\{{({NAME})\}}")
"""`${NAME}`: a variable, or a step whose result is meant."""


def variables_of(
    content: Mapping[Any, Any], given: Mapping[str, Any], at: Places
) -> dict[str, Any]:
    """Return the values of a recipe's variables.

    Args:
        content: the recipe.
        given: values over those that it has, by name; a text is read as YAML reads it.
        at: knows the lines.

    Raises:
        OptionError: a name or a value that may not be, one that is missing, or an unknown name.
    """
    declared = content.get("variables", {})
    if not isinstance(declared, dict):
        raise at.fail(("variables",), "must be a map", got=type(declared).__name__)
    for name, value in declared.items():
        if not isinstance(name, str) or re.fullmatch(NAME, name) is None:
            raise at.fail(("variables", str(name)), "not a name of a variable", got=name)
        if isinstance(value, dict | list):
            raise at.fail(("variables", name), "must be a text or a number")
    values = dict(declared)
    for name, value in given.items():
        if name not in declared:
            expected = ", ".join(declared) or "none"
            raise OptionError(
                "the recipe has no such variable", path=at.path, got=name, expected=expected
            )
        values[name] = _scalar(name, value) if isinstance(value, str) else value
    for name, value in values.items():
        if value is None:
            hint = f"Pass `set={name}=VALUE`"
            raise at.fail(("variables", name), "has no value", hint=hint)
    return values


def filled(
    value: Any, place: Place, variables: Mapping[str, Any], steps: Sequence[str], at: Places
) -> Any:
    """Return a value with variables put in; references to steps stay as they are.

    A text that is nothing but a variable becomes its value, a number for a number.

    Raises:
        OptionError: a name that is neither a variable nor a step.
    """
    if isinstance(value, dict):
        return {
            _filled_text(key, (*place, key), variables, steps, at)
            if isinstance(key, str)
            else key: filled(item, (*place, str(key)), variables, steps, at)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [filled(v, (*place, i), variables, steps, at) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    whole = REFERENCE.fullmatch(value)
    if whole is not None and whole[1] in variables:
        return variables[whole[1]]
    return _filled_text(value, place, variables, steps, at)


def _filled_text(
    text: str, place: Place, variables: Mapping[str, Any], steps: Sequence[str], at: Places
) -> str:
    def one(found: re.Match[str]) -> str:
        name = found[1]
        if name in steps:
            return found[0]
        if name in variables:
            return str(variables[name])
        known = [*variables, *steps]
        raise at.fail(
            place,
            "no such variable or step",
            got=name,
            expected=", ".join(known) or "none are declared",
            hint=closest(name, known),
        )

    return REFERENCE.sub(one, text)


def _scalar(name: str, text: str) -> Any:
    """Return the value of a variable that was given as text, as YAML reads it."""
    try:
        value = strict_yaml.loads(text.encode())
    except (strict_yaml.StrictYamlError, UnicodeEncodeError) as error:
        raise OptionError(f"the value of {name} is no plain YAML: {error}", got=text) from error
    return text if isinstance(value, dict | list) else value
