"""One step of a recipe: what it reads, its options with their types, and its result's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from loratools.algebra.ranks import RankRule
from loratools.face.declare import Declaration
from loratools.hub.references import is_explicit, parse
from loratools.operations.merge.methods import get_method
from loratools.operations.merge.options import Parameters
from loratools.pipeline.places import Places
from loratools.pipeline.schema import WeightedPath, is_path, step_options, step_types
from loratools.pipeline.variables import REFERENCE
from loratools.work.declared import build
from loratools.work.typed import option_value
from loratools_formats.contract.registry import get_format
from loratools_formats.core.file_names import WRITTEN_ENDINGS
from loratools_formats.disk.errors import LoratoolsError, OptionError
from loratools_formats.disk.strict_yaml import Place

_MAKES_FOLDERS = frozenset({"extract"})
NEEDS_RANKS = frozenset({"extract", "squeeze"})
"""Operations that do nothing without a rule for the ranks."""


@dataclass(frozen=True)
class StepInput:
    """Something that a step reads.

    Attributes:
        parameter: which of the step's inputs or options.
        text: as the recipe says it, with variables put in.
        step: the earlier step whose result it is; None for a path or a reference.
        weight: its factor, where the parameter takes one; None otherwise.
        want: what it is to be, if it names something on the Hub.
        is_list: whether it is one of several.
    """

    parameter: str
    text: str
    step: str | None
    weight: float | None
    want: str
    is_list: bool


@dataclass(frozen=True)
class Step:
    """A step of a recipe.

    Attributes:
        name: what other steps call its result.
        operation: what it does.
        declaration: of the function that it calls.
        inputs: what it reads.
        plain: inputs that are no paths, by parameter.
        options: by keyword, with the declared types.
        values: the options as the recipe has them, for the key of its content.
        output: name of its result in the folder of results; None if it makes none.
    """

    name: str
    operation: str
    declaration: Declaration
    inputs: tuple[StepInput, ...]
    plain: Mapping[str, str]
    options: Mapping[str, Any]
    values: Mapping[str, Any]
    output: str | None

    @property
    def merges_by_recipe(self) -> bool:
        """Whether it is a merge that a recipe of merge describes."""
        return self.operation == "merge" and any(
            one.parameter == "adapters" and not one.is_list for one in self.inputs
        )

    def group(self, cls: type) -> dict[str, Any]:
        """Return the options that a dataclass declares, by their names there."""
        return {
            made.name: self.options[word]
            for word, (of, made) in self.declaration.options.items()
            if of is cls and word in self.options
        }


class StepReader:
    """Reads the steps of one recipe in order.

    Args:
        at: knows the lines.
    """

    def __init__(self, at: Places) -> None:
        self._at = at
        self._outputs: dict[str, str | None] = {}

    def read(self, given: Any, place: Place) -> Step:
        """Return a step.

        Args:
            given: an instance of one of the types of steps.
            place: where it stands.

        Raises:
            OptionError: something in it is wrong; names the line and the key.
        """
        word = type(given).__struct_config__.tag
        declaration = step_types()[word][1]
        values = {
            one.name: msgspec.to_builtins(value) if _is_option(declaration, one.name) else value
            for one in msgspec.structs.fields(type(given))
            if (value := getattr(given, one.name)) is not msgspec.UNSET and value is not None
        }
        name, output = values.pop("name"), values.pop("output", None)
        inputs: list[StepInput] = []
        plain: dict[str, str] = {}
        for parameter, hint in declaration.inputs.items():
            if parameter not in values:
                continue
            value, mark = values.pop(parameter), declaration.references.get(parameter)
            if mark is None and not is_path(hint):
                plain[parameter] = value
                continue
            want: str = "file"
            if mark is not None:
                want = (mark.text if isinstance(value, str) else None) or mark.want
            inputs += self._inputs(parameter, value, want, (*place, parameter))
        options, paths = self._options(declaration, values, place)
        for keyword, (text, want) in paths.items():
            inputs += self._inputs(keyword, text, want, (*place, keyword))
        step = Step(name, word, declaration, tuple(inputs), plain, options, values, output=None)
        self._check(step, place)
        if declaration.writes and word != "check":
            step = replace(step, output=output or self._default_output(step))
            if step.output in self._outputs.values():
                key = "output" if output else "name"
                raise self._at.fail((*place, key), "another step writes there", got=step.output)
        self._outputs[name] = step.output
        return step

    def _inputs(self, parameter: str, value: Any, want: str, place: Place) -> Iterator[StepInput]:
        if isinstance(value, str):
            yield self._input(parameter, value, None, want, place, is_list=False)
        elif not value:
            raise self._at.fail(place, "names nothing", expected="at least one path")
        elif isinstance(value, Mapping):
            for text, weight in value.items():
                yield self._input(parameter, text, float(weight), want, place, is_list=True)
        else:
            for index, item in enumerate(value):
                with_weight = isinstance(item, WeightedPath)
                text, weight = (item.path, item.weight) if with_weight else (item, None)
                where = (*place, index)
                yield self._input(parameter, text, weight, want, where, is_list=True)

    def _input(
        self,
        parameter: str,
        text: str,
        weight: float | None,
        want: str,
        place: Place,
        *,
        is_list: bool,
    ) -> StepInput:
        found = REFERENCE.fullmatch(text)
        if found is None:
            if REFERENCE.search(text):
                message = "a step's result stands alone, not within a path"
                raise self._at.fail(place, message, got=text)
            self._require(text, want, place)
            return StepInput(parameter, text, None, weight, want, is_list)
        step = found[1]
        if step not in self._outputs:
            raise self._at.fail(place, "a step reads results of earlier steps only", got=step)
        if self._outputs[step] is None:
            raise self._at.fail(place, "this step makes no file", got=step)
        return StepInput(parameter, text, step, weight, want, is_list)

    def _require(self, text: str, want: Any, place: Place) -> None:
        """Refuse a path where nothing is, unless it is a reference to the Hub."""
        folder = self._at.path.parent
        try:
            # A misspelt path in a folder that is there is no name on the Hub.
            is_near = (folder / text.partition("/")[0]).is_dir() and not is_explicit(text)
            found = (folder / text).exists() or (not is_near and parse(text, want) is not None)
        except (LoratoolsError, ValueError, OSError) as error:
            raise self._at.fail(place, f"not a path: {error}", got=text) from error
        if not text or not found:
            raise self._at.fail(place, "no such file or folder", got=text)

    def _options(
        self, declaration: Declaration, values: Mapping[str, Any], place: Place
    ) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
        """Return the options by keyword, and those that are paths with what is wanted there."""
        known = step_options(declaration)
        options: dict[str, Any] = {}
        paths: dict[str, tuple[str, str]] = {}
        groups: dict[type, dict[str, Any]] = {}
        for key, value in values.items():
            keyword, cls, made = known[key]
            if made.type is Path:
                paths[keyword] = (value, made.reference or "file")
                continue
            if isinstance(value, str) and REFERENCE.search(value):
                message = "a step's result is no value of it"
                raise self._at.fail((*place, key), message, got=value)
            is_read = made.parse is not None and made.type not in (int, float)
            try:
                text = str(value) if is_read and type(value) in (int, float) else value
                options[keyword] = option_value(cls, made, text)
            except OptionError as error:
                raise self._at.at((*place, key), error) from error
            groups.setdefault(cls, {})[made.name] = options[keyword]
        for cls, chosen in groups.items():
            try:
                build(cls, chosen)
            except OptionError as error:
                first = next(key for key in values if known[key][1] is cls)
                raise self._at.at((*place, first), error) from error
        return options, paths

    def _check(self, step: Step, place: Place) -> None:
        """Check what types do not say: names of methods and formats, and that a rank is chosen."""
        key = "to"
        try:
            if step.options.get("to") is not None:
                get_format(step.options["to"])
            key = "method"
            if step.operation == "merge" and not step.merges_by_recipe:
                parameters = build(Parameters, step.group(Parameters)).given()
                get_method(step.options.get("method", "linear")).checked(parameters)
        except LoratoolsError as error:
            raise self._at.at((*place, key), error) from error
        if step.operation in NEEDS_RANKS and not build(RankRule, step.group(RankRule)).is_given:
            expected = "rank, energy, budget or another rule"
            raise self._at.fail(place, "no rule for the ranks", expected=expected)

    def _default_output(self, step: Step) -> str:
        """Return the name of a result: the step's, with the suffix of its format if it is a file.

        Operations keep the format of what they read first, unless `to` says another.
        """
        to = step.options.get("to")
        if to is not None:
            return step.name + get_format(to).ending
        if step.operation in _MAKES_FOLDERS or not step.inputs:
            return step.name
        first = step.inputs[0]
        text = first.text if first.step is None else str(self._outputs[first.step])
        suffix = next((s for s in WRITTEN_ENDINGS if text.lower().endswith(s)), "")
        return f"{step.name}{suffix}"


def _is_option(declaration: Declaration, key: str) -> bool:
    return key in step_options(declaration)
