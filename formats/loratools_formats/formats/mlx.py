"""MLX adapter folders: `adapters.safetensors` beside the `adapter_config.json` of mlx-lm.

ΔW = scale · (a @ b)ᵀ with `lora_a: (in, r)` and `lora_b: (r, out)`, transposed against everybody
else; the scale is a number of its own, not alpha/r, and one rank and one scale hold for all
modules. Experts of a switch layer lie the usual way round, and an embedding is scale · a @ b for
(vocabulary, dim). Source: `tuner/lora.py`, `tuner/dora.py` and `tuner/utils.py` of mlx-lm 0.32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools_formats.contract.commands import command_on
from loratools_formats.contract.format import Context, Format, Loss
from loratools_formats.core.file_names import ADAPTER_CONFIG, MLX_WEIGHTS, WEIGHTS_OF_PEFT
from loratools_formats.disk.distant import is_there

if TYPE_CHECKING:
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.core.change import Layer, LowRank, ModuleChange
    from loratools_formats.core.tensors import TensorRef
    from loratools_formats.disk.files import RegularFile

_MAX_CONFIG_BYTES = 1 << 20
_KEY = re.compile(r"(?P<path>[^.]+(?:\.[^.]+)*)\.(?P<part>lora_a|lora_b|m)")
_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.\d+\.(.+)")


def _folder(path: Path) -> Path:
    return path.parent if path.name == MLX_WEIGHTS else path


def _adapter(folder: Path) -> Adapter:
    from loratools_formats.containers.safetensors_read import read_safetensors
    from loratools_formats.core.adapter import Adapter
    from loratools_formats.disk.errors import AdapterError
    from loratools_formats.disk.files import RegularFile, inside

    config_file = RegularFile(inside(folder, ADAPTER_CONFIG))
    config = _config(config_file)
    file = read_safetensors(inside(folder, MLX_WEIGHTS))
    parts: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in file.tensors.items():
        key = _KEY.fullmatch(name)
        if key is None:
            raise AdapterError(
                "unknown tensor in the adapter; it may change the weights",
                tensor=name,
                expected="a name ending in lora_a, lora_b or m",
            )
        parts.setdefault(key["path"], {})[key["part"]] = tensor
    scale = float(config["lora_parameters"]["scale"])
    is_dora = config.get("fine_tune_type") == "dora"
    return Adapter(
        format="mlx",
        source=folder,
        modules={path: _delta(path, parts[path], scale, is_dora) for path in sorted(parts)},
        config=config,
        metadata=file.metadata,
        base_model=config.get("model") if isinstance(config.get("model"), str) else None,
        inputs=(file.file, config_file),
    )


def _config(file: RegularFile) -> dict[str, Any]:
    from loratools_formats.disk.errors import AdapterError, UnsupportedError
    from loratools_formats.disk.strict_json import read_object

    path = file.path
    values = read_object(file, _MAX_CONFIG_BYTES)
    kind = values.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedError(
            "fine_tune_type is not an adapter's", path=path, got=kind, expected="lora or dora"
        )
    parameters = values.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        raise AdapterError(
            "config has no scale, which mlx-lm asks for",
            path=path,
            got=parameters,
            expected="lora_parameters with a number scale",
        )
    return values


def _delta(path: str, parts: Mapping[str, TensorRef], scale: float, is_dora: bool) -> ModuleChange:
    from loratools_formats.core.change import ModuleChange
    from loratools_formats.core.factors import check_magnitude
    from loratools_formats.disk.errors import AdapterError

    if "lora_a" not in parts or "lora_b" not in parts or ("m" in parts) != is_dora:
        raise AdapterError(
            "module does not have the tensors of its kind",
            tensor=path,
            got=", ".join(sorted(parts)),
            expected="lora_a, lora_b" + (", m" if is_dora else ""),
        )
    direction = _factors(path, parts["lora_a"], parts["lora_b"], scale)
    if not is_dora:
        return ModuleChange(direction)
    check_magnitude(parts["m"], direction.shape[0])
    return ModuleChange(direction, parts["m"])


def _factors(path: str, a: TensorRef, b: TensorRef, scale: float) -> LowRank:
    from loratools_formats.checkpoints.facts import is_embedding
    from loratools_formats.core.change import Layer, LowRank
    from loratools_formats.core.factors import check_factor
    from loratools_formats.disk.errors import AdapterError

    for tensor in (a, b):
        check_factor(tensor, Path(path))
    dims = (len(a.shape), len(b.shape))
    if dims == (2, 2):
        kind: Any = "embedding" if is_embedding(path) else "linear"
        return LowRank(a.transposed((1, 0)), b.transposed((1, 0)), scale, Layer(kind))
    if dims == (3, 3):
        return LowRank(a, b, scale, _of_experts(path))
    if dims == (2, 3) and a.shape[0] == b.shape[0] * b.shape[2]:
        stacked = a.reshaped((b.shape[0], b.shape[2], a.shape[1]))
        return LowRank(stacked, b, scale, _of_experts(path))
    raise AdapterError(
        "factors do not fit together", tensor=a.key, got=f"{list(a.shape)} and {list(b.shape)}"
    )


def _of_experts(path: str) -> Layer:
    """Return what MLX's stacks are: A is on the inputs, however a base stores the weights."""
    from loratools_formats.core.change import Layer

    return Layer("experts", (), (f"{path}.weight",), transposed_if_square=None, swapped=False)


def _targets(modules: Mapping[str, ModuleChange]) -> list[str]:
    """Return what mlx-lm calls the modules: paths within a layer, or whole paths outside."""
    found = ((_LAYER.fullmatch(name), name) for name in modules)
    return sorted({match[1] if match else name for match, name in found})


def _stored(adapter: Adapter) -> Iterator[TensorRef]:
    from loratools_formats.disk.errors import UnsupportedError

    for name, delta in adapter.modules.items():
        part = delta.require_factors()
        if part.bias is not None or part.layer.kind == "conv":
            what = "a convolution" if part.layer.kind == "conv" else "a bias of factors"
            raise UnsupportedError(f"an MLX adapter cannot hold {what}", tensor=name)
        if part.layer.kind == "experts":
            if part.layer.parameters != (f"{name}.weight",):
                raise UnsupportedError(
                    "MLX has a module for each stack of experts, and its own names for them",
                    tensor=name,
                    got=", ".join(part.layer.parameters),
                    hint="If this is a merge, pass `base`, which tells them",
                )
            yield part.a.renamed(f"{name}.lora_a")
            yield part.b.renamed(f"{name}.lora_b")
        else:
            yield part.a.transposed((1, 0)).renamed(f"{name}.lora_a")
            yield part.b.transposed((1, 0)).renamed(f"{name}.lora_b")
        if delta.magnitude is not None:
            yield delta.magnitude.reshaped((delta.magnitude.numel,)).renamed(f"{name}.m")


def _written_config(adapter: Adapter) -> dict[str, Any]:
    """Return the configuration with the rank and the scale that all modules share.

    Raises:
        UnsupportedError: they do not share them, or only some are DoRA.
    """
    from loratools_formats.disk.errors import UnsupportedError

    parts = [delta.require_factors() for delta in adapter.modules.values()]
    kinds = {"dora" if delta.is_dora else "lora" for delta in adapter.modules.values()}
    for what, found in (
        ("rank", {part.rank for part in parts}),
        ("scale", {part.scale for part in parts}),
        ("kind", kinds),
    ):
        if len(found) > 1:
            first = command_on(adapter, "squeeze", "--energy 1 --uniform", output="uniform")
            hint = f"Make it uniform first: {first}"
            if what == "kind":
                first = command_on(adapter, "to-lora", "--base MODEL --rank RANK")
                hint = f"Make all plain LoRAs first: {first}"
            elif adapter.provenance is not None:
                hint = "Add `uniform=True`"
            raise UnsupportedError(
                f"mlx-lm loads adapters of one {what} only",
                path=adapter.source,
                got=", ".join(map(str, sorted(found))),
                hint=hint,
            )
    config = dict(adapter.config)
    if parts:
        config["fine_tune_type"] = next(iter(kinds))
        parameters = config.get("lora_parameters") or {}
        same = (parameters.get("rank"), parameters.get("scale")) == (parts[0].rank, parts[0].scale)
        if not same:
            shared = {"rank": parts[0].rank, "scale": parts[0].scale}
            config["lora_parameters"] = {**parameters, **shared}
    return config


class Mlx(Format):
    """Folders as mlx-lm saves and loads them."""

    name = "mlx"
    description = "MLX adapter folder (adapter_config.json + adapters.safetensors)"
    suffixes = ("-mlx",)
    is_folder = True
    dtypes = ("f32", "f16", "bf16")

    def sniff(self, path: Path) -> bool:
        """Return whether a folder has MLX's configuration and weights, and none of PEFT's."""
        folder = _folder(path)
        if not is_there(folder / MLX_WEIGHTS) or not (folder / ADAPTER_CONFIG).is_file():
            return False
        return not any(is_there(folder / name) for name in WEIGHTS_OF_PEFT)

    def read(self, path: Path) -> Adapter:
        """Read a folder, or one named by its weight file."""
        from loratools_formats.disk.errors import naming

        folder = _folder(path)
        with naming(folder):
            return _adapter(folder)

    def losses(self, adapter: Adapter) -> list[Loss]:
        """Return what MLX cannot hold."""
        from loratools_formats.core.factors import kept_whole

        if adapter.format == "mlx":
            return [Loss(name, "MLX has no full differences") for name in kept_whole(adapter)]
        return super().losses(adapter)

    def write(self, adapter: Adapter, path: Path) -> None:
        """Write configuration and weights."""
        from loratools_formats.containers.safetensors_write import write_safetensors
        from loratools_formats.disk import strict_json

        config = strict_json.dumps(_written_config(adapter), indent=4)
        (path / ADAPTER_CONFIG).write_text(config + "\n", encoding="utf-8")
        write_safetensors(path / MLX_WEIGHTS, _stored(adapter), adapter.metadata)

    def weights_nbytes(self, adapter: Adapter) -> int:
        """Return the size of the weight file that `write` would make."""
        from loratools_formats.containers.safetensors_write import safetensors_nbytes

        _written_config(adapter)
        return safetensors_nbytes(_stored(adapter), adapter.metadata)

    def from_model(self, adapter: Adapter, context: Context) -> Adapter:
        """Make the configuration that mlx-lm asks for; modules keep their names."""
        from loratools_formats.core.factors import stored_as

        modules = {name: stored_as(delta, context.dtype) for name, delta in adapter.modules.items()}
        config = dict(adapter.config)
        if adapter.format != "mlx":
            config = {
                "fine_tune_type": "lora",
                "num_layers": -1,
                "lora_parameters": {"dropout": 0.0, "keys": _targets(modules)},
                "model": adapter.base_model,
            }
        return replace(
            adapter,
            format="mlx",
            modules=modules,
            additions={},
            replacements={},
            carried={},
            config=config,
        )

    def merged_config(self, adapters: Sequence[Adapter]) -> Mapping[str, Any]:
        """Return the first configuration, which names the modules of all, in as many layers."""
        config = dict(adapters[0].config)
        if len(adapters) == 1:
            return config
        names = {name: delta for adapter in adapters for name, delta in adapter.modules.items()}
        parameters = {**(config.get("lora_parameters") or {}), "keys": _targets(names)}
        if any(other.config.get("num_layers") != config.get("num_layers") for other in adapters):
            config["num_layers"] = -1
        return {**config, "lora_parameters": parameters}


FORMAT = Mlx()
