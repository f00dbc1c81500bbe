"""`check` finds no error in adapters that their own libraries made and load."""

from pathlib import Path

import peft_cases
import peft_kinds
import pytest

import loratools as lt
from loratools_formats.contract.registry import find_format
from loratools_formats.disk.errors import LoratoolsError

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about what these cases are for
ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "examples" / "tiny-llama"


UNTOLD = ("gated", "increlora", "loralib")
"""Kinds whose files do not tell what they are; `--from` does."""


def errors(path, **options):
    return [
        (f.code, f.message) for f in lt.check(path, **options).findings if f.severity == "error"
    ]


@pytest.mark.parametrize("name", peft_cases.CASES)
def test_lora_of_peft_in_every_kind_of_layer(saved, name):
    assert errors(saved(name), target=["peft"]) == []


@pytest.mark.parametrize("case", peft_kinds.CASES, ids=lambda case: case.name)
def test_every_other_kind_of_peft(case, tmp_path):
    peft_kinds.make(case, tmp_path)
    assert errors(tmp_path / "adapter", target=["peft"]) == []


def goldens():
    """Return files of kohya, diffusers, ComfyUI and others, and adapters of every kind."""
    golden = ROOT / "tests" / "golden"
    yield from sorted((golden / "singlefile").glob("*.safetensors"))
    for path in sorted((golden / "kinds").glob("*/adapter*")):
        if path.parent.name not in UNTOLD:
            yield path
    for path in sorted((golden / "outputs").glob("*/*")):
        try:
            find_format(path)
        except LoratoolsError:  # a base model
            continue
        yield path


@pytest.mark.parametrize("path", list(goldens()), ids=lambda p: f"{p.parent.name}-{p.name}")
def test_files_of_other_trainers_and_every_kind(path):
    assert errors(path) == []


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("target", ["mlx", "llamacpp"])
def test_what_is_converted_for_a_program_has_no_error_there(name, target, tmp_path):
    if target == "llamacpp" and name == "dora":
        pytest.skip("llama.cpp has no DoRA")
    base = {"base": LLAMA / "model"}
    even = lt.squeeze(LLAMA / name, rank=8, uniform=True).adapter
    if target == "mlx":
        output = tmp_path / "mlx"
        lt.write(even, output, format="mlx", **base)
    else:
        output = tmp_path / "adapter.gguf"
        lt.write(even, output, format="gguf", **base)
    assert errors(output, target=[target]) == []


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_bundled_adapters_beside_their_base(name):
    assert errors(LLAMA / name, base=LLAMA / "model", target=["peft"]) == []
