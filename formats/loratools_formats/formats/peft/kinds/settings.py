"""What PEFT's other kinds depend on: shapes from tensors, settings from configurations.

Source: the tuners of peft 0.21.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loratools_formats.core.change import Missing, ModuleChange
from loratools_formats.core.config_values import LOOPS, Values
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.peft.kinds.declaration import Module, Shape
from loratools_formats.formats.peft.patterns import matches_whole

_LEAST_RANKNUM = 1e-5  # added to the rank by AdaLoRA's scale


def scaled(values: Values, module: Module) -> dict[str, Any]:
    """Return the scale alpha/r."""
    del values
    if module.alpha is None or module.rank is None:
        raise AdapterError("config lacks alpha or r", tensor=module.path)
    return {"scale": module.alpha / module.rank}


def adalora(values: Values, module: Module) -> dict[str, Any]:
    """Return AdaLoRA's scale."""
    rows = module.side("a", 0)
    first = values.count("init_r")
    if rows != first and "rank_pattern" not in values:
        raise AdapterError(
            "rank in the file and rank in the config differ",
            tensor=module.parts["a"].key,
            got=rows,
            expected=f"init_r = {first}",
        )
    alpha = values.number("lora_alpha")
    # PEFT keeps dividing by the first rank after it has pruned some.
    return {"scale": (alpha if alpha > 0 else rows) / (first + _LEAST_RANKNUM)}


def factors_shape(module: Module) -> Shape:
    """Return the shape of a weight whose factors are `a` and `b`."""
    return module.side("b", 0), module.side("a", 1)


def loha_shape(module: Module) -> Shape:
    """Return the shape of a LoHa's weight."""
    if "t1" not in module.parts:
        return module.side("w1_a", 0), module.side("w1_b", 1)
    return module.side("w1_a", 1), module.side("w1_b", 1) * _kernel(module.parts["t1"])


def _kernel(core: TensorRef) -> int:
    return math.prod(core.shape[2:])


def lokr_shape(module: Module) -> Shape:
    """Return the shape of a LoKr's weight."""
    parts = module.parts
    factors = ("w1_a", 0), ("w1_b", 1)
    left = parts["w1"].shape if "w1" in parts else tuple(module.side(*each) for each in factors)
    if "w2" in parts:
        whole = parts["w2"].shape
        right = whole[0], math.prod(whole[1:])
    elif "w2_t" in parts:
        right = module.side("w2_a", 1), module.side("w2_b", 1) * _kernel(parts["w2_t"])
    else:
        right = module.side("w2_a", 0), module.side("w2_b", 1)
    if len(left) != 2:
        raise AdapterError("tensor is not a matrix", tensor=parts["w1"].key, got=list(left))
    return left[0] * right[0], left[1] * right[1]


def lokr(values: Values, module: Module) -> dict[str, Any]:
    """Return LoKr's scale, and whether PEFT's order of a Conv1d's columns applies."""
    whole = module.parts.get("w2")
    return {**scaled(values, module), "by_input": whole is not None and len(whole.shape) == 3}


def vera(values: Values, module: Module) -> dict[str, Any]:
    """Return VeRA's seed, if its projections are not stored."""
    seed = None if "a" in module.parts else values.whole("projection_prng_key")
    return {"seed": seed, "halves": False}


def pvera(values: Values, module: Module) -> dict[str, Any]:
    """Return the same of PVeRA, which uses the half of each that is the mean."""
    if values.flag_or_false("sample_at_inference"):
        raise UnsupportedError("PVeRA that samples at inference has no one weight change")
    return {**vera(values, module), "halves": True}


def vblora_shape(module: Module) -> Shape:
    """Return the shape of a VB-LoRA's weight."""
    length = module.side("bank", 1)
    name = "logits" if "logits_a" in module.parts else "indices"
    return module.side(f"{name}_b", 0) * length, module.side(f"{name}_a", 1) * length


def tinylora(values: Values, _: Module) -> dict[str, Any]:
    """Return TinyLoRA's seed, and the share of modules that have one vector in common."""
    return {"seed": values.whole("projection_seed"), "tying": values.share("weight_tying")}


def gralora(values: Values, _: Module) -> dict[str, Any]:
    """Return GraLoRA's scale, of the rank of both its parts."""
    return {"scale": values.number("alpha") / (values.count("r") + values.whole("hybrid_r"))}


def randlora(values: Values, module: Module) -> dict[str, Any]:
    """Return RandLoRA's scale, and how its bases are drawn if they are not stored."""
    of_authors = "a" in module.parts and "randbasis" in module.parts["a"].key
    settings: dict[str, Any] = {
        "scale": values.number("randlora_alpha") / module.side("lambda", 0),
        "rule": "authors" if of_authors else "peft",
        "seed": None,
        "sparsity": None,
    }
    if "a" not in module.parts and "peft_version" not in values:
        settings["rule"] = Missing(
            "peft, if PEFT trained it, or authors, if their own fork did", ("peft", "authors")
        )
    if "a" not in module.parts:
        settings["seed"] = values.whole("projection_prng_key")
        if values.flag_or_false("very_sparse"):
            settings["sparsity"] = "root"
        elif values.flag_or_false("sparse"):
            settings["sparsity"] = 3
        else:
            # PEFT draws in bfloat16 where the machine has it, and does not record it.
            settings["draws"] = Missing(
                "bf16, or f16 if the machine that trained it had no bfloat16", ("bf16", "f16")
            )
    return settings


def fourierft(values: Values, _: Module) -> dict[str, Any]:
    """Return FourierFT's scale, and the seed by which its places are drawn."""
    return {"seed": values.whole("random_loc_seed"), "scale": values.number("scaling")}


def waveft(values: Values, module: Module) -> dict[str, Any]:
    """Return the same of WaveFT, and its wavelet if it has one."""
    wavelet = values.text("wavelet_family").lower() if values.flag("use_idwt") else None
    return {**fourierft(values, module), "wavelet": wavelet}


def _neumann_terms(values: Values) -> int | None:
    """Return how many terms of a series stand for an inverse; None if it is computed itself."""
    if not values.flag("use_cayley_neumann"):
        return None
    return values.count("num_cayley_neumann_terms", most=LOOPS)


def oft(values: Values, module: Module) -> dict[str, Any]:
    """Return how OFT makes rotations."""
    shared = values.flag_or_false("block_share")
    if shared and module.side("triangles", 0) != 1:
        raise AdapterError(
            "the tensors and the config's block_share differ",
            tensor=module.parts["triangles"].key,
            got=list(module.parts["triangles"].shape),
            expected="one block for all",
        )
    return {
        "shared": shared,
        "bound": values.number("eps") if values.flag("coft") else None,
        "terms": _neumann_terms(values),
    }


def road(values: Values, _: Module) -> dict[str, Any]:
    """Return which form RoAd has, and how many outputs make a group."""
    return {"variant": values.text("variant"), "group": values.count("group_size")}


def ia3(values: Values, module: Module) -> dict[str, Any]:
    """Return which side of the weight is scaled, which shows in linear layers only."""
    shape = module.parts["gain"].shape
    if len(shape) > 2 and math.prod(shape) == shape[1]:
        found, path = values.names("feedforward_modules"), module.path
        if isinstance(found, str):
            return {"on_input": matches_whole(found, path)}
        return {"on_input": any(path.endswith(end) for end in found if isinstance(end, str))}
    if len(shape) != 2 or min(shape) != 1 or max(shape) == 1:
        raise UnsupportedError(
            "the tensors do not show whether inputs or outputs are scaled",
            tensor=module.parts["gain"].key,
            got=list(shape),
        )
    return {"on_input": shape[0] == 1}


def ia3_shape(module: Module) -> Shape:
    """Return the side that is scaled."""
    shape = module.parts["gain"].shape
    if len(shape) != 2:
        return (None, None)
    return (None, shape[-1]) if shape[0] == 1 else (shape[0], None)


def deft(values: Values, module: Module) -> dict[str, Any]:
    """Return DEFT's decomposition and scale."""
    alpha = values.number_or_none("alpha")
    return {
        "method": values.text("decomposition_method"),
        "scale": alpha / module.side("p", 1) if alpha else 1.0,
    }


def psoft(values: Values, module: Module) -> dict[str, Any]:
    """Return how PSOFT makes its rotation."""
    if values.text("psoft_svd") != "full":
        raise UnsupportedError("PSOFT on a randomised SVD of the base cannot be repeated")
    return {
        "rank": module.rank,
        "orthogonal": values.flag("psoft_orth"),
        "balanced": values.text("ab_svd_init") == "pissa_init",
        "bound": values.number_or_none("cayley_neumann_eps"),
        "terms": _neumann_terms(values),
    }


def adamss(values: Values, _: Module) -> dict[str, Any]:
    """Return into how many groups AdaMSS sorts the directions of a weight, and by which seed."""
    return {"groups": values.count("num_subspaces"), "seed": values.whole("random_seed")}


def peanut(values: Values, _: Module) -> dict[str, Any]:
    """Return PEANuT's scale, and what its network is made of."""
    return {
        "scale": values.number("scaling"),
        "activation": values.text("act_fn"),
        "depth": values.count("depth", most=LOOPS, least=0),
    }


def sparse(values: Values, module: Module) -> dict[str, Any]:
    """Return the scale of a sparse change, and that of the factors which Supra adds to it."""
    factor_scale = None
    if "a" in module.parts:
        factor_scale = values.number("lora_alpha") / values.count("r")
    return {"scale": 1.0, "factor_scale": factor_scale}


def unilora_left(modules: Mapping[str, ModuleChange]) -> str:
    """PEFT saves the indices of Uni-LoRA, by which its modules are known, only if asked to."""
    return "" if modules else "Uni-LoRA's indices"


def frod_left(modules: Mapping[str, ModuleChange]) -> str:
    """PEFT saves the basis of FRoD only if asked to."""
    others = [change.kind_delta for change in modules.values()]
    lacks = any(other is not None and "v" not in other.shared for other in others)
    return "FRoD's bases" if lacks else ""


def miss(values: Values, module: Module) -> dict[str, Any]:
    """Return whether MiSS repeats its block along the outputs, and hold the form to the config."""
    form = values.text("init_weights") if values.is_text("init_weights") else ""
    block = module.parts["block"]
    if (form == "bat") != (len(block.shape) == 3):
        raise AdapterError(
            "the tensors and the config's init_weights differ",
            tensor=block.key,
            got=list(block.shape),
            expected="three axes with bat, two with any other",
        )
    return {"mini": form == "mini"}


def miss_shape(module: Module) -> Shape:
    """Return the outputs, which blocks of three axes tell."""
    if miss_variant(module) is None:
        return None, None
    return module.side("block", 0) * module.side("block", 1), None


def miss_variant(module: Module) -> str | None:
    """Blocks of three axes are those of MiSS's second form, "bat"."""
    return "miss_bat" if len(module.parts["block"].shape) == 3 else None
