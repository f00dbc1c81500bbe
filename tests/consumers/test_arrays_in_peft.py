"""An adapter made from arrays, loaded by real PEFT: its logits are those of W + ΔW."""

import numpy as np
import peft_oracle as oracle
import pytest
import torch
from peft import PeftModel
from peft_models import EXAMPLES
from transformers import AutoModelForCausalLM

import loratools as lt

MODEL = EXAMPLES / "tiny-llama" / "model"
pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def fresh():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()


@pytest.mark.parametrize("kind", ["numpy", "torch", "bfloat16"])
def test_an_adapter_from_arrays_answers_in_peft_as_the_changed_weights(kind, tmp_path):
    rng = np.random.default_rng(0)
    factors, changes = {}, {}
    with torch.no_grad():
        changed = fresh()
        for rank, name in zip((4, 6), NAMES, strict=True):
            weight = changed.get_submodule(name).weight
            b, a = (
                rng.standard_normal((weight.shape[0], rank)),
                rng.standard_normal((rank, weight.shape[1])),
            )
            pair = (
                torch.tensor(b / 8, dtype=torch.float32),
                torch.tensor(a / 8, dtype=torch.float32),
            )
            if kind == "bfloat16":
                pair = tuple(part.bfloat16() for part in pair)
            changes[name] = 12 / rank * (pair[0].double() @ pair[1].double())
            weight += changes[name]
            factors[name] = tuple(part.numpy() for part in pair) if kind == "numpy" else pair
        adapter = lt.from_factors(factors, alpha=12, base_model="tiny-llama")
        for name in NAMES:
            assert np.array_equal(lt.delta(adapter, name), changes[name].numpy())
        lt.write(adapter, tmp_path / "made")
        loaded = PeftModel.from_pretrained(fresh(), str(tmp_path / "made")).double().eval()
        tokens = torch.arange(1, 40).reshape(1, -1)
        want, got = changed(tokens).logits, loaded(tokens).logits
        untouched = fresh()(tokens).logits
    assert (want - untouched).abs().max() > 1e-2
    # PEFT applies the factors one after the other, in float64: only the order of sums differs.
    assert (got - want).abs().max() <= 1e-11 * want.abs().max()
