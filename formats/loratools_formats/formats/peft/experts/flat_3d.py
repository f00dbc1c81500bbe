"""PEFT's two names for stacked parameters, with an axis for the experts: vLLM's 3-D pairs.

`experts.base_layer` is gate_up, or up where there is no gate, and `experts` is down, as in PEFT.
A is (E, r, in) and B is (out, r, E), so both are PEFT's own bytes seen with another shape.
Megatron-Bridge writes them (pull 5939, `stack_3d_moe`), and vLLM reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools_formats.core.adapter import ExpertLayout
from loratools_formats.core.peft_facts import NESTED
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.peft.experts.layout import (
    JOINED,
    UP,
    A,
    B,
    Layout,
    Plain,
    factor,
    named,
    with_targets,
)

_OWNERS = (".experts", f".experts{NESTED}")


def _is_one(name: str, tensor: TensorRef) -> bool:
    found = factor(name)
    return found is not None and len(tensor.shape) == 3 and f".{found[0]}".endswith(_OWNERS)


def _claims(tensors: Mapping[str, TensorRef]) -> bool:
    return any(_is_one(name, tensor) for name, tensor in tensors.items())


def _read(found: Plain, folder: Path) -> Plain:
    made = {name: t for name, t in found.tensors.items() if not _is_one(name, t)}
    pairs: dict[str, dict[str, TensorRef]] = {}
    for name, tensor in found.tensors.items():
        if name not in made:
            path, part = factor(name) or ("", "")
            pairs.setdefault(path, {})[part] = tensor
    stacks: dict[str, str] = {}
    stated = found.values.get("target_parameters")
    for path, parts in pairs.items():
        a, b = parts.get(A), parts.get(B)
        if a is None or b is None or (a.shape[0], a.shape[1]) != (b.shape[2], b.shape[1]):
            raise AdapterError(
                "expert factors do not fit together",
                path=folder,
                tensor=path,
                got=" and ".join(str(list(t.shape)) for t in parts.values()),
                expected="lora_A (E, r, in) and lora_B (out, r, E)",
            )
        experts, rank, in_ = a.shape
        made[named(path, A)] = a.reshaped((experts * rank, in_))
        made[named(path, B)] = b.reshaped((b.shape[0], rank * experts))
        owner = path.removesuffix(NESTED)
        alone = path == owner and f"{owner}{NESTED}" not in pairs
        if alone and not stated:
            raise UnsupportedError(
                "one parameter of a stack alone, and the config does not say which",
                path=folder,
                tensor=path,
                expected="target_parameters with its name",
                hint=f'Add target_parameters: ["{owner}.down_proj"], or gate_up_proj, to '
                "adapter_config.json",
            )
        leaf = JOINED[1] if path == owner else _inward(b, pairs.get(owner, {}).get(A))
        stacks[path] = "" if stated else f"{owner}.{leaf}"
    return Plain(
        with_targets(found.values, made, stacks),
        made,
        found.straight | stacks.keys(),
        ExpertLayout(LAYOUT.name, "stacked parameters with an axis for the experts (shapes tell)"),
    )


def _inward(b: TensorRef, down: TensorRef | None) -> str:
    """Return the parameter that maps into the experts, which down's inputs tell.

    Args:
        b: its (out, r, E).
        down: A of the other parameter, (E, r, in); None if it is not adapted.
    """
    has_gate = down is None or b.shape[0] != down.shape[2]
    return JOINED[0] if has_gate else UP


LAYOUT = Layout("flat-3d", _claims, _read)
