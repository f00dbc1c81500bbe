"""Write `quantised_by/TOOL.npz`: layers that a tool quantised, and its own values of them.

    python tests/golden/make_quantised_by.py TOOL

TOOL is modelopt, auto_round, autoawq, gptqmodel or comfy_kitchen; each needs an environment of its
own. A tiny Llama is quantised on a CPU and saved as the tool saves models; one layer of it is kept.
comfy-kitchen has no models, and quantises a matrix. The values are what the tool's layer gives for
the identity, or what the tool's packed tensor means. Keys are CASE/TENSOR, CASE/values,
CASE/stated, which is JSON of what the configuration says, and CASE/metadata, of a file's metadata;
floats that NumPy has not are stored as their bits, and CASE/TENSOR:TYPE says of which type.

Made with nvidia-modelopt 0.47.0, auto-round 0.16.1, autoawq 0.2.9, gptqmodel 7.7.0, comfy-kitchen
0.2.40, transformers 5.23.0 and torch 2.13.0. gptqmodel asks for torch 2.14, and for more than two
cores.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "quantised_by"
LAYER = "model.layers.0.mlp.down_proj"
IN, OUT = 128, 64
BITS = {
    torch.bfloat16: ("BF16", torch.uint16),
    torch.float8_e4m3fn: ("F8_E4M3", torch.uint8),
    torch.float8_e8m0fnu: ("F8_E8M0", torch.uint8),
}


def save_model(folder):
    """Save a tiny Llama and a tokenizer of words w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=OUT, intermediate_size=IN, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{i}": i for i in range(126)} | {"<unk>": 126, "</s>": 127}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def plain(folder):
    """Load what `save_model` saved."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def saved(folder):
    """Return the layer's tensors by their last names, and what config.json says of them."""
    from safetensors.torch import load_file

    (config,) = Path(folder).rglob("config.json")
    tensors = load_file(config.parent / "model.safetensors")
    found = {k.removeprefix(f"{LAYER}."): t for k, t in tensors.items() if k.startswith(LAYER)}
    found = {k: t for k, t in found.items() if k != "input_scale"}
    return found, json.loads(config.read_text())["quantization_config"]


def by_identity(layer, dtype):
    """Return the (out, in) weight of a layer from what it gives for the identity."""
    with torch.inference_mode():
        return layer.to("cpu")(torch.eye(IN, dtype=dtype)).T.contiguous()


def modelopt(model, out):
    """Yield the cases of ModelOpt."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    ids = torch.arange(64).reshape(2, 32)
    for name in (
        "NVFP4_DEFAULT_CFG", "NVFP4_MLP_WEIGHT_ONLY_CFG", "FP8_DEFAULT_CFG", "MXFP8_DEFAULT_CFG",
        "MXFP4_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
        "INT8_DEFAULT_CFG",
    ):  # fmt: skip
        found = mtq.quantize(plain(model), copy.deepcopy(getattr(mtq, name)), lambda m: m(ids))
        with torch.inference_mode():
            export_hf_checkpoint(found, export_dir=out / name)
        tensors, stated = saved(out / name)
        yield name.removesuffix("_CFG"), tensors, stated, unpacked(name, tensors)


def unpacked(name, tensors):
    """Return what ModelOpt's own packed tensor means; in float32 where scales are of that type."""
    from modelopt.torch.quantization import qtensor

    kind = getattr(qtensor, f"{name.partition('_')[0]}QTensor")
    scale, about, dtype = tensors["weight_scale"], {}, torch.bfloat16
    if "weight_scale_2" in tensors:
        size = IN // scale.shape[-1]
        about = {"double_scale": tensors["weight_scale_2"], "block_sizes": {-1: size}}
    elif name.startswith("MXFP4"):
        about = {"block_sizes": {-1: 32}}
    elif scale.dtype == torch.float32:
        dtype = torch.float32
        scale = scale.reshape(-1, 1) if scale.numel() in (1, OUT) else scale
    packed = kind(torch.Size((OUT, IN)), dtype, tensors["weight"])
    return packed.dequantize(dtype, scale=scale, **about).reshape(OUT, IN)


def auto_round(model, out):
    """Yield the cases of AutoRound."""
    import os

    from auto_round import AutoRound
    from transformers import AutoTokenizer

    os.environ["AR_ALLOW_W8_ASYM"] = "1"
    data = out / "data.jsonl"
    data.write_text(f'{{"text": "{"w1 w2 w3 w4 w5 w9 w8 w7 " * 40}"}}\n' * 16)
    own, gptq, gptqmodel, awq = (
        "auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq",
    )  # fmt: skip
    integers = [
        (own, 4), (gptq, 4), (own, 2), (gptq, 2), (own, 3), (own, 8), (gptq, 8),
        (gptqmodel, 2, False), (gptqmodel, 4, False), (own, 8, False),
        (gptqmodel, 8, False), (gptq, 8, False), (gptq, 4, False), (gptqmodel, 3, False),
        (own, 5, False), (own, 6, False), (own, 7, False),
        (awq, 4), (awq, 4, False), (awq, 5, False), (awq, 6), (awq, 7, False),
    ]  # fmt: skip
    forms = [
        (form, {"scheme": f"W{bits}A16", "group_size": 64} | ({"sym": False} if rest else {}))
        for form, bits, *rest in integers
    ]
    names = ("MXFP4", "MXFP8", "MXINT4", "NVFP4", "NVFP4_E5M3")
    for form, arguments in forms + [(own, {"scheme": name}) for name in names]:
        name = "-".join([form.replace(":", "-"), *(str(v) for v in arguments.values())])
        rounder = AutoRound(
            plain(model), AutoTokenizer.from_pretrained(model), iters=0, disable_opt_rtn=True,
            device_map="cpu", nsamples=4, seqlen=16, dataset=str(data), **arguments,
        )  # fmt: skip
        rounder.quantize_and_save(str(out / name), format=form)
        tensors, stated = saved(out / name)
        tensors.pop("input_global_scale", None)
        yield name, tensors, stated, by_auto_round(out / name, tensors, stated)


def by_auto_round(folder, tensors, stated):
    """Return what AutoRound's layer makes of its weight.

    Two of its forms have no kernel for a CPU where they are asymmetric: what the layers that packed
    them compute is taken there.
    """
    form, bits, size = stated["packing_format"], stated["bits"], stated["group_size"]
    if form == "auto_round:auto_awq":
        from auto_round.export.export_to_awq.utils import dequantize_gemm

        parts = (tensors[name] for name in ("qweight", "qzeros", "scales"))
        return dequantize_gemm(*parts, bits, size).T.contiguous()
    if form == "auto_round:auto_gptq" and not stated["sym"]:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

        layer = QuantLinear(bits, size, IN, OUT, bias=False)
        layer.load_state_dict(tensors)
        return by_identity(layer, torch.half)
    from transformers import AutoModelForCausalLM

    (config,) = folder.rglob("config.json")
    layer = AutoModelForCausalLM.from_pretrained(config.parent, device_map="cpu")
    layer = layer.get_submodule(LAYER)
    if "scales" not in tensors:  # layers that quantise what they are given, too
        return layer.dequant_weight_online().to(torch.bfloat16)
    return by_identity(layer.to(tensors["scales"].dtype), tensors["scales"].dtype)


def autoawq(model, out):
    """Yield the case of AutoAWQ."""
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    found = AutoAWQForCausalLM.from_pretrained(str(model), device_map="cpu", safetensors=True)
    found.quantize(
        AutoTokenizer.from_pretrained(model),
        quant_config={"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
        calib_data=["w1 w2 w3 w4 w5 w9 w8 w7 " * 7] * 16, max_calib_seq_len=64,
    )  # fmt: skip
    found.save_quantized(str(out / "gemm"))
    yield ("gemm", *saved(out / "gemm"), by_identity(found.model.get_submodule(LAYER), torch.half))


def gptqmodel(model, out):
    """Yield the cases of gptqmodel."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    ids = [torch.arange(i, i + 64)[None] for i in range(8)]
    data = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    for bits, act, sym, form in (
        (4, False, True, "gptq"), (4, True, False, "gptq"), (8, False, True, "gptq"),
        (3, True, True, "gptq"), (2, False, False, "gptq_v2"),
    ):  # fmt: skip
        name = f"{form}-{bits}-act{int(act)}-sym{int(sym)}"
        config = QuantizeConfig(bits=bits, group_size=64, desc_act=act, sym=sym, format=form)
        found = GPTQModel.load(str(model), config, device="cpu")
        found.quantize(data, batch_size=1)
        found.save(str(out / name))
        loaded = GPTQModel.load(
            str(out / name), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
        )  # in BF16 it would round the scales
        layer = loaded.model.get_submodule(LAYER)
        tensors, stated = saved(out / name)
        yield name, tensors, stated, by_identity(layer, tensors["scales"].dtype)


def comfy_kitchen(model, out):
    """Yield the cases of comfy-kitchen, the library of ComfyUI; rows and columns fill no tile."""
    from comfy_kitchen.tensor import QuantizedTensor

    torch.manual_seed(0)
    weight = torch.randn(160, 96) * 0.02
    for form, layout, dtype, options in (
        ("nvfp4", "TensorCoreNVFP4Layout", torch.bfloat16, {}),
        ("mxfp8", "TensorCoreMXFP8Layout", torch.bfloat16, {}),
        ("int8_tensorwise", "TensorWiseINT8Layout", torch.float32, {}),
        ("int8_tensorwise", "TensorWiseINT8Layout", torch.float32, {"per_channel": True}),
        (
            "int8_tensorwise", "TensorWiseINT8Layout", torch.float32,
            {"per_channel": True, "convrot": True, "convrot_groupsize": 16},
        ),
        ("convrot_w4a4", "TensorCoreConvRotW4A4Layout", torch.float32, {"convrot_groupsize": 64}),
        ("nvfp4", "TensorCoreNVFP4Layout", torch.bfloat16, {"shape": (150, 92)}),
        ("mxfp8", "TensorCoreMXFP8Layout", torch.bfloat16, {"shape": (150, 92)}),
    ):  # fmt: skip
        about = {"format": form, **options}
        shape = about.pop("shape", None)
        if shape is not None:
            about["orig_shape"] = list(shape)
        own = weight if shape is None else weight[: shape[0], : shape[1]].contiguous()
        if "w4a4" in form:
            own = torch.randn(32, 128) * 0.02
        found = QuantizedTensor.from_float(
            own, layout, **{k: v for k, v in options.items() if k != "shape"}
        )
        said = {"_quantization_metadata": json.dumps({"layers": {"x": about}})}
        tensors = {**found.state_dict("weight"), "metadata": said}
        yield "-".join([form, *options]), tensors, {}, found.dequantize().to(dtype)


TOOLS = {
    "modelopt": modelopt, "auto_round": auto_round, "autoawq": autoawq, "gptqmodel": gptqmodel,
    "comfy_kitchen": comfy_kitchen,
}  # fmt: skip


def main():
    """Run one tool and write what it made."""
    tool = sys.argv[1]
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "model")
        if tool != "comfy_kitchen":
            save_model(model)
        for name, tensors, stated, values in TOOLS[tool](model, Path(temporary)):
            metadata = tensors.pop("metadata", None)
            if metadata is not None:
                found[f"{name}/metadata"] = np.array(json.dumps(metadata))
            for part, tensor in {**tensors, "values": values}.items():
                code, bits = BITS.get(tensor.dtype, ("", tensor.dtype))
                key = f"{name}/{part}:{code}" if code else f"{name}/{part}"
                found[key] = tensor.detach().contiguous().view(bits).numpy()
            found[f"{name}/stated"] = np.array(json.dumps(stated, sort_keys=True))
            FOLDER.mkdir(exist_ok=True)
            np.savez_compressed(FOLDER / f"{tool}.npz", **found)


if __name__ == "__main__":
    main()
