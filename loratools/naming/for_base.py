"""A single file's modules under the names of a base checkpoint, whichever naming that has.

The checkpoint's own list of modules undoes flattening; where it has the other naming of the
architecture, a table leads there, fusing and splitting modules as the checkpoint has them. Its own
names may lie below a prefix, as in the all-in-one files of Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from loratools.naming.lists import CHECKPOINT_PREFIX, embedded_map, looked_up
from loratools.naming.places import module_key
from loratools.naming.rename import NamingOptions, renamed
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.commands import command_on
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.single_file_keys import Naming
from loratools_formats.disk.errors import AdapterError, LoratoolsError

_WAYS: tuple[Naming, ...] = ("comfyui", "diffusers")
_ANY = "diffusion_model."


def named_for_base(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return the adapter with its modules named as the base's are; others than single files stay.

    Raises:
        AdapterError: no way leads to names that the base has for all of its modules.
        UnsupportedError: deltas that would have to be fused or split and cannot be.
    """
    if get_format(adapter.format).naming is None:
        return adapter
    modules = _Modules(base)
    direct = modules.found(_unflattened(adapter, modules))
    if direct is not None:
        return _with_names(adapter, direct)
    for way in _WAYS:
        try:
            other = renamed(adapter, way, NamingOptions()).adapter
        except LoratoolsError:
            continue
        names = modules.found({name: _path(name) for name in _names(other)})
        if names is not None:
            return _with_names(other, names)
    missing = [n for n, p in _unflattened(adapter, modules).items() if modules.full(p) is None]
    shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    raise AdapterError(
        f"{len(missing)} of the adapter's modules are not in the base, in any of its namings",
        path=adapter.source,
        got=shown,
        expected=f"such as {modules.example}",
        hint="If it has several components, take one: "
        + command_on(
            adapter, "convert", "--to peft --component NAME --allow-lossy", output="component"
        ),
    )


def names_in_base(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    """Return the base's name of each module of the adapter.

    Others keep their names, also where the base fuses or splits what the adapter does not.
    """
    names = {name: name for name in adapter.modules}
    if get_format(adapter.format).naming is None:
        return names
    modules = _Modules(base)
    found = {name: modules.full(path) for name, path in _unflattened(adapter, modules).items()}
    return names | {n: full for n, full in found.items() if full is not None and n in names}


class _Modules:
    """The modules of a checkpoint, by their paths without its prefix."""

    def __init__(self, base: Checkpoint) -> None:
        names = {key.rpartition(".")[0] for key in base.tensors if "." in key}
        below = {name for name in names if name.startswith(CHECKPOINT_PREFIX)}
        self._prefix = CHECKPOINT_PREFIX if below else ""
        self._paths = {name.removeprefix(self._prefix) for name in (below or names)}
        self.dotted = [f"{_ANY}{path}" for path in sorted(self._paths)]
        self.example = next(iter(sorted(names)), "none")

    def full(self, path: str) -> str | None:
        return self._prefix + path if path in self._paths else None

    def found(self, paths: Mapping[str, str]) -> dict[str, str] | None:
        """Return the base's name of every module, None if one has none."""
        names = {name: self.full(path) for name, path in paths.items()}
        known = {name: full for name, full in names.items() if full is not None}
        return known if len(known) == len(names) else None


def _names(adapter: Adapter) -> Iterable[str]:
    added = [addition.target.rpartition(".")[0] for addition in adapter.additions.values()]
    return dict.fromkeys([*adapter.modules, *added])


def _path(name: str) -> str:
    key = module_key(name)
    return name if key is None else key.path


def _unflattened(adapter: Adapter, modules: _Modules) -> dict[str, str]:
    names = list(_names(adapter))
    dotted = looked_up(names, modules.dotted, embedded_map(adapter))
    return {name: _path(dotted.get(name, name)) for name in names}


def _with_names(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    additions = {}
    for key, addition in adapter.additions.items():
        module, _, leaf = addition.target.rpartition(".")
        additions[key] = replace(addition, target=f"{names[module]}.{leaf}")
    return replace(
        adapter,
        modules={names[name]: delta for name, delta in adapter.modules.items()},
        additions=additions,
    )
