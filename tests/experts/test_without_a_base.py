"""Experts laid out by what the adapter alone says of its model, and by how many the base has."""

import numpy as np
import pytest
from expert_files import (
    OWNER,
    Change,
    base,
    each,
    each_joined,
    largest_error,
    read_deltas,
    save,
)

import loratools as lt
from loratools_formats.disk.errors import UnsupportedError


def named(made, name):
    tensors, config = made
    return tensors, config | {"base_model_name_or_path": name}


def of_family(made, family, *kept):
    """Return a file of some projections whose configuration tells the class, as PEFT writes it."""
    tensors, config = made
    library = f"transformers.models.{family}.modeling_{family}"
    tensors = {n: v for n, v in tensors.items() if n.split(".")[-3] in kept}
    config |= {"target_modules": list(kept), "auto_mapping": {"parent_library": library}}
    return tensors, config


def stacks(folder):
    """Return ΔW (E, out, in) in float64 of each stacked parameter, by its last name."""
    found = {}
    for change in lt.read(folder).modules.values():
        part = change.require_factors()
        delta = part.scale * part.b.load(np.float64) @ part.a.load(np.float64)
        found[part.layer.parameters[0].rpartition(".")[2]] = delta
    return found


@pytest.mark.parametrize(
    ("write", "asked"), [(each, "stacked"), (each_joined, "stacked"), (each_joined, "3d")]
)
def test_the_name_of_gpt_oss_joins_by_turns(write, asked, tmp_path):
    """Single experts of mcore have gate and up in halves, also where the model has turns."""
    change = Change()
    folder = save(tmp_path / "a", named(write(change), "openai/gpt-oss-20b"))
    lt.convert(folder, experts=asked, output=tmp_path / "b")
    made, wanted = stacks(tmp_path / "b"), change.deltas()
    for e in range(change.experts):
        np.testing.assert_allclose(made["gate_up_proj"][e][0::2], wanted["gate", e], atol=1e-12)
        np.testing.assert_allclose(made["gate_up_proj"][e][1::2], wanted["up", e], atol=1e-12)
        np.testing.assert_allclose(made["down_proj"][e], wanted["down", e], atol=1e-12)


def test_up_alone_gets_zeros_for_the_gate_of_its_class(tmp_path):
    change = Change()
    folder = save(tmp_path / "a", of_family(each(change), "qwen3_moe", "up_proj", "down_proj"))
    lt.convert(folder, experts="stacked", output=tmp_path / "b")
    wanted = {k: 0 * d if k[0] == "gate" else d for k, d in change.deltas().items()}
    assert largest_error(read_deltas(lt.read(tmp_path / "b")), wanted) <= 2.0**-51


def test_a_class_without_a_gate_gets_none(tmp_path):
    change = Change()
    folder = save(tmp_path / "a", of_family(each(change), "nemotron_h", "up_proj", "down_proj"))
    lt.convert(folder, experts="stacked", output=tmp_path / "b")
    made = stacks(tmp_path / "b")
    assert made.keys() == {"up_proj", "down_proj"}
    for (name, e), delta in change.deltas().items():
        if name != "gate":
            np.testing.assert_allclose(made[f"{name}_proj"][e], delta, atol=1e-12)


@pytest.mark.parametrize("inner", [6, 8])
def test_a_square_says_nothing_of_how_gate_and_up_are_joined(inner, tmp_path):
    """Released gpt-oss models have such; a model of another name and other sizes is none."""
    change = Change(width=8, inner=inner)
    folder = save(tmp_path / "a", named(each(change), "Qwen/Qwen3-30B-A3B"))
    if inner == 8:
        with pytest.raises(UnsupportedError, match="in halves or alternating"):
            lt.convert(folder, experts="stacked", output=tmp_path / "b")
        return
    lt.convert(folder, experts="stacked", output=tmp_path / "b")
    assert largest_error(read_deltas(lt.read(tmp_path / "b")), change.deltas()) <= 2.0**-51


@pytest.mark.parametrize("asked", [{"experts": "3d"}, {"to": "tinker"}, {"experts": "stacked"}])
def test_experts_that_only_the_base_has_are_zeros(asked, tmp_path):
    change = Change(experts=4)
    model = base(tmp_path / "base", change, stacks=True)
    tensors, config = each(change)
    tensors = {n: v for n, v in tensors.items() if f"{OWNER}.3." not in n}
    lt.convert(save(tmp_path / "a", (tensors, config)), base=model, output=tmp_path / "b", **asked)
    wanted = {k: 0 * delta if k[1] == 3 else delta for k, delta in change.deltas().items()}
    assert largest_error(read_deltas(lt.read(tmp_path / "b")), wanted) <= 2.0**-51


@pytest.mark.parametrize(("alpha", "rounds"), [(8.0, False), (3.0, True)])
@pytest.mark.parametrize("asked", [{"experts": "3d"}, {"for_": "sglang"}])
def test_a_scale_that_is_folded_is_said_to_round_where_it_does(asked, alpha, rounds, tmp_path):
    change = Change()
    tensors, config = of_family(each(change), "qwen3_moe", "gate_proj", "up_proj", "down_proj")
    config |= {"alpha_pattern": {r"experts\.1\.down_proj": alpha}}
    done = lt.convert(save(tmp_path / "a", (tensors, config)), output=tmp_path / "b", **asked)
    assert any("rounds once" in note for note in done.notes) == rounds
    assert (done.relative_error > 0) == rounds
    wanted = change.deltas()
    wanted["down", 1] = wanted["down", 1] * alpha / change.alpha
    error = largest_error(read_deltas(lt.read(tmp_path / "b")), wanted)
    assert error <= (2.0**-23 if rounds else 2.0**-51)


@pytest.mark.parametrize("family", ["llama4", "lfm2_moe"])
def test_experts_of_llama_4_have_a_on_the_outputs(family, tmp_path):
    """PEFT since 0.19.1 has it there of this class alone; shapes of both parameters show it."""
    change = Change()
    tensors, config = of_family(each(change), family, "gate_proj", "up_proj", "down_proj")
    tensors = {name.replace(".mlp.", ".feed_forward."): v for name, v in tensors.items()}
    folder = save(tmp_path / "a", (tensors, config))
    lt.convert(folder, experts="stacked", peft_layout="0.19.1", output=tmp_path / "b")
    adapter = lt.read(tmp_path / "b")
    sides = {change.layer.swapped for change in adapter.modules.values()}
    assert sides == {family == "llama4"}
    assert largest_error(read_deltas(adapter), change.deltas()) <= 2.0**-51
