"""Sets of adapters that share bases: one safetensors file, and what its tensors mean.

ΔW of member i in module m is U Σ Vᵀ, with the bases of i's group and a core of its own:

- `basis.G.u.MODULE`: U, (out, kᵤ); (E, out, kᵤ) of stacked experts
- `basis.G.v.MODULE`: Vᵀ, (kᵥ, in); (E, kᵥ, in)
- `cores.G.MODULE`: (n, kᵤ, kᵥ), or (n, k) of diagonal cores; (n, E, …) of stacked experts; one for
  each member of the group that has the module
- `bias.I.MODULE`: what member I adds to the module's bias
- `own.I.KEY`: another tensor of member I, under its key in a PEFT file

G and I count groups and members from 0. Who the members are, and their PEFT configurations, is in
the metadata entry `shared_set`, as JSON. As an `Adapter`, such a file has no modules and
carries all its tensors: it is a shelf of adapters, and operations on ΔW refuse it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratools_formats.contract.commands import command_on
from loratools_formats.core.adapter import Adapter, Replacement
from loratools_formats.core.change import Layer
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError, UnsupportedError

FORMAT = "shared-set"
METADATA_KEY = "shared_set"
VERSION = 1
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Part:
    """What one group has of one module.

    Attributes:
        u: (out, kᵤ), or (E, out, kᵤ).
        v: (kᵥ, in), or (E, kᵥ, in).
        cores: (n, kᵤ, kᵥ), (n, E, kᵤ, kᵥ), or diagonal ones without the last axis.
        members: whose cores they are, by place in the set.
    """

    u: TensorRef
    v: TensorRef
    cores: TensorRef
    members: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one matrix."""
        return self.u.shape[-2], self.v.shape[-1]

    @property
    def rank(self) -> int:
        """Columns of the larger basis."""
        return max(self.u.shape[-1], self.v.shape[-2])

    @property
    def experts(self) -> int:
        """Number of stacked matrices, 1 for an ordinary weight."""
        return self.u.shape[0] if len(self.u.shape) == 3 else 1

    def core(self, member: int) -> TensorRef:
        """Return the core of a member."""
        return self.cores.matrix(self.members.index(member))


@dataclass(frozen=True)
class SharedModule:
    """One module of a set.

    Attributes:
        name: module path.
        layer: what is adapted.
        parts: by group.
    """

    name: str
    layer: Layer
    parts: Mapping[int, Part]


@dataclass(frozen=True)
class Member:
    """One adapter of a set.

    Attributes:
        name: that it goes by; a possible file name.
        group: whose bases it has.
        config: its PEFT configuration.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of what is stored, as it was measured.
        biases: what it adds to a module's bias, by the module's path.
        replacements: tensors that replace base tensors, by their key in a PEFT file.
        carried: tensors that are carried along, by their key.
    """

    name: str
    group: int
    config: Mapping[str, Any]
    relative_error: float
    biases: Mapping[str, TensorRef] = field(default_factory=dict)
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    carried: Mapping[str, TensorRef] = field(default_factory=dict)


@dataclass(frozen=True)
class SharedSet:
    """Adapters of one base model in shared bases.

    Attributes:
        diagonal: whether cores are diagonal.
        base_model: its name, if recorded.
        members: in order.
        modules: by path, in order.
    """

    diagonal: bool
    base_model: str | None
    members: tuple[Member, ...]
    modules: Mapping[str, SharedModule]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return 1 + max((member.group for member in self.members), default=-1)


def is_shared_set(adapter: Adapter) -> bool:
    """Return whether an adapter is the shelf that a set's file is read as."""
    return adapter.format == FORMAT


def tensors_of(shared: SharedSet) -> Iterator[TensorRef]:
    """Yield every tensor under its name in the file."""
    for module in shared.modules.values():
        for group, part in module.parts.items():
            yield part.u.renamed(f"basis.{group}.u.{module.name}")
            yield part.v.renamed(f"basis.{group}.v.{module.name}")
            yield part.cores.renamed(f"cores.{group}.{module.name}")
    for place, member in enumerate(shared.members):
        for name, bias in member.biases.items():
            yield bias.renamed(f"bias.{place}.{name}")
        for key, entry in member.replacements.items():
            yield entry.tensor.renamed(f"own.{place}.{key}")
        for key, tensor in member.carried.items():
            yield tensor.renamed(f"own.{place}.{key}")


def metadata_of(shared: SharedSet) -> dict[str, str]:
    """Return the metadata entry that says what the tensors are."""
    configs = list(dict.fromkeys(_compact(member.config) for member in shared.members))
    every = {group: _of_group(shared.members, group) for group in range(shared.groups)}
    members = [
        {
            "name": member.name,
            "group": member.group,
            "config": configs.index(_compact(member.config)),
            # Of one width, so that the size of a file is known before its errors are.
            "relative_error": f"{member.relative_error:.3e}",
            "replacements": {
                key: {"kind": r.kind, "target": r.target, "rows": list(r.rows)}
                for key, r in member.replacements.items()
            },
        }
        for member in shared.members
    ]
    modules = [
        {
            "name": module.name,
            "layer": _of_layer(module.layer),
            "members": {
                str(group): None if part.members == every[group] else list(part.members)
                for group, part in module.parts.items()
            },
        }
        for module in shared.modules.values()
    ]
    whole = {
        "version": VERSION,
        "cores": "diagonal" if shared.diagonal else "full",
        "base_model": shared.base_model,
        "configs": [json.loads(config) for config in configs],
        "members": members,
        "modules": modules,
    }
    return {"format": FORMAT, METADATA_KEY: _compact(whole)}


def _of_group(members: Sequence[Member], group: int) -> tuple[int, ...]:
    return tuple(place for place, member in enumerate(members) if member.group == group)


def findings_of(shared: SharedSet, adapter: Adapter) -> tuple[Finding, ...]:
    """Return what a user should know of a set: what is in it, and how to get it out again."""
    names = [member.name for member in shared.members]
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    what = "is a shared set of " + (f"{len(names)} adapters" if len(names) != 1 else "one adapter")
    hint = "Take one out: " + command_on(adapter, "fleet unshare", names[0], output=names[0])
    ranks = sorted({p.rank for m in shared.modules.values() for p in m.parts.values()})
    spread = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    groups = f"{shared.groups} groups" if shared.groups > 1 else "one group"
    message = f"bases of rank {spread} in {groups} hold {listed}"
    return (
        Finding("shared-set", "error", None, what, hint),
        Finding("shared-members", "note", None, message),
    )


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


_AGAIN = "Copy the file again from where it was made, or share the adapters anew"


def possible_name(name: str) -> str:
    """Return a member's name, which can be that of a file in any folder.

    Raises:
        ValueError: it cannot.
    """
    parts = name.replace("\\", "/").split("/")
    sound = len(parts) == 1 and name not in ("", ".", "..") and name.isprintable()
    if not sound or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"the name {name!r}, which no file can have")
    return name


def _broken(adapter: Adapter, problem: str) -> AdapterError:
    return AdapterError(f"not a sound shared set: {problem}", path=adapter.source, hint=_AGAIN)


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _of_layer(layer: Layer) -> dict[str, Any]:
    return {
        "kind": layer.kind,
        "kernel": list(layer.kernel),
        "parameters": list(layer.parameters),
        "transposed_if_square": layer.transposed_if_square,
        "swapped": layer.swapped,
    }


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
