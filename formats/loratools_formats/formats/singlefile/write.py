"""Writing single files: each tensor under the key that it has, scales by one carrier.

A tensor's key stays as it was read as long as it still belongs to the module that it is part of;
`spelling` gives new ones to modules that were renamed or come from another format. Where a module's
alpha still gives its scale, its tensor is copied bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from loratools_formats.containers.safetensors_write import safetensors_nbytes, write_safetensors
from loratools_formats.contract.format import Loss
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.single_file_keys import (
    NAMINGS,
    Naming,
    Role,
    is_first_factor,
    parse,
)
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError
from loratools_formats.formats.singlefile.metadata import (
    updated,
    with_digests,
    with_room_for_digests,
)
from loratools_formats.formats.singlefile.scale import (
    METADATA_KEY,
    alpha_tensor,
    has_mixed_ranks,
    packed,
    packed_configs,
    states_scale,
    switches,
)
from loratools_formats.formats.singlefile.spelling import (
    Spelling,
    naming_of,
    respelled,
    spelling_losses,
)


def losses(adapter: Adapter, target: Naming) -> list[Loss]:
    """Return what a single file of a naming could not hold of an adapter."""
    return [] if _is_own(adapter, target) else spelling_losses(adapter, target)


def write(adapter: Adapter, path: Path, target: Naming) -> None:
    """Write the file.

    Raises:
        UnsupportedError: the naming, or no single file, can hold the adapter.
    """
    tensors, metadata = _contents(adapter, target)
    write_safetensors(path, tensors, with_digests(metadata, tensors))


def weights_nbytes(adapter: Adapter, target: Naming) -> int:
    """Return the size of the file that `write` would make.

    Raises:
        UnsupportedError: it could not be written.
    """
    tensors, metadata = _contents(adapter, target)
    return safetensors_nbytes(tensors, metadata)


def _is_own(adapter: Adapter, target: Naming) -> bool:
    return adapter.format == target or (target == "safetensors" and adapter.format in NAMINGS)


def _contents(adapter: Adapter, target: Naming) -> tuple[list[TensorRef], dict[str, str]]:
    if not _is_own(adapter, target):
        adapter = respelled(adapter, target)
    metadata = with_room_for_digests(updated(adapter))
    if target == "diffusers" and METADATA_KEY not in metadata and has_mixed_ranks(adapter.modules):
        metadata[METADATA_KEY] = packed(adapter.modules, {})
    in_metadata = METADATA_KEY in metadata
    if in_metadata:
        metadata[METADATA_KEY] = _true_metadata(adapter, metadata)
    tensors = list(_tensors(adapter, in_metadata=in_metadata))
    return tensors, metadata


def _true_metadata(adapter: Adapter, metadata: dict[str, str]) -> str:
    """Return diffusers' metadata, unchanged if it is still true of each module."""
    configs = packed_configs(metadata, adapter.source)
    parts = {name: delta.factors for name, delta in adapter.modules.items()}
    wanted = {name: (p.rank, p.scale) for name, p in parts.items() if p is not None}
    stated = {} if configs is None else configs.settings(sorted(wanted))
    found = {name: (setting.rank, setting.scale) for name, setting in stated.items()}
    # Modules of a component without a configuration have scale 1 and any rank.
    same = all(found.get(n, (rank, 1.0)) == (rank, scale) for n, (rank, scale) in wanted.items())
    kinds = switches({name: adapter.modules[name] for name in found})
    if same and configs is not None and configs.switches(found) == kinds:
        return metadata[METADATA_KEY]
    return packed(adapter.modules, metadata)


def _tensors(adapter: Adapter, *, in_metadata: bool) -> Iterator[TensorRef]:
    for name, delta in adapter.modules.items():
        part = delta.factors
        if part is None:
            yield from delta.tensors()
            continue
        keys = _Keys(name, part)
        yield from _stored_factors(part, keys)
        if delta.magnitude is not None:
            yield _stored_magnitude(delta.magnitude, delta, keys)
        if not in_metadata:
            yield from _alpha(part, keys)
    yield from adapter.shared.values()
    for key, addition in adapter.additions.items():
        yield addition.tensor.renamed(key)
    for key, replacement in adapter.replacements.items():
        yield replacement.tensor.renamed(key)
    for key, tensor in adapter.carried.items():
        yield tensor.renamed(key)


class _Keys:
    """The keys of a module's tensors: those that they have, or such as the module's others have.

    Attributes:
        wants_alpha: whether the keys are new ones of kohya's, some of whose readers want an alpha.
    """

    def __init__(self, name: str, part: LowRank) -> None:
        self._name = name
        new = not is_first_factor(part.a.key, name)
        self.wants_alpha = new and naming_of(name) == "kohya"
        self._spelling = Spelling.of(name if new else part.a.key)

    def of(self, role: Role, tensor: TensorRef) -> str:
        parsed = parse(tensor.key, control=True)
        if parsed is not None and (parsed.module, parsed.role) == (self._name, role):
            return tensor.key
        return self._spelling.key(role)

    def new(self, role: Role) -> str:
        return self._spelling.key(role)


def _stored_factors(part: LowRank, keys: _Keys) -> Iterator[TensorRef]:
    a, b = part.a, part.b
    out, in_ = part.shape
    layer = part.layer
    if layer.kind == "experts":
        raise UnsupportedError(
            "stacked experts have no place in a single file", tensor=a.key, got=list(a.shape)
        )
    if layer.kind == "conv":
        a = a.reshaped((part.rank, in_ // math.prod(layer.kernel), *layer.kernel))
        b = b.reshaped((out, part.rank, *(1 for _ in layer.kernel)))
    embedding = layer.kind == "embedding"
    yield a.renamed(keys.of("embedding_a" if embedding else "a", a))
    yield b.renamed(keys.of("embedding_b" if embedding else "b", b))
    if part.bias is not None:
        yield part.bias.renamed(keys.of("bias", part.bias))


def _stored_magnitude(magnitude: TensorRef, delta: ModuleChange, keys: _Keys) -> TensorRef:
    key = keys.of("magnitude", magnitude)
    if key != magnitude.key and key.endswith(".dora_scale") and delta.axis == "output":
        ones = (1,) * (1 + len(delta.layer.kernel))
        magnitude = magnitude.reshaped((magnitude.numel, *ones))
    return magnitude.renamed(key)


def _alpha(part: LowRank, keys: _Keys) -> Iterator[TensorRef]:
    stored = part.alpha_tensor
    if stored is not None:
        if states_scale(stored, part):
            yield stored.renamed(keys.of("alpha", stored))
            return
        yield alpha_tensor(keys.of("alpha", stored), part)
    elif part.scale != 1.0 or keys.wants_alpha:
        yield alpha_tensor(keys.new("alpha"), part)
