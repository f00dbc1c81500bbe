"""Adapters of stacked experts as releases of PEFT write them, and the change that each merges.

    PYTHONPATH=FOLDER python tests/golden/make_experts.py

with the release in FOLDER (`pip install --no-deps --target FOLDER peft==0.18.1`) writes
`tests/golden/experts/<release>-<class>-<inner width>/`: PEFT's folder, and `delta.safetensors` with
ΔW of both parameters as (E, out, in) in float64. The model is a module with two parameters, stored
(E, out, in), or (E, in, out) in a class that says `is_transposed`.
"""

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "experts"
EXPERTS, RANK, WIDTH = 3, 2, 4


class Experts(torch.nn.Module):
    def __init__(self, inner, *, transposed):
        super().__init__()
        self.is_transposed = transposed
        for name, (out, in_) in {"gate_up_proj": (2 * inner, WIDTH),
                                 "down_proj": (WIDTH, inner)}.items():  # fmt: skip
            shape = (EXPERTS, in_, out) if transposed else (EXPERTS, out, in_)
            setattr(self, name, torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)))


class Block(torch.nn.Module):
    def __init__(self, inner, *, transposed):
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.experts = Experts(inner, transposed=transposed)


def make(inner, *, transposed):
    torch.manual_seed(inner)
    model = Block(inner, transposed=transposed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=3, target_modules=[], target_parameters=names, init_lora_weights=False
    )
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in sorted(wrapped.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape).to(parameter.dtype)
    kind = "in-out" if transposed else "out-in"
    folder = HERE / f"{peft.__version__}-{kind}-{inner}"
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    deltas = {}
    for name, old in before.items():
        delta = (merged[name] - old).detach()
        deltas[name] = (delta.transpose(1, 2) if transposed else delta).contiguous()
    save_file(deltas, folder / "delta.safetensors")
    text = json.loads((folder / "adapter_config.json").read_text())
    for key in ("target_parameters", "target_modules"):  # sets, of no order
        text[key] = sorted(text[key] or [])
    (folder / "adapter_config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    print(folder.name)


if __name__ == "__main__":
    for inner in (3, 2, 4):  # none square; gate_up square; down square
        for transposed in (False, True):
            make(inner, transposed=transposed)
