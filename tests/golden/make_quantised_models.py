"""Write `quantised_models/CASE`: a model that a tool quantised, and what the tool makes of it.

    python tests/golden/make_quantised_models.py CASE [CASE …]

CASE is gptq, gptq-order, awq, nvfp4 or fp8; each needs its tool and `loratools` in one environment.
A tiny Llama is quantised on a CPU and saved as the tool saves models (`base`), an adapter is fused
into it that keeps the format, and the tool loads both: gptqmodel those of GPTQ, transformers by
gptqmodel that of AutoAWQ. ModelOpt has no loader for a CPU; its own tensors unpack the weights
there. `logits.npz` has what a plain model in float32 computes for `IDS` with the tool's values of
all weights, those of the base, of the fused model, and of the base plus ΔW (`changed`); what the
tool's own kernels compute with the fused model, in their 16 bits; and the tool's values of the
changed weights, before and after. `fused.safetensors` has what was loaded of these.

Made with gptqmodel 7.7.0, autoawq 0.2.9, nvidia-modelopt 0.47.0, transformers 5.23.0 and torch
2.13.0.
"""

import copy
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from make_quantised_by import save_model

FOLDER = Path(__file__).parent / "quantised_models"
IDS = [[1, 7, 9, 30, 2, 100]]
CHANGED = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.1.mlp.down_proj": (64, 128),
}
RANK = 4
_OF_THIS_RUN = re.compile(r'^ *"offload_to_disk_path".*\n', re.MULTILINE)
SIZE = 0.05  # of ΔW's entries; those of the weights are about 0.1


def save_plain(folder):
    """Save a tiny Llama of two layers, and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save_model(folder)  # for its tokenizer
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def save_adapter(folder):
    """Save an adapter as PEFT does, and return its ΔW by module in float64."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(2)
    tensors, changes = {}, {}
    for module, (out, width) in CHANGED.items():
        a = rng.standard_normal((RANK, width)).astype(np.float32)
        b = (SIZE / RANK**0.5 * rng.standard_normal((out, RANK))).astype(np.float32)
        prefix = f"base_model.model.{module}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        changes[module] = b.astype(np.float64) @ a.astype(np.float64)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = sorted({module.rpartition(".")[2] for module in CHANGED})
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return changes


def gptq(model, base, *, order):
    """Quantise by gptqmodel, and return what loads such a folder."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    ids = [torch.arange(i, i + 64)[None] for i in range(8)]
    data = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    config = QuantizeConfig(bits=4, group_size=32, desc_act=order, sym=order)
    found = GPTQModel.load(str(model), config, device="cpu")
    found.quantize(data, batch_size=1)
    found.save(str(base))

    def loaded(folder):
        return GPTQModel.load(
            str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
        ).model

    return loaded


def awq(model, base):
    """Quantise by AutoAWQ, and return how transformers loads such a folder."""
    from awq import AutoAWQForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig

    found = AutoAWQForCausalLM.from_pretrained(str(model), device_map="cpu", safetensors=True)
    found.quantize(
        AutoTokenizer.from_pretrained(model),
        quant_config={"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
        calib_data=["w1 w2 w3 w4 w5 w9 w8 w7 " * 7] * 16, max_calib_seq_len=64,
    )  # fmt: skip
    found.save_quantized(str(base))

    def loaded(folder):
        plan = AwqConfig(backend="torch_awq")
        return AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", dtype=torch.float16, quantization_config=plan
        )

    return loaded


def modelopt(model, base, *, config, unpack):
    """Quantise weights by ModelOpt, and return what unpacks such a folder by its tensors."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    found = mtq.quantize(copy.deepcopy(plain), config, lambda m: m(torch.tensor(IDS)))
    with torch.inference_mode():
        export_hf_checkpoint(found, export_dir=base)

    def loaded(folder):
        tensors = load_file(folder / "model.safetensors")
        filled = copy.deepcopy(plain)
        for key, parameter in filled.named_parameters():
            module = key.removesuffix(".weight")
            is_coded = f"{key}_scale" in tensors
            values = unpack(tensors, module, parameter.shape) if is_coded else tensors[key]
            parameter.data.copy_(values)
        return filled.float()

    return loaded


def nvfp4(model, base):
    """Quantise by ModelOpt in NVFP4, weights only."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def unpack(tensors, module, shape):
        packed = NVFP4QTensor(shape, torch.bfloat16, tensors[f"{module}.weight"])
        return packed.dequantize(
            torch.bfloat16,
            scale=tensors[f"{module}.weight_scale"],
            double_scale=tensors[f"{module}.weight_scale_2"],
            block_sizes={-1: 16},
        )

    return modelopt(model, base, config=copy.deepcopy(mtq.NVFP4_DEFAULT_CFG), unpack=unpack)


def fp8(model, base):
    """Quantise by ModelOpt in FP8."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.qtensor import FP8QTensor

    def unpack(tensors, module, shape):
        packed = FP8QTensor(shape, torch.float32, tensors[f"{module}.weight"])
        return packed.dequantize(torch.float32, scale=tensors[f"{module}.weight_scale"])

    return modelopt(model, base, config=copy.deepcopy(mtq.FP8_DEFAULT_CFG), unpack=unpack)


CASES = {
    "gptq": lambda model, base: gptq(model, base, order=False),
    "gptq-order": lambda model, base: gptq(model, base, order=True),
    "awq": awq,
    "nvfp4": nvfp4,
    "fp8": fp8,
}


def logits(model):
    """Return what a model computes for `IDS`, in float32."""
    with torch.inference_mode():
        return model.eval()(torch.tensor(IDS)).logits.float().numpy()


def values(model, module):
    """Return the (out, in) weight that a layer of a loaded model acts with, in float32."""
    layer = model.get_submodule(module)
    if type(layer) is torch.nn.Linear:
        return layer.weight.detach().float()
    width = layer.in_features
    with torch.inference_mode():
        return layer(torch.eye(width, dtype=torch.float16)).T.float().contiguous()


def main():
    """Write the cases that are named."""
    os.cpu_count = lambda: 8  # gptqmodel wants more than two
    import loratools as lt

    for case in sys.argv[1:]:
        folder = FOLDER / case
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as temporary:
            model, base, fused = (Path(temporary, name) for name in ("model", "base", "fused"))
            save_plain(model)
            load = CASES[case](model, base)
            changes = save_adapter(folder / "adapter")
            kept = folder / "base"
            kept.mkdir()
            for path in sorted(base.glob("*.safetensors")) + sorted(base.glob("*config.json")):
                if path.name not in ("generation_config.json", "tokenizer_config.json"):
                    shutil.copy(path, kept)
            for path in kept.glob("*.json"):
                path.write_text(_OF_THIS_RUN.sub("", path.read_text()))
            lt.fuse(base, folder / "adapter", requantize=True, allow_lossy=True, output=fused)
            found, before = {}, load(base)
            found["base"] = logits(with_changes(model, before, {}))
            found["changed"] = logits(with_changes(model, before, changes))
            after = load(fused)
            found["fused"] = logits(with_changes(model, after, {}))
            found["by kernels"] = logits(after)
            for module in CHANGED:
                found[f"before {module}"] = values(before, module).numpy()
                found[f"after {module}"] = values(after, module).numpy()
            keep_changed(fused, folder)
            np.savez_compressed(folder / "logits.npz", **found)


def with_changes(plain, quantised, changes):
    """Return a plain model in float32 that has the values of a quantised one, plus ΔW."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    own = dict(quantised.named_parameters()) | dict(quantised.named_buffers())
    for key, parameter in model.named_parameters():
        module = key.removesuffix(".weight")
        is_linear = type(model.get_submodule(module)) is torch.nn.Linear
        weight = values(quantised, module) if is_linear else own[key].detach().float()
        if module in changes:
            weight = (weight.double() + torch.from_numpy(changes[module])).float()
        parameter.data.copy_(weight)
    return model


def keep_changed(fused, folder):
    """Keep the tensors of the changed weights of a fused model."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for path in fused.glob("*.safetensors"):
        tensors |= load_file(path)
    own = {k: t for k, t in tensors.items() if k.rpartition(".")[0] in CHANGED}
    save_file(own, folder / "fused.safetensors")


if __name__ == "__main__":
    main()
