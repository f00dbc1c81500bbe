"""`repair` equals the paper's edit done densely, and PEFT's own `reduce_intruder_dimension`."""

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import dense
import numpy as np
import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.base.decompositions import IntruderOptions
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.repair.operation import repair
from loratools.operations.repair.result import RepairOptions
from loratools_formats import read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import OptionError, UnsupportedError

BASE = dense.TINY / "model"
F32 = ComputeOptions(dtype="f32")


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from loratools.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def edited(weight, change, shrink=0.75):
    """Return the change after the edit of arXiv 2410.21228, from two whole SVDs."""
    _, found, (u, s, vt) = dense.intruders(weight, change, 10, 0.5)
    return change + (shrink - 1.0) * (u[:, found] * s[found]) @ vt[found], len(found)


@pytest.mark.parametrize("keep", [True, False])
def test_trained_adapters_are_edited_as_the_paper_says(tmp_path, keep):
    options = RepairOptions(IntruderOptions(), keep_every_rank=keep)
    result = repair(
        read_adapter(dense.TINY / "lora"), options, base=read_checkpoint(BASE), compute=F32
    )
    write_adapter(result.adapter, tmp_path / "out", "peft")
    before, after = dense.peft_changes(dense.TINY / "lora"), dense.peft_changes(tmp_path / "out")
    weights = dense.base_weights()
    moved = 0.0
    for module in result.modules:
        change = before[module.name]
        want, count = edited(weights[module.name], change)
        moved += np.linalg.norm(want - change) ** 2
        assert module.intruders == count
        assert_allclose(
            module.change, np.linalg.norm(want - change) / np.linalg.norm(change), atol=1e-6
        )
        u, s, vt = np.linalg.svd(want, full_matrices=False)
        rank = module.rank_out
        assert rank == 32 + (count if keep else 0)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert_allclose(after[module.name], best, atol=2e-6 * s[0])
        error = np.linalg.norm(after[module.name] - want) / np.linalg.norm(want)
        assert_allclose(module.relative_error, error, rtol=1e-3, atol=1e-6)
    total = np.sqrt(sum(np.linalg.norm(change) ** 2 for change in before.values()))
    assert_allclose(result.change, np.sqrt(moved) / total, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_peft_makes_the_same_change_of_the_same_adapter(tmp_path):
    import torch
    from peft import PeftModel
    from peft.tuners.lora.intruders import reduce_intruder_dimension
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, dense.TINY / "lora").to(torch.float64)
    reduce_intruder_dimension(model, logging_sink=None)
    theirs = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("intruder_reduced")
        .detach()
        .numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    result = repair(
        read_adapter(dense.TINY / "lora"),
        RepairOptions(IntruderOptions()),
        base=read_checkpoint(BASE),
        compute=F32,
    )
    write_adapter(result.adapter, tmp_path / "out", "peft")
    ours = dense.peft_changes(tmp_path / "out")
    assert set(ours) == set(theirs)
    assert sum(module.intruders for module in result.modules) > 50
    for name, change in ours.items():
        assert np.linalg.norm(change - theirs[name]) <= 1e-5 * np.linalg.norm(change), name


def dora_weights(folder):
    """Return m/‖W + BA‖ ⊙ (W + BA), and the gains, by module path."""
    weights, directions = dense.base_weights(), dense.peft_changes(folder)
    stored = dense.tensors(folder / "adapter_model.safetensors")
    found = {}
    for name, direction in directions.items():
        magnitude = stored[f"base_model.model.{name}.lora_magnitude_vector"].reshape(-1)
        whole = weights[name] + direction
        gains = (magnitude / np.linalg.norm(whole, axis=1))[:, None]
        found[name] = gains * whole, gains, direction
    return found


@pytest.mark.parametrize("keep", [True, False])
def test_a_dora_is_edited_in_its_weight_and_stays_one(tmp_path, keep):
    result = lt.repair(
        dense.TINY / "dora", base=BASE, keep_every_rank=keep, dtype="f32", output=tmp_path / "out"
    )
    weights, before = dense.base_weights(), dora_weights(dense.TINY / "dora")
    after = dora_weights(tmp_path / "out")
    assert sum(module.intruders for module in result.modules) > 20
    moved = total = 0.0
    for module in result.modules:
        weight, (merged, gains, direction) = weights[module.name], before[module.name]
        _, found, (u, s, vt) = dense.intruders(weight, merged - weight, 10, 0.5)
        assert module.intruders == len(found)
        edit = -0.25 * (u[:, found] * s[found]) @ vt[found]
        moved, total = moved + np.sum(edit**2), total + np.sum((merged - weight) ** 2)
        error = np.linalg.norm(after[module.name][0] - merged - edit)
        left = np.linalg.svd(gains * direction + edit, compute_uv=False)[module.rank_out :]
        assert module.rank_out == 16 + (len(found) if keep else 0)
        size = np.linalg.norm(merged + edit - weight)
        assert_allclose(error, np.linalg.norm(left), rtol=1e-3, atol=1e-5 * size)
        assert_allclose(module.relative_error, error / size, rtol=1e-3, atol=1e-7)
    assert_allclose(result.change, np.sqrt(moved / total), rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_peft_makes_the_edited_weight_of_a_repaired_dora(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lt.repair(dense.TINY / "dora", base=BASE, keep_every_rank=True, dtype="f32",
              output=tmp_path / "out")  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(tmp_path / "out")).merge_and_unload()
    theirs = {name: value.double().numpy() for name, value in merged.state_dict().items()}
    for name, (weight, _, _) in dora_weights(tmp_path / "out").items():
        assert_allclose(theirs[f"{name}.weight"], weight, atol=1e-5 * np.abs(weight).max())


def test_other_steps_leave_the_weight_of_a_dora_as_it_is(tmp_path):
    file = tmp_path / "skewed" / "adapter_model.safetensors"
    shutil.copytree(dense.TINY / "dora", tmp_path / "skewed")
    stored = load_file(file)
    skewed = {
        key: (value.astype(np.float64) * (2.0**-12 if "lora_B" in key else 2.0**12)).astype(
            value.dtype
        )
        if "magnitude" not in key
        else value
        for key, value in stored.items()
    }
    save_file(skewed, file, metadata={"format": "pt"})
    for base in (None, BASE):
        result = lt.repair(tmp_path / "skewed", base=base, keep_intruders=True, rebalance=True,
                           drop_dead=True, output=tmp_path / "out", overwrite=True)  # fmt: skip
        assert {module.action for module in result.modules} == {"rebalanced"}
        ours, theirs = dora_weights(tmp_path / "skewed"), dora_weights(tmp_path / "out")
        for name, (weight, _, _) in ours.items():
            assert np.array_equal(theirs[name][0], weight)


def test_a_dora_of_a_zero_direction_is_no_dead_module(tmp_path):
    """Without the base nobody knows what its magnitudes change."""
    shutil.copytree(dense.TINY / "dora", tmp_path / "zero")
    file = tmp_path / "zero" / "adapter_model.safetensors"
    stored = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({**stored, key: np.zeros_like(stored[key])}, file, metadata={"format": "pt"})
    for base in (None, BASE):
        result = lt.repair(tmp_path / "zero", base=base, keep_intruders=True, drop_dead=True)
        assert {module.action for module in result.modules} == {"kept"}


def test_a_second_repair_finds_the_shrunk_dimensions_shorter(tmp_path):
    options = RepairOptions(IntruderOptions(), shrink=0.0, keep_every_rank=True)
    result = repair(
        read_adapter(dense.TINY / "lora"), options, base=read_checkpoint(BASE), compute=F32
    )
    write_adapter(result.adapter, tmp_path / "out", "peft")
    again = repair(read_adapter(tmp_path / "out"), options, base=read_checkpoint(BASE), compute=F32)
    assert again.change < result.change


def test_dead_modules_go_and_peft_loads_the_rest(make_folder, tmp_path):
    modules = {f"layers.{i}.q": (24, 20, 8) for i in range(3)}
    folder = make_folder("adapter", modules, dtype="f32")
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    key = "base_model.model.layers.1.q.lora_B.weight"
    save_file({**stored, key: np.zeros_like(stored[key])}, file)
    done = run("repair", folder, "-o", tmp_path / "out", "--keep-intruders", "--drop-dead")
    assert done.returncode == 0, done.stderr
    after = dense.peft_changes(tmp_path / "out")
    before = dense.peft_changes(folder)
    assert set(after) == {"layers.0.q", "layers.2.q"}
    for name, change in after.items():
        assert np.array_equal(change, before[name])
    assert "dropped" in done.stdout
    assert set(read_adapter(tmp_path / "out").modules) == set(after)


def test_balancing_rounds_nothing(make_folder, tmp_path):
    folder = make_folder("adapter", dtype="bf16")
    file = folder / "adapter_model.safetensors"
    import ml_dtypes

    stored = load_file(file)
    skewed = {
        key: (value.astype(np.float64) * (2.0**-20 if "lora_B" in key else 2.0**7)).astype(
            ml_dtypes.bfloat16
        )
        for key, value in stored.items()
    }
    save_file(skewed, file)
    done = run(
        "repair", folder, "-o", tmp_path / "out", "--keep-intruders", "--rebalance", "--json"
    )
    (module,) = json.loads(done.stdout)["modules"]
    assert (module["action"], module["relative_error"]) == ("rebalanced", 0.0)
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    norms = [np.linalg.norm(value.astype(np.float64)) for value in after.values()]
    assert 0.4 < norms[0] / norms[1] < 2.5
    assert np.array_equal(
        dense.peft_changes(tmp_path / "out")["layers.0.q"], dense.peft_changes(folder)["layers.0.q"]
    )


def test_modules_that_are_not_selected_keep_every_bit(tmp_path):
    done = run(
        "repair", dense.TINY / "lora", "--base", BASE, "-o", tmp_path / "out", "--include", "q_proj"
    )
    assert done.returncode == 0, done.stderr
    before, after = dense.peft_changes(dense.TINY / "lora"), dense.peft_changes(tmp_path / "out")
    for name, change in before.items():
        if not name.endswith("q_proj"):
            assert np.array_equal(after[name], change)


def test_what_cannot_be_repaired_is_refused(tmp_path):
    adapter = read_adapter(dense.TINY / "dora")
    turned = {name: replace(c, axis="input") for name, c in adapter.modules.items()}
    with pytest.raises(UnsupportedError, match="magnitude for each output"):
        repair(replace(adapter, modules=turned), RepairOptions(keep_intruders=True, drop_dead=True))
    with pytest.raises(OptionError, match="no step"):
        RepairOptions(keep_intruders=True)
    with pytest.raises(OptionError, match="lambda"):
        RepairOptions(IntruderOptions(), shrink=1.5)
    done = run("repair", dense.TINY / "lora", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "--base" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_other_formats_are_repaired_as_peft_is(tmp_path):
    base, whole = dense.TINY / "model", lt.repair(dense.TINY / "lora", base=dense.TINY / "model")
    lt.convert(dense.TINY / "lora", to="mlx", output=tmp_path / "mlx")
    lt.repair(tmp_path / "mlx", base=base, output=tmp_path / "repaired")
    for name in whole.adapter.modules:
        b, a = lt.factors(lt.read(tmp_path / "repaired"), name)
        np.testing.assert_array_equal(b @ a, lt.delta(whole.adapter, name))
    lt.convert(dense.TINY / "lora", to="gguf", base=base, output=tmp_path / "a.gguf")
    with pytest.raises(UnsupportedError, match=r"convert \S+a\.gguf --to peft --base MODEL"):
        lt.repair(tmp_path / "a.gguf", base=base)
    options = {"keep_intruders": True, "drop_dead": True}
    assert lt.repair(tmp_path / "a.gguf", **options).change == 0.0


def test_a_gguf_adapter_is_measured_beside_the_base_as_it_was_before(tmp_path):
    base = dense.TINY / "model"
    lt.convert(dense.TINY / "lora", to="gguf", base=base, output=tmp_path / "a.gguf")
    before = lt.spectrum(dense.TINY / "lora", base=base, include="layers.1")
    after = lt.spectrum(tmp_path / "a.gguf", base=base, include="layers.1")
    for one, other in zip(before.matrices, after.matrices, strict=True):
        assert one.name == other.name
        np.testing.assert_allclose(one.base.cosines, other.base.cosines, atol=1e-6)
        assert one.base.intruders == other.base.intruders
    pair = lt.compare([dense.TINY / "lora", tmp_path / "a.gguf"], base=base)
    assert min(module.cosine for module in pair.modules) > 1 - 1e-6


def test_the_rows_of_a_repair_are_its_modules(make_folder, tmp_path):
    folder = make_folder("adapter", {f"layers.{i}.q": (24, 20, 8) for i in range(3)})
    done = run("repair", folder, "-o", tmp_path / "out", "--keep-intruders", "--rebalance", "--csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["name"], row["action"]) for row in rows] == [
        (f"layers.{i}.q", "kept") for i in range(3)
    ]
