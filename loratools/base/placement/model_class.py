"""The names that a class of transformers gives to what a checkpoint stores.

A checkpoint may name and divide weights as an earlier release did, or as another program does:
`language_model.model.layers.0` is `model.language_model.layers.0` in the class, and the weights of
single experts are one parameter. PEFT names modules as the class does. `data/class_names.json` has
the rules, as `tests/placement/make_class_names.py` found them in the release that it states.
Source of the order in which rules hold: transformers 5.23, `core_model_loading.py` and
`conversion_mapping.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

from loratools_formats.core.wrapped_names import unwrapped


@dataclass(frozen=True)
class Rule:
    """A rule that renames tensors, and converts them if it has operations.

    Attributes:
        find: what it searches a name for; one group `g0`, `g1` ... for each source.
        sources: what it converts, in the order in which the parts of a fused weight lie.
        targets: what it makes of them.
        operations: names of transformers' operations, and their arguments.
        paired: whether each source has a target of its own, once the first source was seen.
        offset: what is added to the number that the pattern finds.
        scope: path of the model that the rule belongs to; None for all of the model.
    """

    find: re.Pattern[str]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    paired: bool = False
    offset: int = 0
    scope: str | None = None

    @property
    def alternates(self) -> bool:
        """Whether it only puts outputs in halves that alternate in the file, of a stack."""
        inward = {"dim": 1, "inverse": False}
        return [(n, dict(given)) for n, given in self.operations] == [("Interleave", inward)]

    def renamed(self, name: str, prefix: str) -> tuple[str, int] | None:
        """Return a name as the rule has it, and which source it was; None if it is not concerned.

        Args:
            name: of a tensor.
            prefix: the attribute that heads keep the body of their model under.
        """
        before, rest = "", name
        if self.scope is not None:
            scope = f"{self.scope}." if self.scope else ""
            longest = f"{prefix}.{scope}" if prefix else scope
            before = longest if name.startswith(longest) else scope
            if not name.startswith(before):
                return None
            rest = name[len(before) :]
        match = self.find.search(rest)
        if match is None:
            return None
        group = next(k for k, v in match.groupdict().items() if v is not None)
        which = int(group[1:])
        first = self.find.groupindex[group]
        target = self.targets[which if self.paired else 0]

        def captured(number: re.Match[str]) -> str:
            text = match.group(first + int(number[1])) or ""
            return str(int(text) + self.offset) if self.offset else text

        target = re.sub(r"\\(\d)", captured, target)
        return before + rest.replace(match.group(0), target, 1), which

    def made(self, name: str, index: int) -> str:
        """Return the name of one of the tensors that the rule makes, by that of the first."""
        first, own = (
            target.replace("\\", "").lstrip("^")
            for target in (self.targets[0], self.targets[index])
        )
        return name if index == 0 else name.replace(first, own, 1)

    @property
    def cuts(self) -> int:
        """Into how many equal parts, one after the other, it cuts the outputs of one tensor."""
        chunks = [name == "Chunk" and not given.get("dim", 0) for name, given in self.operations]
        return len(self.targets) if chunks == [True] and len(self.sources) == 1 else 0


@dataclass(frozen=True)
class Named:
    """A tensor as the class has it.

    Attributes:
        name: of the parameter that it is, or is part of.
        rule: what converts it; None if it is the parameter.
        source: which of the rule's sources it is.
    """

    name: str
    rule: Rule | None = None
    source: int = 0


class ModelClass:
    """A class of transformers, with the parts that a configuration gives it.

    Args:
        name: of the class.
        config: the model's configuration.
        table: the rules of all classes, by default those of this package.
    """

    def __init__(
        self, name: str, config: Mapping[str, Any], table: Mapping[str, Any] | None = None
    ) -> None:
        self.name = name
        table = _table() if table is None else table
        entry = table["classes"][name]
        self._prefix: str = entry.get("prefix", "")
        self._roots = frozenset(entry["roots"])
        self._body = frozenset(entry.get("body", ()))
        self._rules = tuple(_collected(table, name, config, self._prefix))
        self._bare = frozenset(
            f"{path}.{weight}" if path else weight
            for path, part in _parts(table, name, config, "")
            for weight in table["classes"].get(part, {}).get("bare", ())
        )
        self._odd: dict[str, Literal["embedding", "conv1d", "linear"]] = {
            f"{path}.{layer}" if path else layer: kind
            for path, part in _parts(table, name, config, "")
            for layer, kind in table["classes"].get(part, {}).get("odd", {}).items()
        }
        self._projections = frozenset(
            source.removesuffix(".weight").rpartition(".")[2]
            for rule in self._rules
            if rule.operations[:1] and rule.operations[0][0] == "MergeModulelist"
            for source in rule.sources
        )
        self._keep = frozenset(entry.get("keep", ()))
        self._guarded: set[int] = set()

    def named(self, key: str) -> Named:
        """Return what the class calls a tensor of a checkpoint."""
        if self._keep and numbered(key)[0] in self._keep:
            return Named(key)
        name, rule, source = key, None, 0
        for renaming in self._rules:
            if not renaming.operations:
                name = self._renamed(renaming, name)
        for converter in self._rules:
            found = converter.renamed(name, self._prefix) if converter.operations else None
            if found is not None:
                (name, source), rule = found, converter
                break
        name = self._placed(name)
        if name != key and self._is_own(key) and not self._is_own(name):
            return Named(self._placed(key))
        return Named(name, rule, source)

    def odd_kind(self, module: str) -> Literal["embedding", "conv1d", "linear"] | None:
        """Return what a layer is whose name says something else; None if its name says it."""
        return self._odd.get(numbered(module)[0]) if self._odd else None

    def is_bare(self, name: str) -> bool:
        """Return whether PEFT adapts a weight as a parameter only.

        It has no layer for some modules. In classes that stack experts, it takes every layer that
        is called as the projections of experts were for one of them, dense ones too, and every
        `gate` for a router.
        """
        module = name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        if module != name and self._projections and leaf in {*self._projections, "gate"}:
            return True
        return bool(self._bare) and numbered(name)[0] in self._bare

    def _renamed(self, rule: Rule, name: str) -> str:
        found = rule.renamed(name, self._prefix)
        if found is None:
            return name
        if rule.paired:
            if found[1] == 0:
                self._guarded.add(id(rule))
            elif id(rule) not in self._guarded:
                return name
        return found[0]

    def _is_own(self, name: str) -> bool:
        return name.partition(".")[0] in self._roots

    def _placed(self, name: str) -> str:
        """Return a name with the body's prefix, or without, as the class has it."""
        if not self._prefix:
            return name
        first, _, rest = name.partition(".")
        if first == self._prefix and rest.partition(".")[0] in self._roots and not self._body:
            return rest
        if first not in self._roots and first in self._body:
            return f"{self._prefix}.{name}"
        return name


def class_of(config: Mapping[str, Any]) -> ModelClass | None:
    """Return the class that a configuration names; None if it names none, or one not known."""
    named = config.get("architectures")
    if not isinstance(named, list):
        return None
    known = _table()["classes"]
    name = next((n for n in named if isinstance(n, str) and n in known), None)
    return None if name is None else ModelClass(name, config)


_LISTS = frozenset({"layers", "layer", "h", "blocks", "block", "experts"})


def numbered(name: str) -> tuple[str, list[str]]:
    """Return a name without the numbers of layers and experts, and these numbers.

    >>> numbered("model.layers.12.mlp.experts.3.w1.weight")
    ('model.layers.#.mlp.experts.#.w1.weight', ['12', '3'])
    """
    parts = name.split(".")
    numbers = []
    for index in range(1, len(parts)):
        if parts[index].isdigit() and parts[index - 1] in _LISTS:
            numbers.append(parts[index])
            parts[index] = "#"
    return ".".join(parts), numbers


def names_in(model: ModelClass, keys: Sequence[str]) -> dict[str, Named]:
    """Return what a class calls tensors; layers and experts of one kind are asked once."""
    known: dict[str, tuple[str, Named]] = {}
    found = {}
    for key in keys:
        shape, numbers = numbered(unwrapped(key))
        if shape not in known:
            marked = _filled(shape, [str(_MARK + i) for i in range(len(numbers))])
            known[shape] = (marked, model.named(marked))
        named = known[shape][1]
        parts = named.name.split(".")
        marks = {str(_MARK + i): number for i, number in enumerate(numbers)}
        name = ".".join(marks.get(part, part) for part in parts)
        lost = any(part.isdigit() and int(part) >= _MARK and part not in marks for part in parts)
        found[key] = model.named(unwrapped(key)) if lost else replace(named, name=name)
    return found


_MARK = 1_000_003


def _filled(shape: str, numbers: Sequence[str]) -> str:
    remaining = iter(numbers)
    return ".".join(next(remaining) if part == "#" else part for part in shape.split("."))


def release() -> str:
    """Return the release of transformers that the table was made from."""
    return str(_table()["transformers"])


def _collected(
    table: Mapping[str, Any], name: str, config: Mapping[str, Any], prefix: str
) -> Iterator[Rule]:
    """Yield the rules of a class and of its parts, in the order in which they hold."""
    seen: dict[str, list[str]] = {}
    for path, part in _parts(table, name, config, ""):
        if _claimed(seen, part, path):
            continue
        model_type = table["classes"].get(part, {}).get("type", "")
        rules = table["rules"].get(part)
        by_class = rules is not None
        if rules is None and not _claimed(seen, model_type, path):
            rules = table["rules"].get(model_type)
        if rules is None:
            continue
        scope = path.removeprefix(prefix).removeprefix(".") if path else None
        yield from (_rule(values, scope) for values in rules)
        seen.setdefault(part, []).append(path)
        if not by_class and model_type:
            seen.setdefault(model_type, []).append(path)
    yield from (_rule(values, None) for values in table["rules"]["legacy"])


def _claimed(seen: Mapping[str, list[str]], name: str, path: str) -> bool:
    return any(other == "" or path.startswith(f"{other}.") for other in seen.get(name, ()))


def _parts(
    table: Mapping[str, Any], name: str, config: Mapping[str, Any], path: str
) -> Iterator[tuple[str, str]]:
    """Yield path and class of a model and of the models in it, as `named_modules` does."""
    yield path, name
    for inner, usual, section in table["classes"].get(name, {}).get("parts", ()):
        own = config.get(section) if section else None
        part_config = own if isinstance(own, Mapping) else config if not section else {}
        part = usual
        if section:
            told = part_config.get("model_type")
            usually = table["classes"].get(usual, {}).get("type")
            if isinstance(told, str) and usually is not None and told != usually:
                part = table["bodies"].get(told, usual)
        yield from _parts(table, part, part_config, f"{path}.{inner}" if path else inner)


def _rule(values: Mapping[str, Any], scope: str | None) -> Rule:
    return Rule(
        _compiled(values["find"]),
        tuple(values["sources"]),
        tuple(values["targets"]),
        tuple((name, arguments) for name, arguments in values.get("operations", ())),
        values.get("kind") == "GroupWeightRename",
        values.get("offset", 0),
        scope,
    )


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@cache
def _table() -> Mapping[str, Any]:
    file = resources.files("loratools.base.placement") / "data" / "class_names.json"
    values: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values
