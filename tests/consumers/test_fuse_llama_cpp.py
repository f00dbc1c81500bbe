"""Fused checkpoints through llama.cpp's own converter say what PEFT says with the live adapter."""

import gguf_models
import numpy as np
import pytest

from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_converted_by_llama_cpp(tmp_path):
    names = ("llama", "gpt2", "qwen3moe")
    folders, wanted = [], []
    for name in names:
        base, adapter = tmp_path / f"{name}-base", tmp_path / f"{name}-adapter"
        gguf_models.save(gguf_models.make_model(name), base)
        model = gguf_models.adapted(
            gguf_models.make_model(name), **gguf_models.variants(name)["plain"]
        )
        wanted.append(gguf_models.expected(model))
        model.save_pretrained(adapter, save_embedding_layers=False)
        folders.append(tmp_path / f"{name}-fused")
        inputs = [FuseInput(read_adapter(adapter), 1.0, "adapter")]
        Fusion(read_checkpoint(base), inputs, FuseOptions()).write(folders[-1])
    gguf_models.convert_bases(folders)
    for name, folder, want in zip(names, folders, wanted, strict=True):
        (got,) = gguf_models.from_llama_cpp(folder / "model.gguf", [], [[]])
        untouched = gguf_models.expected(gguf_models.make_model(name))
        assert np.abs(got - want).max() < (5e-3 if name in gguf_models.GELU else 1e-4), name
        assert np.abs(want - untouched).max() > 0.05, name
