"""gpt-oss joins gate and up by turns: every way from single experts to a stack, and to MLX."""

import numpy as np
import pytest
from expert_files import Change, base, each, each_joined, read_deltas, save

import loratools as lt
from loratools_formats import read_adapter


@pytest.mark.parametrize("write", [each, each_joined])
@pytest.mark.parametrize("through", [None, "mlx"])
def test_stacks_alternate(write, through, tmp_path):
    change = Change()
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
    model = base(tmp_path / "base", change, stacks=True, **config)
    folder = save(tmp_path / "a", write(change))
    if through is not None:
        lt.convert(folder, to=through, base=model, output=tmp_path / "held")
        for name, held in read_adapter(tmp_path / "held").modules.items():
            part, leaf = held.require_factors(), name.rpartition(".")[2].removesuffix("_proj")
            for e in range(change.experts):
                delta = part.scale * part.b.load(np.float64)[e] @ part.a.load(np.float64)[e]
                np.testing.assert_allclose(delta, change.deltas()[leaf, e], rtol=1e-6, atol=1e-6)
        folder = tmp_path / "held"
    lt.convert(folder, to="peft", experts="stacked", base=model, output=tmp_path / "b")
    found, wanted = read_deltas(read_adapter(tmp_path / "b")), change.deltas()
    for e in range(change.experts):
        whole = np.concatenate([found["gate", e], found["up", e]])
        np.testing.assert_allclose(whole[0::2], wanted["gate", e], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(whole[1::2], wanted["up", e], rtol=1e-6, atol=1e-6)
