"""Names of files that hold adapters, weights and the state of training: which are which.

They are told by name alone, since on the Hub and in stores of objects nothing else is known before
a download. `contract/file_kinds.py` looks into files that are here.
"""

from __future__ import annotations

import re

ADAPTER_CONFIG = "adapter_config.json"
"""The configuration in folders of PEFT, and in those of MLX."""
PEFT_WEIGHTS = "adapter_model.safetensors"
PICKLED_PEFT_WEIGHTS = "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"
WEIGHTS_OF_PEFT = (PEFT_WEIGHTS, PICKLED_PEFT_WEIGHTS)
WEIGHTS_OF_ADAPTERS = (*WEIGHTS_OF_PEFT, MLX_WEIGHTS)
"""Weights that belong to the folder they are in, and have their configuration beside them."""

PICKLE_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of weights that torch saves: pickles, in zip archives or not."""
WRITTEN_ENDINGS = (".safetensors", ".gguf")
"""Endings of weights that are written here."""
WEIGHT_ENDINGS = (*WRITTEN_ENDINGS, *PICKLE_ENDINGS, ".nemo")
"""Endings of all weights that are read here."""

CARD = "README.md"
"""What the Hub shows of a repository."""
TRAINING_STATE = re.compile(
    r"(?:optimizer|scheduler|scaler|rng_state.*|training_args)\.(?:pt|pth|bin)"
    r"|.*_(?:optim|model)_states\.pt"
)
"""Files that trainers write beside weights, to go on from there."""
MODEL_WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model|pytorch_model|consolidated)[-.\w]*\.(?:safetensors|bin)"
    r"(?:\.index\.json)?"
)
"""Files of a whole model, and what lists them."""


def may_be_adapter(name: str) -> bool:
    """Return whether a file may hold an adapter, as far as its name tells.

    >>> may_be_adapter("style.ckpt"), may_be_adapter("optimizer.pt"), may_be_adapter("model.bin")
    (True, False, False)
    """
    is_other = TRAINING_STATE.fullmatch(name) or MODEL_WEIGHTS.fullmatch(name)
    return name.endswith(WEIGHT_ENDINGS) and not is_other


def without_ending(name: str) -> str:
    """Return the name of a weight file without its ending; other names as they are.

    >>> without_ending("style.safetensors"), without_ending("style-v1.5")
    ('style', 'style-v1.5')
    """
    ending = next((end for end in WEIGHT_ENDINGS if name.lower().endswith(end)), "")
    return name[: len(name) - len(ending)] or name
