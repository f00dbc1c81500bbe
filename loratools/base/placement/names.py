"""Finding the base tensor a name means, whatever wrappers either side puts around it.

Both names are brought to one spelling: leading neutral parts are dropped, and renames between
generations of a model class applied. Parts that name something, such as `vision_tower`, are never
dropped, so that a vision layer cannot be taken for a language layer; nothing matches by suffix.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from loratools.base.placement import rules
from loratools.base.placement.model_class import Named, class_of, names_in
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import TEXT_SECTIONS
from loratools_formats.core.expert_names import NUMBER
from loratools_formats.core.tensors import TensorRef
from loratools_formats.core.wrapped_names import unwrapped
from loratools_formats.disk.errors import AdapterError

_SECTIONS = (*TEXT_SECTIONS, "vision_config")
_VISION = re.compile(r"^(vision|visual|image)")


class Names:
    """A checkpoint's tensors, to be found by names of either side.

    Args:
        base: the checkpoint.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.tensors: Mapping[str, TensorRef] = base.tensors
        self.resized: dict[str, tuple[int, ...]] = {}
        config = base.config
        self.types = frozenset(
            part["model_type"]
            for part in (config, *self._sections())
            if isinstance(part.get("model_type"), str)
        )
        own = config.get("model_type")
        self._neutral = rules.NEUTRAL
        if isinstance(own, str):
            self._neutral |= {own, rules.BODY_PREFIX.get(own, own)}
        if any(f".{rules.TOWER}." in f".{key}" for key in base.tensors):
            self._neutral -= {"text_model"}
        self._renamings = [
            (re.compile(rule.pattern), rule.replacement)
            for rule in rules.RENAMINGS
            if rule.types is None or rule.types & self.types
        ]
        self._by_spelling: dict[str, list[str]] = {}
        for key in base.tensors:
            self._by_spelling.setdefault(self.spelling(key), []).append(key)
        self._model = class_of(config)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape a tensor has once the adapter's whole tensors have replaced others."""
        return self.resized.get(key, self.tensors[key].shape)

    def _sections(self) -> list[Mapping[str, Any]]:
        found = [self.base.config.get(name) for name in _SECTIONS]
        return [section for section in found if isinstance(section, dict)]

    def section(self, name: str) -> Mapping[str, Any]:
        """Return the part of the configuration that a module's layer is built from."""
        config = self.base.config
        is_vision = _VISION.match(self.spelling(name)) is not None
        order = ("vision_config",) if is_vision else _SECTIONS[:-1]
        for key in order:
            if isinstance(config.get(key), dict):
                return dict(config[key])
        return config

    def types_of(self, name: str) -> tuple[str, ...]:
        """Return the model types whose rules hold for a module: its own part's, and the whole's."""
        found = (self.section(name).get("model_type"), self.base.config.get("model_type"))
        return tuple(dict.fromkeys(t for t in found if isinstance(t, str)))

    def spelling(self, name: str) -> str:
        """Return the spelling that names of one tensor share."""
        parts = unwrapped(name).split(".")
        while len(parts) > 1 and parts[0] in self._neutral:
            del parts[0]
        text = ".".join(parts)
        for pattern, replacement in self._renamings:
            text = pattern.sub(replacement, text)
        return text

    def find(self, name: str) -> str | None:
        """Return the key of the tensor that a name means; None if the base has no such tensor.

        Raises:
            AdapterError: it could mean several, or the class has two tensors as one.
        """
        if name in self.tensors:
            self._refuse_twins(name)
            return name
        in_class = self.in_class(name)
        if in_class is not None and in_class.rule is None:
            key = self._by_class.get(in_class.name)
            if key is not None:
                return key
        found = self._by_spelling.get(self.spelling(name), [])
        if len(found) > 1:
            raise AdapterError(
                "several base tensors fit one name",
                path=self.base.path,
                tensor=name,
                got=", ".join(found[:3]),
                expected="one, or one of exactly this name",
            )
        return found[0] if found else None

    def _refuse_twins(self, key: str) -> None:
        """Refuse a tensor if the class takes another one of the base for the same parameter."""
        alike = self._by_spelling[self.spelling(key)]
        if self._model is None or len(alike) == 1:
            return
        of_class = {each: self._model.named(unwrapped(each)) for each in alike}
        own = of_class[key]
        twins = [k for k, n in of_class.items() if n.rule is None and n.name == own.name]
        if own.rule is None and len(twins) > 1:
            raise AdapterError(
                "two base tensors are one parameter of the model's class, which loads one of them",
                path=self.base.path,
                tensor=own.name,
                got=", ".join(twins),
                expected="one of them",
                hint="Remove the other from the base's files",
            )

    def in_class(self, name: str) -> Named | None:
        """Return what the base's class calls a tensor; None if the class is not known."""
        return None if self._model is None else self._model.named(unwrapped(name))

    def is_bare(self, key: str) -> bool:
        """Return whether PEFT adapts a weight of the class as a parameter, not as a layer's."""
        return self._model is not None and self._model.is_bare(key)

    def odd_kind(self, module: str) -> Literal["embedding", "conv1d", "linear"] | None:
        """Return what the class has as a layer whose name says something else."""
        return None if self._model is None else self._model.odd_kind(module)

    @property
    def has_class(self) -> bool:
        """Whether the configuration names a class that is known."""
        return self._model is not None

    @cached_property
    def _by_class(self) -> dict[str, str]:
        """The stored tensors by their names in the class, where each is one of its parameters."""
        if self._model is None:
            return {}
        found: dict[str, str] = {}
        twice = set()
        for key, named in names_in(self._model, list(self.tensors)).items():
            if named.rule is None:
                twice |= {named.name} & found.keys()
                found[named.name] = key
        return {name: key for name, key in found.items() if name not in twice}

    def merged_into(self, parameter: str) -> list[list[str]]:
        """Return the stored tensors that the class stacks to a parameter, by expert and part."""
        return self._merged.get(parameter, [])

    def alternated(self, parameter: str) -> str | None:
        """Return the stored stack whose outputs alternate where the class has them in halves.

        None if the parameter is none of those. Inkling's files hold gate and up so.
        """
        return self._alternated.get(parameter)

    @cached_property
    def _alternated(self) -> dict[str, str]:
        if self._model is None:
            return {}
        named = names_in(self._model, list(self.tensors)).items()
        return {n.name: key for key, n in named if n.rule is not None and n.rule.alternates}

    def cut_from(self, name: str) -> tuple[str, int, int] | None:
        """Return the stored tensor that the class cuts a tensor from; None if it does not.

        Returns:
            Its key, which of the parts the tensor is, and how many equal parts there are.
        """
        named = self.in_class(name)
        return None if named is None else self._cuts.get(named.name)

    def cut_to(self, name: str) -> list[str]:
        """Return the tensors of the class that a name stood for before it was cut into them."""
        named = self.in_class(name)
        rule = None if named is None else named.rule
        if named is None or rule is None:
            return []
        return [rule.made(named.name, index) for index in range(rule.cuts)]

    @cached_property
    def _cuts(self) -> dict[str, tuple[str, int, int]]:
        if self._model is None:
            return {}
        return {
            named.rule.made(named.name, index): (key, index, named.rule.cuts)
            for key, named in names_in(self._model, list(self.tensors)).items()
            if named.rule is not None
            for index in range(named.rule.cuts)
        }

    @cached_property
    def _merged(self) -> dict[str, list[list[str]]]:
        if self._model is None:
            return {}
        found: dict[str, dict[int, dict[int, str]]] = {}
        for key, named in names_in(self._model, list(self.tensors)).items():
            expert = NUMBER.search(key)
            kinds = () if named.rule is None else named.rule.operations
            if expert is not None and kinds and kinds[0][0] == "MergeModulelist":
                parts = found.setdefault(named.name, {}).setdefault(int(expert[1]), {})
                parts[named.source] = key
        return {
            name: [[parts[i] for i in sorted(parts)] for _, parts in sorted(experts.items())]
            for name, experts in found.items()
        }

    def nearest(self, name: str) -> list[str]:
        """Return the base tensors with the most similar names, for messages."""
        spelling = self.spelling(name)
        parts = spelling.split(".")
        # Comparing with every tensor would take seconds on large checkpoints.
        pool = [s for s in self._by_spelling if s.split(".")[-2:-1] == parts[-2:-1]]
        pool = pool or list(self._by_spelling)
        close = difflib.get_close_matches(spelling, pool[:2000], n=2, cutoff=0.4)
        return [key for s in close for key in self._by_spelling[s]][:2]
