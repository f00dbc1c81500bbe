"""The LoRA layers of a live PEFT model: their factors as an adapter, and new factors in place.

Each layer of one adapter is seen as the file that PEFT would save sees it, so that the operations
on files serve here too. What PEFT keeps of a layer besides its tensors (rank, alpha, scaling, the
sizes of its inner layers, the patterns of the configuration) follows the new factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper, _ConvNd

from loratools_formats.core.adapter import Adapter, Layer, LowRank, ModuleChange
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.peft_patterns import PatternsOf
from loratools_formats.core.tensors import Buffer, TensorRef
from loratools_formats.disk.errors import OptionError, UnsupportedError

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_STARTS = ("gaussian", "orthogonal", "eva")  # the others change the base weights, too
_VARIANTS = ("Dora", "ALora")  # whose change is scale · b @ a, or has it as its direction


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

    @property
    def is_embedding(self) -> bool:
        """Whether its factors are bare parameters."""
        return isinstance(self.module, Embedding)

    @property
    def a(self) -> torch.nn.Parameter:
        """(r, in), or (r, in, *kernel)."""
        return self._parameter("A")

    @property
    def b(self) -> torch.nn.Parameter:
        """(out, r), or (out, r, 1, …)."""
        return self._parameter("B")

    @property
    def rank(self) -> int:
        """Rank r."""
        return int(self.a.shape[0])

    @property
    def alpha(self) -> float:
        """The number that scaling comes from."""
        return float(self.module.lora_alpha[self.adapter])

    @property
    def is_rslora(self) -> bool:
        """Whether scaling is alpha/√r, and not alpha/r."""
        return bool(self.module.use_rslora.get(self.adapter, False))

    def _holder(self, side: str) -> Any:
        return getattr(
            self.module, f"lora_embedding_{side}" if self.is_embedding else f"lora_{side}"
        )

    def _parameter(self, side: str) -> torch.nn.Parameter:
        held = self._holder(side)[self.adapter]
        found: torch.nn.Parameter = held if self.is_embedding else held.weight
        return found

    def scale(self, alpha: float, rank: int) -> float:
        """Return the scale that PEFT makes of an alpha and a rank."""
        return alpha / math.sqrt(rank) if self.is_rslora else alpha / rank

    def change(self) -> ModuleChange:
        """Return its change; tensors are read from the model when they are asked for."""
        magnitudes = getattr(self.module, "lora_magnitude_vector", {})
        magnitude = None
        if self.adapter in magnitudes:
            weight = magnitudes[self.adapter].weight
            magnitude = tensor_ref(f"{self.name}.magnitude", weight, tuple(weight.shape))
        kernel = tuple(self.a.shape[2:])
        kind = "embedding" if self.is_embedding else "conv" if kernel else "linear"
        bias = None if self.is_embedding else self._holder("B")[self.adapter].bias
        factors = LowRank(
            tensor_ref(f"{self.name}.a", self.a, (self.rank, self.a[0].numel())),
            tensor_ref(f"{self.name}.b", self.b, (self.b.shape[0], self.rank)),
            self.scale(self.alpha, self.rank),
            Layer(kind, kernel),  # type: ignore[arg-type]
            None if bias is None else tensor_ref(f"{self.name}.bias", bias, tuple(bias.shape)),
            alpha=self.alpha,
        )
        return ModuleChange(factors, magnitude)

    def put(self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Give it new factors, which become parameters on the device and of the type of the old.

        Args:
            a: (r, in · kernel).
            b: (out, r).
            bias: (out,), of the second factor; None if it has none.
        """
        rank = len(a)
        for side, old, new in (("A", self.a, a), ("B", self.b, b)):
            shape = (rank, *old.shape[1:]) if side == "A" else (len(b), rank, *old.shape[2:])
            made = new.reshape(shape).to(old.device, old.dtype)
            parameter = torch.nn.Parameter(made, requires_grad=old.requires_grad)
            if self.is_embedding:
                self._holder(side)[self.adapter] = parameter
            else:
                self._holder(side)[self.adapter].weight = parameter
        if bias is not None:
            with torch.no_grad():
                self._holder("B")[self.adapter].bias.copy_(bias)

    def settle(self, rank: int, alpha: float) -> None:
        """Let what PEFT keeps of the layer say its rank and alpha."""
        whole = int(alpha) if float(alpha).is_integer() else alpha
        self.module.r[self.adapter], self.module.lora_alpha[self.adapter] = rank, whole
        self.module.scaling[self.adapter] = self.scale(alpha, rank)
        if not self.is_embedding:
            words = "channels" if isinstance(self.module, _ConvNd) else "features"
            setattr(self._holder("A")[self.adapter], f"out_{words}", rank)
            setattr(self._holder("B")[self.adapter], f"in_{words}", rank)


def tensor_ref(key: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> TensorRef:
    """Return a reference to a tensor of a model, read when it is asked for."""

    def read() -> Buffer:
        stored = tensor.detach().cpu().contiguous().reshape(-1)
        return stored.view(torch.uint8).numpy().data

    return TensorRef(key, DTYPES[_TYPES[tensor.dtype]], shape, read)


def unwrapped(model: Any) -> PeftModel:
    """Return the PEFT model inside what training wraps around it.

    Raises:
        OptionError: there is none.
        UnsupportedError: it is spread over processes.
    """
    while not isinstance(model, PeftModel):
        name = type(model).__name__
        if name in ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"):
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


def live_layers(model: PeftModel, adapter: str) -> list[LiveLayer]:
    """Return the layers of an adapter, in the model's order.

    Raises:
        OptionError: there is no such adapter.
        UnsupportedError: it is no LoRA, or one of its layers cannot get other factors in place.
    """
    if adapter not in model.peft_config:
        raise OptionError("no such adapter", got=adapter, expected=", ".join(model.peft_config))
    config: Any = model.peft_config[adapter]
    base: Any = model.base_model.model
    start = getattr(config, "init_lora_weights", True)
    if config.peft_type != "LORA" or (isinstance(start, str) and start not in _STARTS):
        raise UnsupportedError(
            "only the factors of a LoRA on an unchanged base can be squeezed in training",
            got=f"{config.peft_type}"
            + (f", init_lora_weights={start}" if start is not True else ""),
            hint="Squeeze the saved adapter: "
            "loratools squeeze ADAPTER --initial FIRST --rank 8 -o plain",
        )
    found = [
        LiveLayer(name, module, adapter)
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer)
        and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    ]
    seen: dict[int, str] = {}
    for each in found:
        reason = _obstacle(each)
        twin = [
            seen.setdefault(p.untyped_storage().data_ptr(), each.name) for p in (each.a, each.b)
        ]
        if reason is None and any(name != each.name for name in twin):
            reason = f"shares a factor with {twin[0]}"
        if reason is not None:
            raise UnsupportedError(
                f"the layer {reason}, so its factors cannot be replaced", tensor=each.name
            )
    if not found:
        raise OptionError("the adapter has no layer", got=adapter)
    return found


def _obstacle(layer: LiveLayer) -> str | None:
    module, adapter = layer.module, layer.adapter
    if isinstance(module, ParamWrapper):
        return "adapts a parameter"
    variant = getattr(module, "lora_variant", {}).get(adapter)
    name = "" if variant is None else getattr(variant, "__name__", type(variant).__name__)
    if name and not name.lstrip("_").startswith(_VARIANTS):
        return f"is of the variant {name}"
    if adapter in module.merged_adapters:
        return "is merged"
    if not layer.alpha:
        return "has alpha 0, with which it changes nothing"
    if layer.b.shape[1] != layer.rank:
        return "is a convolution in groups"
    if layer.a.dtype not in _TYPES or type(layer.a) is not torch.nn.Parameter:
        return f"has factors of {layer.a.dtype}, {type(layer.a).__name__}"
    if module.scaling[adapter] != layer.scale(layer.alpha, layer.rank):
        return f"has scaling {module.scaling[adapter]:g}, which is not that of its alpha"
    return None


def live_adapter(model: PeftModel, layers: list[LiveLayer]) -> Adapter:
    """Return an adapter as if PEFT had saved the model and it had been read."""
    config: Any = model.peft_config[layers[0].adapter]
    values = {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted({each.name.rpartition(".")[2] for each in layers}),
        "use_rslora": bool(config.use_rslora),
        "use_dora": bool(config.use_dora),
        "rank_pattern": dict(config.rank_pattern or {}),
        "alpha_pattern": dict(config.alpha_pattern or {}),
    }
    modules = {each.name: each.change() for each in layers}
    return Adapter(format="peft", source=None, modules=modules, config=values)


def settle_all(
    model: PeftModel, layers: list[LiveLayer], settings: Mapping[str, tuple[int, float]]
) -> None:
    """Let every layer and the configuration say these ranks and alphas.

    Args:
        model: the model.
        layers: all of the adapter's.
        settings: (rank, alpha) by module path.
    """
    for each in layers:
        each.settle(*settings[each.name])
    config: Any = model.peft_config[layers[0].adapter]
    stored = {each.name: (each.rank, each.module.lora_alpha[each.adapter]) for each in layers}
    config.r, config.lora_alpha = max(stored.values(), key=lambda setting: setting[0])
    names = PatternsOf(list(stored))
    config.rank_pattern = dict(_others(names, stored, 0, config.r))
    config.alpha_pattern = dict(_others(names, stored, 1, config.lora_alpha))
    if isinstance(config.init_lora_weights, str):  # loading would begin so again, at odd ranks
        config.init_lora_weights = True


def _others(
    names: PatternsOf, stored: Mapping[str, tuple[Any, ...]], place: int, usual: Any
) -> Iterator[tuple[str, Any]]:
    for name, setting in stored.items():
        if setting[place] != usual:
            yield names.pattern_for(name), setting[place]
