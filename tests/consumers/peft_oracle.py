"""PEFT as the judge: adapters saved by it, and the weights and outputs it makes of any folder.

`save` trains nothing: it fills every tensor of an adapter with random values, so that none of
them is zero, one or equal to the base. `merged` and `outputs` load a folder onto a fresh base in
float64, so what they return is PEFT's arithmetic without its rounding. `predicted` says the same
by our reader and the formulas of the format alone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft_models
from peft_cases import Case
from whole_delta import effective_delta

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.core.orientation import is_transposed
from loratools_formats.disk.errors import AdapterError
from loratools_formats.formats.peft.write import stored_tensors

State = dict[str, Array]

WARNINGS = (
    # PEFT says these whenever the option in question is used at all, or wrongly.
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:fan_in_fan_out is set to (True|False) but the target module:UserWarning",
    "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning",
    "ignore:Model with `tie_word_embeddings=True` and the:UserWarning",
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
    "ignore:lora with eva initialization used:UserWarning",
    # It takes the biases of lora_B for factors.
    "ignore:Adapter 'default':UserWarning",
    # Transformers calls a deprecated property of its own when PEFT asks.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def save(folder: Path, case: Case, *, seed: int = 0) -> Path:
    """Save the adapter of a case, with random values, by PEFT itself."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = fresh(case)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 12, **case.config}))
    fill(model, seed)
    model.to(getattr(torch, case.dtype))
    model.save_pretrained(str(folder), **case.save_options)
    return folder


def fresh(case: Case) -> Any:
    """Return the base of a case, always with the same weights."""
    import torch

    base = peft_models.build(case.model)
    if case.prepare is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            case.prepare(base)
    return base


def copied(folder: Path, target: Path) -> Path:
    """Copy a folder that other tests use too, to change the copy."""
    shutil.copytree(folder, target)
    return target


def edit_config(folder: Path, **values: Any) -> None:
    """Set values in a saved configuration; None removes one."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def stored_bytes(adapter: Adapter) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return type, shape and bytes of every tensor as the PEFT format stores it."""
    return {
        tensor.key: (tensor.dtype.code, tensor.shape, bytes(tensor.read()))
        for tensor in stored_tensors(adapter)
    }


def fill(model: Any, seed: int) -> None:
    """Give every trainable tensor random values; magnitudes stay near what PEFT made of them."""
    import torch

    generator = torch.Generator().manual_seed(seed + 77)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.4 * noise)


def loaded(folder: Path, case: Case, **options: Any) -> Any:
    """Return PEFT's model of a folder on a fresh base, all in float64."""
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(fresh(case).double(), str(folder), **options).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    return model


def state(model: Any) -> State:
    """Return a model's tensors as arrays of their own, tied ones separately."""
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def base_state(case: Case) -> State:
    """Return the tensors of a fresh base in float64."""
    return state(fresh(case).double())


def outputs(model: Any, case: Case) -> Array:
    """Return what a model answers to the example batch."""
    import torch

    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in peft_models.example_inputs(case.model).items()
    }
    with torch.no_grad():
        answer = model(**inputs)
    return getattr(answer, "logits", answer).numpy().copy()


def outputs_with(case: Case, weights: State) -> Array:
    """Return what the base answers once it has other weights."""
    import torch

    base = fresh(case).double()
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        module = base.get_submodule(path)
        if leaf in dict(module.named_parameters(recurse=False)):
            # A parameter of its own, so that weights the base ties may differ from each other.
            setattr(module, leaf, torch.nn.Parameter(torch.from_numpy(array)))
    return outputs(base, case)


def peft_deltas(model: Any, adapter_name: str = "default") -> State:
    """Return the ΔW that PEFT computes for each adapted tensor of the base; a DoRA's direction."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.r:
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            leaf = getattr(module, "parameter_name", None) or "weight"
            if type(module).__name__ == "MultiheadAttention":
                leaf = "in_proj_weight"
            delta = module.get_delta_weight(adapter_name).detach().numpy()
            shape = getattr(module.get_base_layer(), leaf).shape
            found[f"{path}.{leaf}"] = delta.reshape(shape)
    return found


def weight_name(path: str, delta: LowRank, base: State) -> str:
    """Return the base tensor that a module's delta belongs to."""
    if delta.layer.parameters:
        return _fitting(delta, base)
    plain = path.replace(".base_layer", "")
    return next(name for name in (f"{plain}.weight", f"{plain}.in_proj_weight") if name in base)


def _fitting(delta: LowRank, base: State) -> str:
    fitting = []
    for name in base.keys() & set(delta.layer.parameters):
        try:
            is_transposed(name, delta, base[name].shape)
        except AdapterError:
            continue
        fitting.append(name)
    (only,) = fitting
    return only


def own_deltas(adapter: Adapter, base: State) -> State:
    """Return the ΔW our reader finds for each adapted tensor of the base."""
    found = {}
    for path, whole in adapter.modules.items():
        delta = whole.require_factors()
        name = weight_name(path, delta, base)
        assert name not in found, name
        found[name] = effective_delta(path, whole, base[name].shape)
    return found


def predicted(adapter: Adapter, base: State, deltas: State, ties: tuple[str, ...] = ()) -> State:
    """Return what the base becomes by the formulas of the format.

    Args:
        adapter: its replacements, biases and magnitudes are used, its factors are not.
        base: the base's tensors.
        deltas: ΔW by base tensor.
        ties: tensors that are one; what is done to the first is done to all.
    """
    result = {name: array.copy() for name, array in base.items()}
    for replacement in adapter.replacements.values():
        values = replacement.tensor.load()
        if replacement.kind == "token_rows":
            result[replacement.target][list(replacement.rows)] = values
        else:
            result[replacement.target] = values.astype(base[replacement.target].dtype)
    for path, whole in adapter.modules.items():
        delta = whole.require_factors()
        name = weight_name(path, delta, base)
        result[name] = result[name] + deltas[name]
        if whole.is_dora:
            transposed = is_transposed(path, delta, base[name].shape)
            result[name] = _dora_weight(whole, result[name], output_axis=1 if transposed else 0)
        if delta.bias is not None:
            bias = f"{path}.bias"
            result[bias] = result[bias] + delta.scale * delta.bias.load(np.float64)
    for name in ties:
        result[name] = result[ties[0]]
    return result


def _dora_weight(dora: ModuleChange, weight: Array, output_axis: int) -> Array:
    """Return m / ‖V‖ · V, the norm over all but the output axis."""
    others = tuple(axis for axis in range(weight.ndim) if axis != output_axis)
    norm = np.sqrt((weight**2).sum(axis=others, keepdims=True))
    return dora.magnitude.load(np.float64).reshape(norm.shape) / norm * weight


def changes(after: State, before: State) -> State:
    """Return the differences of the tensors that differ."""
    return {
        name: after[name] - before[name]
        for name in before
        if after[name].shape == before[name].shape and not np.array_equal(after[name], before[name])
    }


def assert_states_equal(got: State, want: State, relative: float) -> None:
    """Compare every tensor of two states, each relative to its own norm."""
    assert set(got) == set(want)
    for name, array in want.items():
        assert got[name].shape == array.shape, name
        assert distance(got[name], array) <= relative, f"{name}: {distance(got[name], array):.3e}"


def distance(got: Array, want: Array) -> float:
    """‖got − want‖ / ‖want‖."""
    whole = float(np.linalg.norm(want.astype(np.float64)))
    part = float(np.linalg.norm(got.astype(np.float64) - want))
    return part / whole if whole else part


def truncated(change: Array, rank: int, is_stack: bool) -> Array:
    """Return the best approximation of a rank of a dense ΔW; of each expert in a stack."""
    if is_stack:
        return np.stack([truncated(one, rank, is_stack=False) for one in change])
    u, s, vt = np.linalg.svd(change.reshape(change.shape[0], -1), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ vt[:rank]).reshape(change.shape)


def spectrum(change: Array, is_stack: bool) -> Array:
    """Return the singular values of a dense ΔW, one row for each expert."""
    stack = change if is_stack else change.reshape(1, change.shape[0], -1)
    return np.linalg.svd(stack, compute_uv=False)


def norm(arrays: Mapping[str, Array]) -> float:
    """Return the Frobenius norm of all arrays together."""
    return math.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in arrays.values()))
