"""Fixtures that many tests share, and the fast tier: `pytest --fast`, `make test-fast`.

The fast tier leaves out every test marked `slow` and the folders NOT_FAST, and skips every test and
every file that imports one of the libraries which judge our outputs: they take seconds to import.
Outputs are not flushed to the disk.
"""

import importlib.abc
import json
import os
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

# A name that is no path may be one on the Hub; tests/hub has its own, and nothing else asks.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Lines of progress come after a second, which a busy machine may or may not take.
os.environ.setdefault("LORATOOLS_PROGRESS", "never")
# Digests of weights are kept for the next run, but not in the home of whoever runs the tests.
os.environ.setdefault("LORATOOLS_CACHE", tempfile.mkdtemp(prefix="loratools-cache-"))

# What runs the workers may have loaded readline, which sets these for all its children.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)

# Tests with other libraries, and tests of whole programs that are stopped, starved or fed rubbish.
NOT_FAST = {Path(__file__).parent / name for name in ("consumers", "fuzz", "robustness")}
HEAVY = {
    "accelerate", "bitsandbytes", "diffusers", "kubernetes_validate", "loralib", "lycoris",
    "mergekit", "mlx", "mlx_lm", "peft", "playwright", "transformers", "xllamacpp",
}  # fmt: skip
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f64": np.float64}


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="leave out slow tests; see conftest.py")
    parser.addoption("--models", action="store_true", help="test every class of transformers")


def pytest_report_header():
    """Name OpenBLAS' kernel, on which the last bits of every product depend."""
    from threadpoolctl import threadpool_info

    kernels = {i["architecture"] for i in threadpool_info() if i["internal_api"] == "openblas"}
    return f"matrix kernel: {', '.join(sorted(kernels)) or 'not of OpenBLAS'}"


class Skipping(importlib.abc.MetaPathFinder):
    """Skips whatever imports a heavy library."""

    def find_spec(self, name, *_):
        library = name.partition(".")[0]
        if library in HEAVY:
            pytest.skip(f"{library} is not imported in the fast tier", allow_module_level=True)


def pytest_configure(config):
    if config.getoption("fast"):
        sys.meta_path.insert(0, Skipping())
        os.fsync = _unwaited


def _unwaited(descriptor):
    """Stand for `os.fsync`, whose calls tests count, without waiting for the disk."""
    os.fstat(descriptor)


def pytest_ignore_collect(collection_path, config):
    return True if config.getoption("fast") and collection_path in NOT_FAST else None


def pytest_collection_modifyitems(config, items):
    if config.getoption("fast"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture
def make_folder(tmp_path):
    """Return a function that writes a PEFT folder.

    modules maps a path to (out, in, rank); config entries override r = 8, lora_alpha = 16.
    """

    def make(name="adapter", modules=None, *, dtype="bf16", seed=0, extra=None, **config):
        rng = np.random.default_rng(seed)
        tensors = {}
        for path, (out, in_, rank) in (modules or {"layers.0.q": (24, 20, 8)}).items():
            decay = 0.6 ** np.arange(rank)
            a, b = rng.standard_normal((rank, in_)), rng.standard_normal((out, rank)) * decay
            prefix = f"base_model.model.{path}"
            tensors[f"{prefix}.lora_A.weight"] = a.astype(DTYPES[dtype])
            tensors[f"{prefix}.lora_B.weight"] = b.astype(DTYPES[dtype])
        tensors |= extra or {}
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]} | config
        (folder / "adapter_config.json").write_text(json.dumps(values))
        return folder

    return make
