"""What a merge of several formats or spellings says of its modules: loaders find all of them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import peft_oracle
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.base.named_base import distinct_bases
from loratools_formats.disk.errors import AdapterError, UnsupportedError

pytestmark = [pytest.mark.filterwarnings(line) for line in peft_oracle.WARNINGS]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    tiny_models.made("LlamaForCausalLM").save_pretrained(root / "base")
    return root


def saved(root, out, seed, cls="LlamaForCausalLM", **config):
    """Save an adapter by PEFT itself, with random values."""
    import peft
    import transformers

    base = getattr(transformers, cls).from_pretrained(root / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, **config))
    peft_oracle.fill(model, seed)
    model.save_pretrained(out)
    return {
        f"{path}.weight": module.get_delta_weight("default").detach().numpy()
        for path, module in model.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def by_peft(root, adapter, cls="LlamaForCausalLM"):
    """Return the changes that PEFT's own load makes; a missing key is an error."""
    import transformers

    kind = getattr(transformers, cls)
    old = dict(kind.from_pretrained(root / "base").named_parameters())
    new = tiny_models.merged(root / "base", adapter, kind)
    return {key: (new[key] - old[key]).detach().numpy() for key in old}


def total(*changes):
    keys = {key for each in changes for key in each}
    return {key: sum(each[key] for each in changes if key in each) for key in keys}


def assert_equal(found, wanted):
    for key, change in found.items():
        np.testing.assert_allclose(change, wanted.get(key, 0.0), atol=1e-5, err_msg=key)


def on_mlx(folder, rng, layers, keys):
    """Write an MLX adapter as mlx-lm trains one: some last layers, and modules within them."""
    folder.mkdir()
    shapes = {"self_attn.q_proj": (32, 32), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32)}
    factors = {}
    for layer, key in itertools.product(layers, keys):
        inputs, outputs = shapes[key]
        name = f"model.layers.{layer}.{key}"
        factors[f"{name}.lora_a"] = rng.standard_normal((inputs, 2), np.float32)
        factors[f"{name}.lora_b"] = rng.standard_normal((2, outputs), np.float32)
    save_file(factors, folder / "adapters.safetensors")
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": keys}
    config = {"num_layers": len(layers), "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_modules_that_only_another_format_has_are_targets(llama, tmp_path):
    one = saved(llama, tmp_path / "one", 1, target_modules=["q_proj", "down_proj"])
    other = saved(llama, tmp_path / "other", 2, target_modules=["q_proj", "up_proj"])
    lt.convert(tmp_path / "other", to="mlx", output=tmp_path / "mlx")
    lt.convert(tmp_path / "other", base=llama / "base", output=tmp_path / "other.gguf")
    for name, base in (("mlx", None), ("mlx", llama / "base"), ("other.gguf", llama / "base")):
        out = tmp_path / f"{name} {base is None}"
        lt.merge([tmp_path / "one", tmp_path / name], base=base, output=out)
        assert_equal(by_peft(llama, out), total(one, other))


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("b", "a"), ("a", "peft")])
def test_mlx_lm_loads_a_merge_of_other_layers_and_modules(llama, first, second, tmp_path):
    utils = pytest.importorskip("mlx_lm.utils")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    rng = np.random.default_rng(0)
    on_mlx(tmp_path / "a", rng, [1], ["self_attn.q_proj"])
    on_mlx(tmp_path / "b", rng, [0, 1], ["self_attn.q_proj", "mlp.up_proj"])
    saved(llama, tmp_path / "peft", 3, target_modules=["q_proj", "down_proj", "lm_head"])
    pair = [tmp_path / first, tmp_path / second]
    lt.merge(pair, allow_missing=True, output=tmp_path / "both")
    model, _ = utils.load_model(llama / "base", strict=False)
    tuner.load_adapters(model, str(tmp_path / "both"))
    found = dict(load_file(tmp_path / "both" / "adapters.safetensors"))
    modules = {name for path in pair for name in lt.read(path).modules}
    assert {key.removesuffix(".lora_a") for key in found if key.endswith("a")} == modules


def test_a_body_and_a_model_with_a_head_name_modules_differently(tmp_path):
    import transformers

    tiny_models.made("BertForMaskedLM").save_pretrained(tmp_path / "base")
    asked = {"cls": "BertForMaskedLM", "target_modules": ["query", "dense"]}
    one = saved(tmp_path, tmp_path / "one", 1, **asked)
    other = saved(tmp_path, tmp_path / "other", 2, **{**asked, "target_modules": ["query"]})
    weights = tmp_path / "other" / "adapter_model.safetensors"
    bare = {key.replace(".bert.", "."): array for key, array in load_file(weights).items()}
    save_file(bare, weights, {"format": "pt"})
    pair = [tmp_path / "one", tmp_path / "other"]
    for more in ({}, {"allow_missing": True}):
        with pytest.raises(AdapterError, match="name one module differently") as told:
            lt.merge(pair, output=tmp_path / "no", **more)
        assert "`base`" in told.value.hint
    lt.merge(pair, base=tmp_path / "base", output=tmp_path / "both")
    assert_equal(by_peft(tmp_path, tmp_path / "both", "BertForMaskedLM"), total(one, other))
    assert transformers.BertForMaskedLM.base_model_prefix == "bert"


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["/models/llama", "llama"], ["/models/llama"]),
        (["org/llama", "org/llama", None], ["org/llama"]),
        (["llama", "other"], ["llama", "other"]),
        (["org/llama", "other/llama"], ["org/llama", "other/llama"]),
        ([None, None], []),
    ],
)
def test_which_names_are_of_one_base(names, wanted):
    assert distinct_bases(names) == wanted


@pytest.mark.parametrize(
    "name", ["MixtralForCausalLM", "PhimoeForCausalLM", "GraniteMoeForCausalLM", "OlmoeForCausalLM"]
)
def test_routers_go_to_mlx_under_the_names_that_mlx_lm_has(name, tmp_path):
    utils = pytest.importorskip("mlx_lm.utils")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    base = tmp_path / "base"
    model = tiny_models.made(name)
    model.save_pretrained(base)
    if name.startswith("Granite"):  # which mlx-lm wants at the top of the configuration
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    routers = [
        k for k, _ in model.named_parameters() if k.endswith(("gate.weight", "router.weight"))
    ]
    wanted = routed(tmp_path, tmp_path / "lora", name, routers)
    lt.convert(tmp_path / "lora", to="mlx", base=base, output=tmp_path / "mlx")
    loaded, _ = utils.load_model(base, strict=False)
    tuner.load_adapters(loaded, str(tmp_path / "mlx"))
    lt.convert(tmp_path / "mlx", to="peft", base=base, output=tmp_path / "back")
    assert_equal(by_peft(tmp_path, tmp_path / "back", name), wanted)


def routed(root, out, cls, routers):
    """Save an adapter of routers by PEFT; return what it changes."""
    saved(root, out, 1, cls=cls, target_modules=["o_proj"], target_parameters=routers)
    return by_peft(root, out, cls)


def test_routers_that_mlx_lm_cannot_adapt_are_refused(tmp_path):
    pytest.importorskip("mlx_lm.tuner.utils")
    import mlx.nn as nn
    from mlx_lm.models import deepseek_v3

    model = tiny_models.made("DeepseekV3ForCausalLM")
    model.save_pretrained(tmp_path / "base")
    routers = [key for key, _ in model.named_parameters() if key.endswith("mlp.gate.weight")]
    routed(tmp_path, tmp_path / "lora", "DeepseekV3ForCausalLM", routers)
    with pytest.raises(UnsupportedError, match="no such layer in its models of type deepseek_v3"):
        lt.convert(tmp_path / "lora", to="mlx", base=tmp_path / "base", output=tmp_path / "mlx")
    assert not issubclass(deepseek_v3.MoEGate, nn.Linear)
    assert not hasattr(deepseek_v3.MoEGate, "to_lora")
