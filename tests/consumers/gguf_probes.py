"""Tiny models for llama.cpp's converter, and where it puts the rows of their weights."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import numpy as np
import tiny_models

from loratools_formats.disk.errors import AdapterError
from loratools_formats.formats.gguf.layouts import LAYOUTS, Sizes

_LEFT_OUT = "llama.cpp has no tensor for it"


class CannotError(Exception):
    """A class cannot be probed; the text says why."""


def save(name, folder):
    """Save a tiny model of a class with random weights.

    Returns:
        Its weights by their names in memory, and the classes of its modules by their paths.

    Raises:
        CannotError: transformers has no such class, or it cannot be built tiny.
    """
    import torch

    model = built(name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    written(model, folder)
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    weights = {
        key: weight.detach().numpy()
        for key, weight in model.named_parameters(remove_duplicate=False)
        if weight.ndim in (2, 3)
    }
    return weights, kinds


def built(name, wider=False):
    """Return a tiny model of a class; a little wider on request.

    Raises:
        CannotError: transformers has no such class, or it cannot be built tiny.
    """
    import torch
    import transformers

    if not hasattr(transformers, name):
        raise CannotError("transformers has no such class to compare with")
    try:
        cls = getattr(transformers, name)
        config = adjusted(name, BUILT[name]() if name in BUILT else tiny_models.config_of(cls))
        if wider:
            widen(config)
        torch.manual_seed(0)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in cls(config).parameters())
        if size <= 60_000_000:
            return cls(config).float()
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise CannotError(f"no tiny model of it can be built: {said}"[:150]) from error
    raise CannotError(f"no tiny model of it can be built: {size} weights")


def widen(config):
    """Give a configuration, where it has these sizes, six heads in place of four."""
    for part in (getattr(config, "text_config", None), config):
        old = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        if part is None or hasattr(part, "mamba_n_heads"):  # whose width must fit its heads
            continue
        if all(getattr(part, key, None) == old[key] for key in old):
            part.hidden_size, part.num_attention_heads, part.num_key_value_heads = 48, 6, 3


def written(model, folder):
    """Save a model as llama.cpp's converter wants it, with a vocabulary of numbers."""
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    if type(model).__name__.startswith("GraniteMoeHybrid"):  # as published checkpoints call them
        text = (folder / "config.json").read_text()
        text = text.replace('"linear_attention"', '"mamba"').replace(
            '"full_attention"', '"attention"'
        )
        (folder / "config.json").write_text(text)
    as_published(type(model).__name__, folder)
    count = getattr(getattr(model.config, "text_config", model.config), "vocab_size", 96)
    vocabulary = {"model": {"vocab": {str(i): i for i in range(count)}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))


PUBLISHED_TRANSPOSED = ("Qwen3VLMoeForConditionalGeneration",)
"""Classes whose published files have stacks of experts as (E, in, out).

transformers 5 takes both orders, by the shape, and saves (E, out, in). llama.cpp's converter takes
the published one alone.
"""


def as_published(name, folder):
    """Store the experts of a saved folder in the order of published files."""
    from safetensors.numpy import load_file, save_file

    if name not in PUBLISHED_TRANSPOSED:
        return
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for key, stack in tensors.items():
            if re.search(r"\.experts\.(gate_up_proj|down_proj)$", key):
                tensors[key] = np.ascontiguousarray(stack.swapaxes(1, 2))
        save_file(tensors, path, {"format": "pt"})


MORE = {
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8},
    "HunYuanVLForConditionalGeneration": {"head_dim": 8},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2Model": {"layer_types": ["conv", "full_attention"]},
    "Llama4ForCausalLM": {"moe_layers": [0]},
    "Llama4ForConditionalGeneration": {"moe_layers": [0]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "FalconForCausalLM": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "BambaForCausalLM": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_expand": 2,
    },
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_expand": 2,
    },
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "LagunaForCausalLM": {"num_attention_heads_per_layer": [4, 4]},
}
"""What classes need beside small sizes, in their text's configuration."""
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96,
    "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GEMMA4 = {
    **TEXT, "global_head_dim": 8, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip
GEMMA3N = {
    **TEXT, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8, "laurel_rank": 4, "intermediate_size": [48, 48],
    "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip
VISION4 = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "patch_size": 14, "position_embedding_size": 16,
}  # fmt: skip


def _given(kind, **values):
    def make():
        import transformers

        return getattr(transformers, kind)(**values)

    return make


BUILT = {
    "Gemma4ForCausalLM": _given("Gemma4TextConfig", **GEMMA4),
    "Gemma4ForConditionalGeneration": _given(
        "Gemma4Config", text_config=GEMMA4, vision_config=VISION4
    ),
    "Gemma3nForCausalLM": _given("Gemma3nTextConfig", **GEMMA3N),
    "NemotronForCausalLM": _given(
        "NemotronConfig", **{k: v for k, v in TEXT.items() if k != "layer_types"}
    ),
    "Dots1ForCausalLM": _given(
        "Dots1Config",
        **{k: v for k, v in TEXT.items() if k != "layer_types"},
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
}
"""Configurations that are not the default one made small."""
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip


def adjusted(name, config):
    """Return a configuration with what a class needs beside small sizes."""
    for part in (getattr(config, "text_config", None), config):
        if part is None:
            continue
        own = {key: value for key, value in LINEAR.items() if key in vars(part)}
        own |= MORE.get(name, {}) if part is getattr(config, "text_config", config) else {}
        for key, value in own.items():
            setattr(part, key, value)
        part.tie_word_embeddings = False
    return config


def stored(folder):
    """Return the tensors of a folder of safetensors files."""
    from safetensors.numpy import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for path in files for key, tensor in load_file(path).items()}


def index_of(tensors):
    """Return where each row and each column of tensors is, by its bytes."""
    rows, columns = {}, {}
    for key, tensor in tensors.items():
        if tensor.ndim not in (2, 3):
            continue
        for plane, matrix in enumerate(tensor if tensor.ndim == 3 else tensor[None]):
            which = plane if tensor.ndim == 3 else None
            for number, row in enumerate(np.ascontiguousarray(matrix)):
                rows.setdefault(row.tobytes(), (key, which, number))
            for number, row in enumerate(np.ascontiguousarray(matrix.T)):
                columns.setdefault(row.tobytes(), (key, which, number))
    return rows, columns


def origins(made, indices):
    """Return, by key, the GGUF tensors that take its rows, and the rows of each plane in order.

    {key: {gguf name: (turned, {plane: [row]})}}; keys of tensors that are not rows of one kind
    are under None.
    """
    rows, columns = indices
    found = defaultdict(dict)
    for name, tensor in made.items():
        if tensor.ndim not in (2, 3) or not name.endswith(".weight"):
            continue
        planes = tensor if tensor.ndim == 3 else tensor[None]
        for index in (rows, columns):
            places = [[index.get(row.tobytes()) for row in np.ascontiguousarray(p)] for p in planes]
            if all(place is not None for plane in places for place in plane):
                turned = index is columns
                break
        else:
            continue
        for number, plane in enumerate(places):
            for key in dict.fromkeys(place[0] for place in plane):
                short = name.removesuffix(".weight")
                inside = found[key].setdefault(short, (turned, tensor.ndim, {}))
                mine = [place for place in plane if place[0] == key]
                inside[2][number] = (mine, len(plane))
    return found


def numbered(name):
    """Return a name with `#` for the number of its layer and `*` for that of an expert."""
    parts, seen = name.split("."), False
    for index in range(1, len(parts)):
        if parts[index].isdigit():
            if parts[index - 1] == "experts":
                parts[index] = "*"
            elif not seen:
                parts[index], seen = "#", True
    return ".".join(parts)


def sizes_of(config):
    """Return what layouts depend on."""
    text = {**config, **(config.get("text_config") or {})}

    def size(*names, default=1):
        return next((text[n] for n in names if isinstance(text.get(n), int) and text[n]), default)

    heads = size("num_attention_heads", "n_head", "n_heads")
    hidden = size("hidden_size", "n_embd", "d_model", default=32)
    kv = size("num_key_value_heads", "num_kv_heads", default=heads)
    return Sizes(
        heads,
        kv,
        hidden,
        size("head_dim", default=hidden // heads),
        linear_keys=size("linear_num_key_heads", default=0),
        linear_values=size("linear_num_value_heads", default=0),
        linear_key_width=size("linear_key_head_dim", default=0),
    )


def layout_of(total, parts, sizes):
    """Return the name of the layout by which rows became those of tensors; None if none is."""
    for name, layout in LAYOUTS.items():
        try:
            if layout(total, sizes) == parts:
                return name
        except (AdapterError, ZeroDivisionError, IndexError):
            continue
    return None


def orders_of(shape, tensors):
    """Return the rows that each tensor takes of a weight, and whether its columns are meant.

    Raises:
        CannotError: a tensor is not made of rows of this weight alone, plane by plane.
    """
    stack = len(shape) == 3
    orders, turned = {}, set()
    for name, (is_turned, dims, planes) in tensors.items():
        turned.add(is_turned)
        if stack and (dims != 3 or sorted(planes) != list(range(shape[0]))):
            raise CannotError("its planes are put elsewhere")
        found = set()
        for number, (mine, whole) in planes.items():
            if len(mine) != whole:
                raise CannotError("it is part of a tensor beside others")
            if stack and {place[1] for place in mine} != {number}:
                raise CannotError("its planes are put elsewhere")
            found.add(tuple(place[2] for place in mine))
        if len(found) != 1:
            raise CannotError("it is cut into a stack")
        orders[name] = list(found.pop())
    if len(turned) != 1:
        raise CannotError("its tensors are turned in part")
    return orders, turned.pop()


def by_columns(tensor, made, sizes):
    """Return what becomes of a matrix whose columns are put into another order; None if none is."""
    for name, other in made.items():
        if other.shape != tensor.shape or not name.endswith(".weight"):
            continue
        place = {value: column for column, value in enumerate(tensor[0].tolist())}
        order = [place.get(value) for value in other[0].tolist()]
        if None in order or not np.array_equal(tensor[:, order], other):
            continue
        layout = layout_of(tensor.shape[1], [order], sizes)
        if layout is not None:
            said = re.sub(r"^blk\.\d+\.", "blk.#.", name.removesuffix(".weight"))
            return f"{said} columns:{layout}"
    return None


def judged(key, shape, tensors, sizes, ignored):
    """Return what becomes of a weight: its tensors, layout and whether it is a stack, as text.

    Raises:
        CannotError: it cannot be said.
    """
    orders, turned = orders_of(shape, tensors)
    names = sorted(orders, key=lambda name: orders[name][0])
    layout = layout_of(shape[-1] if turned else shape[-2], [orders[n] for n in names], sizes)
    if layout is None:
        raise CannotError("its rows lie in an order that is not known")
    said = [re.sub(r"^((?:\w+\.)*?blk)\.\d+\.", r"\1.#.", name) for name in names]
    lost = sorted({re.sub(r"^blk\.#\.", "", name) for name in said} & ignored)
    lost += sorted({name for name in said if name.startswith("cls")})
    if lost:
        raise CannotError(f"llama.cpp multiplies by {', '.join(lost)} without adapters")
    words = [",".join(said)]
    words += [layout] if layout != "whole" else []
    return " ".join([*words, "stacked"] if len(shape) == 3 else words)


def is_looked_up(kind, tensors):
    """Return whether rows of a weight are looked up, or it is no matrix of a layer."""
    names = set(tensors)
    if names & {"token_embd"}:
        return False
    if kind is None:
        return False
    return any(word in kind for word in ("Embedding", "Norm", "Conv1d", "Conv2d"))


def entry_of(key, tensor, found, made, failed, sizes, ignored):
    """Return what becomes of a weight, or raise why that cannot be said."""
    if not found and tensor.ndim == 2 and key not in failed:
        entry = by_columns(tensor, made, sizes)
        if entry is not None:
            return entry
    if not found:
        raise CannotError(_reason(failed.get(key)))
    return judged(key, tensor.shape, found, sizes, ignored)


def row(architecture, weights, disk, made, failed, ignored, config):
    """Return a class's row: its architecture, what it puts before `model.`, modules, refusals."""
    weights, kinds = weights
    sizes = sizes_of(config)
    modules, refused = {}, {}
    for in_memory, tensors in ((True, weights), (False, disk)):
        where = origins(made, index_of(tensors))
        for key, tensor in tensors.items():
            path = key.removesuffix(".weight")
            name = numbered(path)
            found = where.get(key, {})
            if tensor.ndim != (3 if path == key else 2) or is_looked_up(kinds.get(path), found):
                continue
            if not in_memory and (not found or name in modules or name in refused):
                continue
            try:
                entry = entry_of(key, tensor, found, made, failed, sizes, ignored)
            except CannotError as error:
                if in_memory and name not in modules:
                    refused[name] = str(error)
                continue
            refused.pop(name, None)
            if modules.setdefault(name, entry) != entry:
                refused[name] = f"its layers differ: {modules.pop(name)} and {entry}"
    held = {numbered(key.removesuffix(".weight")) for key in weights}
    prefix, modules, refused = canonical(modules, refused, held)
    return {"architecture": architecture, "prefix": prefix, "modules": modules, "refused": refused}


def _reason(said):
    if said is None or "map tensor" in said or "Unsupported" in said or "leaves it out" in said:
        return _LEFT_OUT
    return f"the converter fails: {said}"


OLD = ("model.language_model.", "language_model.model.", "language_model.", "model.text_model.")


def canonical(modules, refused, held):
    """Return the prefix of the body in memory, and modules with `model.` in its place."""
    inner = [name for name in modules if "#" in name or modules[name] == "token_embd"]
    inner = [name.split(".") for name in inner if name in held and "#" in name]
    common = []
    for parts in zip(*inner, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    outer = common.index("#") - 1 if "#" in common else len(common)
    prefix = "".join(f"{part}." for part in common[:outer])

    def renamed(name):
        if name in modules and name not in held:
            return name
        if prefix != "" and name.startswith(prefix):
            return "model." + name[len(prefix) :]
        if prefix == "" and ("#" in name or modules.get(name) == "token_embd"):
            return f"model.{name}"
        return name

    kept = {renamed(name): entry for name, entry in modules.items()}
    for old in (
        "",
        "model.",
        "backbone.",
        *OLD,
    ):  # names of earlier releases, which are looked up with these prefixes anyway
        for name in list(kept):
            new = "model." + name[len(old) :]
            if name != new and name.startswith(old) and kept.get(new) == kept[name]:
                del kept[name]
    return prefix, kept, {renamed(name): reason for name, reason in refused.items()}
