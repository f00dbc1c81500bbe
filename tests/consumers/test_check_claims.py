"""What `check` says of PEFT, vLLM, SGLang, MLX-LM, diffusers and llama.cpp is what they do.

vLLM and SGLang do not install beside the other libraries: what their own code says is recorded by
`record_serving.py` from their wheels.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools.operations.check.targets import all_targets, known_targets

sys.path.insert(0, str(Path(__file__).parents[1] / "check"))
from handmade_adapters import IN, MODULES, OUT, folder, tensors
from record_serving import CONFIGS, FIRST, NAMES, RECORD

RECORDED = json.loads(RECORD.read_text())
VLLM = [name for name in RECORDED if name.startswith("vllm")]

LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"


def codes(path, **options):
    return {finding.code for finding in lt.check(path, **options).findings}


def changes_in_peft(path, name="other"):
    """Return the names of modules whose weight PEFT changes when it loads and merges a folder."""
    import torch
    from peft import PeftModel
    from torch import nn

    def module():
        attention = nn.ModuleDict(
            {name: nn.Linear(IN, OUT, bias=False) for name in ("q_proj", "v_proj")}
        )
        return nn.ModuleDict({"self_attn": attention})

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict({"layers": nn.ModuleList(module() for _ in range(2))})

    base = Base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(base, path, adapter_name=name).merge_and_unload()
    return {
        name.removesuffix(".weight")
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, before[name])
    }


def renamed(old, new):
    return {key.replace(old, new): array for key, array in tensors().items()}


NO_OPS = {
    "LT401": lambda p: folder(p, target_modules=["q_proj"], without=("task_type",)),
    "LT402": lambda p: folder(
        p, renamed("self_attn", "_orig_mod.self_attn"), without=("task_type",)
    ),
    "LT403": lambda p: folder(p, renamed(".weight", ".default.weight"), without=("task_type",)),
    "LT404": lambda p: folder(p, renamed("base_model.model.", ""), without=("task_type",)),
}


def test_peft_refuses_an_embedding_of_another_vocabulary(tmp_path):
    import torch
    from peft import PeftModel
    from torch import nn

    class Base(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.embed_tokens = nn.Embedding(rows, IN)
            self.q_proj = nn.Linear(IN, OUT, bias=False)

    weights = {"base_model.model.embed_tokens.weight": np.ones((20, IN), np.float32),
               "base_model.model.q_proj.lora_A.weight": np.ones((4, IN), np.float32),
               "base_model.model.q_proj.lora_B.weight": np.ones((OUT, 4), np.float32)}  # fmt: skip
    path = folder(tmp_path / "a", weights, modules_to_save=["embed_tokens"],
                  target_modules=["q_proj"], without=("task_type",))  # fmt: skip
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(Base(16), path)
    assert torch.equal(
        PeftModel.from_pretrained(Base(20), path).base_model.model.embed_tokens.weight,
        torch.ones(20, IN),
    )


def test_peft_changes_every_module_of_a_sound_adapter(tmp_path):
    path = folder(tmp_path / "a", without=("task_type",))
    assert changes_in_peft(path) == set(MODULES)
    assert not {code for code in codes(path) if code.startswith("LT4")}


@pytest.mark.parametrize("code", NO_OPS)
def test_peft_loads_a_silent_no_op_without_an_error(code, tmp_path):
    path = NO_OPS[code](tmp_path / "a")
    assert code in codes(path)
    assert changes_in_peft(path) != set(MODULES)


def test_a_regular_expression_is_matched_as_peft_does(tmp_path):
    for pattern in (r".*q_proj", r"q_proj", r"model\.layers\.0\..*", r".*\.(q|v)_proj"):
        path = folder(
            tmp_path / pattern.replace("\\", "_").replace("*", "+").replace("|", "_"),
            target_modules=pattern, without=("task_type",),
        )  # fmt: skip
        try:
            changed = changes_in_peft(path)
        except ValueError:  # no module is targeted at all
            changed = set()
        assert ("LT401" in codes(path)) == (changed != set(MODULES)), pattern


@pytest.mark.parametrize(
    "config",
    [{"layers_to_transform": [1]}, {"layers_to_transform": 0}, {"exclude_modules": ["q_proj"]}],
    ids=str,
)
def test_what_narrows_the_targets_is_read_as_peft_does(config, tmp_path):
    path = folder(tmp_path / "a", without=("task_type",), **config)
    assert "LT401" in codes(path)
    assert changes_in_peft(path) != set(MODULES)


def test_mlx_refuses_what_the_table_says(tmp_path):
    """A tensor that no layer has is an error there, and not passed over."""
    from mlx import core as mx
    from mlx import nn
    from mlx_lm.tuner.utils import load_adapters

    assert known_targets()["mlx"].other_kinds == "refused"

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(IN, OUT, bias=False)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Layer()]

    weights = {"layers.0.q_proj.lora_a": np.ones((IN, 4), np.float32),
               "layers.0.q_proj.lora_b": np.ones((4, OUT), np.float32)}  # fmt: skip
    config = {"fine_tune_type": "lora", "num_layers": 1,
              "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0,
                                  "keys": ["q_proj"]}}  # fmt: skip
    for more in ({}, {"layers.0.elsewhere.lora_a": np.ones((IN, 4), np.float32)}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        arrays = {key: mx.array(array) for key, array in (weights | more).items()}
        mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
        if more:
            with pytest.raises(ValueError, match="not an adapter parameter"):
                load_adapters(Model(), tmp_path)
        else:
            load_adapters(Model(), tmp_path)


def test_the_fix_for_mlx_is_loaded_by_mlx(tmp_path):
    import mlx_lm

    made = lt.check(LLAMA / "rslora", target=["mlx"], fix=True, output=tmp_path / "mlx")
    assert made.counts["error"] == 0
    model, _ = mlx_lm.load(str(LLAMA / "model"), adapter_path=str(tmp_path / "mlx"))
    names = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    assert names


def test_diffusers_gives_modules_of_different_ranks_their_own_scale():
    from diffusers.utils.peft_utils import get_peft_kwargs

    ranks = {"a.lora_B.weight": 4, "b.lora_B.weight": 8, "c.lora_B.weight": 8}
    found = get_peft_kwargs(ranks, None, dict.fromkeys(ranks))
    assert known_targets()["diffusers"].mixed_ranks == "yes"
    assert found["lora_alpha"] / found["r"] == 1.0
    assert found["alpha_pattern"] == found["rank_pattern"] == {"a": 4}


def test_adapters_that_peft_makes_have_no_errors(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model = nn.Sequential(nn.Linear(8, 12), nn.Conv2d(3, 4, 3), nn.Embedding(10, 6))
    made = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1", "2"]))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    made.save_pretrained(tmp_path / "peft")
    found = lt.check(tmp_path / "peft", target=["peft"]).findings
    assert [(f.code, f.message) for f in found if f.severity == "error"] == []


def recorded_adapter(path, case):
    """Write an adapter with the configuration of a recorded case, and tensors that fit it."""
    config = CONFIGS[case]
    weights = tensors(rank=config.get("r", 4))
    prefix = f"base_model.model.{FIRST}"
    if "rank_pattern" in config:
        weights[f"{prefix}.lora_A.weight"] = np.ones((2, IN), np.float32)
        weights[f"{prefix}.lora_B.weight"] = np.ones((OUT, 2), np.float32)
    if "use_dora" in config:
        weights |= {
            f"base_model.model.{name}.lora_magnitude_vector": np.ones(OUT, np.float32)
            for name in MODULES
        }
    if "modules_to_save" in config:
        name = config["modules_to_save"][0]
        weights[f"base_model.model.{name}.weight"] = np.ones((6, IN), np.float32)
    if "bias" in config:
        weights[f"{prefix}.base_layer.bias"] = np.ones(OUT, np.float32)
    if "lora_bias" in config:
        weights |= {
            f"base_model.model.{name}.lora_B.bias": np.ones(OUT, np.float32) for name in MODULES
        }
    if "use_qalora" in config:
        weights = {
            key: array[:, : IN // 4] if "lora_A" in key else array for key, array in weights.items()
        }
        config = config | {"qalora_group_size": 4}
    return folder(path, weights, **config)


def about_targets(path, target):
    return [f for f in lt.check(path, target=[target]).findings if f.target]


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("program", VLLM)
def test_vllm_refuses_and_scales_as_the_table_says(program, case, tmp_path):
    record = RECORDED[program]
    version = program.split()[1].rpartition(".")[0]
    path = recorded_adapter(tmp_path / "a", case)
    found = about_targets(path, f"vllm@{version}")
    says = record["configs"][case]
    by_name = case == "lora_bias" and "refused" in record["names"]["lora_B's bias"]
    refused = [f for f in found if "refuses" in f.message or "takes ranks up to" in f.message]
    assert bool(refused) == ("refused" in says or by_name), (says, found)
    if "scales" in says and not refused:
        adapter = lt.read(path)
        others = [name for name in adapter.modules if name != FIRST]
        own = [adapter.modules[name].factors for name in (FIRST, others[0])]
        if None not in own:
            wrong = says["scales"] != pytest.approx([part.scale for part in own])
            assert wrong == any(f.code == "LT506" for f in found)


@pytest.mark.parametrize("case", CONFIGS)
def test_sglang_scales_as_the_table_says(case, tmp_path):
    (record,) = (found for name, found in RECORDED.items() if name.startswith("sglang"))
    path = recorded_adapter(tmp_path / "a", case)
    found = {f.code for f in about_targets(path, "sglang")}
    says = record["configs"][case]
    assert ("LT503" in found) == says["use_dora"]
    parts = [lt.read(path).modules[name].factors for name in (FIRST, MODULES[-1])]
    if None not in parts:
        wrong = says["scales"] != pytest.approx([part.scale for part in parts])
        assert wrong == bool(found & {"LT506", "LT508"})


@pytest.mark.parametrize("program", VLLM)
def test_vllm_parses_names_as_the_rules_say(program):
    names = RECORDED[program]["names"]
    assert set(names) == set(NAMES)
    assert names["as saved"] == names["no prefix"] == {"module": FIRST}
    for case in ("adapter's name", "bias", "lora_B's bias", "token rows", "magnitude"):
        assert "refused" in names[case]
    version = program.split()[1].rpartition(".")[0]
    target = next(t for t in all_targets()["vllm"] if t.version == version)
    assert (target.token_rows, target.biases, target.dora) == ("refused",) * 3


def test_old_diffusers_takes_the_first_rank_as_alpha_of_all(tmp_path):
    record = RECORDED["diffusers 0.39.0"]
    arrays = {}
    for name, rank in record["ranks"].items():
        key = f"transformer.{name}"
        arrays[f"{key}.lora_A.weight"] = np.ones((rank, IN), np.float32)
        arrays[f"{key}.lora_B.weight"] = np.ones((OUT, rank), np.float32)
    path = tmp_path / "mixed.safetensors"
    save_file(arrays, path)
    wrong = [name for name, scale in record["scales"].items() if scale != 1.0]
    (found,) = (f for f in about_targets(path, "diffusers@0.39") if f.code == "LT506")
    assert found.where == f"transformer.{wrong[0]}"
    assert f"multiplies {found.where} by 0.5 instead of 1" in found.message
    assert f"for {len(wrong)} of {len(arrays) // 2}" in found.message
    assert not about_targets(path, "diffusers")
    fixed = lt.check(
        path, target=["diffusers@0.39"], fix=True, output=tmp_path / "even.safetensors"
    )
    assert not any(f.target for f in fixed.findings)


def test_every_version_of_a_program_that_was_run_is_recorded():
    for name, versions in all_targets().items():
        for target in versions:
            if f"of the wheel {name} " in target.source:
                known = [k for k in RECORDED if k.startswith(f"{name} {target.version}")]
                assert known, target.label
