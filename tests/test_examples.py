"""The example scripts run, and make adapters of the same shape as the bundled ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from loratools_formats import read_adapter

EXAMPLES = Path(__file__).parent.parent / "examples"
LIMIT_BYTES = 12_000_000


def shapes(folder):
    adapter = read_adapter(folder)
    return {tensor.key: (tensor.shape, tensor.dtype.code) for tensor in adapter.tensors()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "bundled", "made"),
    [
        ("make_minilm_lora.py", {"minilm-lora": "."}, "minilm-lora"),
        (
            "make_tiny_llama.py",
            {f"tiny-llama/{name}": name for name in ("lora", "rslora", "dora")},
            "tiny-llama",
        ),
    ],
)
def test_script_makes_what_is_bundled(tmp_path, script, bundled, made):
    out = tmp_path / made
    command = [sys.executable, EXAMPLES / script, "--quick", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "reloaded" in done.stdout
    for kept, fresh in bundled.items():
        assert shapes(out / fresh) == shapes(EXAMPLES / kept)


@pytest.mark.slow
def test_tiny_flux_is_what_its_script_makes(tmp_path):
    script = EXAMPLES / "make_tiny_flux.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    made, kept = (read_adapter(f / "kohya.safetensors") for f in (tmp_path, EXAMPLES / "tiny-flux"))
    assert [(t.key, bytes(t.raw())) for t in made.tensors()] == [
        (t.key, bytes(t.raw())) for t in kept.tensors()
    ]
    assert made.metadata == kept.metadata


@pytest.mark.slow
def test_tiny_llama_speaks_otherwise_in_llama_cpp_with_its_adapter(tmp_path):
    command = [sys.executable, EXAMPLES / "tiny_llama_gguf.py", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(said) == ["base", "with adapter", "fused"]
    assert "The optional argument is" in said["base"]
    assert "There is a man" in said["with adapter"]
    assert said["fused"] == said["with adapter"]


def test_examples_stay_small():
    sizes = [path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file()]
    assert sum(sizes) < LIMIT_BYTES


def test_bundled_adapters_carry_no_base_weights_or_local_paths():
    for name in ("minilm-lora", "tiny-llama/lora", "tiny-llama/rslora", "tiny-llama/dora"):
        adapter = read_adapter(EXAMPLES / name)
        assert adapter.base_model in (
            "sentence-transformers/all-MiniLM-L6-v2",
            "loratools/tiny-llama",
        )
        assert {r.kind for r in adapter.replacements.values()} <= {"module"}
        assert not adapter.carried
        assert not adapter.caveats
