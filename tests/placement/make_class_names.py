"""Writes the table of names that transformers' classes give to what checkpoints store.

    python tests/placement/make_class_names.py [CLASS ...]

It makes the whole table, or replaces the classes that are named. It builds every class of the
automatic mappings that its default configuration builds, on the meta device, or with the values
below, and records what `core_model_loading` does with names: rules by class or model type, the
parts that are models of their own, and the prefix that bodies and heads differ by. Run it again
with a new release; `test_class_names.py` compares the table with the one that is installed.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

from loratools.base.placement.model_class import numbered  # noqa: E402
from loratools_formats.checkpoints.facts import CONV1D_TYPES, is_embedding  # noqa: E402
from loratools_formats.core.orientation import named_conv1d  # noqa: E402

TABLE = Path(__file__).parents[2] / "loratools/base/placement/data/class_names.json"
_SECONDS = 20
_GIVEN = {
    "Dbrx": {"n_layers": 2, "attn_config": {"kv_n_heads": 8, "rope_theta": 1e4}},
    "Dots1": {
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "HunYuan": {"head_dim": 64},
    "Lfm2Moe": {
        "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "Ministral": {"head_dim": 64},
    "Nemotron": {"num_key_value_heads": 8, "head_dim": 64},
}  # fmt: skip
"""What configurations lack that do not build a model by default, by how classes' names begin."""


def class_names():
    """Return the names of the classes that the automatic mappings have."""
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES"):
            for classes in mapping.values():
                found.update((classes,) if isinstance(classes, str) else filter(None, classes))
    return sorted(found)


def shortened(config):
    """Return a configuration of two layers, in all of its parts."""
    from transformers import PretrainedConfig

    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            shortened(value)
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > 2:
        config.num_hidden_layers = 2
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == layers:
                setattr(config, name, value[:2])
    return config


def model_of(class_name):
    """Return a class's model on the meta device, or raise what its configuration raises."""
    import torch
    import transformers

    cls = getattr(transformers, class_name)
    given = next((values for name, values in _GIVEN.items() if class_name.startswith(name)), {})
    for values in ({}, given):
        for change in (shortened, lambda config: config):  # two layers may be too few
            try:
                with torch.device("meta"):
                    return cls(change(cls.config_class(**values)))
            except TimeoutError:
                raise
            except Exception as error:  # noqa: BLE001 - any class may refuse its own defaults
                failed = error
    raise failed


def described(model, classes):
    """Add a class and those of its parts to the table."""
    from transformers import PretrainedConfig, PreTrainedModel

    sections = {
        id(value): name
        for name, value in vars(model.config).items()
        if isinstance(value, PretrainedConfig)
    }
    parts, seen = [], []
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and not path.startswith(tuple(seen)):
            seen.append(path + ".")
            section = sections.get(id(module.config), "")
            parts.append([path, type(module).__name__, section])
            if type(module).__name__ not in classes:
                described(module, classes)
    keys = list(model.state_dict())
    roots = sorted({key.partition(".")[0] for key in keys})
    prefix = model.base_model_prefix
    body = {
        k.removeprefix(f"{prefix}.").partition(".")[0] for k in keys if k.startswith(f"{prefix}.")
    }
    entry = {"type": model.config.model_type, "roots": roots}
    if prefix:
        entry["prefix"] = prefix
    if prefix and body:
        entry["body"] = sorted(body)
    if parts:
        entry["parts"] = parts
    bare = bare_weights(model, tuple(seen))
    if bare:
        entry["bare"] = bare
    odd = odd_layers(model, tuple(seen))
    if odd:
        entry["odd"] = odd
    classes[type(model).__name__] = entry


def odd_layers(model, inner):
    """Return the layers whose names say another kind than they are, and their kinds."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = {torch.nn.Embedding: "embedding", Conv1D: "conv1d", torch.nn.Linear: "linear"}
    conv1d = model.config.model_type in CONV1D_TYPES
    found = {}
    for path, module in model.named_modules():
        kind = next((name for cls, name in kinds.items() if isinstance(module, cls)), None)
        if kind is None or path.startswith(inner):
            continue
        named = "conv1d" if conv1d and named_conv1d(path) else "linear"
        if kind != ("embedding" if is_embedding(path) else named):
            found[numbered(path)[0]] = kind
    return dict(sorted(found.items()))


def bare_weights(model, inner):
    """Return the weights that are parameters of modules which PEFT has no layer for.

    PEFT adapts them as `target_parameters`. Routers that are linear layers, but return more than
    one tensor, are among them: PEFT makes a layer that fails when it is called. Numbers of layers
    are left out, and parts of the model that have entries of their own.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    layers = (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.conv._ConvNd, Conv1D)
    return sorted(
        {
            numbered(f"{path}.weight")[0]
            for path, module in model.named_modules()
            if not path.startswith(inner)
            and (not isinstance(module, layers) or returns_several(module))
            for name, weight in module.named_parameters(recurse=False)
            if name == "weight" and weight.ndim == 2
        }
    )


def returns_several(module):
    """Return whether a subclass of linear layers returns several tensors."""
    import torch

    if not isinstance(module, torch.nn.Linear) or type(module) is torch.nn.Linear:
        return False
    inputs = torch.zeros(2, module.in_features, device="meta")
    try:
        return isinstance(module.eval()(inputs), tuple)
    except RuntimeError:  # it takes inputs of another shape, as no router does
        return False


def expected(model):
    """Return what transformers calls each tensor that it stores, and each that it has in memory."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
        revert_weight_conversion,
    )

    own = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def name(key):
        found, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if found not in own and key in own:
            return rename_source_key(key, [], [], model.base_model_prefix, own)[0]
        return found

    stored = revert_weight_conversion(model, own)
    return {key: name(key) for key in [*stored, *own]}


def wrong(model, wanted, table):
    """Return the names that the table does not give as transformers does."""
    from loratools.base.placement.model_class import ModelClass, names_in

    config = json.loads(model.config.to_json_string(use_diff=False))
    found = names_in(ModelClass(type(model).__name__, config, table), sorted(wanted))
    return {key: name for key, name in wanted.items() if found[key].name != name}


def rule(transform):
    """Return a rule as plain values."""
    values = {
        "find": transform.compiled_sources.pattern,
        "sources": transform.source_patterns,
        "targets": transform.target_patterns,
    }
    kind = type(transform).__name__
    if kind not in ("WeightRenaming", "WeightConverter"):
        values["kind"] = kind
    if hasattr(transform, "offset"):
        values["offset"] = transform.offset
    if hasattr(transform, "operations"):
        values["operations"] = [operation(op) for op in transform.operations]
    return values


def operation(op):
    """Return an operation's name and its plain arguments."""
    known = inspect.signature(type(op).__init__).parameters
    arguments = {
        name: value
        for name, value in vars(op).items()
        if name in known and isinstance(value, str | int | list | bool)
    }
    return [type(op).__name__, arguments]


def make(names):
    """Return the table, and what could not be built with its reason.

    Args:
        names: of classes; if there are some, the others stay as the table has them.
    """
    import transformers
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    mapping = _build_checkpoint_conversion_mapping()
    rules = {name: [rule(t) for t in transforms] for name, transforms in sorted(mapping.items())}
    classes, failed = {}, {}
    for name in names or class_names():
        signal.alarm(_SECONDS)
        try:
            described(model_of(name), classes)
        except Exception as error:  # noqa: BLE001 - any class may refuse its own defaults
            failed[name] = f"{type(error).__name__}: {str(error)[:100]}"
        finally:
            signal.alarm(0)
    bodies = {
        model_type: names if isinstance(names, str) else names[0]
        for model_type, names in MODEL_MAPPING_NAMES.items()
    }
    table = {
        "transformers": transformers.__version__,
        "rules": rules,
        "bodies": dict(sorted(bodies.items())),
        "classes": classes,
    }
    if names:
        known = json.loads(TABLE.read_text(encoding="utf-8"))["classes"]
        table["classes"] = known | classes
    table["classes"] = dict(sorted(table["classes"].items()))
    for name in sorted(classes):
        _check(name, table, failed)
    return table, failed


def _check(name, table, failed):
    """Note names to keep as they are; take out a class that the table gives wrong names to."""
    try:
        model = model_of(name)
        wanted = expected(model)
    except Exception as error:  # noqa: BLE001 - parts are not built alone
        failed[f"{name} is not checked"] = f"{type(error).__name__}: {str(error)[:100]}"
        return
    own = set(model.state_dict())
    off = wrong(model, wanted, table)
    keep = sorted({numbered(key)[0] for key in off if key in own and off[key] == key})
    if keep:
        table["classes"][name]["keep"] = keep
        off = wrong(model, wanted, table)
    if off:
        del table["classes"][name]
        key = next(iter(off))
        failed[name] = f"{len(off)} names differ, such as {key}, which is {off[key]}"


def _timeout(*_):
    raise TimeoutError("too slow")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _timeout)
    made, refused = make(sys.argv[1:])
    lines = []
    for key, value in made.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{inner}\n}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    for class_name, reason in refused.items():
        print(class_name, reason, file=sys.stderr)
    print(len(made["classes"]), "classes,", len(refused), "not built")
