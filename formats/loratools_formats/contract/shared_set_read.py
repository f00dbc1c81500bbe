"""Reading the set that a file of shared bases holds: each of its tensors is taken once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

_AGAIN = "Copy the file again from where it was made, or share the adapters anew"


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
        self._every: dict[int, list[int]] = {}

    def whole(self) -> SharedSet:
        configs = [_object(config) for config in self._found["configs"]]
        entries = [_object(entry) for entry in self._found["members"]]
        groups = [_count(entry["group"], len(entries)) for entry in entries]
        for place, group in enumerate(groups):
            self._every.setdefault(group, []).append(place)
        modules = {m.name: m for m in map(self._module, self._found["modules"])}
        for module in modules.values():
            for group, part in module.parts.items():
                if any(groups[place] != group for place in part.members):
                    raise self._fault(module.name, "cores of a member of another group")
        members = tuple(self._member(i, e, configs, modules) for i, e in enumerate(entries))
        names = {member.name.casefold() for member in members}
        if not members or not modules or len(names) < len(members):
            raise _broken(self._adapter, "it has no members or modules, or two of one name")
        if self._left:
            raise self._fault(next(iter(self._left)), "a tensor that its metadata do not mention")
        base = self._found.get("base_model")
        return SharedSet(self._diagonal, None if base is None else str(base), members, modules)

    def _module(self, entry: Mapping[str, Any]) -> SharedModule:
        name = _text(entry["name"])
        parts = {}
        for group, given in entry["members"].items():
            members = self._every[int(group)] if given is None else given
            places = tuple(_count(place, len(self._found["members"])) for place in members)
            if group != str(int(group)) or len(set(places)) < len(places) or not places:
                raise self._fault(name, "an impossible list of members")
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
        biases = {
            module: self._left.pop(key)
            for module in modules
            if (key := f"bias.{place}.{module}") in self._left
        }
        replacements = {
            key: Replacement(
                one["kind"],
                _text(one["target"]),
                self._take(f"own.{place}.{key}"),
                tuple(map(int, one["rows"])),
            )
            for key, one in entry["replacements"].items()
        }
        prefix = f"own.{place}."
        keys = [key for key in self._left if key.startswith(prefix)]
        carried = {key.removeprefix(prefix): self._left.pop(key) for key in keys}
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
    )


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
