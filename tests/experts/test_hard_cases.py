"""One expert, no gate, guesses: what a file leaves open is told, and what it says is read."""

import json

import numpy as np
import pytest
from expert_files import (
    LAYOUTS,
    OWNER,
    PREFIX,
    Change,
    base,
    flat_3d,
    fused_deltas,
    largest_error,
    read_deltas,
    save,
    stacked,
)
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools_formats import read_adapter
from loratools_formats.disk.errors import LoratoolsError, UnsupportedError

ROUNDING = 2.0**-21
"""Of a float32 base, values and changes of size 1."""


def only(made, leaf):
    """Return a stacked file's down or gate_up alone, as PEFT names one parameter of a module."""
    tensors, config = made
    nested = leaf == "gate_up_proj"
    kept = {n: v for n, v in tensors.items() if (".base_layer." in n) == nested}
    kept = {name.replace(".base_layer.", "."): values for name, values in kept.items()}
    return kept, {**config, "target_parameters": [f"mlp.experts.{leaf}"]}


@pytest.mark.parametrize("inner", [4, 6, 8])
@pytest.mark.parametrize("layout", ["PEFT 0.21", "PEFT 0.18", "Automodel", "3-D pairs"])
def test_one_expert_is_a_stack_of_one(layout, inner, tmp_path):
    """The axes of one were read as a matrix's, and a square on the outputs as one on the inputs."""
    change = Change(experts=1, width=8, inner=inner)
    folder = save(tmp_path / "a", LAYOUTS[layout](change))
    found = read_deltas(read_adapter(folder))
    assert largest_error(found, change.deltas()) <= 2.0**-51
    for stacks in (False, True):
        model = base(tmp_path / f"base {stacks}", change, stacks=stacks)
        lt.fuse(model, folder, output=tmp_path / f"fused {stacks}")
        found = fused_deltas(model, tmp_path / f"fused {stacks}")
        assert largest_error(found, change.deltas()) <= ROUNDING
    lt.convert(folder, experts="each", base=model, output=tmp_path / "each")
    assert largest_error(read_deltas(read_adapter(tmp_path / "each")), change.deltas()) <= 2.0**-51


@pytest.mark.parametrize("inner", [6, 8])
def test_pairs_with_three_axes_have_up_where_there_is_no_gate(inner, tmp_path):
    """The outputs of the inner pair are down's inputs, and not twice as many."""
    change = Change(width=8, inner=inner)
    tensors, config = flat_3d(change)
    a, b = change.whole("up")
    tensors |= {f"{PREFIX}.base_layer.lora_A.weight": a,
                f"{PREFIX}.base_layer.lora_B.weight": b.transpose(1, 2, 0)}  # fmt: skip
    adapter = read_adapter(save(tmp_path / "a", (tensors, config)))
    assert adapter.config["target_parameters"] == [f"{OWNER}.down_proj", f"{OWNER}.up_proj"]
    wanted = {key: delta for key, delta in change.deltas().items() if key[0] != "gate"}
    assert largest_error(read_deltas(adapter), wanted) <= 2.0**-51


def test_every_command_that_adds_or_finds_a_guessed_order_says_so(tmp_path):
    change = Change()
    model = base(tmp_path / "base", change, stacks=True)
    folder = save(tmp_path / "a", LAYOUTS["Unsloth, unmarked"](change))
    done = [lt.fuse(model, folder, output=tmp_path / "fused")]
    done.append(lt.verify(tmp_path / "fused", base=model, adapters=folder))
    assert done[1].contained
    done.append(lt.fuse(model, folder))  # a plan
    done.append(lt.write(lt.read(folder), tmp_path / "again"))
    for result in done:
        assert [f.code for f in result.findings].count("expert-order-guessed") == 1, result
    assert "times as alike" in json.dumps(done[1].to_dict()["notes"])


@pytest.mark.parametrize("leaf", ["down_proj", "gate_up_proj"])
@pytest.mark.parametrize("release", [None, "0.18.1", "0.19.0"])
def test_a_square_alone_is_told_until_it_is_written_anew(release, leaf, tmp_path):
    change = Change(width=8, inner=8 if leaf == "down_proj" else 4)
    stated = {} if release is None else {"peft_version": release}
    made = only(stacked(change, swapped=release is not None, **stated), leaf)
    folder = save(tmp_path / "a", made)
    model = base(tmp_path / "base", change, stacks=True)
    wanted = {k: d for k, d in change.deltas().items() if (k[0] == "down") == (leaf[0] == "d")}
    zero = {k: d * 0 for k, d in change.deltas().items() if k not in wanted}

    def told(result):
        return [f for f in result.findings if f.code == "expert-side-assumed"]

    def check(path):
        lt.fuse(model, path, output=f"{path}-fused")
        found = fused_deltas(model, tmp_path / f"{path}-fused")
        assert largest_error(found, wanted | zero) <= ROUNDING

    check(folder)
    (found,) = told(lt.read(folder))
    assert "names no release" in found.message or f"PEFT {release}" in found.message
    assert f"convert {folder} --peft-layout 0.19.1 --base BASE" in found.hint
    assert told(lt.fuse(model, folder))
    assert told(lt.squeeze(folder, rank=2, output=tmp_path / "small"))
    assert told(lt.merge([(folder, 0.5), (folder, 0.5)], output=tmp_path / "merged"))
    assert [f.code for f in lt.check(folder).findings].count("LT405") == 1
    done = lt.convert(folder, peft_layout="0.19.1", base=model, output=tmp_path / "new")
    assert not told(done)
    assert not told(lt.read(tmp_path / "new"))
    assert lt.read(tmp_path / "new").config["peft_version"] == "0.19.1"
    assert "LT405" not in {f.code for f in lt.check(tmp_path / "new").findings}
    check(tmp_path / "new")
    new = read_deltas(
        replaced_sides(lt.read(tmp_path / "new"))  # PEFT has A on the inputs of this class
    )
    assert largest_error(new, wanted) <= 2.0**-51


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("how", ["squeeze", "merge and squeeze"])
def test_a_square_stays_on_its_side_when_its_sibling_goes(how, swapped, tmp_path):
    """PEFT 0.21 that saves a file of 2025 again keeps its number and has A on the inputs."""
    change = Change(width=8, inner=8)
    folder = save(tmp_path / "a", stacked(change, swapped=swapped, peft_version="0.18.1"))
    model = base(tmp_path / "base", change, stacks=True)
    wanted = {
        key: delta if key[0] == "down" else 0 * delta for key, delta in change.deltas().items()
    }
    if how == "merge and squeeze":
        lt.merge([(folder, 0.5), (folder, 0.5)], base=model, output=tmp_path / "merged")
        folder = tmp_path / "merged"
    lt.squeeze(folder, energy=1.0, drop="base_layer", output=tmp_path / "down")
    lt.fuse(model, tmp_path / "down", output=tmp_path / "fused")
    found = fused_deltas(model, tmp_path / "fused")
    assert largest_error(found, wanted) <= 4 * ROUNDING


def replaced_sides(adapter):
    """Return an adapter whose stacks of an unknown side are taken to have A on the inputs."""
    from dataclasses import replace

    modules = {}
    for name, change in adapter.modules.items():
        part = change.require_factors()
        assert part.layer.swapped is None
        layer = replace(part.layer, swapped=False)
        modules[name] = change.with_direction(replace(part, layer=layer))
    return replace(adapter, modules=modules)


def test_what_mlx_lm_has_no_model_of_is_told(tmp_path):
    change = Change()
    config = {"model_type": "inkling_text", "architectures": ["InklingForCausalLM"]}
    model = base(tmp_path / "base", change, stacks=True, **config)
    with pytest.raises(UnsupportedError, match=r"mlx-lm 0\.32 has no model of this type") as told:
        lt.convert(save(tmp_path / "a", LAYOUTS["PEFT 0.21"](change)), to="mlx", base=model,
                   output=tmp_path / "mlx")  # fmt: skip
    assert told.value.got == "model type inkling_text"
    assert "loratools fuse BASE ADAPTER" in told.value.hint
    plain = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight":
             np.ones((2, 8) if x == "A" else (8, 2), np.float32) for x in "AB"}  # fmt: skip
    dense = save(tmp_path / "b", (plain, change.config | {"target_modules": ["q_proj"]}))
    done = lt.convert(dense, to="mlx", base=model, output=tmp_path / "mlx")
    assert "no-model-in-mlx" in {finding.code for finding in done.findings}


@pytest.mark.parametrize("leaf", ["gate_proj", "up_proj"])
def test_gguf_of_gate_or_up_alone_leaves_the_other_as_it_is(leaf, tmp_path):
    """A half that is not adapted has a block of zeros in PEFT's joined parameter."""
    change = Change(width=8, inner=8, same_a=False)
    tensors, config = LAYOUTS["one by one"](change)
    tensors = {n: v for n, v in tensors.items() if f".{leaf}." in n or ".down_proj." in n}
    config |= {"target_modules": [leaf, "down_proj"]}
    model = base(tmp_path / "base", change, stacks=True)
    lt.convert(save(tmp_path / "a", (tensors, config)), to="gguf", base=model,
               output=tmp_path / "a.gguf")  # fmt: skip
    lt.convert(tmp_path / "a.gguf", to="peft", base=model, output=tmp_path / "b")
    kept = {leaf.removesuffix("_proj"), "down"}
    wanted = {k: d if k[0] in kept else 0 * d for k, d in change.deltas().items()}
    adapter = read_adapter(tmp_path / "b")
    assert largest_error(read_deltas(adapter), wanted) <= 2.0**-51
    assert {module.rank for module in adapter.modules.values()} == {2}


def dora(change, seed=3):
    """Return experts one by one, each a DoRA; PEFT on transformers 4 writes them."""
    tensors, config = LAYOUTS["one by one"](change)
    rng = np.random.default_rng(seed)
    for name, b in list(tensors.items()):
        if "lora_B" in name:
            magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
            tensors[magnitude] = (1 + rng.random(len(b))).astype(np.float32)
    return tensors, config | {"use_dora": True}


@pytest.mark.parametrize("inner", [6, 8])
def test_a_dora_of_one_expert_reads_its_weight_in_a_stack(inner, tmp_path):
    """The hint of a refusal led to `to-lora`, which knew no stacks."""
    change = Change(width=8, inner=inner)
    tensors, config = dora(change)
    folder = save(tmp_path / "a", (tensors, config))
    one, stack = (base(tmp_path / f"{x}", change, stacks=x) for x in (False, True))
    lt.to_lora(folder, base=stack, energy=1.0, output=tmp_path / "lora")
    lt.fuse(one, folder, output=tmp_path / "fused one")
    wanted = fused_deltas(one, tmp_path / "fused one")
    for model in (one, stack):
        lt.fuse(model, tmp_path / "lora", output=tmp_path / "fused", overwrite=True)
        found = fused_deltas(model, tmp_path / "fused")
        assert largest_error(found, wanted) <= 4 * ROUNDING
    plain = save(tmp_path / "plain", LAYOUTS["one by one"](change))
    lt.to_dora(plain, base=stack, output=tmp_path / "dora")
    lt.fuse(stack, tmp_path / "dora", output=tmp_path / "fused", overwrite=True)
    found = fused_deltas(stack, tmp_path / "fused")
    assert largest_error(found, change.deltas()) <= 4 * ROUNDING


@pytest.mark.parametrize("asked", ["3d", "shared-outer", "stacked", "tinker"])
def test_a_layout_without_a_place_for_magnitudes_is_refused(asked, tmp_path):
    """The experts were written one by one, and nothing said so."""
    folder = save(tmp_path / "a", dora(Change()))
    wanted = {"to": "tinker"} if asked == "tinker" else {"experts": asked}
    with pytest.raises(UnsupportedError, match=f"cannot be written as {asked}") as told:
        lt.convert(folder, output=tmp_path / "b", **wanted)
    assert "to-lora" in told.value.hint
    lt.convert(folder, experts="each", output=tmp_path / "b")


@pytest.mark.parametrize("asked", ["3d", "shared-outer", "stacked", "tinker"])
def test_a_layout_without_a_place_for_biases_is_refused(asked, tmp_path):
    """The file was written without them, and the check of what was written stopped it."""
    tensors, config = LAYOUTS["one by one"](Change())
    biases = {n.replace("weight", "bias"): b[:, 0].copy() for n, b in tensors.items() if "_B" in n}
    made = tensors | biases, config | {"lora_bias": True}
    folder = save(tmp_path / "a", made)
    wanted = {"to": "tinker"} if asked == "tinker" else {"experts": asked}
    with pytest.raises(
        UnsupportedError, match=rf"lora_bias\) cannot be written as {asked}"
    ) as told:
        lt.convert(folder, output=tmp_path / "b", **wanted)
    assert f"convert {folder} --to peft --experts each -o" in told.value.hint
    lt.convert(folder, experts="each", output=tmp_path / "b")
    kept = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert all(np.array_equal(kept[name], bias) for name, bias in biases.items())


@pytest.mark.parametrize("asked", [{"experts": "3d"}, {"to": "tinker"}])
def test_experts_of_several_types_are_stacked_in_one_that_holds_them(asked, tmp_path):
    change = Change(same_a=False)
    tensors, config = LAYOUTS["one by one"](change)
    for name in tensors:
        if ".experts.1." in name:
            tensors[name] = tensors[name].astype(np.float16)
    folder = save(tmp_path / "a", (tensors, config))
    wanted = read_deltas(read_adapter(folder))
    lt.convert(folder, output=tmp_path / "b", **asked)
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), wanted) == 0.0


@pytest.mark.parametrize("inner", [6, 8])
def test_experts_without_a_gate_are_extracted(inner, tmp_path):
    change = Change(width=8, inner=inner)
    whole = base(tmp_path / "whole", change, stacks=True)
    tensors = load_file(whole / "model.safetensors")
    up = tensors.pop(f"{OWNER}.gate_up_proj")[:, inner:]
    tensors[f"{OWNER}.up_proj"] = np.ascontiguousarray(up)
    tensors = {name.replace(".mlp.", ".mixer."): values for name, values in tensors.items()}
    config = json.loads((whole / "config.json").read_text())
    config |= {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"]}
    model = tmp_path / "base"
    model.mkdir()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))
    a, adapter = LAYOUTS["one by one"](change)
    a = {n.replace(".mlp.", ".mixer."): v for n, v in a.items() if ".gate_proj." not in n}
    folder = save(tmp_path / "a", (a, adapter | {"target_modules": ["up_proj", "down_proj"]}))
    lt.fuse(model, folder, output=tmp_path / "fused")
    lt.extract(model, tmp_path / "fused", rank=2, output=tmp_path / "b")
    found = read_deltas(lt.read(tmp_path / "b"))
    wanted = {key: delta for key, delta in change.deltas().items() if key[0] != "gate"}
    assert largest_error(found, wanted) <= 8 * ROUNDING


TWO_NAMES = [
    ("one by one", "one by one, gate_up"), ("one by one, gate_up", "Tinker"),
    ("one by one", "one by one, w1 w3 w2"), ("3-D, apart", "one by one, w1 w3 w2"),
]  # fmt: skip


@pytest.mark.parametrize("allow_missing", [False, True])
@pytest.mark.parametrize("pair", TWO_NAMES, ids=" + ".join)
def test_single_experts_of_other_names_are_merged_beside_the_base_alone(
    pair, allow_missing, tmp_path
):
    """The output had both, and no loader applies both."""
    changes = Change(seed=1), Change(seed=2)
    folders = [save(tmp_path / str(i), LAYOUTS[x](changes[i])) for i, x in enumerate(pair)]
    weighted = [(folders[0], 0.75), (folders[1], -0.5)]
    with pytest.raises(LoratoolsError, match="name one module differently") as told:
        lt.merge(weighted, output=tmp_path / "no", allow_missing=allow_missing)
    assert "`base`" in told.value.hint
    model = base(tmp_path / "base", changes[0], stacks=False)
    lt.merge(weighted, base=model, output=tmp_path / "both", allow_missing=allow_missing)
    other = changes[1].deltas()
    wanted = {k: 0.75 * delta - 0.5 * other[k] for k, delta in changes[0].deltas().items()}
    found = read_deltas(read_adapter(tmp_path / "both"))
    assert largest_error(found, wanted) <= 2.0**-21
