"""Whole diffusion pipelines read as one checkpoint: tensors by their component and their name.

A pipeline is a folder with a `model_index.json`, and a folder for each component. Only components
that adapters change are read. Each is dequantised by its own configuration; the whole has none.
"""

from __future__ import annotations

import os
from pathlib import Path

from loratools.base.dequantised import dequantised
from loratools_formats.checkpoints.checkpoint import Checkpoint, read_checkpoint
from loratools_formats.checkpoints.pipelines import component_folders, is_pipeline
from loratools_formats.disk.errors import MissingFileError


def read_base(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, or the components of a pipeline as one, whose tensors are plain.

    Raises:
        LoratoolsError: nothing there, or malformed.
    """
    target = Path(path)
    if not is_pipeline(target):
        return read_checkpoint(target)
    parts: dict[str, Checkpoint] = {}
    for name in component_folders(target):
        try:
            parts[name] = read_checkpoint(target / name)
        except MissingFileError:
            if not name.startswith("text_encoder"):  # often not downloaded, or pickled
                raise
    tensors = {
        f"{name}.{key}": tensor.renamed(f"{name}.{key}")
        for name, part in parts.items()
        for key, tensor in dequantised(part).checkpoint.tensors.items()
    }
    return Checkpoint(
        target,
        tensors,
        {},
        tuple(file for part in parts.values() for file in part.files),
        read=tuple(file for part in parts.values() for file in part.read),
        components=tuple(parts),
    )
