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
from loratools_formats.disk.errors import and_more

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
    what = "is a shared set of " + (f"{len(names)} adapters" if len(names) != 1 else "one adapter")
    hint = "Take one out: " + command_on(adapter, "fleet unshare", names[0], output=names[0])
    ranks = sorted({p.rank for m in shared.modules.values() for p in m.parts.values()})
    spread = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    groups = f"{shared.groups} groups" if shared.groups > 1 else "one group"
    message = f"bases of rank {spread} in {groups} hold {and_more(names, 5)}"
    return (
        Finding("shared-set", "error", None, what, hint),
        Finding("shared-members", "note", None, message),
    )


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


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _of_layer(layer: Layer) -> dict[str, Any]:
    return {
        "kind": layer.kind,
        "kernel": list(layer.kernel),
        "parameters": list(layer.parameters),
        "transposed_if_square": layer.transposed_if_square,
        "swapped": layer.swapped,
        **({"tied": True} if layer.tied else {}),
    }
