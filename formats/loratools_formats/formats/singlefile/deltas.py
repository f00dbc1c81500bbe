"""From the tensors of one module to its weight change: plain factors, DoRA, and LyCORIS' kinds.

Source: LyCORIS 4.1 (`modules/locon.py`, `loha.py`, `lokr.py`) and ComfyUI's weight adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from loratools_formats.core.change import Axis, KindDelta, Layer, LowRank, ModuleChange
from loratools_formats.core.factors import check_factor, flattened_convolution
from loratools_formats.core.kind_shapes import check_shapes
from loratools_formats.core.single_file_keys import Role
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError
from loratools_formats.formats.singlefile.scale import Setting, stated_alpha

Parts = dict[Role, TensorRef]
"""The tensors of a module by what they are."""

_HADAMARD: dict[Role, str] = {
    "hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b",
    "hada_t1": "t1", "hada_t2": "t2",
}  # fmt: skip
_KRONECKER: dict[Role, str] = {
    "lokr_w1": "w1", "lokr_w1_a": "w1_a", "lokr_w1_b": "w1_b", "lokr_w2": "w2",
    "lokr_w2_a": "w2_a", "lokr_w2_b": "w2_b", "lokr_t2": "w2_t",
}  # fmt: skip
_BESIDE: frozenset[Role] = frozenset({"alpha", "magnitude", "bias"})


def delta_of(module: str, parts: Parts, stated: Setting | None, path: Path) -> ModuleChange:
    """Return the weight change that a module's tensors make.

    Args:
        module: its name, for messages.
        parts: its tensors.
        stated: what the file's metadata says of it.
        path: the file, for messages.

    Raises:
        AdapterError: the tensors do not fit together, or make no one kind.
    """
    for role, tensor in parts.items():
        if role not in ("alpha", "on_input"):
            check_factor(tensor, path)
    own = parts.keys() - _BESIDE
    for has, make in (
        ({"a", "b"}, _low_rank),
        ({"embedding_a", "embedding_b"}, _embedding),
        ({"a", "b", "mid"}, _tucker),
        ({"diff"}, _full),
        ({"a1", "a2", "b1", "b2"}, _glora),
        ({"oft_blocks"}, _rotation),
        ({"oft_blocks", "rescale"}, _rotation),
        ({"ia3", "on_input"}, _ia3),
    ):
        if own == has:
            return _with_magnitude(make(module, parts, stated, path), parts, path)
    if own and own <= _HADAMARD.keys():
        return _with_magnitude(_hadamard(module, parts, stated, path), parts, path)
    if own and own <= _KRONECKER.keys():
        return _with_magnitude(_kronecker(module, parts, stated, path), parts, path)
    raise AdapterError(
        "the tensors of a module do not make one kind of adapter",
        path=path,
        tensor=module,
        got=", ".join(sorted(tensor.key for tensor in parts.values())),
    )


def _alpha(
    parts: Parts, rank: int, stated: Setting | None, path: Path
) -> tuple[float | None, float]:
    """Return alpha, None if none is stated, and the scale."""
    if "alpha" in parts:
        alpha = stated_alpha(parts["alpha"], path)
        return alpha, alpha / rank
    return (None, 1.0) if stated is None else (stated.alpha, stated.scale)


def _low_rank(module: str, parts: Parts, stated: Setting | None, path: Path) -> LowRank:
    a, b = parts["a"], parts["b"]
    layer = Layer("linear")
    dims = len(a.shape)
    if dims > 1 and len(b.shape) != dims and math.prod(b.shape[2:]) == 1 < len(b.shape):
        # Loaders flatten both: tools write a 1×1 kernel, or the second factor's, or leave them out.
        b = b.reshaped((*b.shape[:2], *(1 for _ in a.shape[2:])))
    if dims < 2 or len(b.shape) != dims:
        raise AdapterError(
            "the two factors of a module have different numbers of dimensions",
            path=path,
            tensor=module,
            got=f"{list(a.shape)} and {list(b.shape)}",
        )
    if dims > 2:
        a, b, layer = flattened_convolution(a, b, path)
    alpha, scale = _alpha(parts, a.shape[0], stated, path)
    return LowRank(a, b, scale, layer, parts.get("bias"), alpha, parts.get("alpha"))


def _with_magnitude(direction: LowRank | KindDelta, parts: Parts, path: Path) -> ModuleChange:
    magnitude = parts.get("magnitude")
    if magnitude is None:
        return ModuleChange(direction)
    return ModuleChange(direction, magnitude, _axis(magnitude, direction, path))


def _axis(magnitude: TensorRef, direction: LowRank | KindDelta, path: Path) -> Axis:
    """Return whether magnitudes belong to outputs or to inputs, which their shape tells."""
    (out, in_), layer = direction.shape, direction.layer
    assert out is not None  # every kind that has magnitudes tells its shape
    assert in_ is not None
    inputs = in_ // math.prod(layer.kernel)
    shape = magnitude.shape
    if not layer.kernel and len(shape) > 2 and shape[0] == 1 and in_ % magnitude.numel == 0:
        inputs = magnitude.numel  # LoHa and LoKr of a convolution may not tell its kernel
    if magnitude.numel == out and (len(shape) == 1 or shape[0] == out or shape[:2] == (1, out)):
        is_row = len(shape) > 1 and shape[0] == 1 and not _is_peft(magnitude.key)
        return "input" if out == inputs and out > 1 and is_row else "output"
    if magnitude.numel == inputs and shape[0] == 1:
        return "input"
    raise AdapterError(
        "magnitude does not fit the module",
        path=path,
        tensor=magnitude.key,
        got=list(shape),
        expected=f"{out} elements, one for each output, or {inputs}, one for each input",
    )


def _is_peft(key: str) -> bool:
    return not key.endswith(".dora_scale")


def _embedding(module: str, parts: Parts, stated: Setting | None, path: Path) -> LowRank:
    _none_beside(module, parts, {"alpha"}, path)
    a, b = parts["embedding_a"], parts["embedding_b"]
    alpha, scale = _alpha(parts, a.shape[0], stated, path)
    return LowRank(a, b, scale, Layer("embedding"), alpha=alpha, alpha_tensor=parts.get("alpha"))


def _tucker(module: str, parts: Parts, stated: Setting | None, path: Path) -> KindDelta:
    _none_beside(module, parts, {"alpha", "magnitude"}, path)
    down, up, mid = parts["a"], parts["b"], parts["mid"]
    check_shapes("tucker", {"down": down, "up": up, "mid": mid})
    _, scale = _alpha(parts, down.shape[0], stated, path)
    if len(mid.shape) < 3 or mid.shape[:2] != (up.shape[1], down.shape[0]):
        raise AdapterError(
            "Tucker core does not fit its factors",
            path=path,
            tensor=mid.key,
            got=list(mid.shape),
            expected=f"[{up.shape[1]}, {down.shape[0]}, kernel]",
        )
    kernel = mid.shape[2:]
    shape = (up.shape[0], down.shape[1] * math.prod(kernel))
    layer = Layer("conv", kernel)
    tensors = {"down": down, "up": up, "mid": mid}
    return _other("tucker", tensors, parts, scale, layer, shape)


def _hadamard(module: str, parts: Parts, stated: Setting | None, path: Path) -> KindDelta:
    _none_beside(module, parts, {"alpha", "magnitude"}, path)
    tensors = _named(module, parts, _HADAMARD, ("w1_a", "w1_b", "w2_a", "w2_b"), path)
    if ("t1" in tensors) != ("t2" in tensors):
        raise AdapterError("LoHa has one of two Tucker cores", path=path, tensor=module)
    check_shapes("loha", tensors)
    _, scale = _alpha(parts, tensors["w1_b"].shape[0], stated, path)
    layer = Layer("linear")
    columns = math.prod(tensors["w1_b"].shape[1:])
    rows = tensors["w1_a"].shape[0]
    if "t1" in tensors:
        rows = tensors["w1_a"].shape[1]
        layer = Layer("conv", tensors["t1"].shape[2:])
        columns *= math.prod(layer.kernel)
    return _other("loha", tensors, parts, scale, layer, (rows, columns))


def _kronecker(module: str, parts: Parts, stated: Setting | None, path: Path) -> KindDelta:
    _none_beside(module, parts, {"alpha", "magnitude"}, path)
    tensors = _named(module, parts, _KRONECKER, (), path)
    for side in ("w1", "w2"):
        whole = side in tensors
        factors = [f"{side}_a" in tensors, f"{side}_b" in tensors]
        if whole == any(factors) or factors[0] != factors[1]:
            raise AdapterError(
                f"LoKr has neither or both of {side} and its factors", path=path, tensor=module
            )
    if "w2_t" in tensors and "w2" in tensors:
        raise AdapterError("LoKr has a whole w2 beside a Tucker core", path=path, tensor=module)
    check_shapes("lokr", tensors)
    # Whatever alpha says, nothing scales two whole matrices: LyCORIS and ComfyUI agree on it.
    scale = 1.0
    ranks = {tensors[key].shape[0] for key in ("w1_b", "w2_b") if key in tensors}
    if len(ranks) > 1 and "alpha" in parts:  # LyCORIS divides by that of w1, ComfyUI by that of w2
        raise AdapterError(
            "the two sides of LoKr have different ranks, so that alpha has no one meaning",
            path=path,
            tensor=module,
            got=sorted(ranks),
        )
    if ranks:
        _, scale = _alpha(parts, ranks.pop(), stated, path)
    rows, columns = 1, 1
    kernel: tuple[int, ...] = ()
    for side in ("w1", "w2"):
        if side in tensors:
            shape = tensors[side].shape
            rows, columns = rows * shape[0], columns * math.prod(shape[1:])
            kernel = kernel or shape[2:]
        elif f"{side}_t" in tensors:
            kernel = tensors[f"{side}_t"].shape[2:]
            rows *= tensors[f"{side}_a"].shape[1]
            columns *= tensors[f"{side}_b"].shape[1] * math.prod(kernel)
        else:
            rows *= tensors[f"{side}_a"].shape[0]
            columns *= math.prod(tensors[f"{side}_b"].shape[1:])
    layer = Layer("conv", kernel) if kernel else Layer("linear")
    return _other("lokr", tensors, parts, scale, layer, (rows, columns))


def _full(module: str, parts: Parts, stated: Setting | None, path: Path) -> KindDelta:
    del stated
    _none_beside(module, parts, {"alpha"}, path)
    diff = parts["diff"]
    check_shapes("full", {"diff": diff})
    shape = (diff.shape[0], math.prod(diff.shape[1:]))
    layer = Layer("conv", diff.shape[2:]) if len(diff.shape) > 2 else Layer("linear")
    return _other("full", {"diff": diff}, parts, 1.0, layer, shape)


def _glora(module: str, parts: Parts, stated: Setting | None, path: Path) -> KindDelta:
    _none_beside(module, parts, {"alpha"}, path)
    tensors = {role: parts[role] for role in ("a1", "a2", "b1", "b2")}
    check_shapes("lycoris_glora", tensors)
    _, scale = _alpha(parts, tensors["a2"].shape[0], stated, path)
    columns = math.prod(tensors["b2"].shape[1:])
    layer = (
        Layer("conv", tensors["b2"].shape[2:]) if len(tensors["b2"].shape) > 2 else Layer("linear")
    )
    shape = (tensors["b1"].shape[0], columns)
    return KindDelta(
        "lycoris_glora", tensors, {"scale": scale}, layer, shape, alpha_tensor=parts.get("alpha")
    )


def _rotation(module: str, parts: Parts, stated: Setting | None, path: Path) -> KindDelta:
    """Return OFT or BOFT, whose alpha is a limit in units of the number of outputs."""
    del stated
    _none_beside(module, parts, {"alpha"}, path)
    blocks = parts["oft_blocks"]
    if len(blocks.shape) not in (3, 4):
        raise AdapterError(
            "rotations are no stack of blocks",
            path=path,
            tensor=blocks.key,
            got=list(blocks.shape),
            expected="3 dimensions for OFT, 4 for BOFT",
        )
    tensors = {"blocks": blocks}
    if "rescale" in parts:
        tensors["gain"] = parts["rescale"]
    out = blocks.shape[-3] * blocks.shape[-2]
    alpha = stated_alpha(parts["alpha"], path) if "alpha" in parts else 0.0
    return KindDelta(
        "diag_oft" if len(blocks.shape) == 3 else "butterfly_oft",
        tensors,
        {"constraint": alpha * out},
        shape=(out, None),
        alpha_tensor=parts.get("alpha"),
    )


def _ia3(module: str, parts: Parts, stated: Setting | None, path: Path) -> KindDelta:
    del stated
    _none_beside(module, parts, set(), path)
    on_input = stated_alpha(parts["on_input"], path)
    if on_input not in (0, 1):
        raise AdapterError(
            "on_input is neither 0 nor 1", path=path, tensor=parts["on_input"].key, got=on_input
        )
    gain = parts["ia3"]
    shape = (None, None) if on_input else (gain.numel, None)
    tensors = {"gain": gain, "on_input": parts["on_input"]}
    return KindDelta("lycoris_ia3", tensors, {"on_input": bool(on_input)}, shape=shape)


def _other(
    kind: str,
    tensors: dict[str, TensorRef],
    parts: Parts,
    scale: float,
    layer: Layer,
    shape: tuple[int, int],
) -> KindDelta:
    return KindDelta(kind, tensors, {"scale": scale}, layer, shape, alpha_tensor=parts.get("alpha"))


def _named(
    module: str, parts: Parts, names: Mapping[Role, str], needed: tuple[str, ...], path: Path
) -> dict[str, TensorRef]:
    tensors = {names[role]: tensor for role, tensor in parts.items() if role in names}
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise AdapterError(
            f"module lacks {', '.join(missing)}",
            path=path,
            tensor=module,
            got=", ".join(sorted(tensor.key for tensor in parts.values())),
        )
    return tensors


def _none_beside(module: str, parts: Parts, allowed: set[Role], path: Path) -> None:
    for role in (parts.keys() & _BESIDE) - allowed:
        raise AdapterError(
            f"module of this kind has a {role}, which has no meaning there",
            path=path,
            tensor=parts[role].key,
            got=module,
        )
