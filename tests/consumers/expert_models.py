"""A tiny model of experts, PEFT's adapters for them, and what PEFT makes of an adapter."""

import warnings
from pathlib import Path

import pytest
import tiny_models

import loratools as lt

torch = pytest.importorskip("torch")

ROUNDING = 2.0**-22
"""Relative error of a base in float32 that is rounded once more, with room for its sums."""


class Model:
    """A tiny model, PEFT's adapters for its experts, and what PEFT makes of an adapter."""

    def __init__(self, name, inner, folder):
        import transformers

        self.cls, self.folder, self.base = getattr(transformers, name), folder, folder / "base"
        config = tiny_models.config_of(self.cls)
        for part in (config, getattr(config, "text_config", config)):
            for key in ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size"):
                if isinstance(getattr(part, key, None), int):
                    setattr(part, key, inner)
        torch.manual_seed(0)
        self.cls(config).save_pretrained(self.base)
        weights = dict(self.loaded().named_parameters())
        self.old = {name: weight.detach() for name, weight in weights.items()}
        ends = {".".join(n.split(".")[-3:]) for n, w in weights.items() if _is_stack(n, w)}
        self.parameters = sorted(ends)

    def loaded(self, folder=None):
        return self.cls.from_pretrained(folder or self.base).double()

    def adapter(self, name, parameters=None, **settings):
        """Write an adapter with PEFT; return its folder."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(len(name))
        settings = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": []} | settings
        model = get_peft_model(
            self.loaded().float(),
            LoraConfig(target_parameters=parameters or self.parameters,
                       init_lora_weights=False, **settings),
        )  # fmt: skip
        model.save_pretrained(self.folder / name)
        return self.folder / name

    def change(self, adapter):
        """Return ΔW of every parameter as PEFT merges it; what it does not find is an error."""
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            warnings.filterwarnings("error", message=".*[Uu]nexpected keys.*")
            model = PeftModel.from_pretrained(self.loaded(), str(adapter))
        merged = dict(model.merge_and_unload().named_parameters())
        return {name: merged[name].detach() - old for name, old in self.old.items()}

    def fused(self, adapter):
        out = Path(f"{adapter}-fused")
        lt.fuse(self.base, adapter, output=out, overwrite=True)
        new = dict(self.loaded(out).named_parameters())
        return {name: new[name].detach() - old for name, old in self.old.items()}


def _is_stack(name, weight):
    return weight.ndim == 3 and "expert" in name and not name.endswith("bias")


def off(found, *wanted):
    """Return the relative distance of a change from the sum of others."""
    total = {name: sum(each[name] for each in wanted) for name in found}
    square = sum(float((found[name] - total[name]).norm() ** 2) for name in total)
    return (square / sum(float(each.norm() ** 2) for each in total.values())) ** 0.5
