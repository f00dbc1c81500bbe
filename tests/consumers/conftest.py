"""Adapters saved by PEFT once for all tests that read them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf_models
import peft_oracle
import pytest
from peft_cases import CASES

# Run as scripts; importing them would put llama.cpp's own gguf in the place of the package.
collect_ignore_glob = ["llama_cpp_*.py", "make_*.py"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are tiny; more threads would only stand in the way of the other workers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a case's name to the folder PEFT saved; not to be changed."""
    root = tmp_path_factory.mktemp("saved-by-peft")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            peft_oracle.save(root / name, CASES[name])
        return root / name

    return folder


@pytest.fixture(scope="session")
def gguf_bases(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return a folder with every tiny model, as transformers and as GGUF; made once a run."""
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if worker_id != "master" else root) / "gguf-bases"
    try:
        shared.with_name("gguf-bases-begun").mkdir()
    except FileExistsError:  # another worker makes them
        for _ in range(1200):
            if shared.exists():
                return shared
            time.sleep(0.1)
        raise
    making = shared.with_name("gguf-bases-unfinished")
    folders = [making / name for name in gguf_models.CONFIGS]
    for folder in folders:
        gguf_models.save(gguf_models.make_model(folder.name), folder)
    gguf_models.convert_bases(folders)
    return making.rename(shared)
