"""The LoRA layers of a live PEFT model: their factors as an adapter, and new factors in place.

Each layer of one adapter is seen as the file that PEFT would save sees it, so that the operations
on files serve here too. What PEFT keeps of a layer besides its tensors (rank, alpha, scaling, the
sizes of its inner layers, the patterns of the configuration) follows the new factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper, _ConvNd

from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.peft_patterns import settings_of
from loratools_formats.core.tensors import TensorRef, of_torch
from loratools_formats.disk.errors import OptionError, UnsupportedError

_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base weights, too
_VARIANTS = ("Dora", "ALora")  # whose change is scale · b @ a, or has it as its direction
_SPREAD = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
Settings = Mapping[str, tuple[int, float]]
"""(rank, alpha) by module path."""


@dataclass(frozen=True)
class LiveLayer:
    """One layer of an adapter.

    Attributes:
        name: module path, as in a saved adapter.
        module: PEFT's layer.
        adapter: name of the adapter.
    """

    name: str
    module: Any
    adapter: str

    def place(self, side: str) -> tuple[Any, str]:
        """Return what holds a factor, `A` or `B`, as an attribute, and the attribute's name."""
        if isinstance(self.module, Embedding):  # bare parameters
            return getattr(self.module, f"lora_embedding_{side}"), self.adapter
        return getattr(self.module, f"lora_{side}")[self.adapter], "weight"

    @property
    def a(self) -> torch.nn.Parameter:
        """(r, in), or (r, in, *kernel)."""
        found: torch.nn.Parameter = getattr(*self.place("A"))
        return found

    @property
    def b(self) -> torch.nn.Parameter:
        """(out, r), or (out, r, 1, …)."""
        found: torch.nn.Parameter = getattr(*self.place("B"))
        return found

    @property
    def bias(self) -> torch.nn.Parameter | None:
        """(out,), of the second factor; None if it has none."""
        return getattr(self.place("B")[0], "bias", None)

    @property
    def rank(self) -> int:
        """Rank r."""
        return len(self.a)

    @property
    def alpha(self) -> float:
        """The number that scaling comes from."""
        found: float = self.module.lora_alpha[self.adapter]
        return found

    @property
    def is_rslora(self) -> bool:
        """Whether scaling is alpha/√r, and not alpha/r."""
        return bool(self.module.use_rslora.get(self.adapter, False))

    def scale(self, alpha: float, rank: int) -> float:
        """Return the scale that PEFT makes of an alpha and a rank."""
        return alpha / math.sqrt(rank) if self.is_rslora else alpha / rank

    def change(self) -> ModuleChange:
        """Return its change; tensors are read from the model when they are asked for."""
        kernel = tuple(self.a.shape[2:])
        embeds = isinstance(self.module, Embedding)
        factors = LowRank(
            of_torch(f"{self.name}.a", self.a).reshaped((self.rank, self.a[0].numel())),
            of_torch(f"{self.name}.b", self.b).reshaped((len(self.b), self.rank)),
            self.scale(self.alpha, self.rank),
            Layer("embedding" if embeds else "conv" if kernel else "linear", kernel),
            self._ref("bias", self.bias),
            alpha=self.alpha,
        )
        magnitudes = getattr(self.module, "lora_magnitude_vector", {})
        of_dora = magnitudes[self.adapter].weight if self.adapter in magnitudes else None
        return ModuleChange(factors, self._ref("magnitude", of_dora))

    def _ref(self, part: str, tensor: torch.Tensor | None) -> TensorRef | None:
        return None if tensor is None else of_torch(f"{self.name}.{part}", tensor)

    def put(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Give it new factors, which become parameters on the device and of the type of the old.

        Args:
            a: (r, in · kernel).
            b: (out, r).
        """
        shapes = (len(a), *self.a.shape[1:]), (*b.shape, *self.b.shape[2:])
        for side, old, new, shape in zip("AB", (self.a, self.b), (a, b), shapes, strict=True):
            made = new.reshape(shape).to(old.device, old.dtype)
            setattr(*self.place(side), torch.nn.Parameter(made, old.requires_grad))

    def settle(self, rank: int, alpha: float) -> None:
        """Let what PEFT keeps of the layer say its rank and alpha."""
        self.module.r[self.adapter], self.module.lora_alpha[self.adapter] = rank, alpha
        self.module.scaling[self.adapter] = self.scale(alpha, rank)
        if not isinstance(self.module, Embedding):
            words = "channels" if isinstance(self.module, _ConvNd) else "features"
            setattr(self.place("A")[0], f"out_{words}", rank)
            setattr(self.place("B")[0], f"in_{words}", rank)


def unwrapped(model: Any) -> PeftModel:
    """Return the PEFT model inside what training wraps around it.

    Raises:
        OptionError: there is none.
        UnsupportedError: it is spread over processes.
    """
    while not isinstance(model, PeftModel):
        name = type(model).__name__
        if name in _SPREAD:
            raise UnsupportedError(
                "parameters that are spread over processes cannot be replaced",
                got=name,
                hint="Train in one process, or squeeze the saved adapter and go on from that",
            )
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if inner is None:
            raise OptionError("not a PEFT model", got=name, expected="what get_peft_model returns")
        model = inner
    return model


def live_layers(model: PeftModel, adapter: str | None = None) -> list[LiveLayer]:
    """Return the layers of an adapter, in the model's order.

    Args:
        model: the model.
        adapter: its name; by default the active one.

    Raises:
        OptionError: there is no such adapter, or several are active.
        UnsupportedError: it is no LoRA, or one of its layers cannot get other factors in place.
    """
    names = [adapter] if adapter is not None else model.active_adapters
    if len(names) != 1 or names[0] not in model.peft_config:
        problem = "no such adapter" if adapter is not None else "not one active adapter"
        found = ", ".join(names) or None
        raise OptionError(problem, got=found, expected=f"one of {', '.join(model.peft_config)}")
    config: Any = model.peft_config[names[0]]
    start = getattr(config, "init_lora_weights", True)
    if config.peft_type != "LORA" or start not in _STARTS:
        began = "" if start is True else f", init_lora_weights={start}"
        raise UnsupportedError(
            "only the factors of a LoRA on an unchanged base can be squeezed in training",
            got=f"{config.peft_type}{began}",
            hint="Squeeze the saved adapter: "
            "loratools squeeze ADAPTER --initial FIRST --rank 8 -o plain",
        )
    base: Any = model.base_model.model
    layers = [
        LiveLayer(name, module, names[0])
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer)
        and (names[0] in module.lora_A or names[0] in module.lora_embedding_A)
    ]
    if not layers:
        raise OptionError("the adapter has no layer", got=names[0])
    seen: dict[int, str] = {}
    for each in layers:
        reason = _obstacle(each)
        for factor in () if reason else (each.a, each.b):
            twin = seen.setdefault(factor.untyped_storage().data_ptr(), each.name)
            reason = reason if twin == each.name else f"shares a factor with {twin}"
        if reason:
            raise UnsupportedError(
                f"the layer {reason}, so its factors cannot be replaced", tensor=each.name
            )
    return layers


def _obstacle(layer: LiveLayer) -> str | None:
    """Return why a layer cannot get other factors; None if it can."""
    module, adapter = layer.module, layer.adapter
    if isinstance(module, ParamWrapper):
        return "adapts a parameter"
    variant = getattr(module, "lora_variant", {}).get(adapter)
    name = getattr(variant, "__name__", type(variant).__name__).lstrip("_")
    if variant is not None and not name.startswith(_VARIANTS):
        return f"is of the variant {name}"
    if adapter in module.merged_adapters:
        return "is merged"
    held = next(filter(None, map(_obstacle_of, (layer.a, layer.b))), None)
    if held is not None:
        return held
    if layer.b.shape[1] != layer.rank:
        return "is a convolution in groups"
    if not layer.alpha:
        return "has alpha 0, with which it changes nothing"
    if module.scaling[adapter] != layer.scale(layer.alpha, layer.rank):
        return f"has scaling {module.scaling[adapter]:g}, which is not that of its alpha"
    return None


def _obstacle_of(factor: torch.Tensor) -> str | None:
    if type(factor) is not torch.nn.Parameter or factor.dtype not in _TYPES:
        return f"has factors of {factor.dtype}, {type(factor).__name__}"
    if factor.ndim < 2 or factor.is_meta:
        return "has factors that are spread over processes or devices"
    hooks = factor._backward_hooks, getattr(factor, "_post_accumulate_grad_hooks", None)  # noqa: SLF001
    return "has hooks on its factors" if any(hooks) else None


def settle_all(model: PeftModel, layers: list[LiveLayer], settings: Settings) -> None:
    """Let an adapter's layers and its configuration say these ranks and alphas.

    Args:
        model: the model.
        layers: all of an adapter's.
        settings: for those that get others.
    """
    all_of_them = {each.name: (each.rank, each.alpha) for each in layers} | dict(settings)
    for each in layers:
        each.settle(*all_of_them[each.name])
    config: Any = model.peft_config[layers[0].adapter]
    for key, value in settings_of(all_of_them).items():
        setattr(config, key, value)
    if isinstance(config.init_lora_weights, str):  # loading would begin so again, at odd ranks
        config.init_lora_weights = True


def reshape(model: PeftModel, layers: list[LiveLayer], settings: Settings) -> None:
    """Give layers other ranks and alphas; factors of other ranks are zeros that wait to be loaded.

    Args:
        model: the model.
        layers: all of an adapter's.
        settings: for those that get others.
    """
    for each in layers:
        a, b = each.a.detach(), each.b.detach()
        rank = settings.get(each.name, (each.rank,))[0]
        if rank != each.rank:
            each.put(a.new_zeros(rank, a[0].numel()), b.new_zeros(len(b), rank))
    settle_all(model, layers, settings)
