"""The LoRA layers of a live PEFT model: their factors as an adapter, and new factors in place.

Each layer of one adapter is seen as the file that PEFT would save sees it, so that the operations
on files serve here too. What PEFT keeps of a layer besides its tensors (rank, alpha, scaling, the
sizes of its inner layers, the patterns of the configuration) follows the new factors.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper, _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel

from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.factors import scale_of
from loratools_formats.core.peft_patterns import settings_of
from loratools_formats.core.tensors import of_torch
from loratools_formats.disk.errors import OptionError, UnsupportedError

AlphaPolicy = Literal["keep-scale", "sqrt"]
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base weights, too
_VARIANTS = ("Dora", "ALora")  # whose change is scale · b @ a, or has it as its direction


@dataclass(frozen=True)
class LiveLayer:
    """One layer of an adapter, as it is when it is looked at.

    Attributes:
        name: module path, as in a saved adapter.
        module: PEFT's layer.
        adapter: name of the adapter.
        a: (r, in) or (r, in, *kernel).
        b: (out, r) or (out, r, 1, …).
        bias: (out,), of the second factor; None if it has none.
        alpha: the number that scaling comes from.
    """

    name: str
    module: Any
    adapter: str
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    alpha: float

    @classmethod
    def of(cls, name: str, module: Any, adapter: str) -> LiveLayer:
        """Return a layer as it is now."""
        a, b = (getattr(*_place(module, adapter, side)) for side in "AB")
        bias = getattr(_place(module, adapter, "B")[0], "bias", None)
        return cls(name, module, adapter, a, b, bias, module.lora_alpha[adapter])

    @property
    def rank(self) -> int:
        """Rank r of the factors."""
        return len(self.a)

    def scale(self, rank: int, alpha: float) -> float:
        """Return the scale that PEFT makes of a rank and an alpha."""
        return scale_of(alpha, rank, is_rooted=bool(self.module.use_rslora.get(self.adapter)))

    def alpha_at(self, rank: int, policy: AlphaPolicy) -> float:
        """Return the alpha for another rank, a whole number if it is one.

        With scaling alpha/√r, alpha in proportion to √r also keeps the scale.
        """
        is_rooted = policy == "sqrt" or self.module.use_rslora.get(self.adapter)
        root = math.sqrt(rank / self.rank)
        found = self.alpha * root if is_rooted else self.alpha * rank / self.rank
        return int(found) if found.is_integer() else found

    def change(self) -> ModuleChange:
        """Return its change; tensors are read from the model when they are asked for."""
        magnitudes = getattr(self.module, "lora_magnitude_vector", {})
        magnitude = magnitudes[self.adapter].weight if self.adapter in magnitudes else None
        a, b = (factor.reshape(len(factor), -1) for factor in (self.a, self.b))
        parts = {"a": a, "b": b, "bias": self.bias, "magnitude": magnitude}
        held = {n: of_torch(f"{self.name}.{n}", p) for n, p in parts.items() if p is not None}
        bias = held.get("bias")
        scale = self.scale(self.rank, self.alpha)
        factors = LowRank(held["a"], held["b"], scale, bias=bias, alpha=self.alpha)
        return ModuleChange(factors, held.get("magnitude"))

    def put(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Give it new factors, which become parameters on the device and of the type of the old.

        Args:
            a: (r, in · kernel).
            b: (out, r).
        """
        module, adapter, rank = self.module, self.adapter, len(a)
        for side, old, new in (("A", self.a, a), ("B", self.b, b)):
            shaped = new.reshape(len(new), -1, *old.shape[2:]).to(old.device, old.dtype)
            made = torch.nn.Parameter(shaped, old.requires_grad)
            setattr(*_place(module, adapter, side), made)
        if not isinstance(module, Embedding):
            words = "channels" if isinstance(module, _ConvNd) else "features"
            setattr(module.lora_A[adapter], f"out_{words}", rank)
            setattr(module.lora_B[adapter], f"in_{words}", rank)
        module.r[adapter] = rank


def _place(module: Any, adapter: str, side: str) -> tuple[Any, str]:
    """Return what holds a factor, `A` or `B`, as an attribute, and the attribute's name."""
    if isinstance(module, Embedding):  # bare parameters
        return getattr(module, f"lora_embedding_{side}"), adapter
    return getattr(module, f"lora_{side}")[adapter], "weight"


@dataclass(frozen=True)
class LiveAdapter:
    """One adapter of a live model, as it is when it is looked at.

    Attributes:
        model: the model, without what training wraps around it.
        name: the adapter's.
        layers: the adapter's layers by module path, in the model's order.
    """

    model: PeftModel
    name: str
    layers: Mapping[str, LiveLayer]

    @classmethod
    def of(cls, model: Any, name: str | None = None) -> LiveAdapter:
        """Return an adapter of a model as it is now, by default the active one.

        Raises:
            OptionError: no PEFT model, no such adapter, or several are active.
        """
        model = unwrapped(model)
        names = model.active_adapters if name is None else [name]
        if len(names) != 1 or names[0] not in model.peft_config:
            problem = "not one active adapter" if name is None else "no such adapter"
            known = f"one of {', '.join(model.peft_config)}"
            raise OptionError(problem, got=", ".join(names) or None, expected=known)
        layers = {
            path: LiveLayer.of(path, module, names[0])
            for path, module in model.base_model.model.named_modules()
            if isinstance(module, LoraLayer) and names[0] in module.r
        }
        return cls(model, names[0], layers)

    def check(self) -> LiveAdapter:
        """Return it if each of its layers can get other factors in place.

        Raises:
            OptionError: there is none.
            UnsupportedError: one cannot, or it is no LoRA on an unchanged base.
        """
        config: Any = self.model.peft_config[self.name]
        start = getattr(config, "init_lora_weights", True)
        if config.peft_type != "LORA" or start not in _STARTS:
            raise UnsupportedError(
                "only the factors of a LoRA on an unchanged base can be squeezed in training",
                got=f"{config.peft_type}, init_lora_weights={start}",
                hint="Squeeze the saved adapter: "
                "loratools squeeze ADAPTER --initial FIRST --rank 8 -o plain",
            )
        if not self.layers:
            raise OptionError("the adapter has no layer", got=self.name)
        owners: dict[int, str] = {}
        for each in self.layers.values():
            reasons = [reason for reason, applies in _obstacles(each).items() if applies]
            for factor in () if reasons else (each.a, each.b):
                owner = owners.setdefault(factor.untyped_storage().data_ptr(), each.name)
                reasons += [f"shares a factor with {owner}"] if owner != each.name else []
            if reasons:
                problem = f"the layer {reasons[0]}, so its factors cannot be replaced"
                raise UnsupportedError(problem, tensor=each.name)
        return self

    @property
    def copies(self) -> list[DistributedDataParallel]:
        """What averages the model's gradients over processes, which Trainers show nobody."""
        is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        everything = () if is_alone else gc.get_objects()
        found = [each for each in everything if issubclass(type(each), DistributedDataParallel)]
        return [each for each in found if any(module is self.model for module in each.modules())]

    def settle(self, alphas: Mapping[str, float]) -> LiveAdapter:
        """Let all that states ranks and alphas follow layers, and return the adapter as it is then.

        Args:
            alphas: by module path, for layers that get another.
        """
        for path, alpha in alphas.items():
            layer, module = self.layers[path], self.layers[path].module
            module.lora_alpha[self.name] = alpha
            module.scaling[self.name] = layer.scale(module.r[self.name], alpha)
        now = LiveAdapter.of(self.model, self.name)
        config: Any = self.model.peft_config[self.name]
        settings = {path: (each.rank, each.alpha) for path, each in now.layers.items()}
        for key, value in settings_of(settings).items():
            setattr(config, key, value)
        if isinstance(config.init_lora_weights, str):  # loading would begin so again, at odd ranks
            config.init_lora_weights = True
        for copy in self.copies:  # as unpickling does: it looks for its parameters anew
            copy.__setstate__(copy.__getstate__())  # type: ignore[no-untyped-call]
        return now


def unwrapped(model: Any) -> PeftModel:
    """Return the PEFT model inside what training wraps around it.

    Raises:
        OptionError: there is none, or what is around it spreads its parameters over processes.
    """
    while not isinstance(model, PeftModel):
        is_copy = isinstance(model, DataParallel | DistributedDataParallel)
        inner = model.module if is_copy else getattr(model, "_orig_mod", None)
        if inner is None:
            raise OptionError(
                "not a PEFT model whose parameters are whole in each process",
                got=type(model).__name__,
                hint="Give what get_peft_model returns, or squeeze the saved adapter",
            )
        model = inner
    return model


def _obstacles(layer: LiveLayer) -> dict[str, bool]:
    """Return for each reason why a layer could not get other factors whether it applies."""
    module, adapter, factors = layer.module, layer.adapter, (layer.a, layer.b)
    variant = getattr(module, "lora_variant", {}).get(adapter)
    kind = getattr(variant, "__name__", type(variant).__name__).lstrip("_")
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    is_plain = all(type(p) is torch.nn.Parameter and p.ndim > 1 and not p.is_meta for p in factors)
    return {
        "adapts a parameter": isinstance(module, ParamWrapper),
        f"is of the variant {kind}": variant is not None and not kind.startswith(_VARIANTS),
        "is merged": adapter in module.merged_adapters,
        "has factors that are spread over processes or devices": not is_plain,
        f"has factors of {factors[0].dtype}": any(p.dtype not in _TYPES for p in factors),
        "has hooks on its factors": any(getattr(p, name, None) for p in factors for name in hooks),
        "is a convolution in groups": getattr(module.get_base_layer(), "groups", 1) > 1,
        "has another rank than its factors": module.r[adapter] != layer.rank,
        "has alpha 0, with which it changes nothing": not layer.alpha,
        "has another scaling than its alpha makes": (
            module.scaling[adapter] != layer.scale(module.r[adapter], layer.alpha)
        ),
    }
