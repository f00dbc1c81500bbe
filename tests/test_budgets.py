"""A budget is the size of the written weight file: never exceeded, and used up."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_cli import loratools

import loratools as lt
from loratools.algebra.ranks import Budget, RankRule
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.extract.operation import difference, extract
from loratools.operations.merge.align import MergeInput
from loratools.operations.merge.operation import merge
from loratools.operations.merge.options import MergeOptions
from loratools.operations.squeeze import rank_choices, squeeze
from loratools.operations.to_lora import to_lora
from loratools_formats import get_format, read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import OptionError

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"

RANK = 12
SHAPES = [(96, 64), (64, 96), (200, 32)]
TAGS = json.dumps({f"made up tag {i}": i for i in range(300)})
NAMES = {
    "peft": "model.layers.{}.mlp.up_proj",
    "mlx": "model.layers.{}.mlp.up_proj",
    "gguf": "blk.{}.ffn_up",
    "kohya": "lora_unet_mid_block_attentions_0_transformer_blocks_{}_attn1_to_q",
    "diffusers": "transformer.blocks.{}.attn.to_q",
}
CONFIGS = {
    "peft": {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["up_proj"]},
    "mlx": {"fine_tune_type": "lora", "lora_parameters": {"rank": RANK, "scale": 1.0}},
    "gguf": {"architecture": "llama"},
}
METADATA = {
    "kohya": {"ss_tag_frequency": TAGS, "ss_network_dim": "12", "sshs_model_hash": "unknown"},
    "diffusers": {
        "lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": RANK})
    },
}


def source(folder, format_name, scale, dtype, seed=0):
    """Write an adapter of three modules, and read it."""
    rng = np.random.default_rng(seed)
    modules = {}
    for index, (out, in_) in enumerate(SHAPES):
        decay = 0.7 ** np.arange(RANK)
        a, b = rng.standard_normal((RANK, in_)), rng.standard_normal((out, RANK)) * decay
        name = NAMES[format_name].format(index)
        part = LowRank(in_memory(f"{name}.a", a, dtype), in_memory(f"{name}.b", b, dtype), scale)
        modules[name] = ModuleChange(part)
    made = Adapter(
        format=format_name,
        source=None,
        modules=modules,
        config=CONFIGS.get(format_name, {}),
        metadata=METADATA.get(format_name, {}),
    )
    path = (
        folder / f"source-{seed}-{format_name}{'' if get_format(format_name).is_folder else '.x'}"
    )
    write_adapter(made, path, format_name, overwrite=True)
    if format_name == "kohya":  # whose writer puts true digests in place of others
        save_file(load_file(path), path, metadata=METADATA["kohya"])
    return read_adapter(path, format_name)


def written_nbytes(adapter, path):
    """Return the size of the weight file that writing gives."""
    write_adapter(adapter, path, adapter.format, overwrite=True)
    names = ("adapter_model.safetensors", "adapters.safetensors")
    file = next((path / name for name in names if (path / name).exists()), path)
    return file.stat().st_size


def squeezed(folder, format_name, scale, dtype, rule, options):
    return squeeze(source(folder, format_name, scale, dtype), rule, options)


def folded(folder, format_name, scale, dtype, rule, options):
    return to_lora(source(folder, format_name, scale, dtype), rule, options)


def merged(folder, format_name, scale, dtype, rule, options):
    inputs = [
        MergeInput(source(folder, format_name, scale, dtype, seed), weight, f"{seed}")
        for seed, weight in ((0, 0.7), (1, 0.3))
    ]
    return merge(inputs, MergeOptions(rule=rule, compute=options))


def extracted(folder, _format, scale, dtype, rule, options):
    rng = np.random.default_rng(0)
    checkpoints = []
    for name in ("base", "tuned"):
        (folder / name).mkdir(exist_ok=True)
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (folder / name / "config.json").write_text(json.dumps(config))
        tensors = {
            f"{NAMES['peft'].format(index)}.weight": rng.standard_normal(shape).astype(np.float32)
            for index, shape in enumerate(SHAPES)
        }
        save_file(tensors, folder / name / "model.safetensors")
        checkpoints.append(read_checkpoint(folder / name))
    return extract(*checkpoints, difference(*checkpoints), rule, options)


CASES = {
    f"{operation.__name__} {format_name}": (operation, format_name)
    for operation in (squeezed, folded, merged)
    for format_name in NAMES
} | {"extracted peft": (extracted, "peft")}
BITS = {"F32": 32, "F16": 16, "BF16": 16}


@pytest.mark.parametrize("case", CASES)
@given(
    st.integers(1_500, 40_000),
    st.booleans(),
    st.sampled_from([1.0, 0.5, 1.5, 2.0]),
    st.sampled_from(sorted(BITS)),
    st.sampled_from([None, "f32", "bf16"]),
)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_file_is_within_the_budget_and_uses_it(
    tmp_path, case, nbytes, uniform, scale, dtype, out_dtype
):
    operation, format_name = CASES[case]
    uniform |= format_name == "mlx"  # whose files have one rank
    rule = RankRule(budget=Budget(nbytes=nbytes), uniform=uniform)
    options = ComputeOptions(dtype=out_dtype)
    path = tmp_path / f"out{'' if get_format(format_name).is_folder else '.x'}"
    try:
        result = operation(tmp_path, format_name, scale, dtype, rule, options)
    except OptionError as error:
        if "the budget is too small" not in str(error):
            raise
        least = operation(tmp_path, format_name, scale, dtype, RankRule(rank=1), options)
        # The record of rank 1 is shorter than that of a budget.
        assert written_nbytes(least.adapter, path) > nbytes - 200
        return
    size = written_nbytes(result.adapter, path)
    assert size <= nbytes
    parts = [change.require_factors() for change in result.adapter.modules.values()]
    if uniform:
        assert len({part.rank for part in parts}) == 1
    if format_name == "gguf" and scale == 1.5:
        return  # the next rank may store all of B in float32
    prices = [(sum(part.shape) * max(part.a.dtype.bits, part.b.dtype.bits)) // 8 for part in parts]
    limits = [min(part.shape) if operation is extracted else RANK for part in parts]
    limits = [2 * limit for limit in limits] if operation is merged else limits
    growing = [
        price for price, part, limit in zip(prices, parts, limits, strict=True) if part.rank < limit
    ]
    # Shapes and offsets of six tensors take more digits, and data are aligned.
    slack = 6 * 32
    if uniform and max(part.rank for part in parts) < max(limits):
        assert nbytes - size < sum(prices) + slack
    elif not uniform and growing:
        assert nbytes - size < min(growing) + slack


@pytest.mark.parametrize("format_name", NAMES)
def test_rows_of_the_table_are_sizes_of_files(tmp_path, format_name):
    adapter = source(tmp_path, format_name, 2.0, "F16")
    path = tmp_path / f"out{'' if get_format(format_name).is_folder else '.x'}"
    for row in rank_choices(adapter):
        result = squeeze(adapter, RankRule(rank=row.rank))
        plain = Adapter(**{**vars(result.adapter), "metadata": adapter.metadata})
        assert row.nbytes == written_nbytes(plain, path)


def test_too_small_a_budget_says_what_would_do(tmp_path):
    adapter = source(tmp_path, "kohya", 0.5, "F16")
    done = loratools("squeeze", adapter.source, "--budget", "1kB", "-o", tmp_path / "x.safetensors")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    least = int(line.partition("at least ")[2].partition(" ")[0])
    out = tmp_path / "least.safetensors"
    # The record holds the budget itself, so a longer number may ask for a byte or two more.
    done = loratools("squeeze", adapter.source, "--budget", f"{least + 8}", "-o", out)
    assert done.returncode == 0, done.stderr
    assert least - 8 <= out.stat().st_size <= least + 8


@pytest.mark.parametrize("rule", [{"budget": "60%"}, {"energy": 0.9}])
def test_mlx_files_get_one_rank_and_keep_to_the_rule(rule, tmp_path):
    lt.convert(TINY / "lora", to="mlx", base=TINY / "model", output=tmp_path / "mlx")
    found = lt.squeeze(tmp_path / "mlx", output=tmp_path / "out", **rule)
    ranks = {module.rank_out for module in found.modules}
    assert len(ranks) == 1
    assert 1 < ranks.pop() < 32
    old, new = (tmp_path / name / "adapters.safetensors" for name in ("mlx", "out"))
    if "budget" in rule:
        assert new.stat().st_size <= 0.6 * old.stat().st_size
    else:
        assert min(module.energy for module in found.modules) >= rule["energy"]
