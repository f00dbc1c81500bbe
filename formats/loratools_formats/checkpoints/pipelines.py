"""Diffusion pipelines in diffusers' form: a `model_index.json`, and a folder for each component."""

from __future__ import annotations

from pathlib import Path

from loratools_formats.checkpoints.checkpoint import checkpoint_names
from loratools_formats.checkpoints.no_checkpoint import PIPELINE_INDEX, is_weights
from loratools_formats.disk.errors import AdapterError, MissingFileError

ADAPTED = (
    "unet", "transformer", "transformer_2", "prior", "decoder", "connectors",
    "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4",
)  # fmt: skip
"""Folders of the components that adapters change."""


def is_pipeline(path: Path) -> bool:
    """Return whether a path is the folder of a diffusers pipeline."""
    return (path / PIPELINE_INDEX).is_file()


def component_folders(path: Path) -> list[str]:
    """Return the folders of a pipeline's components that adapters change.

    Raises:
        AdapterError: it has none.
    """
    found = [name for name in ADAPTED if (path / name).is_dir()]
    if not found:
        raise AdapterError(
            "the pipeline has no component that adapters change",
            path=path,
            expected=", ".join(ADAPTED),
        )
    return found


def weighted_folders(path: Path) -> list[str]:
    """Return all folders of a pipeline that hold weights as safetensors, by their usual names."""
    return sorted(
        folder.name
        for folder in path.iterdir()
        if folder.is_dir() and any(map(is_weights, folder.iterdir()))
    )


def pipeline_names(path: Path) -> list[str]:
    """Return the names of a pipeline's tensors, each with its component's folder before it.

    Text encoders that are not there, or not as safetensors, are left out.

    Raises:
        MissingFileError: a denoiser is not there.
        AdapterError: malformed.
    """
    names: list[str] = []
    for folder in component_folders(path):
        try:
            names += (f"{folder}.{key}" for key in checkpoint_names(path / folder))
        except MissingFileError:
            if not folder.startswith("text_encoder"):
                raise
    return names
