"""Measure how often the statistical rules of `check` are wrong, and how often they find a plant.

    python tests/check/measure_statistics.py

Clean adapters are trained here by PEFT, on a small Llama that is trained first, with differing
ranks, learning rates, lengths and modules. A plant is a change of rank one in one module, of a
norm that is a multiple of the module's own. What is measured is written to `statistics.json`, from
which `make_docs.py` prints it.
"""

import json
import random
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import loratools as lt

RECORD = Path(__file__).with_name("statistics.json")
TEXTS = Path(__file__).parents[2] / "examples" / "tiny-llama" / "texts"
LAYERS, WIDTH, ADAPTERS, PLANTS = 16, 64, 60, 3
STRENGTHS = (0.5, 1, 2, 4, 8, 16)
FACTORS = (10, 100, 1000)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(network, data, steps, rate, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for _ in range(steps):
        starts = torch.randint(0, len(data) - 33, (8,), generator=generator)
        batch = torch.stack([data[start : start + 32] for start in starts])
        network(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def clean_adapters(root):
    """Train adapters and yield their folders."""
    import torch
    from peft import LoraConfig, get_peft_model

    texts = sorted(path for path in TEXTS.rglob("*") if path.is_file())
    data = torch.tensor(list(b"\n".join(path.read_bytes() for path in texts)))
    base = model()
    train(base, data, 150, 3e-3, 0)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for number in range(ADAPTERS):
        draw = random.Random(number)
        torch.manual_seed(number)
        rank = draw.choice([4, 8, 16])
        config = LoraConfig(
            r=rank, lora_alpha=draw.choice([rank, 2 * rank]), use_rslora=draw.random() < 0.2,
            target_modules=draw.choice([list(MODULES), list(MODULES[:4]), ["q_proj", "v_proj"]]),
        )  # fmt: skip
        network = model()
        network.load_state_dict(weights)
        adapted = get_peft_model(network, config)
        share = data[number % 2 :: 2] if draw.random() < 0.3 else data
        train(adapted, share, draw.choice([20, 40]), draw.choice([1e-3, 3e-3, 1e-2]), number)
        adapted.save_pretrained(root / str(number))
        yield root / str(number)


def found(folder, code):
    return {f.where for f in lt.check(folder, select=[code]).findings}


def planted(folder, into, strength, seed):
    """Write a copy with a plant in one module, and return the module."""
    arrays = load_file(folder / "adapter_model.safetensors")
    names = sorted(name for name in arrays if name.endswith("lora_A.weight"))
    name = random.Random(seed).choice(names)
    a, b = arrays[name], arrays[name.replace("lora_A", "lora_B")]
    draw = np.random.default_rng(seed)
    rows, columns = draw.normal(size=b.shape[0]), draw.normal(size=a.shape[1])
    change = np.outer(rows, columns) / (np.linalg.norm(rows) * np.linalg.norm(columns))
    whole = b @ a + strength * np.linalg.norm(b @ a) * change
    u, s, v = np.linalg.svd(whole)
    rank = len(a)
    arrays[name.replace("lora_A", "lora_B")] = (u[:, :rank] * s[:rank]).astype(np.float32)
    arrays[name] = v[:rank].astype(np.float32)
    into.mkdir()
    (into / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    save_file(arrays, into / "adapter_model.safetensors")
    return name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")


def with_alpha(folder, into, factor):
    into.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] *= factor
    (into / "adapter_config.json").write_text(json.dumps(config))
    arrays = load_file(folder / "adapter_model.safetensors")
    save_file(arrays, into / "adapter_model.safetensors")
    return into


def main():
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = list(clean_adapters(root))
        modules = sum(len(lt.info(folder).modules) for folder in folders)
        flagged = {code: [found(folder, code) for folder in folders] for code in ("LT214", "LT306")}
        plants, count = {}, 0
        for strength in STRENGTHS:
            hits = 0
            for number, folder in enumerate(folders):
                for again in range(PLANTS):
                    place = root / f"planted-{count}"
                    name = planted(folder, place, strength, PLANTS * number + again)
                    hits += name in found(place, "LT306")
                    count += 1
            plants[f"{strength:g}"] = [hits, PLANTS * len(folders)]
        typed = {}
        for factor in FACTORS:
            places = [with_alpha(f, root / f"{factor}-{f.name}", factor) for f in folders]
            typed[f"{factor}"] = [sum(bool(found(p, "LT214")) for p in places), len(places)]
    record = {
        "made": f"{ADAPTERS} LoRAs trained by PEFT on a Llama of {LAYERS} layers and width {WIDTH}",
        "LT214": {
            "clean adapters": [sum(map(bool, flagged["LT214"])), len(folders)],
            "factor that alpha was multiplied by": typed,
        },
        "LT306": {
            "clean adapters": [sum(map(bool, flagged["LT306"])), len(folders)],
            "clean modules": [sum(map(len, flagged["LT306"])), modules],
            "multiple of the module's norm that was planted": plants,
        },
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
