"""A dense float64 fuse of placements, for tests: as plain as can be, with none of the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from loratools.base.placement import Placements, place
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.contract.files import read_adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.dtypes import Array


def fused(base: Path, adapter: Path, out: Path) -> Placements:
    """Write a checkpoint with an adapter's changes; return what `place` said."""
    placements = place(read_adapter(adapter), read_checkpoint(base))
    tensors = {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}
    out.mkdir()
    save_file(applied(placements, tensors), out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", out)
    if placements.untied:
        config = json.loads((out / "config.json").read_text())
        for part in (config, config.get("text_config")):
            if part is not None:
                part["tie_word_embeddings"] = False
        (out / "config.json").write_text(json.dumps(config))
    return placements


def applied(placements: Placements, tensors: dict[str, Array]) -> dict[str, Array]:
    """Return a checkpoint's tensors after the changes, in float64."""
    new = {name: array.copy() for name, array in tensors.items()}
    for key, source in placements.untied.items():
        assert key not in new
        new[key] = tensors[source].copy()
    for key, replacement in placements.replacements:
        values = replacement.tensor.load(np.float64)
        if replacement.kind == "token_rows":
            new[key][list(replacement.rows)] = values
        else:
            new[key] = values.copy()
    for p in placements.deltas:
        stored = new[p.key] if p.plane is None else new[p.key][p.plane]
        stored[...] = _changed(stored, p)
    for p in placements.biases:
        change = p.scale * p.bias.load(np.float64)
        outputs = _indices(p.outputs, new[p.key].shape[0])
        new[p.key][outputs] += change[_indices(p.rows, len(change))]
    return new


def _changed(stored: Array, p: Any) -> Array:
    shape = stored.shape
    kind = p.delta.require_factors().layer.kind
    if kind == "conv":
        stored = stored.reshape(shape[0], -1)
    weight = np.swapaxes(stored, -1, -2) if p.transposed else stored
    weight = weight.copy()
    change = _delta(p.delta, p.expert)
    rows = _indices(p.rows, change.shape[-2])
    outputs = _indices(p.outputs, weight.shape[-2])
    change = change[..., rows, :]
    if p.delta.is_dora:
        whole = weight[outputs] + change
        magnitude = p.delta.magnitude.load(np.float64).reshape(-1)[rows]
        norm = np.linalg.norm(whole, axis=1)
        weight[outputs] = (magnitude / norm)[:, None] * whole
    else:
        weight[..., outputs, :] += change
    weight = np.swapaxes(weight, -1, -2) if p.transposed else weight
    return weight.reshape(shape)


def _delta(delta: ModuleChange, expert: int | None) -> Array:
    part = delta.require_factors()
    a, b = part.a.load(np.float64), part.b.load(np.float64)
    if expert is not None:
        a, b = a[expert], b[expert]
    return part.scale * (b @ a)


def _indices(spans: Any, whole: int) -> Array:
    return np.concatenate([np.arange(*span) for span in spans or ((0, whole),)])
