"""GGUF adapters in the real llama.cpp say what PEFT says in torch, for every token."""

import os
import shutil

import gguf_models
import numpy as np
import pytest

from loratools.convert import prepare, write
from loratools_formats import Context, read_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SILU_TOLERANCE, GELU_TOLERANCE = 1e-4, 5e-3
EFFECT = 0.05  # an adapter without effect would pass; each must move something by more than this

ATTENTION = {name: ["q_proj", "k_proj", "v_proj", "o_proj"] for name in gguf_models.CONFIGS} | {
    "phi3": ["qkv_proj", "o_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
}
MLP = {name: ["gate_proj", "up_proj", "down_proj"] for name in gguf_models.CONFIGS} | {
    "phi3": ["gate_up_proj", "mlp.down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
    "qwen3moe": [],
    "mixtral": [],
}


def variants(name):
    """Return LoRA configurations by what they try."""
    linears = ATTENTION[name] + MLP[name]
    one, other = linears[0], linears[-1]
    basic = {"r": 8, "lora_alpha": 16, "target_modules": linears}
    if name == "gpt2":
        basic["fan_in_fan_out"] = True
    found = {
        "plain": basic,
        "rslora": basic | {"use_rslora": True},
        "rank pattern": basic | {"rank_pattern": {one: 4, other: 3}},
        "alpha pattern": basic | {"alpha_pattern": {one: 4, other: 40}},
        "all": basic
        | {"use_rslora": True, "rank_pattern": {one: 4}, "alpha_pattern": {other: 5.5}},
    }
    if name not in gguf_models.TIED:
        found["embedding"] = basic | {"target_modules": ["embed_tokens", one]}
        found["output"] = basic | {"target_modules": ["lm_head", one]}
    if name in ("qwen3moe", "mixtral"):
        found["experts"] = basic | {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        }
        found["router"] = basic | {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
    return found


@pytest.fixture(scope="session")
def bases(tmp_path_factory, worker_id):
    """Return a folder with every tiny model, as transformers and as GGUF; made once a run."""
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if worker_id != "master" else root) / "gguf-bases"
    making = shared.with_name(f"{shared.name}-{os.getpid()}")
    if not shared.exists():
        folders = [making / name for name in gguf_models.CONFIGS]
        for folder in folders:
            gguf_models.save(gguf_models.make_model(folder.name), folder)
        gguf_models.convert_bases(folders)
        try:
            making.rename(shared)
        except OSError:  # another worker was faster
            shutil.rmtree(making)
    return shared


def export(source, target, base, **context):
    return write(prepare(read_adapter(source), "gguf", Context(base, **context)), target)


@pytest.mark.parametrize("name", gguf_models.CONFIGS)
def test_log_probabilities_equal_those_of_peft(bases, tmp_path, name):
    wanted, files = [], []
    for number, (title, config) in enumerate(variants(name).items()):
        model = gguf_models.adapted(gguf_models.make_model(name), seed=number, **config)
        wanted.append(gguf_models.expected(model))
        folder = tmp_path / f"{number}-{title.replace(' ', '-')}"
        model.save_pretrained(folder, save_embedding_layers=False)
        files.append(folder.with_suffix(".gguf"))
        base = bases / name / ("model.gguf" if number % 2 else "")
        export(folder, files[-1], base)
    untouched = gguf_models.expected(gguf_models.make_model(name))
    scales = np.vstack([np.zeros(len(files)), np.eye(len(files))]).tolist()
    found = gguf_models.from_llama_cpp(bases / name / "model.gguf", files, scales)
    tolerance = GELU_TOLERANCE if name in gguf_models.GELU else SILU_TOLERANCE
    titles = ["no adapter", *variants(name)]
    for title, got, want in zip(titles, found, [untouched, *wanted], strict=True):
        assert np.abs(got - want).max() < tolerance, title
        assert title == "no adapter" or np.abs(want - untouched).max() > EFFECT, title
