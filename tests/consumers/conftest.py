"""Adapters saved by PEFT once for all tests that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import peft_oracle
import pytest
from peft_cases import CASES


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
