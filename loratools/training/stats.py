"""Second moments of the inputs of a model's layers, for `squeeze --stats`.

Of each layer, X·Xᵀ over the inputs of all batches, or its diagonal: Σ x·xᵀ over tokens, over the
patches that a convolution sees, and over the one-hot rows of an embedding, whose matrix is
diagonal. Padding that an attention mask marks is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratools.lowrank.moments import write_moments
from loratools.training.layers import LiveAdapter, unwrapped
from loratools.training.transport import in_float64
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import OptionError, UnsupportedError

_LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


@dataclass(frozen=True)
class CollectedStats:
    """Second moments of the inputs of a model's layers.

    Attributes:
        modules: paths of the layers.
        samples: inputs that each layer saw, in the order of `modules`.
        unseen: layers that no input reached, of which nothing is known.
        moments: X·Xᵀ, (in, in), or its diagonal, (in,), in float32, by module path.
    """

    modules: tuple[str, ...]
    samples: tuple[int, ...]
    unseen: tuple[str, ...]
    moments: Mapping[str, Array] = field(repr=False)

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the safetensors file that `squeeze --stats` reads, and return where.

        Raises:
            OutputExistsError: the file exists and `overwrite` is false.
            OutputError: it could not be written; what stood there is intact.
        """
        counts = dict(zip(self.modules, self.samples, strict=True))
        return write_moments(path, self.moments, counts, overwrite=overwrite)


def collect_stats(
    model: Any,
    batches: Iterable[Any],
    *,
    output: str | os.PathLike[str] | None = None,
    kind: Literal["gram", "diag"] = "gram",
    overwrite: bool = False,
) -> CollectedStats:
    """Run a model over batches and measure the second moments of its layers' inputs.

    Args:
        model: a PEFT model, of which the adapted layers count; or any model, of which all linear
            layers, convolutions and embeddings count.
        batches: what the model takes: tensors, or mappings of its keyword arguments.
        output: the safetensors file to write; without it, `write` of the result makes one.
        kind: `gram` for whole matrices, (in, in) each; `diag` for their diagonals, (in,) each.
        overwrite: replace the file if it exists.

    Raises:
        OptionError: no such kind, or no batch.
        UnsupportedError: a convolution in groups.
        OutputExistsError: the file exists and `overwrite` is false.
    """
    if kind not in ("gram", "diag"):
        raise OptionError("no such kind of moments", got=kind, expected="gram or diag")
    layers = _layers(model)
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    mask: torch.Tensor | None = None

    def seen(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        moment, count = _moment(layer, inputs[0].detach(), mask, whole=kind == "gram")
        sums[name] = moment if name not in sums else sums[name] + moment
        counts[name] += count

    handles = [each.register_forward_pre_hook(partial(seen, n)) for n, each in layers.items()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                is_named = isinstance(batch, Mapping)
                mask = batch.get("attention_mask") if is_named else None
                model(**batch) if is_named else model(batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    moments = {name: sums[name].float().cpu().numpy() for name in layers if counts[name]}
    if not moments:
        raise OptionError("no batch reached a layer", expected="at least one")
    unseen = tuple(name for name in layers if name not in moments)
    found = CollectedStats(tuple(moments), tuple(counts[n] for n in moments), unseen, moments)
    if output is not None:
        found.write(output, overwrite=overwrite)
    return found


def _layers(model: Any) -> dict[str, nn.Module]:
    """Return the layers whose inputs count, by module path."""
    with suppress(OptionError):  # which is raised if there is no PEFT model inside
        model = unwrapped(model)
    if isinstance(model, PeftModel):
        adapted = LiveAdapter.of(model).check().layers
        found = {name: each.module.get_base_layer() for name, each in adapted.items()}
    else:
        found = {n: m for n, m in model.named_modules() if isinstance(m, _LAYERS)}
    for name, layer in found.items():
        if getattr(layer, "groups", 1) > 1:
            raise UnsupportedError("inputs of convolutions in groups are not measured", tensor=name)
    return found


def _moment(
    layer: nn.Module, inputs: torch.Tensor, mask: torch.Tensor | None, *, whole: bool
) -> tuple[torch.Tensor, int]:
    """Return Σ x·xᵀ in float64 or its diagonal, and how many x there were."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        inputs = _patches(layer, inputs)
    elif mask is not None and inputs.shape[:2] == mask.shape:
        inputs = inputs[mask.bool()]
    if isinstance(layer, nn.Embedding):
        tokens = inputs.reshape(-1)
        return torch.bincount(tokens, minlength=layer.num_embeddings).double(), len(tokens)
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return in_float64(rows.T @ rows if whole else (rows * rows).sum(0)), len(rows)


def _patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: torch.Tensor) -> torch.Tensor:
    """Return what each output of a convolution sees: (batch, *places, in · kernel).

    The convolution itself tells, with kernels that each pick one number out of a patch; in float64,
    since processors for less may round what they pick.
    """
    x, shape = in_float64(inputs), layer.weight.shape[1:]
    picks = torch.eye(shape.numel(), dtype=x.dtype, device=x.device).reshape(-1, *shape)
    seen: torch.Tensor = layer._conv_forward(x, picks, None)  # noqa: SLF001 - as its own does
    return seen.movedim(1, -1)
