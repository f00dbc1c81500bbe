"""Adapters taken out of a shared set, loaded by PEFT onto their real base.

PEFT's own changes of the adapters that went in are projected densely onto the bases that the file
holds; PEFT's changes of what came out must be those.
"""

from __future__ import annotations

import numpy as np
import peft_oracle as oracle
import pytest
from peft_cases import Case
from peft_models import EXAMPLES
from safetensors.numpy import load_file

import loratools as lt

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]
LLAMA = Case("tiny_llama", {})


@pytest.mark.parametrize("cores", ["full", "diagonal"])
def test_peft_loads_what_the_set_holds(cores, tmp_path):
    names = ["lora", "rslora"]
    shared = tmp_path / "set.safetensors"
    paths = [EXAMPLES / "tiny-llama" / name for name in names]
    done = lt.fleet_share(paths, cores=cores, rank=24, clusters=1, dtype="f32", output=shared)
    lt.fleet_unshare(shared, all=True, output=tmp_path / "out")
    held = load_file(shared)
    for place, name in enumerate(names):
        before = oracle.peft_deltas(oracle.loaded(paths[place], LLAMA))
        after = oracle.peft_deltas(oracle.loaded(tmp_path / "out" / name, LLAMA))
        lost = whole = 0.0
        for weight, expected in before.items():
            module = weight.removesuffix(".weight")
            u, v = (held[f"basis.0.{side}.{module}"].astype(np.float64) for side in "uv")
            core = held[f"cores.0.{module}"][place].astype(np.float64)
            stored = u @ (np.diag(core) if core.ndim == 1 else core) @ v
            size = np.linalg.norm(stored)
            assert np.linalg.norm(after[weight] - stored) <= 4 * 2.0**-24 * size
            if cores == "full":
                best = u @ np.linalg.pinv(u) @ expected @ np.linalg.pinv(v) @ v
                assert np.linalg.norm(stored - best) <= 1e-6 * np.linalg.norm(expected)
            lost += np.sum((after[weight] - expected) ** 2)
            whole += np.sum(expected**2)
        assert done.adapters[place].relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
