"""Makes the golden fixtures of kinds that come as state dicts; run it as a script.

The changes that they must have are written out from their definitions, row by row.

    kinds/NAME/adapter.pt or adapter.safetensors   as its trainer saves it
    kinds/NAME/base.safetensors                    only if the fold needs it
    kinds/NAME/expected.safetensors                MODULE.weight: ΔW
    kinds/NAME/case.json                           {"source", "format", "settings"}
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

KINDS = Path(__file__).parent / "kinds"
HIDDEN, RANK, ALPHA, HEADS, GROUPS, WIDTH, MLP = 6, 2, 8, 4, 2, 4, 5
LAYER = "model.layers.0"


@dataclass(frozen=True)
class Golden:
    """One golden file.

    Attributes:
        format: that reads it.
        tensors: as the trainer saves them.
        deltas: ΔW by module.
        given: settings that the file does not hold.
        suffix: of the file.
        base: weights of the base by module, if the fold needs them.
    """

    format: str
    tensors: dict[str, Any]
    deltas: dict[str, Any]
    given: dict[str, str]
    suffix: str = ".safetensors"
    base: dict[str, Any] = field(default_factory=dict)


class _Numbers:
    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Any:
        return self._generator.standard_normal(shape).astype(np.float32)


def _product(b: Any, a: Any, scale: float) -> Any:
    return scale * (b.astype(np.float64) @ a.astype(np.float64))


def torchtune(random: _Numbers) -> Golden:
    """Rows 2j and 2j + 1 of a head are rows j and j + width/2 of transformers'."""
    a, b = random(RANK, HIDDEN), random(HEADS * WIDTH, RANK)
    name, native = "layers.0.attn.q_proj", _product(b, a, ALPHA / RANK)
    delta = np.empty_like(native)
    for head in range(HEADS):
        for row in range(WIDTH):
            place = row // 2 + (row % 2) * (WIDTH // 2)
            delta[head * WIDTH + place] = native[head * WIDTH + row]
    return Golden(
        "torchtune",
        {f"{name}.lora_a.weight": a, f"{name}.lora_b.weight": b},
        {f"{LAYER}.self_attn.q_proj": delta},
        {"alpha": str(ALPHA), "rope": "interleaved", "num_attention_heads": str(HEADS)},
        ".pt",
    )


def megatron(random: _Numbers) -> Golden:
    """Every group has its queries, its key and its value; the gate is above the up projection."""
    prefix = "decoder.layers.0."
    qkv, fc1 = f"{prefix}self_attention.linear_qkv.adapter", f"{prefix}mlp.linear_fc1.adapter"
    tensors = {}
    for name, out in ((qkv, (HEADS + 2 * GROUPS) * WIDTH), (fc1, 2 * MLP)):
        tensors[f"{name}.linear_in.weight"] = random(RANK, HIDDEN)
        tensors[f"{name}.linear_out.weight"] = random(out, RANK)
    fused, mlp = (
        _product(
            tensors[f"{name}.linear_out.weight"],
            tensors[f"{name}.linear_in.weight"],
            ALPHA / RANK,
        )
        for name in (qkv, fc1)
    )
    rows: dict[str, list[Any]] = {"q": [], "k": [], "v": []}
    heads = iter(np.split(fused, HEADS + 2 * GROUPS))
    for _ in range(GROUPS):
        for leaf in "q" * (HEADS // GROUPS) + "kv":
            rows[leaf].append(next(heads))
    deltas = {f"{LAYER}.self_attn.{leaf}_proj": np.concatenate(rows[leaf]) for leaf in "qkv"}
    return Golden(
        "megatron",
        tensors,
        deltas | {f"{LAYER}.mlp.gate_proj": mlp[:MLP], f"{LAYER}.mlp.up_proj": mlp[MLP:]},
        {
            "alpha": str(ALPHA),
            "num_attention_heads": str(HEADS),
            "num_key_value_heads": str(GROUPS),
            "intermediate_size": str(MLP),
        },
    )


def lorat(random: _Numbers) -> Golden:
    """Thirds of a fused projection, the second without factors, by the rule of rsLoRA."""
    name, tensors = "blocks.0.attn.qkv", {}
    rows = []
    for part in "qkv":
        a, b = random(RANK, HIDDEN), random(HIDDEN, RANK)
        if part == "k":
            rows.append(np.zeros((HIDDEN, HIDDEN)))
            continue
        tensors |= {f"{name}.{part}.lora.A": a, f"{name}.{part}.lora.B": b}
        rows.append(_product(b, a, ALPHA / RANK**0.5))
    root = {"lora_alpha": np.array(ALPHA, np.float32), "use_rslora": np.array(True)}
    return Golden("lorat", tensors | root, {name: np.concatenate(rows)}, {})


def unscaled(random: _Numbers) -> Golden:
    """Plain factors of LoRAFactory."""
    a, b = random(RANK, HIDDEN), random(4, RANK)
    return Golden(
        "lorafactory",
        {"layers.0.q.weight_a": a, "layers.0.q.weight_b": b},
        {"layers.0.q": _product(b, a, ALPHA / RANK)},
        {"alpha": str(ALPHA), "variant": "lora"},
        ".pt",
    )


def _ldu(random: _Numbers) -> tuple[Any, Any, Any, Any]:
    """Return P, L, D and U of a weight (6, 6) whose pivots are beyond doubt."""
    lower = np.tril(np.tanh(random(HIDDEN, HIDDEN)) * 0.8, -1) + np.eye(HIDDEN)
    upper = np.triu(random(HIDDEN, HIDDEN), 1) + np.eye(HIDDEN)
    diagonal = np.sign(random(HIDDEN)) * (1 + np.abs(random(HIDDEN)))
    return np.eye(HIDDEN)[[3, 0, 4, 2, 5, 1]], lower, diagonal, upper


_LOLDU = "layers.0.q.parametrizations.weight."


def loldu(random: _Numbers) -> Golden:
    """A trained diagonal, of the base's own decomposition."""
    permutation, lower, diagonal, upper = _ldu(random)
    z = (diagonal[:RANK] + random(RANK)).astype(np.float32)
    change = np.diag(z - diagonal[:RANK])
    return Golden(
        "loldu",
        {f"{_LOLDU}0.vector_z": z},
        {"layers.0.q": ALPHA / RANK * permutation @ lower[:, :RANK] @ change @ upper[:RANK]},
        {"alpha": str(ALPHA), "init_method": "lu"},
        base={"layers.0.q": permutation @ lower @ np.diag(diagonal) @ upper},
    )


def loldu_full(random: _Numbers) -> Golden:
    """A residual and trained factors, with a scale that was trained, too."""
    permutation, lower, diagonal, upper = _ldu(random)
    weight = permutation @ lower @ np.diag(diagonal) @ upper
    left, right = permutation @ lower[:, :RANK], upper[:RANK]
    start, z, scale = random(RANK), random(RANK), np.array(3.5, np.float32)
    residual = weight - ALPHA / RANK * left @ np.diag(start) @ right
    tensors = {
        "original": residual, "0.vector_z": z, "0.lora_A": right, "0.lora_B": lower[:, :RANK],
        "0.P": permutation, "0.scaling_factor": scale,
    }  # fmt: skip
    return Golden(
        "loldu",
        {_LOLDU + name: np.ascontiguousarray(v, np.float32) for name, v in tensors.items()},
        {"layers.0.q": residual + 3.5 * left @ np.diag(z) @ right - weight},
        {},
        base={"layers.0.q": weight},
    )


def randlora_authors(random: _Numbers) -> Golden:
    """An MLP of GPT-2: the elements in order, though the sides are the other way round."""
    inner, count = 2 * HIDDEN, 4
    a, b = random(1, RANK, HIDDEN + 1), random(count, inner + 1, RANK)
    tensors, deltas = {}, {}
    for name, (in_, out) in (("h.c_fc", (HIDDEN, inner)), ("h.c_proj", (inner, HIDDEN))):
        lambdas, gammas = random(count, RANK), random(count, HIDDEN)
        product = np.zeros((inner, HIDDEN))
        for row in range(inner):
            for place in range(count * RANK):
                left = b[place // RANK, row, place % RANK]
                summand, direction = place % count, place // count
                product[row] += left * (
                    lambdas[summand, direction] * a[0, direction, :HIDDEN] * gammas[summand]
                ).astype(np.float64)
        stored = ALPHA / RANK / count**0.5 * product.reshape(in_, out)
        deltas[name] = stored.T
        tensors |= {
            f"{name}.randlora_lambda": lambdas,
            f"{name}.randlora_gamma": gammas,
            f"{name}.basis_a": a,
            f"{name}.basis_b": b,
        }
    base = {name: np.zeros_like(delta.T) for name, delta in deltas.items()}
    return Golden("randlora", tensors, deltas, {"alpha": str(ALPHA)}, ".pt", base)


# In the order in which they were added, which their numbers derive from.
_MAKERS = (loldu, loldu_full, lorat, megatron, torchtune, unscaled, randlora_authors)


def all_golden() -> dict[str, Golden]:
    """Return every fixture by the name of its kind."""
    return {make.__name__: make(_Numbers(seed)) for seed, make in enumerate(_MAKERS)}


def main() -> None:
    """Write the fixtures."""
    import torch

    for name, golden in all_golden().items():
        folder = KINDS / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"adapter{golden.suffix}"
        if golden.suffix == ".pt":
            torch.save({k: torch.from_numpy(v) for k, v in golden.tensors.items()}, path)
        else:
            save_file(golden.tensors, path)
        for file, values in (("expected", golden.deltas), ("base", golden.base)):
            if values:
                named = {f"{k}.weight": np.ascontiguousarray(v, "f4") for k, v in values.items()}
                save_file(named, folder / f"{file}.safetensors")
        text: dict[str, Any] = {"source": f"definition of {name}", "format": golden.format}
        text |= {"settings": golden.given} if golden.given else {}
        (folder / "case.json").write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
