"""The modules of a base checkpoint, found by the names that single files give them."""

from __future__ import annotations

from collections.abc import Iterable

from loratools.naming.bare_base import told_component
from loratools.naming.base_components import (
    DENOISER,
    BaseComponent,
    components_of,
    roles_of,
)
from loratools.naming.lists import embedded_map
from loratools.naming.named_modules import all_names
from loratools.naming.places import module_key
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter

_WEIGHT = ".weight"


class BaseModules:
    """The modules of a checkpoint, by component.

    Args:
        base: the checkpoint.

    Attributes:
        example: one of its modules.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._components = components_of(base)
        self._tensors = base.tensors
        names = sorted({key.rpartition(".")[0] or key for key in base.tensors})
        self.example = names[0] if names else "none"

    def found(self, adapter: Adapter) -> dict[str, str]:
        """Return the base's name of every module that it has."""
        dotted = embedded_map(adapter)
        full = {n: self.full(n, dotted.get(n, n)) for n in all_names(adapter)}
        return {name: own for name, own in full.items() if own is not None}

    def full(self, name: str, spelled: str | None = None) -> str | None:
        """Return the base's name of a module, by its name or the dotted one of a flattened one."""
        spelled = spelled or name
        key = module_key(spelled)
        for component in self._of(spelled):
            path, flat = (name, False) if key is None else (key.path, key.flat)
            found = component.full(path, flat=flat)
            if found is not None:
                return found
        is_whole = spelled in self._tensors or spelled + _WEIGHT in self._tensors
        return spelled if is_whole else None

    def _of(self, name: str) -> Iterable[BaseComponent]:
        """Return the components that a module may be of, the likeliest first."""
        key = module_key(name)
        roles = (DENOISER,) if key is None else roles_of(key)
        bare = [each for each in self._components if not each.role]
        return [*(c for role in roles for c in self._components if c.role == role), *bare]

    def is_denoisers(self, name: str) -> bool:
        """Return whether a module is of no text encoder by its name."""
        key = module_key(name)
        return key is None or not roles_of(key)[0].startswith("text_encoder")

    def may_be_denoisers(self, name: str) -> bool:
        """Return whether a table may lead from a module to one of the base's."""
        return self.is_denoisers(name) and bool(list(self._of(name)))

    def full_names(self) -> tuple[str, ...]:
        """Return the denoiser's modules, with the component before them that tables expect.

        Empty if nothing tells which component a bare checkpoint is.
        """
        names: list[str] = []
        for component in self._components:
            keys = [k for k in self._tensors if k.startswith(component.prefix)]
            paths = {k.removeprefix(component.prefix).rpartition(".")[0] for k in keys} - {""}
            if component.prefix and component.role == DENOISER:
                names += (f"{component.full_prefix}{path}" for path in paths)
            elif not component.prefix:
                told = told_component(paths, self._base.config)
                names += (f"{told}.{path}" for path in paths if told is not None)
        return tuple(sorted(names))
