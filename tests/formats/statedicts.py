"""State dicts as training code saves them, made by hand, and what comes of folding them."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule
from loratools.operations.to_lora import to_lora
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint


def saved(path, tensors):
    """Save a state dict, pickled unless it is to be safetensors, and return its path."""
    if path.suffix == ".safetensors":
        save_file({key: np.asarray(value) for key, value in tensors.items()}, path)
        return path
    import torch

    torch.save({key: torch.from_numpy(np.asarray(value)) for key, value in tensors.items()}, path)
    return path


def base_of(folder, weights, **config):
    """Save a base model of some weights, by module, and return it opened."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    named = {f"{module}.weight": np.asarray(value, "f4") for module, value in weights.items()}
    save_file(named, folder / "model.safetensors")
    return read_checkpoint(folder)


def deltas_of(path, shapes, *, base=None, rule=None, **given):
    """Return ΔW in float64 of every module of a file, folded, and the result."""
    texts = {name: str(value) for name, value in given.items()}
    result = to_lora(read_adapter(path), rule or RankRule(), base=base, given=texts)
    modules = result.adapter.modules
    assert set(modules) == set(shapes)
    return {n: effective_delta(n, modules[n], shape) for n, shape in shapes.items()}, result


def close(got, want, relative=1e-6):
    assert np.linalg.norm(got - want) <= relative * np.linalg.norm(want)
