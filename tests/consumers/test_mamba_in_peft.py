"""Models of Mamba's kind, in which PEFT refuses adapters of two layers by their names."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import peft_oracle
import pytest
import tiny_models
from safetensors.numpy import save_file

import loratools as lt
from loratools_formats.core import peft_facts
from loratools_formats.disk.errors import UnsupportedError

pytestmark = [pytest.mark.filterwarnings(line) for line in peft_oracle.WARNINGS]


def test_peft_refuses_the_types_and_the_names():
    from types import SimpleNamespace

    from peft import LoraConfig
    from peft.tuners import tuners_utils

    def refused(kind, leaf):
        model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
        try:
            tuners_utils._check_lora_target_modules_mamba(LoraConfig(), model, leaf)
        except ValueError:
            return True
        return False

    for kind in (*peft_facts._MAMBA, "llama", "bamba", "zamba2"):
        for leaf in ("out_proj", "conv1d", "in_proj"):
            assert refused(kind, leaf) == bool(peft_facts.refused_modules(kind, [f"a.{leaf}"]))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with a tiny model of Mamba before and after a change, and its class."""
    import torch

    root = tmp_path_factory.mktemp("mamba")
    model = tiny_models.made("MambaForCausalLM")
    model.save_pretrained(root / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("in_proj.weight", "out_proj.weight")):
                left, right = (torch.randn(n, generator=generator) for n in weight.shape)
                weight.add_(0.05 * torch.outer(left, right))
    model.save_pretrained(root / "tuned")
    return root, type(model)


def weights(cls, folder):
    return dict(cls.from_pretrained(folder).named_parameters())


def test_extract_refuses_them_and_its_hint_gives_what_peft_loads(models, tmp_path):
    root, cls = models
    with pytest.raises(UnsupportedError) as told:
        lt.extract(root / "base", root / "tuned", rank=1, output=tmp_path / "no")
    pattern = shlex.split(re.search(r"`exclude`: (.+)", told.value.hint)[1])[0]
    lt.extract(root / "base", root / "tuned", rank=1, exclude=pattern, output=tmp_path / "x")
    found = tiny_models.merged(root / "base", tmp_path / "x", cls)
    old, new = weights(cls, root / "base"), weights(cls, root / "tuned")
    for key, weight in found.items():
        wanted = old[key] if "out_proj" in key else new[key]
        np.testing.assert_allclose(weight.detach(), wanted.detach(), atol=1e-6, err_msg=key)


def test_convert_from_mlx_refuses_them_and_drop_gives_what_peft_loads(models, tmp_path):
    root, cls = models
    (tmp_path / "mlx").mkdir()
    rng = np.random.default_rng(0)
    factors = {}
    for key, weight in weights(cls, root / "base").items():
        if key.endswith(("in_proj.weight", "out_proj.weight")):
            rows, columns = weight.shape
            module = key.removesuffix(".weight")
            factors[f"{module}.lora_a"] = rng.standard_normal((columns, 2), np.float32)
            factors[f"{module}.lora_b"] = rng.standard_normal((2, rows), np.float32)
    save_file(factors, tmp_path / "mlx" / "adapters.safetensors")
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    asked = {"to": "peft", "base": root / "base"}
    with pytest.raises(UnsupportedError, match="out_proj would be refused by PEFT") as told:
        lt.convert(tmp_path / "mlx", output=tmp_path / "no", **asked)
    assert "`drop`" in told.value.hint
    lt.convert(tmp_path / "mlx", output=tmp_path / "x", drop="out_proj", **asked)
    found = tiny_models.merged(root / "base", tmp_path / "x", cls)
    old = weights(cls, root / "base")
    moved = {
        key
        for key, weight in found.items()
        if not np.array_equal(weight.detach(), old[key].detach())
    }
    assert moved == {key for key in old if key.endswith("in_proj.weight")}


def test_to_lora_tells_of_layers_that_peft_refuses_as_a_lora_alone(models, tmp_path):
    import peft

    root, cls = models
    config = peft.LoHaConfig(r=2, target_modules=["in_proj", "out_proj"], init_weights=False)
    adapted = peft.get_peft_model(cls.from_pretrained(root / "base"), config)
    adapted.save_pretrained(tmp_path / "loha")
    result = lt.to_lora(tmp_path / "loha", base=root / "base", output=tmp_path / "lora")
    (told,) = [each for each in result.cautions if "refuses" in each]
    assert re.search(r"mixer\.out_proj and 1 more in a model of type mamba", told)
    with pytest.raises(ValueError, match="out_proj"):
        tiny_models.merged(root / "base", tmp_path / "lora", cls)
    assert "LT413" in {f.code for f in lt.check(tmp_path / "lora", base=root / "base").findings}
