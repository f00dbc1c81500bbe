"""Reading sets of adapters that share bases; what a file means is in `shared_set`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

from loratools_formats.contract.shared_set import (
    METADATA_KEY,
    VERSION,
    Member,
    Part,
    SharedModule,
    SharedSet,
    possible_name,
)
from loratools_formats.core.adapter import Adapter, Replacement
from loratools_formats.core.change import Layer
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_REPLACEMENTS = get_args(get_type_hints(Replacement)["kind"])


def parsed(adapter: Adapter) -> SharedSet:
    """Return the set that a file holds.

    Args:
        adapter: its tensors in `carried`, its metadata.

    Raises:
        UnsupportedError: a later version wrote it, or it is no set.
        AdapterError: metadata and tensors that do not fit together.
    """
    if METADATA_KEY not in adapter.metadata:
        raise UnsupportedError(
            "is not a shared set",
            path=adapter.source,
            hint="Make one: loratools fleet share ADAPTERS -o shared.safetensors --rank RANK",
        )
    try:
        found: Any = strict_json.loads(adapter.metadata[METADATA_KEY].encode(), max_depth=32)
        version = found["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(adapter, "its metadata are no JSON object with a version") from error
    if version != VERSION:
        raise UnsupportedError(
            "the shared set is of another version",
            path=adapter.source,
            got=version,
            expected=VERSION,
            hint="Read it with the version of loratools that wrote it, or a later one",
        )
    try:
        return _Parsed(adapter, found).whole()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _broken(adapter, f"its metadata lack or misstate {error}") from error


class _Parsed:
    """Takes tensors one by one, so that none is left over."""

    def __init__(self, adapter: Adapter, found: Mapping[str, Any]) -> None:
        self._adapter = adapter
        self._found = found
        self._left = dict(adapter.carried)
        self._diagonal = {"diagonal": True, "full": False}[found["cores"]]
        self._every: dict[int, tuple[int, ...]] = {}
        self._of_members: dict[str, dict[str, TensorRef]] = {}
        for key in adapter.carried:  # once, however many members and modules there are
            what, _, rest = key.partition(".")
            if what in ("bias", "own"):
                place, _, name = rest.partition(".")
                owned = self._of_members.setdefault(f"{what}.{place}", {})
                owned[name] = self._left.pop(key)

    def whole(self) -> SharedSet:
        configs = [_of_lora(_object(config)) for config in self._found["configs"]]
        entries = [_object(entry) for entry in self._found["members"]]
        groups = [_count(entry["group"], len(entries)) for entry in entries]
        of_groups: dict[int, list[int]] = {}
        for place, group in enumerate(groups):
            of_groups.setdefault(group, []).append(place)
        self._every = {group: tuple(places) for group, places in of_groups.items()}
        modules = {m.name: m for m in map(self._module, self._found["modules"])}
        for module in modules.values():
            for group, part in module.parts.items():
                if part.members is not self._every[group] and any(
                    groups[place] != group for place in part.members
                ):
                    raise self._fault(module.name, "cores of a member of another group")
        members = tuple(self._member(i, e, configs, modules) for i, e in enumerate(entries))
        names = {member.name.casefold() for member in members}
        if not members or not modules or len(names) < len(members):
            raise _broken(self._adapter, "it has no members or modules, or two of one name")
        left = [
            *self._left,
            *(f"{of}.{key}" for of in self._of_members for key in self._of_members[of]),
        ]
        if left:
            raise self._fault(left[0], "a tensor that its metadata do not mention")
        base = self._found.get("base_model")
        return SharedSet(self._diagonal, None if base is None else str(base), members, modules)

    def _module(self, entry: Mapping[str, Any]) -> SharedModule:
        name = _text(entry["name"])
        parts = {}
        for group, given in entry["members"].items():
            places = self._every[int(group)]
            if given is not None:
                places = tuple(_count(place, len(self._found["members"])) for place in given)
                if len(set(places)) < len(places) or not places:
                    raise self._fault(name, "an impossible list of members")
            if group != str(int(group)):
                raise self._fault(name, "an impossible group")
            parts[int(group)] = self._part(name, int(group), places)
        return SharedModule(name, _layer(entry["layer"]), parts)

    def _part(self, name: str, group: int, members: tuple[int, ...]) -> Part:
        u, v = self._take(f"basis.{group}.u.{name}"), self._take(f"basis.{group}.v.{name}")
        cores = self._take(f"cores.{group}.{name}")
        stack = u.shape[:-2]
        if not (len(u.shape) == len(v.shape) in (2, 3) and v.shape[:-2] == stack):
            raise self._fault(name, f"bases of shapes {list(u.shape)} and {list(v.shape)}")
        left, right = u.shape[-1], v.shape[-2]
        core = (left,) if self._diagonal else (left, right)
        if cores.shape != (len(members), *stack, *core) or (self._diagonal and left != right):
            raise self._fault(name, f"cores of shape {list(cores.shape)}")
        if not all(tensor.dtype.floating for tensor in (u, v, cores)):
            raise self._fault(name, "bases or cores of no floating-point type")
        return Part(u, v, cores, members)

    def _member(
        self,
        place: int,
        entry: Mapping[str, Any],
        configs: Sequence[Mapping[str, Any]],
        modules: Mapping[str, SharedModule],
    ) -> Member:
        name = possible_name(_text(entry["name"]))
        given = self._of_members.pop(f"bias.{place}", {})
        biases = {module: given[module] for module in modules if module in given} if given else {}
        if len(biases) < len(given):
            raise self._fault(f"bias.{place}", "biases of modules that it does not have")
        carried = self._of_members.pop(f"own.{place}", {})
        replacements = {}
        for key, one in entry["replacements"].items():
            if one["kind"] not in _REPLACEMENTS:
                raise ValueError(f"a replacement of kind {one['kind']!r}")
            if key not in carried:
                raise self._fault(
                    f"own.{place}.{key}", "no such tensor, which its metadata mention"
                )
            rows = tuple(_count(row, 1 << 31) for row in one["rows"])
            target, tensor = _text(one["target"]), carried.pop(key)
            replacements[key] = Replacement(one["kind"], target, tensor, rows)
        error = float(entry["relative_error"])
        config = configs[_count(entry["config"], len(configs))]
        group = int(entry["group"])
        return Member(name, group, config, error, biases, replacements, carried)

    def _take(self, key: str) -> TensorRef:
        if key not in self._left:
            raise self._fault(key, "no such tensor, which its metadata mention")
        return self._left.pop(key)

    def _fault(self, tensor: str, problem: str) -> AdapterError:
        return AdapterError(
            f"not a sound shared set: {problem}",
            path=self._adapter.source,
            tensor=tensor,
            hint=_AGAIN,
        )


_AGAIN = "Copy the file again from where it was made, or share the adapters anew"


def _broken(adapter: Adapter, problem: str) -> AdapterError:
    return AdapterError(f"not a sound shared set: {problem}", path=adapter.source, hint=_AGAIN)


def _layer(entry: Mapping[str, Any]) -> Layer:
    if entry["kind"] not in ("linear", "conv", "embedding", "experts"):
        raise ValueError(f"a layer of kind {entry['kind']!r}")
    for key in ("transposed_if_square", "swapped"):
        if entry[key] not in (True, False, None):
            raise ValueError(key)
    return Layer(
        entry["kind"],
        tuple(_count(size, 1 << 20) for size in entry["kernel"]),
        tuple(map(_text, entry["parameters"])),
        entry["transposed_if_square"],
        entry["swapped"],
        tied=entry.get("tied") is True,
    )


def _of_lora(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration; what is shared are LoRAs, and so is what is taken out again."""
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise ValueError(f"a member of peft_type {kind!r}")
    return {**config, "peft_type": "LORA"} if config else config


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("an object")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text")
    return value


def _count(value: Any, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"a number from 0 to {limit - 1}")
    return value
