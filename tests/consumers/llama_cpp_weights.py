"""Put the weights of whole folders through llama.cpp's own converter classes; run as a script.

Arguments: pairs of a folder of a model, and the path of an npz to write (weights by GGUF names).
"""

import logging
import sys
from pathlib import Path

import make_gguf_rows
import numpy as np

if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        architecture, made, _ = make_gguf_rows.converted(Path(folder))
        np.savez(out, architecture=np.array(architecture), **made)
