"""Adapters of mlx-lm on its own models, with random values, saved as it saves them."""

from __future__ import annotations

import json

import numpy as np


def adapted(model, folder, keys=None):
    """Give all layers of a model adapters of rank 4 and scale 2, and save them into a folder.

    Args:
        model: of mlx-lm; it has the adapters then.
        folder: to be made.
        keys: names of the layers within a block; all that mlx-lm can adapt by default.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0} | (
        {} if keys is None else {"keys": keys}
    )
    linear_to_lora_layers(model, 2, parameters)
    random = np.random.default_rng(0)
    weights = {
        key: mx.array((random.normal(size=value.shape) * 0.1).astype("f4"))
        for key, value in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(weights.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
