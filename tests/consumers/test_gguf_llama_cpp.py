"""GGUF adapters in the real llama.cpp say what PEFT says in torch, for every token."""

import gguf
import gguf_models
import numpy as np
import pytest
from whole_delta import effective_delta

from loratools.algebra.ranks import RankRule
from loratools.operations.convert.operation import prepare, write
from loratools.operations.merge.align import MergeInput
from loratools.operations.merge.operation import merge
from loratools.operations.merge.options import MergeOptions
from loratools.operations.squeeze import squeeze
from loratools_formats import Adapter, Context, Layer, LowRank, read_adapter, write_adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.tensors import in_memory

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SILU_TOLERANCE, GELU_TOLERANCE = 1e-4, 5e-3
EFFECT = 0.05  # an adapter without effect would pass; each must move something by more than this


def export(source, target, base, **context):
    return write(prepare(read_adapter(source), "gguf", Context(base, **context)), target)


@pytest.mark.parametrize("name", gguf_models.CONFIGS)
def test_log_probabilities_equal_those_of_peft(gguf_bases, tmp_path, name):
    wanted, files = [], []
    for number, (title, config) in enumerate(gguf_models.variants(name).items()):
        model = gguf_models.adapted(gguf_models.make_model(name), seed=number, **config)
        wanted.append(gguf_models.expected(model))
        folder = tmp_path / f"{number}-{title.replace(' ', '-')}"
        model.save_pretrained(folder, save_embedding_layers=False)
        files.append(folder.with_suffix(".gguf"))
        base = gguf_bases / name / ("model.gguf" if number % 2 else "")
        export(folder, files[-1], base)
    untouched = gguf_models.expected(gguf_models.make_model(name))
    scales = np.vstack([np.zeros(len(files)), np.eye(len(files))]).tolist()
    found = gguf_models.from_llama_cpp(gguf_bases / name / "model.gguf", files, scales)
    tolerance = GELU_TOLERANCE if name in gguf_models.GELU else SILU_TOLERANCE
    titles = ["no adapter", *gguf_models.variants(name)]
    for title, got, want in zip(titles, found, [untouched, *wanted], strict=True):
        assert np.abs(got - want).max() < tolerance, title
        assert title == "no adapter" or np.abs(want - untouched).max() > EFFECT, title


def saved_llama(folder, **config):
    """Save a LoRA for the tiny llama; return what torch predicts with it."""
    options = {"r": 32, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = gguf_models.adapted(gguf_models.make_model("llama"), **(options | config))
    model.save_pretrained(folder, save_embedding_layers=False)
    return gguf_models.expected(model)


@pytest.mark.parametrize(("outtype", "tolerance"), [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.1)])
def test_narrow_types_are_as_good_as_their_rounding(gguf_bases, tmp_path, outtype, tolerance):
    wanted = saved_llama(tmp_path / "peft")
    base = gguf_bases / "llama"
    check = export(tmp_path / "peft", tmp_path / "lora.gguf", base, dtype=outtype)
    assert 1e-5 < check.relative_error < 0.01
    (found,) = gguf_models.from_llama_cpp(base / "model.gguf", [tmp_path / "lora.gguf"])
    assert np.abs(found - wanted).max() < tolerance


def test_two_adapters_at_once_are_a_sum(gguf_bases, tmp_path):
    import torch

    base = gguf_bases / "llama"
    saved_llama(tmp_path / "one", r=4)
    saved_llama(tmp_path / "two", r=8, seed=5, target_modules=["q_proj", "o_proj"])
    files = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    for file in files:
        export(file.with_suffix(""), file, base)
    model = gguf_models.make_model("llama")
    with torch.no_grad():
        for folder, weight in ((tmp_path / "one", 0.5), (tmp_path / "two", -1.0)):
            for path, delta in read_adapter(folder).modules.items():
                change = effective_delta(path, delta, delta.shape)
                model.get_submodule(path).weight += weight * torch.from_numpy(change)
    (found,) = gguf_models.from_llama_cpp(base / "model.gguf", files, [[0.5, -1.0]])
    assert np.abs(found - gguf_models.expected(model)).max() < SILU_TOLERANCE


def test_squeezed_and_merged_gguf_adapters_are_what_they_say(gguf_bases, tmp_path):
    """Squeezing or merging GGUF files equals doing it to PEFT folders and exporting those."""
    base = gguf_bases / "llama"
    for name, seed in (("one", 0), ("two", 5)):
        saved_llama(tmp_path / name, seed=seed, use_rslora=name == "two")
        export(tmp_path / name, tmp_path / f"{name}.gguf", base)
    files = []
    for suffix in ("", ".gguf"):
        inputs = [
            MergeInput(read_adapter(tmp_path / f"{name}{suffix}"), weight, name)
            for name, weight in (("one", 0.7), ("two", 0.3))
        ]
        adapters = {
            "squeezed": squeeze(inputs[0].adapter, RankRule(rank=6)).adapter,
            "merged": merge(inputs, MergeOptions(rule=RankRule(rank=20))).adapter,
        }
        for name, adapter in adapters.items():
            out = tmp_path / f"{name}{suffix}"
            write_adapter(adapter, out, adapter.format)
            if not suffix:
                out = tmp_path / f"{name}-exported.gguf"
                export(tmp_path / name, out, base)
            files.append(out)
    found = gguf_models.from_llama_cpp(base / "model.gguf", files)
    np.testing.assert_allclose(found[:2], found[2:], atol=SILU_TOLERANCE)
    assert np.abs(found[0] - found[1]).max() > EFFECT


def test_experts_adapted_one_by_one_are_stacked(gguf_bases, tmp_path):
    """As adapters trained before transformers 5 have them; one expert is not adapted."""
    import torch

    model = gguf_models.make_model("qwen3moe")
    untouched = gguf_models.expected(model)
    rng = np.random.default_rng(0)
    modules = {}
    for layer in range(2):
        experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for expert in range(4 - layer):
            fused = experts.gate_up_proj.data[expert]
            half = len(fused) // 2
            weights = {
                "gate_proj": fused[:half],
                "up_proj": fused[half:],
                "down_proj": experts.down_proj.data[expert],
            }
            for leaf, weight in weights.items():
                a = rng.normal(0, 0.2, (4, weight.shape[1])).astype(np.float32)
                b = rng.normal(0, 0.2, (weight.shape[0], 4)).astype(np.float32)
                weight.add_(1.5 * torch.from_numpy(b @ a))
                path = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                layout = Layer("linear")
                delta = LowRank(in_memory("a", a), in_memory("b", b), 1.5, layout)
                modules[path] = ModuleChange(delta)
    adapter = Adapter(format="peft", source=None, modules=modules)
    base = gguf_bases / "qwen3moe"
    write(prepare(adapter, "gguf", Context(base)), tmp_path / "lora.gguf")
    (found,) = gguf_models.from_llama_cpp(base / "model.gguf", [tmp_path / "lora.gguf"])
    wanted = gguf_models.expected(model)
    assert np.abs(found - wanted).max() < SILU_TOLERANCE
    assert np.abs(wanted - untouched).max() > EFFECT


def handmade(path, architecture, name, a, b, add_alpha):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    add_alpha(writer)
    writer.add_tensor(f"{name}.weight.lora_a", np.ones(a, np.float32))
    writer.add_tensor(f"{name}.weight.lora_b", np.ones(b, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CRASHES = {
    "an embedding that is the output layer": (
        ("gemma3", "token_embd", (gguf_models.VOCABULARY, 4), (64, 4)),
        lambda writer: writer.add_float32("adapter.lora.alpha", 4.0),
    ),
    "alpha as a whole number": (
        ("llama", "blk.0.attn_q", (4, 64), (64, 4)),
        lambda writer: writer.add_uint32("adapter.lora.alpha", 4),
    ),
}


@pytest.mark.parametrize("case", CRASHES)
def test_what_is_refused_kills_llama_cpp(gguf_bases, tmp_path, case):
    (name, tensor, a, b), add_alpha = CRASHES[case]
    handmade(tmp_path / "lora.gguf", name, tensor, a, b, add_alpha)
    base = gguf_bases / name / "model.gguf"
    done = gguf_models.start_llama_cpp(base, [tmp_path / "lora.gguf"], [[1.0]])
    assert done.returncode < 0  # a signal
