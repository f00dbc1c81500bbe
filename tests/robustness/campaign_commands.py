"""The commands that write, on small inputs, for campaigns of faults and signals.

Words are relative to a folder that holds `in`, which `make_inputs` fills, and `out`, whose content
may change. `{n}` is 1 for the old output and 2 for the new one, so that they differ.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from loratools.cli import cli

EXAMPLES = Path(__file__).parents[2] / "examples"
PREFIX = "model.layers.{}.self_attn.{}_proj"
RANK, IN, OUT = 4, 24, 32
RECIPE = """version: 1
steps:
- {{name: small, do: squeeze, source: lora, rank: {n}}}
- {{name: both, do: merge, adapters: ["${{small}}", rslora], rank: 2}}
"""

COMMANDS = {
    "squeeze": "squeeze in/lora -o out/x --rank {n}",
    "squeeze, a file": "squeeze in/single.safetensors -o out/x.safetensors --rank {n}",
    "merge": "merge in/lora in/rslora -o out/x --rank {n} --save-recipe out/r.yaml",
    "merge, by entries": "merge in/lora in/rslora -o out/x --method ties --rank {n}",
    "to-lora": "to-lora in/dora --base in/model -o out/x --rank {n}",
    "to-dora": "to-dora in/lora{n} --base in/model -o out/x",
    "extract": "extract in/model in/fused -o out/x --rank {n} --base-name tiny",
    "convert, to a folder": "convert in/lora{n} -o out/x --to mlx",
    "convert, to a file": "convert in/lora{n} -o out/x.gguf --to gguf --base in/model",
    "fuse": "fuse in/model in/lora:{n} -o out/x",
    "quantize": "quantize in/model{n} -o out/x",
    "dequantize": "dequantize in/four{n} -o out/x",
    "repair": "repair in/lora{n} --base in/model -o out/x --rebalance",
    "run": "run in/recipe{n}.yaml -o out/x",
    "replay": "replay in/made{n} -o out/x",
    "check": "check in/lora{n} --write-baseline out/x.json",
    "spectrum": "spectrum in/lora{n} --html out/x.html",
    "compare": "compare in/lora{n} in/rslora --html out/x.html",
    "fleet share": "fleet share in/lora in/lora{n} in/rslora -o out/x.safetensors --rank 2",
    "fleet add": "fleet add in/shared1.safetensors in/lora{n} --name more -o out/x.safetensors",
    "fleet unshare": "fleet unshare in/shared{n}.safetensors --all -o out/x",
    "push": "push in/made{n} me/made --create --fail-on never",
}

IN_PARTS = {"merge": 1, "run": 2}
"""Commands that write several outputs, each of them whole, and how deep those lie."""

# `fleet index` is not among them: it leaves out what cannot be read, tells it, and ends with 1.

NEVER_REPLACES = {"replay", "check"}
"""Commands without --overwrite."""


def run(words: str) -> None:
    """Run a command in this process."""
    cli.main(words.split(), standalone_mode=False)


def _adapter(folder: Path, seed: int, **config: object) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(2):
        for name in "qk":
            key = "base_model.model." + PREFIX.format(layer, name)
            tensors[f"{key}.lora_A.weight"] = rng.standard_normal((RANK, IN)).astype("f4")
            tensors[f"{key}.lora_B.weight"] = rng.standard_normal((OUT, RANK)).astype("f4")
            if config.get("use_dora"):
                tensors[f"{key}.lora_magnitude_vector"] = np.ones(OUT, "f4")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, **config}
    values["target_modules"] = ["k_proj", "q_proj"]
    values["base_model_name_or_path"] = "tiny"
    (folder / "adapter_config.json").write_text(json.dumps(values))


def _model(folder: Path, seed: int) -> None:
    """Write a base of two shards, with its index and a tokenizer."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    folder.mkdir()
    listed = {}
    for layer in range(2):
        file = f"model-{layer + 1:05d}-of-00002.safetensors"
        tensors = {
            f"{PREFIX.format(layer, name)}.weight": rng.standard_normal((OUT, IN)).astype("f2")
            for name in "qk"
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 4 * OUT * IN * 2}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": IN,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2,
        "head_dim": OUT // 4,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")


def make_inputs(folder: Path, chdir: Callable[[Path], None]) -> None:
    """Fill the folder `in` of a folder, which becomes the working directory."""
    given = folder / "in"
    given.mkdir(parents=True)
    chdir(folder)
    _adapter(given / "lora", 0)
    _adapter(given / "rslora", 1, use_rslora=True)
    _adapter(given / "dora", 2, use_dora=True)
    shutil.copyfile(EXAMPLES / "tiny-flux" / "kohya.safetensors", given / "single.safetensors")
    _model(given / "model", 3)
    run("fuse in/model in/lora -o in/fused -q")
    for n in (1, 2):
        _adapter(given / f"lora{n}", 10 + n)
        _model(given / f"model{n}", 20 + n)
        run(f"quantize in/model{n} -o in/four{n} -q")
        run(f"squeeze in/lora -o in/made{n} --rank {n} -q")
        share = f"fleet share in/lora in/rslora -o in/shared{n}.safetensors --rank {n} -q"
        run(share)
        (given / f"recipe{n}.yaml").write_text(RECIPE.format(n=n))
