"""Idle threads that take rows of one module change no byte of what is written."""

import contextlib

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools.work import parallel

SHAPE = 640, 1100  # several blocks of rows in every pass, and no small matrix
METHODS = ["ties", "dare_ties", "della", "breadcrumbs", "magnitude_prune", "sce", "knots"]


@pytest.fixture
def lent(monkeypatch):
    """Record how many threads are lent."""
    seen, borrowed = [], parallel._Team.borrowed

    @contextlib.contextmanager
    def recorded(team):
        with borrowed(team) as share:
            seen.append(share)
            yield share

    monkeypatch.setattr(parallel._Team, "borrowed", recorded)
    return seen


@pytest.fixture
def adapters(make_folder):
    modules = {"model.layers.0.mlp.down_proj": (*SHAPE, 4)}
    settings = {"r": 4, "target_modules": ["down_proj"]}
    return [make_folder(f"adapter-{n}", modules, seed=n, **settings) for n in range(3)]


def written(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_merges(adapters, tmp_path, method, lent):
    for workers in (1, 4):
        out = tmp_path / f"{workers}"
        lt.merge(adapters, method=method, rank=6, workers=workers, output=out)
    assert written(tmp_path / "1") == written(tmp_path / "4")
    assert max(lent) == 3


def test_extract(tmp_path, lent):
    rng = np.random.default_rng(0)
    old = rng.standard_normal(SHAPE).astype(np.float32)
    for name, values in (("old", old), ("new", old + rng.standard_normal(SHAPE, np.float32) / 64)):
        (tmp_path / name).mkdir()
        weights = {"model.layers.0.mlp.down_proj.weight": values}
        save_file(weights, tmp_path / name / "model.safetensors")
    for workers in (1, 4):
        out = tmp_path / f"{workers}"
        lt.extract(tmp_path / "old", tmp_path / "new", rank=6, workers=workers, output=out)
    assert written(tmp_path / "1") == written(tmp_path / "4")
    assert max(lent) == 3
