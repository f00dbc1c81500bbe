"""A single file's modules under the names of a base checkpoint, whichever naming that has.

The checkpoint's own list of modules undoes flattening; where it has the other naming of the
architecture, a table leads there, fusing and splitting modules as the checkpoint has them. Each
module goes to its component: the denoiser, or a text encoder of the same file. A difference of a
parameter that is no module's weight is added to that parameter.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from loratools.naming.base_components import DENOISER, roles_of
from loratools.naming.base_modules import BaseModules
from loratools.naming.named_modules import all_names
from loratools.naming.places import module_key
from loratools.naming.rename import NamingOptions, renamed
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter, Addition
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.dtypes import DTYPES, encode
from loratools_formats.core.single_file_keys import Naming
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, LoratoolsError, UnsupportedError, and_more

_WAYS: tuple[Naming, ...] = ("comfyui", "diffusers")
_WEIGHT = ".weight"


def named_for_base(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return the adapter with its modules named as the base's are; others than single files stay.

    Args:
        adapter: of any format.
        base: a checkpoint of one component, or of several.

    Raises:
        AdapterError: no way leads to names that the base has for all of its modules.
        UnsupportedError: deltas that would have to be fused or split and cannot be.
    """
    if get_format(adapter.format).naming is None:
        return adapter
    modules = BaseModules(base)
    found = modules.found(adapter)
    missing = [name for name in all_names(adapter) if name not in found]
    if not missing:
        return _with_names(adapter, found, base)
    others = {name for name in missing if modules.may_be_denoisers(name)}
    whole = others | {name for name in all_names(adapter) if modules.is_denoisers(name)}
    rest = _only(adapter, whole)
    kept_whole: UnsupportedError | None = None
    options = NamingOptions(base=modules.full_names()) if others else NamingOptions()
    for way in _WAYS if others else ():
        try:
            other = renamed(rest, way, options).adapter
        except UnsupportedError as error:
            kept_whole = error
            continue
        except LoratoolsError:
            continue
        names = modules.found(other)
        if len(names) == len(all_names(other)):
            named = _with_names(other, names, base)
            left = _only(adapter, set(all_names(adapter)) - whole)
            missing = [name for name in all_names(left) if name not in found]
            if not missing:
                return _together(adapter, named, _with_names(left, found, base))
            break
    if kept_whole is not None and len(missing) == len(others):
        kept_whole.path = kept_whole.path or str(adapter.source)
        raise kept_whole
    raise AdapterError(
        f"{len(missing)} of the adapter's modules are not in the base, in any of its namings",
        path=adapter.source,
        got=and_more(missing, 4),
        expected=f"such as {modules.example}",
        hint=_drop(missing, all_names(adapter)),
    )


def _drop(missing: list[str], names: list[str]) -> str | None:
    """Return the hint to leave out what the base has not; None if nothing would be left."""
    if len(missing) == len(names):
        return "Is this the model that the adapter was trained on?"
    prefixes = {key.prefix for name in missing if (key := module_key(name)) is not None}
    of_others = [name for name in names if name not in missing]
    pattern = "|".join(f"^{re.escape(prefix)}" for prefix in sorted(prefixes))
    if "" in prefixes or any(re.search(pattern, name) for name in of_others):
        pattern = "|".join(f"^{re.escape(name)}$" for name in missing)
    return f"To go without them, leave them out with `drop`: {shlex.quote(pattern)}"


def by_component(adapter: Adapter, roles: Collection[str]) -> dict[str, Adapter]:
    """Return a single file's changes of each component.

    Args:
        adapter: a single file.
        roles: the components that there are; `roles_of` names them.

    Raises:
        AdapterError: a module is of a component that there is not.
    """
    homes: dict[str, set[str]] = {}
    missing = []
    targets = [r.target.rpartition(".")[0] for r in adapter.replacements.values()]
    for name in dict.fromkeys([*all_names(adapter), *targets]):
        key = module_key(name)
        own = (DENOISER,) if key is None else roles_of(key)
        role = next((role for role in own if role in roles), None)
        if role is None:
            missing.append(name)
        else:
            homes.setdefault(role, set()).add(name)
    if missing:
        raise AdapterError(
            f"{len(missing)} of the adapter's modules belong to a component that the base "
            "does not have",
            path=adapter.source,
            got=and_more(missing, 4),
            expected=" or ".join("the denoiser" if r == DENOISER else r for r in roles),
            hint=_drop(missing, all_names(adapter)),
        )
    return {role: _only(adapter, names) for role, names in homes.items()}


def has_all(adapter: Adapter, base: Checkpoint) -> bool:
    """Return whether a base has every module of an adapter under the name that it has there."""
    return all(f"{name}{_WEIGHT}" in base.tensors for name in adapter.modules)


def _only(adapter: Adapter, names: set[str]) -> Adapter:
    """Return an adapter's changes of some modules, without what it carries."""
    return replace(
        adapter,
        modules={n: d for n, d in adapter.modules.items() if n in names},
        additions={k: a for k, a in adapter.additions.items() if _module(a.target) in names},
        replacements={k: r for k, r in adapter.replacements.items() if _module(r.target) in names},
        carried={},
    )


def _together(adapter: Adapter, one: Adapter, other: Adapter) -> Adapter:
    return replace(
        adapter,
        modules={**one.modules, **other.modules},
        additions={**one.additions, **other.additions},
    )


def _module(target: str) -> str:
    return target.rpartition(".")[0]


def _with_names(adapter: Adapter, names: Mapping[str, str], base: Checkpoint) -> Adapter:
    """Return an adapter with the base's names; differences of bare parameters are additions.

    Raises:
        AdapterError: two modules are one in the base.
    """
    _check_each_once(adapter, names)
    additions = {}
    for key, addition in adapter.additions.items():
        module, _, leaf = addition.target.rpartition(".")
        own = names[module]
        is_bare = leaf == "weight" and own in base.tensors
        additions[key] = replace(addition, target=own if is_bare else f"{own}.{leaf}")
    modules: dict[str, ModuleChange] = {}
    for name, change in adapter.modules.items():
        own = names[name]
        diff = _of_parameter(own, change) if own in base.tensors else None
        if diff is None:
            modules[own] = change
        else:
            additions[diff.key] = Addition(own, diff)
    return replace(adapter, modules=modules, additions=additions)


def _check_each_once(adapter: Adapter, names: Mapping[str, str]) -> None:
    """Raise `AdapterError` if two modules are one in the base: loaders take either of them."""
    first: dict[str, str] = {}
    twice = [name for name in adapter.modules if first.setdefault(names[name], name) != name]
    if twice:
        raise AdapterError(
            "two modules are one in the base",
            path=adapter.source,
            tensor=twice[0],
            got=first[names[twice[0]]],
            expected="one spelling of each module",
            hint=_drop(twice, all_names(adapter)),
        )


def _of_parameter(name: str, change: ModuleChange) -> TensorRef | None:
    """Return what a change adds to a parameter that is no weight; None if it is not known."""
    if change.kind == "full" and change.kind_delta is not None:
        return change.kind_delta.parts["diff"]
    part = change.factors
    if part is None or change.is_dora or len(part.a.shape) != 2:
        return None
    # OpenCLIP multiplies by its projection from the right.
    is_crossed = name.endswith(".text_projection")

    def read() -> bytes:
        a, b = part.a.load(np.float64), part.b.load(np.float64)
        product = part.scale * (b @ a)
        return encode(product.T if is_crossed else product, DTYPES["F64"]).tobytes()

    shape = part.shape[::-1] if is_crossed else part.shape
    return TensorRef(part.a.key, DTYPES["F64"], shape, read)
