"""Generated rows of GGUF architectures: whole ΔW through llama.cpp's converter and through ours.

A model of ΔW, named as in memory, is saved by transformers and converted by llama.cpp. The factors
of the same ΔW, under PEFT's names, go through `from_model`. `make test` takes a sample,
`make test-models` every class.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf_probes
import make_gguf_docs
import numpy as np
import pytest

from loratools.lowrank.matrices import loaded
from loratools_formats import Adapter, Context, Layer, LowRank, get_format
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.tensors import in_memory
from loratools_formats.formats.gguf.architectures import ALL, BY_CLASS, REFUSED

GENERATED = sorted(name for row in ALL if row.given is not None for name in row.classes)
SAMPLE = (
    "Qwen2_5_VLForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration", "Glm4ForCausalLM",
    "GptOssForCausalLM", "NemotronHForCausalLM", "Lfm2ForCausalLM", "DeepseekV3ForCausalLM",
    "Llama4ForConditionalGeneration", "Gemma4ForConditionalGeneration", "BertForMaskedLM",
)  # fmt: skip


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        every = metafunc.config.getoption("models")
        metafunc.parametrize("name", GENERATED if every else SAMPLE)


def change_of(key, weight, module, rng):
    """Return (path, change, ΔW) of a parameter: what PEFT calls it, factors, and their product."""
    *stack, rows, columns = weight.shape
    path = key.removesuffix(".weight")
    a = rng.standard_normal((*stack, 3, columns))
    b = rng.standard_normal((*stack, rows, 3))
    delta = b @ a
    layer = Layer("linear")
    if path == key:
        owner, _, leaf = key.rpartition(".")
        layer = Layer("experts", parameters=(key,), transposed_if_square=False, swapped=False)
        path = owner + ".base_layer" * (leaf != "down_proj")
        if "GptOss" in module or "Llama4" in module:  # (E, in, out)
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    elif "Embedding" in module:
        layer = Layer("embedding")
        a, b = b.T, a.T
    return path, ModuleChange(LowRank(in_memory("a", a), in_memory("b", b), 1.0, layer)), delta


def dense(change):
    products = np.stack([b @ a for b, a in loaded(change.require_factors())])
    whole = products if change.layer.kind == "experts" else products[0]
    return whole.T if change.layer.kind == "embedding" else whole


@pytest.mark.slow
def test_every_module_becomes_what_the_converter_makes_of_it(name, tmp_path):
    import torch

    if name == "Gemma3nForConditionalGeneration":
        pytest.skip("its tower needs a package; its language model is that of Gemma3nForCausalLM")
    try:
        model = gguf_probes.built(name, wider=True)
    except gguf_probes.CannotError:
        model = gguf_probes.built(name)
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    rng = np.random.default_rng(0)
    modules = {}
    base = tmp_path / "base"
    base.mkdir()
    gguf_probes.written(model, base)
    target, context = get_format("gguf"), Context(base=base)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.zero_()
            if weight.ndim not in (2, 3) or (weight.ndim == 3) == key.endswith(".weight"):
                continue  # neither a layer's matrix nor a stack of experts
            owner = key.rpartition(".")[0]
            path, change, delta = change_of(key, weight, kinds[owner], rng)
            alone = Adapter(format="peft", source=None, modules={path: change})
            is_embedding = "Embedding" in kinds[owner]
            row = BY_CLASS[name]
            if is_embedding and not (row.outputs and row.embedding.endswith(path.split(".")[-1])):
                continue  # of tied models and encoders, or looked up elsewhere
            if not target.without_place(alone, context):
                modules[path] = change
                weight.copy_(torch.from_numpy(delta))
    gguf_probes.written(model, tmp_path / "deltas")
    script = Path(__file__).parent / "llama_cpp_weights.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "deltas", tmp_path / "made.npz"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = dict(np.load(tmp_path / "made.npz"))
    assert made.pop("architecture") == BY_CLASS[name].name
    adapter = Adapter(format="peft", source=None, modules=modules)
    ours = target.from_model(adapter, context)
    assert ours.modules
    for tensor, change in ours.modules.items():
        wanted = made.pop(f"{tensor}.weight")
        np.testing.assert_allclose(dense(change), wanted, atol=1e-4, err_msg=tensor)
    others = {key for key, values in made.items() if key.endswith(".weight") and values.ndim > 1}
    assert not any(np.abs(made[key]).max() > 1e-3 for key in others)
    back = replace(target.to_model(ours, context), format="peft")
    again = target.from_model(back, context)
    assert again.modules.keys() == ours.modules.keys()
    for tensor, change in ours.modules.items():
        np.testing.assert_allclose(dense(again.modules[tensor]), dense(change), atol=1e-10)


def test_every_class_of_the_converter_has_a_row_or_a_reason():
    script = Path(__file__).parent / "llama_cpp_classes.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    names = set(done.stdout.split())
    assert len(names) > 200
    assert names <= BY_CLASS.keys() | REFUSED.keys()
    assert all(REFUSED.values())


def test_the_page_of_architectures_shows_the_table():
    page = Path(__file__).parents[2] / "docs" / "gguf-architectures.md"
    assert page.read_text(encoding="utf-8") == make_gguf_docs.text()
