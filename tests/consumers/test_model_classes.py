"""Every class of transformers that is built tiny: what `extract` writes is what PEFT applies.

`make test` takes a sample, `make test-models` all classes. A class that cannot be built so, or that
its library does not load as it was saved, is skipped with its reason. One for which docs/classes.md
lists a refusal is not taken: `make test-matrix` holds it to that.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft_oracle
import pytest
import tiny_models
from test_matrix_of_names import listed

import loratools as lt
from loratools.base.placement import model_class

pytestmark = [pytest.mark.filterwarnings(line) for line in peft_oracle.WARNINGS]

SAMPLE = (
    "ViTForImageClassification", "Qwen3MoeForCausalLM", "LlavaForConditionalGeneration",
    "BertForMaskedLM", "GPT2LMHeadModel", "DeepseekV3ForCausalLM", "Phi3ForCausalLM",
)  # fmt: skip


def pytest_generate_tests(metafunc):
    table = Path(model_class.__file__).parent / "data" / "class_names.json"
    names = SAMPLE
    if metafunc.config.getoption("models"):
        refused = listed()
        every = json.loads(table.read_text(encoding="utf-8"))["classes"]
        names = tuple(each for each in every if (each, "extract") not in refused)
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_peft_applies_what_extract_printed(name, tmp_path, request):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    sampled = not request.config.getoption("models")
    try:
        model = tiny_models.made(name)
        saved(model, tmp_path / "base")
        cls = type(model)
        model = cls.from_pretrained(tmp_path / "base").float()
        old = {key: weight.detach().clone() for key, weight in model.named_parameters()}
        chosen = tiny_models.changed(model)
        saved(model, tmp_path / "tuned")
        again = dict(cls.from_pretrained(tmp_path / "tuned").float().named_parameters())
        assert all(torch.equal(again[key], weight) for key, weight in model.named_parameters())
    except Exception as error:  # not of ours to judge
        if sampled:
            raise
        pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")
    if not chosen:
        pytest.skip("no linear layers")
    result = lt.extract(tmp_path / "base", tmp_path / "tuned", rank=1, output=tmp_path / "x")
    new = tiny_models.merged(tmp_path / "base", tmp_path / "x", cls)
    wanted = {key: weight.detach() - old[key] for key, weight in model.named_parameters()}
    off = sum(float((new[key] - old[key] - want).norm() ** 2) for key, want in wanted.items())
    whole = sum(float(want.norm() ** 2) for want in wanted.values())
    assert (off / whole) ** 0.5 == pytest.approx(result.relative_error, abs=1e-6)
