"""What a PEFT file leaves to the code that loads it, computed again from its seeds and the base.

Two kinds leave tensors out. Uni-LoRA saves its numbers alone: which layers there are, and which
number goes where, follow from the model. FRoD saves its trained numbers: the basis that layers of
one role share follows from their weights. Both are repeated step by step, as peft 0.21.2 does it;
what depends on the order in which a model's code declares its layers must be given.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loratools.base.dequantised import dequantised
from loratools.base.placement.names import Names
from loratools.base.weights import BaseModule, find_base_module
from loratools.work.regexes import check_regex, is_found
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import KindDelta, Layer, ModuleChange
from loratools_formats.core.config_values import Values
from loratools_formats.core.dtypes import Array
from loratools_formats.core.peft_facts import frod_category, square_orientation
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk.errors import (
    AdapterError,
    MissingDependencyError,
    OptionError,
    UnsupportedError,
)

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Regenerated:
    """An adapter made complete.

    Attributes:
        adapter: with all that it needs.
        unused: settings that were given for something else.
        caution: what the user should know about it; empty for nothing.
    """

    adapter: Adapter
    unused: Mapping[str, str]
    caution: str = ""


def regenerated(adapter: Adapter, base: Checkpoint | None, given: Mapping[str, str]) -> Regenerated:
    """Return an adapter with what its file leaves to the loader; itself if it leaves nothing.

    Args:
        adapter: of any kind.
        base: the base model.
        given: settings by name; `order` is Uni-LoRA's.

    Raises:
        UnsupportedError: it depends on the base, and there is none, or on an order not given.
        MissingDependencyError: it takes torch, which is not installed.
        AdapterError: the base does not fit.
    """
    missing = get_format(adapter.format).left_to_loader(adapter)
    if not missing:
        return Regenerated(adapter, given)
    if base is None:
        raise UnsupportedError(
            f"the file does not hold {missing}, which PEFT computes from the base model",
            path=adapter.source,
            hint="Pass it as `base`",
        )
    return _REGENERATED[str(adapter.config["peft_type"])](adapter, base, given)


def _unilora(adapter: Adapter, base: Checkpoint, given: Mapping[str, str]) -> Regenerated:
    checkpoint = dequantised(base).checkpoint
    names = Names(checkpoint)
    order = given.get("order")
    paths = _in_order(adapter, checkpoint, None if order is None else order.split(","))
    values, bank = Values(adapter.config), next(iter(adapter.shared.values()), None)
    if bank is None:
        raise AdapterError("the file lacks Uni-LoRA's numbers", path=adapter.source)
    rank, length = values.count("r"), values.count("theta_d_length")
    if bank.shape != (length,):
        raise AdapterError(
            "the file holds a different number of values than its config says",
            tensor=bank.key,
            got=list(bank.shape),
            expected=f"{length}",
        )
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    modules: dict[str, KindDelta] = {}
    places: dict[str, BaseModule] = {}
    for path in paths:
        layer = Layer("linear", transposed_if_square=square_orientation(transposed, path))
        modules[path] = KindDelta("unilora", {}, {}, layer, shared={"bank": bank})
        places[path] = find_base_module(names, path, modules[path])
    shapes = [
        shape
        for path in paths
        for shape in ((rank, places[path].shape[1]), (places[path].shape[0], rank))
    ]
    indices = _dealt(sum(math.prod(shape) for shape in shapes), length, values.whole("proj_seed"))
    counts = np.bincount(indices, minlength=length).astype(np.float32)
    scales = 1.0 / np.sqrt(np.maximum(counts, 1.0))
    start = 0
    parts: dict[str, dict[str, TensorRef]] = {path: {} for path in paths}
    for path, side, shape in zip(
        (path for path in paths for _ in "ab"), "ab" * len(paths), shapes, strict=True
    ):
        chosen = indices[start : start + math.prod(shape)].reshape(shape)
        start += chosen.size
        code = places[path].pieces[0].stored.dtype.code
        parts[path] |= {
            f"indices_{side}": in_memory(f"{path}.indices_{side}", chosen),
            f"scales_{side}": in_memory(f"{path}.scales_{side}", scales[chosen], code),
        }
    complete = {
        path: ModuleChange(replace(modules[path], parts=parts[path], shape=places[path].shape))
        for path in sorted(paths)
    }
    unused = {key: value for key, value in given.items() if key != "order"}
    return Regenerated(replace(adapter, modules=complete), unused)


def _dealt(total: int, length: int, seed: int) -> Array:
    """Return which number each place of all factors has: each as often as any other, shuffled."""
    stream = np.random.default_rng(seed)
    dealt = np.repeat(np.arange(length), total // length)
    if total % length:
        extra = stream.choice(length, size=total % length, replace=False)
        dealt = np.concatenate([dealt, extra])
    stream.shuffle(dealt)
    return dealt


def _in_order(adapter: Adapter, base: Checkpoint, order: list[str] | None) -> list[str]:
    """Return the layers of the base that the configuration names, as the model declares them."""
    is_target = _matcher(adapter)
    paths = [
        key.removesuffix(_WEIGHT)
        for key, tensor in base.tensors.items()
        if key.endswith(_WEIGHT) and len(tensor.shape) == 2 and is_target(key.removesuffix(_WEIGHT))
    ]
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    if not paths:
        raise AdapterError(
            "the base has none of the layers that the adapter's configuration names",
            path=base.path,
            expected=str(adapter.config.get("target_modules")),
        )
    if order is None and len(leaves) > 1:
        raise UnsupportedError(
            "where the numbers go depends on the order in which the model's code declares the "
            "adapted layers, which no file holds",
            path=adapter.source,
            got=", ".join(leaves),
            hint="Find the order in the model's class, and give it with `set=order=NAME,NAME,...`",
        )
    order = leaves if order is None else order
    if sorted(order) != leaves:
        raise OptionError(
            "not an order of the adapted layers", got=",".join(order), expected=", ".join(leaves)
        )
    blocks = {path: re.match(r"(.*\.\d+)\.", path) for path in paths}
    prefixes = {path: "" if found is None else found[1] for path, found in blocks.items()}
    if len({re.sub(r"\d+", "", prefix) for prefix in prefixes.values()}) > 1:
        raise UnsupportedError(
            "the order of layers in different parts of the model is not known",
            path=adapter.source,
            got=", ".join(sorted(set(prefixes.values()))[:4]),
        )

    def rank(path: str) -> tuple[list[int], int]:
        numbers = [int(number) for number in re.findall(r"\d+", prefixes[path])]
        return numbers, order.index(path.rpartition(".")[2])

    result = sorted(paths, key=rank)
    for one, other in itertools.pairwise(result):
        if rank(one) == rank(other):
            raise UnsupportedError(
                "the order of two layers of one block is not known",
                path=adapter.source,
                got=f"{one}, {other}",
            )
    return result


def _matcher(adapter: Adapter) -> Callable[[str], bool]:
    """Return whether PEFT adapts a layer of that name (`check_target_module_exists`)."""
    config = adapter.config
    for key in ("layers_to_transform", "layers_pattern"):
        if config.get(key) not in (None, [], ""):
            raise UnsupportedError(
                f"which layers {key} leaves out is not known here", path=adapter.source
            )
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    return lambda path: _listed(targets, path) and not _listed(excluded, path)


def _listed(entries: Any, path: str) -> bool:
    if isinstance(entries, str):
        check_regex(entries)
        return is_found(rf"\A(?:{entries})\Z", path)
    return any(path == entry or path.endswith(f".{entry}") for entry in entries or ())


def _frod(adapter: Adapter, base: Checkpoint, given: Mapping[str, str]) -> Regenerated:
    names, values = Names(dequantised(base).checkpoint), Values(adapter.config)
    by_category: dict[str, list[str]] = {}
    for path in adapter.modules:
        by_category.setdefault(frod_category(path), []).append(path)
    torch = _torch()
    generator = torch.Generator("cpu").manual_seed(values.whole("projection_prng_key"))
    shared: dict[str, dict[str, TensorRef]] = {}
    for category, paths in sorted(by_category.items()):
        places = [_place(names, path, adapter) for path in _by_layer(paths)]
        matrices = [
            torch.from_numpy(place.weight().rows(0, place.shape[0]).astype(np.float32))
            for place in places
        ]
        basis = _basis(torch, matrices, values.number("regularization_alpha"))
        side = len(basis)
        possible = side * side - side
        count = min(int(side * side * values.number("sparse_rate")), possible)
        if values.number("sparse_rate") > 0 and possible:
            count = max(1, count)
        drawn = torch.randperm(possible, generator=generator)[:count] if count else torch.zeros(0)
        row, column = np.divmod(drawn.numpy().astype(np.int64), side - 1)
        code = places[0].pieces[0].stored.dtype.code
        shared[category] = {
            "v": in_memory(f"{category}.V", basis.numpy(), code),
            "places": in_memory(f"{category}.places", np.stack([row, column + (column >= row)])),
        }
    modules = {
        path: change.with_direction(
            replace(delta, shared={**delta.shared, **shared[frod_category(path)]})
        )
        for path, change in adapter.modules.items()
        if (delta := change.kind_delta) is not None
    }
    caution = (
        "the file does not hold FRoD's basis; it is computed from the base in its stored type on "
        "this machine's CPU, as PEFT would, and the signs of its vectors may depend on the machine"
    )
    return Regenerated(replace(adapter, modules=modules), given, caution)


def _place(names: Names, path: str, adapter: Adapter) -> BaseModule:
    return find_base_module(names, path, adapter.modules[path].direction)


def _by_layer(paths: list[str]) -> list[str]:
    """Return the layers of one role by the number of their block.

    Raises:
        UnsupportedError: the order does not show.
    """
    if len(paths) == 1:
        return paths
    numbers: dict[int, str] = {}
    for path in paths:
        found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", path) or re.search(
            r"(?:^|\.)(\d+)(?:\.|$)", path
        )
        if found is None or int(found[1]) in numbers:
            raise UnsupportedError(
                "FRoD's basis depends on the order of layers, which their names do not show",
                tensor=path,
            )
        numbers[int(found[1])] = path
    return [path for _, path in sorted(numbers.items())]


def _basis(torch: Any, matrices: list[Any], ridge: float) -> Any:
    """Return V (in, in) of the layers of one role, with torch as PEFT computes it."""
    stacked = torch.cat(matrices, dim=0)
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True)[2].T
    q, r = torch.linalg.qr(stacked)
    side = r.shape[1]
    total = torch.zeros((side, side), dtype=r.dtype)
    for part in q.split([len(matrix) for matrix in matrices]):
        total += torch.linalg.inv(part.T @ part + ridge * torch.eye(side, dtype=r.dtype))
    _, vectors = torch.linalg.eigh(total / len(matrices))
    return r.T @ vectors


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "FRoD's basis consists of vectors as torch computes them", hint="pip install torch"
        ) from error
    return torch


_REGENERATED: Mapping[str, Callable[[Adapter, Checkpoint, Mapping[str, str]], Regenerated]] = {
    "UNILORA": _unilora,
    "FROD": _frod,
}
