"""Every command means one and the same ΔW, whatever the base: plain, rounded, turned or stacked.

An adapter and a base are made for each kind of base, with ΔW known in float64. What a command makes
of the adapter is fused into the base again; the change found there is ΔW up to the error that the
command states and the rounding of what it stores. `test_consistency.py` has the tied spellings.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from consistency_bases import (
    BASES,
    DOWN,
    LLAMA,
    OUT,
    U32,
    Q,
    Setting,
    applied,
    dora,
    factor_rounding,
    gap,
    numbers,
    permuted,
    rounding,
    run,
    size,
    wide,
    write_adapter,
    write_base,
)
from safetensors import safe_open
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Return a function from the name of a base to its files, made once."""
    made: dict[str, Setting] = {}

    def make(name: str) -> Setting:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = here = BASES[name](folder)
            here.fused.update(applied(here, here.adapter, folder / "fused"))
        return made[name]

    return make


@pytest.mark.parametrize("name", BASES)
def test_fuse_adds_the_change_rounded_once(setting, name):
    here = setting(name)
    allowed = 0.0 if name != "experts" else factor_rounding(here)  # factors that were extracted
    assert gap(here.fused, here.changes) <= rounding(here) + allowed


@pytest.mark.parametrize("name", BASES)
def test_verify_finds_what_fuse_added_and_nothing_else(setting, tmp_path, name):
    here = setting(name)
    for dtype in ([], ["--dtype", "f32"], ["--dtype", "bf16"]):
        run("fuse", here.base, here.adapter, "-o", tmp_path / "fused", "--overwrite", *dtype)
        known = ["--base", here.base, "--adapter"]
        assert run("verify", tmp_path / "fused", *known, here.adapter)["contained"] is True
        found = run("verify", tmp_path / "fused", *known, f"{here.adapter}:0.5", code=1)
        assert found["contained"] is False


# Operations that keep the change, as commands from {a} and {base} to {out}, and what they state.
KEEPING = {
    "squeeze to all ranks": ["squeeze {a} -o {out} --rank 64"],
    "squeeze to the energy": ["squeeze {a} -o {out} --energy 1.0 --dtype f32"],
    "squeeze with losses": ["squeeze {a} -o {out} --rank 2 --dtype f32"],
    "merge of one": ["merge {a} -o {out}"],
    "merge of its parts": ["merge {a}:0.25 {a}:0.75 -o {out}"],
    "merge of its parts, resized": ["merge {a}:0.25 {a}:0.75 -o {out} --rank 4 --dtype f32"],
    "merge with the base": ["merge {a} -o {out} --base {base}"],
    "ties of one": ["merge {a} -o {out} --method ties --density 1 --rank 4 --dtype f32"],
    "to-lora": ["to-lora {a} -o {out} --base {base}"],
    "to-dora": ["to-dora {a} -o {out} --base {base}"],
    "to-dora and back": [
        "to-dora {a} -o {out}-dora --base {base}",
        "to-lora {out}-dora -o {out} --base {base} --rank 32 --dtype f32",
    ],
    "extract": [
        "fuse {base} {a} -o {out}-fused --dtype f32",
        "extract {base} {out}-fused -o {out} --rank 4 --dtype f32",
    ],
    "extract with losses": [
        "fuse {base} {a} -o {out}-fused --dtype f32",
        "extract {base} {out}-fused -o {out} --rank 2 --dtype f32",
    ],
    "mlx and back": ["convert {a} {out}-mlx --to mlx", "convert {out}-mlx {out} --to peft"],
    "gguf and back": [
        "convert {a} {out}.gguf --base {base}",
        "convert {out}.gguf {out} --to peft --base {base}",
    ],
}


# What a base or an adapter rules out, and a word of the error that says so.
REFUSED = {
    ("experts", "to-dora"): "stacked experts",
    ("experts", "to-dora and back"): "stacked experts",
    ("experts", "mlx and back"): "name experts differently",
    ("conv1d", "mlx and back"): "name the body differently",
}


@pytest.mark.parametrize("operation", KEEPING)
@pytest.mark.parametrize("name", BASES)
def test_what_a_command_writes_is_the_change_within_what_it_states(
    setting, tmp_path, name, operation
):
    here = setting(name)
    names = {"a": here.adapter, "base": here.base, "out": tmp_path / "out"}
    commands = [[w.format(**names) for w in line.split()] for line in KEEPING[operation]]
    if (name, operation) in REFUSED:
        assert REFUSED[name, operation] in run(*commands[0], code=2)
        assert not list(tmp_path.iterdir())
        return
    stated = sum(run(*command).get("relative_error") or 0.0 for command in commands)
    got = applied(here, tmp_path / "out", tmp_path / "again")
    lost = gap(got, here.fused) / size(here.changes)
    # Each of two fused models is rounded, and factors may be rounded by each of two commands.
    noise = 2 * (rounding(here) + factor_rounding(here)) / size(here.changes)
    assert abs(lost - stated) <= noise
    assert ("losses" in operation) == (stated > 0.1)


# Operations on a DoRA that keep its change m/‖W + ΔW‖ · (W + ΔW) − W.
OF_DORA = {
    "to-lora": ["to-lora {a} -o {out} --base {base} --rank 32 --dtype f32"],
    "to-lora with losses": ["to-lora {a} -o {out} --base {base} --rank 6 --dtype f32"],
    "squeeze to all ranks": ["squeeze {a} -o {out} --rank 64"],
    "merge of one": ["merge {a} -o {out} --base {base} --rank 32 --dtype f32"],
    "merge of its parts": ["merge {a}:0.25 {a}:0.75 -o {out} --base {base} --rank 32 --dtype f32"],
    "extract": [
        "fuse {base} {a} -o {out}-fused --dtype f32",
        "extract {base} {out}-fused -o {out} --rank 32 --dtype f32",
    ],
}


@pytest.mark.parametrize("operation", OF_DORA)
@pytest.mark.parametrize("name", [name for name in BASES if name != "experts"])
def test_the_change_of_a_dora_is_kept_within_what_is_stated(setting, tmp_path, name, operation):
    plain = setting(name)
    changes = {}
    for key, change in plain.changes.items():
        whole = plain.weights[key] + change
        outputs = 1 if name == "conv1d" else 0
        gains = 1 + 0.25 * np.abs(numbers(60, whole.shape[outputs]))
        changes[key] = np.expand_dims(gains, 1 - outputs) * whole - plain.weights[key]
    here = replace(plain, adapter=dora(plain, tmp_path / "dora"), changes=changes)
    before = applied(here, here.adapter, tmp_path / "before")
    magnitudes = 2 * U32 * size({key: here.weights[key] + changes[key] for key in changes})
    assert gap(before, changes) <= rounding(here) + magnitudes
    names = {"a": here.adapter, "base": here.base, "out": tmp_path / "out"}
    stated = 0.0
    for line in OF_DORA[operation]:
        stated += run(*(w.format(**names) for w in line.split())).get("relative_error") or 0.0
    got = applied(here, tmp_path / "out", tmp_path / "again")
    noise = 2 * (rounding(here) + magnitudes + factor_rounding(here)) / size(changes)
    assert abs(gap(got, before) / size(changes) - stated) <= noise
    assert ("losses" in operation) == (stated > 0.1)


WITH_DTYPE = {
    "squeeze": "squeeze {a} -o {out} --rank 2",
    "merge": "merge {a}:0.25 {a} -o {out}",
    "merge, resized": "merge {a}:0.25 {a} -o {out} --rank 2",
    "to-lora": "to-lora {dora} -o {out} --base {base} --rank 3",
    "extract": "extract {base} {fused} -o {out} --rank 2",
    "fuse": "fuse {base} {a} -o {out}",
    "dequantize": "dequantize {four} -o {out}",
}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("command", WITH_DTYPE)
def test_dtype_is_the_type_of_every_number_that_a_command_makes(setting, tmp_path, command, dtype):
    here = setting("f32")
    names = {
        "a": here.adapter, "base": here.base, "out": tmp_path / "out", "dora": tmp_path / "dora",
        "fused": here.base.parent / "fused", "four": setting("four-bit").base,
    }  # fmt: skip
    dora(here, tmp_path / "dora")
    run(*(word.format(**names) for word in WITH_DTYPE[command].split()), "--dtype", dtype)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(file, "np") as opened:
        stored = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    if command == "dequantize":  # whose other tensors were never in four bits
        stored = {key: code for key, code in stored.items() if "proj" in key}
    assert set(stored.values()) == {dtype.upper()}


WITH_BUDGET = {
    "squeeze": "squeeze {a} -o {out}",
    "merge": "merge {a}:0.25 {a} -o {out}",
    "to-lora": "to-lora {dora} -o {out} --base {base}",
    "extract": "extract {base} {fused} -o {out}",
}


@pytest.mark.parametrize("budget", [20_000, 60_000])
@pytest.mark.parametrize("command", WITH_BUDGET)
def test_a_budget_holds_the_whole_file_and_is_used(tmp_path, command, budget):
    size_, rank = 256, 32
    paths = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    keys = [f"{path}.weight" for path in paths]
    tensors = {key: numbers(i, size_, size_).astype("f4") for i, key in enumerate(keys)}
    factors = {
        path: (numbers(70 + i, size_, rank), numbers(80 + i, rank, size_))
        for i, path in enumerate(paths)
    }
    changes = {f"{path}.weight": 0.5 * (b @ a) for path, (b, a) in factors.items()}
    base = write_base(tmp_path / "base", tensors, LLAMA)
    adapter = write_adapter(tmp_path / "adapter", factors, r=rank, lora_alpha=rank / 2)
    here = Setting(base, adapter, wide(tensors, keys), changes)
    dora(here, tmp_path / "dora")
    applied(here, adapter, tmp_path / "fused")
    names = {name: tmp_path / name for name in ("base", "fused", "dora", "out")} | {"a": adapter}
    words = [word.format(**names) for word in WITH_BUDGET[command].split()]
    result = run(*words, "--budget", f"{budget}B", "--dtype", "f32")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert file.stat().st_size == result["bytes_out"] <= budget
    # What is left would not hold one more rank, beside what is reserved for the header.
    assert file.stat().st_size > budget - 4 * 2 * size_ - 6000


@pytest.fixture(scope="module")
def gguf_base(tmp_path_factory, setting):
    """Return the f32 base as a GGUF model, and its weights by llama.cpp's names."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    tensors = load_file(setting("f32").base / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_head_count(LLAMA["num_attention_heads"])
    writer.add_head_count_kv(LLAMA["num_key_value_heads"])
    writer.add_embedding_length(OUT)
    weights = {}
    for key, value in tensors.items():
        name = f"{names.get_name(key.removesuffix('.weight'))}.weight"
        turned = permuted(value) if "q_proj" in key or "k_proj" in key else value
        writer.add_tensor(name, np.ascontiguousarray(turned))
        weights[name] = turned.astype(np.float64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


TO_GGUF = {
    "as it is": [],
    "converted": ["convert {a} {out}.gguf --base {base}"],
    "merged": ["merge {a}:0.25 {a}:0.75 -o {out}"],
    "extracted": ["extract {base} {fused} -o {out} --rank 4 --dtype f32"],
    "back from a DoRA": [
        "to-dora {a} -o {out}-dora --base {base}",
        "to-lora {out}-dora -o {out} --base {base} --rank 32 --dtype f32",
    ],
    "converted and squeezed": [
        "convert {a} {out}-all.gguf --base {base}",
        "squeeze {out}-all.gguf -o {out}.gguf --rank 64",
    ],
}


@pytest.mark.parametrize("operation", TO_GGUF)
def test_a_gguf_model_gets_the_change_that_a_checkpoint_gets(
    setting, gguf_base, tmp_path, operation
):
    from gguf import GGUFReader

    here, (base, weights) = setting("f32"), gguf_base
    fused = here.base.parent / "fused"
    names = {"a": here.adapter, "base": here.base, "fused": fused, "out": tmp_path / "out"}
    for line in TO_GGUF[operation]:
        run(*(word.format(**names) for word in line.split()))
    given = [here.adapter, *tmp_path.glob("out.gguf"), *tmp_path.glob("out")][-1]
    assert (given == here.adapter) == (operation == "as it is")
    run("fuse", base, given, "-o", tmp_path / "fused.gguf")
    tensors = {
        t.name: t.data.astype(np.float64) for t in GGUFReader(tmp_path / "fused.gguf").tensors
    }
    got = {name: tensors[name] - weights[name] for name in weights}
    want = dict.fromkeys(got, 0.0) | {
        "blk.0.attn_q.weight": permuted(here.changes[f"{Q}.weight"]),
        "blk.0.ffn_down.weight": here.changes[f"{DOWN}.weight"],
    }
    assert gap(got, want) <= 2 * (rounding(here) + factor_rounding(here))
