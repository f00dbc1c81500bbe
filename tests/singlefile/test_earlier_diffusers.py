"""diffusers 0.39, which scales modules by r / r_max where a file does not state their ranks.

`make` installs it into a folder of the environment (`tests/earlier.txt`). What the installed
diffusers makes of mixed ranks is in test_diffusers.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt

FOLDER = Path(sys.prefix) / "earlier"
NAMES = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.ffn.net.2")
PROGRAM = """
import pathlib, sys, numpy, diffusers
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin as Loader
from peft.tuners.lora import LoraLayer

for path in sys.argv[1:]:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=8, ffn_dim=40, num_layers=1,
    )
    place = pathlib.Path(path)
    state, metadata = Loader.lora_state_dict(
        str(place.parent), weight_name=place.name, return_lora_metadata=True
    )
    Loader.load_lora_into_transformer(state, model, metadata=metadata)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            ((key, a),) = layer.lora_A.items()
            b = layer.lora_B[key].weight.detach().double()
            found[name] = (layer.scaling[key] * b @ a.weight.detach().double()).numpy()
    numpy.savez(path + ".npz", version=diffusers.__version__, **found)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (FOLDER / "diffusers").is_dir(),
    reason="make installs diffusers 0.39 beside the present one",
)
def test_mixed_ranks_keep_their_change(tmp_path):
    generator, tensors = np.random.default_rng(0), {}
    for name, decay, columns in zip(NAMES, (0.9, 0.5, 0.2), (16, 16, 40), strict=True):
        b = generator.standard_normal((16, 6)) * decay ** np.arange(6)
        tensors[f"transformer.{name}.lora_B.weight"] = b.astype("f4")
        a = generator.standard_normal((6, columns))
        tensors[f"transformer.{name}.lora_A.weight"] = a.astype("f4")
    source, bare = tmp_path / "source.safetensors", tmp_path / "bare.safetensors"
    save_file(tensors, source)
    made = {
        "energy": {"energy": 0.99},
        "budget": {"budget": "3kB"},
        "kept": {"energy": 0.99, "keep_alpha": True},
    }
    paths = {}
    for title, options in made.items():
        paths[title] = tmp_path / f"{title}.safetensors"
        lt.squeeze(source, output=paths[title], **options)
    save_file(load_file(paths["energy"]), bare)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, paths.values()), str(bare)],
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        check=True,
        capture_output=True,
    )
    for path in paths.values():
        adapter, found = lt.read(path), np.load(f"{path}.npz")
        assert len({change.rank for change in adapter.modules.values()}) > 1
        assert str(found["version"]) == "0.39.0"
        for name in NAMES:
            wanted = lt.delta(adapter, f"transformer.{name}")
            np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6)
    adapter, found = lt.read(bare), np.load(f"{bare}.npz")  # whose ranks nothing states
    ratios = [
        np.linalg.norm(found[name]) / np.linalg.norm(lt.delta(adapter, f"transformer.{name}"))
        for name in NAMES
    ]
    assert max(ratios) / min(ratios) > 1.1
