"""Small real files of every format, to be mutated; made from what lies in the repository."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import loratools
from loratools.cli import cli

_OF_TRAINERS = {"kohya_sd15", "kohya_flux", "lycoris", "musubi_wan"}
TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
LLAMA = TESTS.parent / "examples" / "tiny-llama"
RECIPE = """version: 1
method: ties
parameters: {density: 0.3}
adapters:
- {path: one, weight: 0.6}
- {path: one, weight: -0.4}
ranks: {rank: 2, patterns: [[q_proj, 1]]}
compute: {seed: 3}
overrides:
- {match: 'layers\\.[01]\\.', weights: [0.3, 0.7]}
"""
STEPS = """version: 1
variables: {rank: 1, base: base}
steps:
- {name: small, do: squeeze, source: one, rank: "${rank}"}
- {name: both, do: merge, adapters: [{path: "${small}", weight: 0.5}, two], method: ties, rank: 2}
- {name: sums, do: fuse, base: "${base}", adapters: {two: 0.5}}
"""
TAGS = {"10_set": {f"made up {number}": number % 7 for number in range(40)}}
TRAINER = {
    "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_module": "networks.lora",
    "ss_base_model_version": "sd_v1", "ss_network_args": '{"conv_dim": "4", "algo": "loha"}',
    "ss_tag_frequency": json.dumps(TAGS), "ss_learning_rate": "0.0001", "ss_v2": "False",
    "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.title": "x",
    "sshs_model_hash": "0" * 64,
}  # fmt: skip
NAMES = """title = "made up"
diffusers = "unet"
kohya = "original"
[[modules]]
blocks = [["input_blocks.{}.1.", "down.{}.attn."]]
pairs = [["q", "to_q"], ["kv", "to_kv"]]
[[modules]]
pairs = [["out.{}", "proj_out.{}"]]
"""


@dataclass(frozen=True)
class Seed:
    """A sound input.

    Attributes:
        name: unique.
        format: what is counted together.
        path: file or folder that commands are given.
        mutated: the file of it that is changed.
        role: what a command takes it for: adapter, base, recipe, steps, names, statement, baseline,
            a shared set, or a shelf of adapters to share.
        given: the format that is told to commands, where a file does not tell its own.
    """

    name: str
    format: str
    path: Path
    mutated: Path
    role: str = "adapter"
    given: str | None = None


def make(folder: Path) -> list[Seed]:
    """Write all seeds into an empty folder, in an order that never changes."""
    seeds: list[Seed] = []
    folder.mkdir(exist_ok=True)
    small = folder / "one"
    shutil.copytree(LLAMA / "lora", folder / "lora")
    loratools.squeeze(folder / "lora", rank=1, output=small)
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    seeds += [
        Seed(f"peft/{name}", f"peft {name.rpartition('.')[2]}", small, small / name)
        for name in (weights, config)
    ]
    for kind in sorted((GOLDEN / "kinds").iterdir()):
        told = json.loads((kind / "case.json").read_text()).get("format")
        for given in sorted(kind.glob("adapter*")):
            place = folder / "kinds" / kind.name / given.name
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if given.is_dir() else shutil.copyfile)(given, place)
            files = sorted(place.iterdir()) if given.is_dir() else [place]
            for file in files:
                if file.suffix in (".safetensors", ".json", ".pt", ".bin"):
                    what = "state dicts" if not given.is_dir() else f"kinds {file.suffix[1:]}"
                    name = f"kinds/{kind.name}/{file.name}"
                    seeds.append(Seed(name, what, place, file, given=told))
    for file in sorted((GOLDEN / "singlefile").glob("*.safetensors")):
        place = folder / "single" / file.name
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)
        seeds.append(Seed(f"single/{file.name}", "single files", place, place))
        if file.stem in _OF_TRAINERS:
            told = place.with_stem(f"{file.stem}-told")
            _with_metadata(file, told)
            seeds.append(Seed(f"single/{told.name}", "single files", told, told))
    nemo = _nemo(folder / "lora.nemo")
    seeds.append(Seed("lora.nemo", "nemo", nemo, nemo))
    for name, to in (("lora.gguf", "gguf"), ("mlx", "mlx")):
        place = folder / name
        loratools.convert(small, to=to, base=LLAMA / "model", output=place)
        files = [place] if place.is_file() else sorted(place.glob("adapter*"))
        seeds += [Seed(f"{to}/{file.name}", to, place, file) for file in files]
    _partly(small, folder / "two")
    shared = folder / "shared.safetensors"
    loratools.fleet_share([small, folder / "two"], rank=1, allow_missing=True, output=shared)
    seeds.append(Seed(shared.name, "shared sets", shared, shared, "set"))
    for name in (weights, config):
        shelf = folder / "shelf" / name.partition(".")[0]
        shutil.copytree(small, shelf / "other")
        shutil.copytree(folder / "two", shelf / "two")
        seeds.append(
            Seed(f"shelf/{name}", "adapters to share", shelf, shelf / "other" / name, "shelf")
        )
    seeds += _bases(folder / "base")
    seeds += _gguf_models(folder / "models")
    for name, text, role in (
        ("recipe.yaml", RECIPE, "recipe"), ("steps.yaml", STEPS, "steps"),
        ("names.toml", NAMES, "names"),
    ):  # fmt: skip
        (folder / name).write_text(text)
        seeds.append(Seed(name, role, folder / name, folder / name, role))
    baseline = folder / "baseline.json"
    command = ["check", str(small), "--write-baseline", str(baseline), "-q"]
    cli.main(command, standalone_mode=False)
    seeds.append(Seed(baseline.name, "baseline", baseline, baseline, "baseline"))
    made = small / "provenance.json"
    seeds.append(Seed(f"one/{made.name}", "statement", small, made, "statement"))
    return seeds


def _with_metadata(source: Path, target: Path) -> None:
    """Copy a single file with the metadata that trainers write."""
    from safetensors.numpy import load_file, save_file

    save_file(load_file(source), target, metadata=TRAINER)


def _gguf_models(folder: Path) -> list[Seed]:
    """Return two GGUF models of the base's weights, one of them in blocks of eight bits."""
    import gguf
    import numpy as np

    folder.mkdir()
    seeds = []
    for kind in ("f16", "q8_0"):
        path = folder / f"model-{kind}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name("tiny")
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(128)
        writer.add_feed_forward_length(256)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_rope_dimension_count(32)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"t{number}" for number in range(8)])
        writer.add_token_scores([0.0] * 8)
        values = np.linspace(-1.0, 1.0, 128 * 128, dtype=np.float32).reshape(128, 128)
        for name, rows in (("attn_q", 128), ("attn_k", 64)):
            stored = values[:rows].astype(np.float16)
            if kind == "q8_0":
                blocks = gguf.quantize(values[:rows], gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(
                    f"blk.0.{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0
                )
            else:
                writer.add_tensor(f"blk.0.{name}.weight", stored)
        writer.add_tensor("output_norm.weight", np.ones(128, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        seeds.append(Seed(f"models/{path.name}", "gguf models", path, path, "base"))
    return seeds


def _nemo(path: Path) -> Path:
    weights = path.with_suffix(".ckpt")
    source = GOLDEN / "kinds" / "megatron" / "adapter.safetensors"
    # In a process of its own: every case would be a copy of one that has torch.
    code = "import sys, torch; from safetensors.torch import load_file as read; "
    code += "torch.save(read(sys.argv[1]), sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, source, weights], check=True)
    config = b"peft:\n  lora_tuning: {adapter_dim: 2, alpha: 8}\n"
    with tarfile.open(path, "w") as archive:
        for name, data in (("model_config.yaml", config), ("model_weights.ckpt", weights)):
            content = data if isinstance(data, bytes) else data.read_bytes()
            member = tarfile.TarInfo(f"./{name}")
            member.size, member.mtime = len(content), 1.5
            archive.addfile(member, io.BytesIO(content))
    return path


def _partly(adapter: Path, folder: Path) -> None:
    """Write an adapter of the two modules that the base has."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    ours = re.compile(r"layers\.0\.self_attn\.[qk]_proj")
    kept = {name: value for name, value in tensors.items() if ours.search(name)}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _bases(folder: Path) -> list[Seed]:
    """Return a base of two shards with an index, and its parts."""
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file

    folder.mkdir()
    whole = safe_open(LLAMA / "model" / "model.safetensors", "numpy")
    names = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.norm.weight",
    ]
    listed = {}
    for number, name in enumerate(names, 1):
        values = np.ones(whole.get_slice(name).get_shape(), np.float16)
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: values}, folder / file, metadata={"format": "pt"})
        listed[name] = file
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(LLAMA / "model" / "config.json", folder / "config.json")
    files = ["model.safetensors.index.json", "config.json", "model-00001-of-00003.safetensors"]
    return [
        Seed(
            f"base/{name}", "index files" if "index" in name else "bases", folder, folder / name,
            "base",
        )
        for name in files
    ]  # fmt: skip
