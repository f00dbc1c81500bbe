"""Run the bundled tiny Llama in llama.cpp, without and with its adapter.

Writes the base model as GGUF, converts the adapter with `loratools convert`, fuses it with
`loratools fuse`, and lets llama.cpp continue a text with each. Needs the packages `gguf` and
`xllamacpp`:

    python examples/tiny_llama_gguf.py --out tiny-llama-gguf
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.formats.gguf.architectures import ARCHITECTURES, Sizes

HERE = Path(__file__).parent / "tiny-llama"
PROMPT = "The heart of the wise"
TOKENS = 40
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_tensor(key: str, values: np.ndarray, sizes: Sizes) -> tuple[str, np.ndarray]:
    """Return the GGUF name of a weight of the base, and its rows in llama.cpp's order."""
    path = key.removesuffix(".weight")
    if path == "model.norm":
        return "output_norm.weight", values
    found = ARCHITECTURES["llama"].module(path)
    if found is None:
        _, _, block, norm = path.split(".")
        return f"blk.{block}.{NORMS[norm]}.weight", values
    module, _ = found
    (order,) = module.rows(len(values), sizes)
    return f"{module.tensors[0]}.weight", np.ascontiguousarray(values[order])


def write_base(folder: Path, out: Path) -> None:
    """Write a transformers Llama with a byte-level tokenizer as GGUF, in 32-bit floats."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type("model")
    writer.add_name("tiny-llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    vocabulary = tokenizer["model"]["vocab"]
    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    kinds = [gguf.TokenType.NORMAL] * len(vocabulary)
    for token in special:
        kinds[token] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    sizes = Sizes(heads, config["num_key_value_heads"], hidden, hidden // heads)
    for key, tensor in read_checkpoint(folder).tensors.items():
        writer.add_tensor(*gguf_tensor(key, tensor.load(np.float32), sizes))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loratools(*arguments: object) -> None:
    """Run a command of loratools."""
    code = "from loratools.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)


def continued(model: Path, adapter: Path | None = None) -> str:
    """Return what llama.cpp writes after the prompt."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 256
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = False
    parameters.fit_params = False
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(parameters)
    body = {"prompt": PROMPT, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.listening_address}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return str(json.load(response)["content"])


def main() -> None:
    """Write the files and print the texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tiny-llama-gguf"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    base, adapter, fused = out / "base.gguf", out / "lora.gguf", out / "fused.gguf"
    write_base(HERE / "model", base)
    loratools("convert", HERE / "lora", adapter, "--base", base, "--overwrite", "--quiet")
    loratools("fuse", base, HERE / "lora", "-o", fused, "--overwrite", "--quiet")
    for title, text in (
        ("base", continued(base)),
        ("with adapter", continued(base, adapter)),
        ("fused", continued(fused)),
    ):
        print(f"{title}: {' '.join((PROMPT + text).split())}")


if __name__ == "__main__":
    main()
