"""A base of several shards and an adapter of it; the dense fuse of the placement tests, too."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "placement"))

import fuse_cases as cases
from fuse_cases import EMBED, HEAD, UP, matrix


@pytest.fixture
def sharded(tmp_path):
    """A base of three shards: one touched, one half, one not; and files of all kinds beside it."""
    shards = {
        "model-00001-of-00003.safetensors": {
            EMBED: matrix(1, 40, 16), f"{UP.format(0)}.weight": matrix(2, 24, 16),
        },
        "model-00002-of-00003.safetensors": {f"{UP.format(1)}.weight": matrix(3, 24, 16)},
        "model-00003-of-00003.safetensors": {
            "model.norm.weight": matrix(4, 16), "steps": np.arange(3), HEAD: matrix(5, 40, 16),
        },
    }  # fmt: skip
    base = cases.base(tmp_path / "base", shards, vocab_size=40, tie_word_embeddings=False)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "README.md"):
        (base / name).write_text(f"the {name}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    return base


@pytest.fixture
def ups(tmp_path):
    rng = np.random.default_rng(6)
    return cases.adapter(
        tmp_path / "ups", {UP.format(i): cases.factors(rng, 24, 16, 2) for i in range(2)}
    )
