"""Record what serving programs do with configurations and names, from their own wheels.

    pip download --no-deps --dest WHEELS vllm==0.33.0 vllm==0.26.0 sglang==0.5.23 diffusers==0.39.0
    python tests/consumers/record_serving.py WHEELS/*.whl

The wheels are hundreds of megabytes and do not install beside the other libraries of the tests. Of
each, only the functions that decide are run, and what they say of each case is written to
`serving_claims.json`, with the digest of the file that holds them. `test_check_claims.py` compares
that with what `check` says.
"""

import ast
import collections
import hashlib
import json
import sys
import types
import zipfile
from pathlib import Path

RECORD = Path(__file__).with_name("serving_claims.json")
LARGEST_RANK = 512  # of vLLM's choices; smaller limits are flags
PLAIN = {
    "base_model_name_or_path": "org/base", "bias": "none", "lora_alpha": 8, "peft_type": "LORA",
    "peft_version": "0.21.2", "r": 4, "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
FIRST = "model.layers.0.self_attn.q_proj"
CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank pattern": {"rank_pattern": {FIRST: 2}},
    "alpha pattern": {"alpha_pattern": {FIRST: 16}},
    "both patterns": {"rank_pattern": {FIRST: 2}, "alpha_pattern": {FIRST: 4}},
    "rank 600": {"r": 600},
    "whole lm_head": {"modules_to_save": ["lm_head"]},
    "whole score": {"modules_to_save": ["score"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, named steps": {"init_lora_weights": "pissa_niter_16"},
    "OLoRA": {"init_lora_weights": "olora"},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "EVA": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
    "layer replication": {"layer_replication": [[0, 1], [0, 1]]},
    "QALoRA": {"use_qalora": True},
}
NAMES = {
    "as saved": f"base_model.model.{FIRST}.lora_A.weight",
    "adapter's name": f"base_model.model.{FIRST}.lora_A.default.weight",
    "no prefix": f"{FIRST}.lora_A.weight",
    "bias": f"base_model.model.{FIRST}.base_layer.bias",
    "lora_B's bias": f"base_model.model.{FIRST}.lora_B.bias",
    "token rows": "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    "magnitude": f"base_model.model.{FIRST}.lora_magnitude_vector",
}
RANKS = {"a": 4, "b": 8, "c": 8}  # of a file of diffusers without alphas


def source(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode()


def function(text, name):
    """Return one function of a file, run without the file's imports."""
    (node,) = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name]
    scope = {"collections": collections}
    exec(compile(ast.Module([node], []), name, "exec"), scope)
    return scope[name]


def stub(name, **values):
    module = types.ModuleType(name)
    module.__dict__.update(values)
    sys.modules[name] = module


def helper(text):
    """Return vLLM's `PEFTHelper`; what it imports of vLLM is a type, a log and a storage."""

    class Log:
        def info_once(self, *_): ...

    stub("vllm")
    stub("vllm.config")
    stub("vllm.config.lora", LoRAConfig=None)
    stub("vllm.logger", init_logger=lambda _: Log())
    stub("vllm.model_executor")
    stub("vllm.model_executor.model_loader")
    stub("vllm.model_executor.model_loader.tensorizer", TensorizerConfig=None)
    stub("vllm.lora.peft_helper")
    module = sys.modules["vllm.lora.peft_helper"]
    exec(compile(text, "peft_helper.py", "exec"), module.__dict__)
    return module.PEFTHelper


def scales(found):
    """Return the scale of the module that the cases' patterns name, and of the others."""
    if hasattr(found, "get_rank_and_scaling"):
        return [found.get_rank_and_scaling(n)[1] for n in (FIRST, "model.layers.1.x.q_proj")]
    return [found.vllm_lora_scaling_factor] * 2


def of_vllm(wheel):
    text, names = source(wheel, "vllm/lora/peft_helper.py"), source(wheel, "vllm/lora/utils.py")
    peft_helper, parse = helper(text), function(names, "parse_fine_tuned_lora_name")
    limits = types.SimpleNamespace(max_lora_rank=LARGEST_RANK)
    configs, parsed = {}, {}
    for case, change in CONFIGS.items():
        try:
            found = peft_helper.from_dict(PLAIN | change)
            found.validate_legal(limits)
            configs[case] = {"scales": scales(found)}
        except ValueError as error:
            configs[case] = {"refused": str(error)}
    for case, name in NAMES.items():
        try:
            parsed[case] = {"module": parse(name)[0]}
        except ValueError as error:
            parsed[case] = {"refused": str(error)}
    digest = hashlib.sha256((text + names).encode()).hexdigest()
    return {"files": "peft_helper.py, utils.py", "sha256": digest, "configs": configs,
            "names": parsed}  # fmt: skip


def of_sglang(wheel):
    """Run `LoRAConfig`, and the line of `LoRAAdapter` that computes its scale."""
    config_text = source(wheel, "sglang/srt/lora/lora_config.py")
    text = source(wheel, "sglang/srt/lora/lora.py")
    scope = {"__name__": "lora_config"}
    exec(compile(config_text, "lora_config.py", "exec"), scope)
    (line,) = [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "self.scaling"
    ]
    configs = {}
    for case, change in CONFIGS.items():
        config = scope["LoRAConfig"].from_dict(PLAIN | change)
        own = types.SimpleNamespace(config=config)
        scale = eval(compile(ast.Expression(line), "lora.py", "eval"), {"self": own})
        configs[case] = {"scales": [scale, scale], "use_dora": config.use_dora}
    digest = hashlib.sha256((config_text + text).encode()).hexdigest()
    return {"files": "lora_config.py, lora.py", "sha256": digest, "configs": configs}


def of_diffusers(wheel):
    text = source(wheel, "diffusers/utils/peft_utils.py")
    ranks = {f"{name}.lora_B.weight": rank for name, rank in RANKS.items()}
    found = function(text, "get_peft_kwargs")(ranks, None, dict.fromkeys(ranks))
    alphas, own = found["alpha_pattern"], found["rank_pattern"]
    taken = {
        name: alphas.get(name, found["lora_alpha"]) / own.get(name, found["r"]) for name in RANKS
    }
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"files": "peft_utils.py", "sha256": digest, "ranks": RANKS, "scales": taken}


def main():
    recorded = {}
    for wheel in map(Path, sys.argv[1:]):
        library, version = wheel.name.split("-")[:2]
        make = {"vllm": of_vllm, "sglang": of_sglang, "diffusers": of_diffusers}[library]
        recorded[f"{library} {version}"] = make(wheel)
    RECORD.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
