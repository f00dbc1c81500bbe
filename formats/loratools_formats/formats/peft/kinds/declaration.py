"""How a kind of PEFT adapter is described: tensor names, configuration keys, settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loratools_formats.core.change import ModuleChange
from loratools_formats.core.config_values import Values
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError

Parts = Mapping[str, TensorRef]
Shape = tuple[int | None, int | None]


@dataclass(frozen=True)
class Module:
    """One module while its settings are resolved.

    Attributes:
        path: module path.
        parts: its tensors, own and shared, by part.
        alpha: the `alpha_pattern`'s number for it, else the configuration's.
        rank: the `rank_pattern`'s number for it, else the configuration's.
    """

    path: str
    parts: Parts
    alpha: float | None
    rank: int | None

    def side(self, part: str, axis: int) -> int:
        """Return the length of an axis of a part.

        Raises:
            AdapterError: it has no such axis.
        """
        shape = self.parts[part].shape
        if len(shape) <= axis:
            raise AdapterError(
                "tensor has too few axes", tensor=self.parts[part].key, got=list(shape)
            )
        return shape[axis]


@dataclass(frozen=True)
class PeftKind:
    """How PEFT stores one kind.

    Attributes:
        kind: name of the declaration.
        parts: part by the end of a tensor's name, after the module path; `{}` in both stands for a
            number.
        shape: (out, in), None for what the tensors do not tell.
        settings: numbers that ΔW depends on.
        used: configuration keys that `settings` uses.
        neutral: further keys that leave ΔW alone.
        shared: part by the name of a tensor that all modules have in common; `{}` in it stands for
            anything.
        kernel_of: parts whose axes after the second are a convolution's kernel.
        patterns: configuration keys that map names of modules to a rank or an alpha of their own.
        variant: returns the name of another declaration that a module is of; None for `kind`.
        settings_of_all: numbers that follow from how many modules there are.
        shared_by: returns the name under which a module's shared tensors are kept, at the end of
            their own names; None if all modules share the same.
        left_to_loader: names what the file leaves to be computed from the base; empty if nothing.
        layer: what its modules are, where the tensors' names do not say `embedding`.
        sizes: configuration key by the name of a length (`core.kind_shapes`) that it states; PEFT
            makes tensors of that length and refuses a file with others.
        sizes_vary_by: configuration keys that, when set, give modules other sizes.
        takes_embeddings: whether it takes embeddings as if they were linear layers of their stored
            shape, so that only the module's name tells.
    """

    kind: str
    parts: Mapping[str, str]
    shape: Callable[[Module], Shape] = lambda _module: (None, None)
    settings: Callable[[Values, Module], dict[str, Any]] = lambda _values, _module: {}
    used: frozenset[str] = frozenset()
    neutral: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    kernel_of: tuple[str, ...] = ()
    patterns: frozenset[str] = frozenset()
    variant: Callable[[Module], str | None] = lambda _module: None
    settings_of_all: Callable[[int], dict[str, Any]] = lambda _count: {}
    shared_by: Callable[[str], str] | None = None
    left_to_loader: Callable[[Mapping[str, ModuleChange]], str] = lambda _modules: ""
    layer: Literal["linear", "embedding"] = "linear"
    takes_embeddings: bool = False
    sizes: Mapping[str, str] = field(default_factory=dict)
    sizes_vary_by: frozenset[str] = frozenset()


NOT_A_CHANGE = {
    "PROMPT_TUNING": "it adds tokens to the input and changes no weight",
    "PREFIX_TUNING": "it adds keys and values to the cache and changes no weight",
    "P_TUNING": "it adds tokens to the input and changes no weight",
    "MULTITASK_PROMPT_TUNING": "it adds tokens to the input and changes no weight",
    "ADAPTION_PROMPT": "it adds gated attention to learned tokens and changes no weight",
    "CPT": "it adds tokens to the input and changes no weight",
    "CARTRIDGE": "it adds keys and values to the cache and changes no weight",
    "XLORA": "it mixes adapters per token",
    "POLY": "it mixes adapters per task",
    "LILY": "it is routed per input",
    "SHADOW": "it runs a second network beside the model",
    "LN_TUNING": "it replaces norm weights, and has no weight change to fold",
}
"""Kinds of PEFT that are recognised and have no change of weights that could be told, and why."""
