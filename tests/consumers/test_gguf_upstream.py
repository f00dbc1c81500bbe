"""Our files next to those of llama.cpp's own converter: the same bytes where that one is right."""

import subprocess
import sys
from pathlib import Path

import gguf_models
import numpy as np
import pytest
from gguf import GGUFReader
from test_gguf_llama_cpp import GELU_TOLERANCE, SILU_TOLERANCE, export

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

RIGHT = [
    ("llama", "plain"),
    ("llama", "rank pattern"),
    ("llama", "embedding"),
    ("llama", "output"),
    ("mistral", "plain"),
    ("qwen2", "plain"),
    ("qwen3", "rank pattern"),
    ("qwen3moe", "plain"),
    ("gemma3", "plain"),
    ("phi3", "plain"),
]
WRONG = [("llama", "rslora"), ("llama", "alpha pattern"), ("qwen3", "all")]
GPT2 = {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True}
# The converter turns the factors as it does Conv1D weights, though PEFT's are not turned.
GPT2_CASES = {
    "refused": GPT2 | {"target_modules": ["attn.c_attn"]},
    "silent": GPT2 | {"target_modules": ["attn.c_proj"]},
}


@pytest.fixture(scope="module")
def converted(gguf_bases, tmp_path_factory):
    """Return a function from a case to (what torch says, our file, the converter's file)."""
    root = tmp_path_factory.mktemp("converted")
    configs = {case: gguf_models.variants(case[0])[case[1]] for case in RIGHT + WRONG}
    configs |= {("gpt2", title): config for title, config in GPT2_CASES.items()}
    expected, arguments = {}, []
    for number, (case, config) in enumerate(configs.items()):
        model = gguf_models.adapted(gguf_models.make_model(case[0]), seed=number, **config)
        expected[case] = gguf_models.expected(model)
        folder = root / f"{case[0]}-{case[1].replace(' ', '-')}"
        model.save_pretrained(folder, save_embedding_layers=False)
        export(folder, folder.with_suffix(".ours.gguf"), gguf_bases / case[0])
        arguments += [gguf_bases / case[0], folder, folder.with_suffix(".theirs.gguf")]
    script = Path(__file__).parent / "llama_cpp_convert_lora.py"
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    def files(name, title):
        stem = root / f"{name}-{title.replace(' ', '-')}"
        ours, theirs = stem.with_suffix(".ours.gguf"), stem.with_suffix(".theirs.gguf")
        return expected[name, title], ours, theirs

    return files


def tensors(path):
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize(("name", "title"), RIGHT)
def test_tensors_are_byte_for_byte_those_of_the_converter(converted, name, title):
    _, ours, theirs = converted(name, title)
    assert tensors(ours) == tensors(theirs)


@pytest.mark.parametrize("name", ["llama"])
def test_the_keys_of_the_converter_have_the_same_types_and_values(converted, name):
    _, ours, theirs = converted(name, "plain")
    mine, other = GGUFReader(ours), GGUFReader(theirs)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert mine.get_field(key).types == other.get_field(key).types
        assert mine.get_field(key).contents() == other.get_field(key).contents()


@pytest.mark.parametrize(("name", "title"), WRONG)
def test_scales_that_the_converter_loses_are_kept(converted, gguf_bases, name, title):
    wanted, ours, theirs = converted(name, title)
    found = gguf_models.from_llama_cpp(gguf_bases / name / "model.gguf", [ours, theirs])
    assert np.abs(found[0] - wanted).max() < SILU_TOLERANCE
    assert np.abs(found[1] - wanted).max() > 0.2


def test_conv1d_factors_are_not_turned(converted, gguf_bases):
    base = gguf_bases / "gpt2" / "model.gguf"
    wanted, ours, theirs = converted("gpt2", "silent")
    found = gguf_models.from_llama_cpp(base, [ours, theirs])
    assert np.abs(found[0] - wanted).max() < GELU_TOLERANCE
    assert np.abs(found[1] - wanted).max() > 0.2
    wanted, ours, theirs = converted("gpt2", "refused")
    (found,) = gguf_models.from_llama_cpp(base, [ours])
    assert np.abs(found - wanted).max() < GELU_TOLERANCE
    assert gguf_models.start_llama_cpp(base, [theirs], [[1.0]]).returncode != 0
