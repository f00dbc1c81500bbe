"""What the configuration says of experts that were written: ranks, scales, release and targets."""

import json
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from expert_files import PREFIX, Change, base, each, largest_error, read_deltas, save, stacked
from safetensors.numpy import load_file

import loratools as lt
from loratools.cli import cli
from loratools_formats import read_adapter
from loratools_formats.disk.errors import AdapterError, UnsupportedError


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
def test_patterns_name_the_stacks_of_the_file(key, rslora, tmp_path):
    """They named single experts, which only loratools' own reader made of the stacks again."""
    change = Change(same_a=False, rslora=rslora)
    tensors, config = each(change)
    config[key] = {"down_proj": 1 if key == "rank_pattern" else 5}
    if key == "rank_pattern":
        for name in tensors:
            if ".down_proj.lora_A" in name:
                tensors[name] = tensors[name][:1]
            elif ".down_proj.lora_B" in name:
                tensors[name] = tensors[name][:, :1]
    folder = save(tmp_path / "a", (tensors, config))
    wanted = read_deltas(read_adapter(folder))
    lt.convert(folder, experts="3d", output=tmp_path / "b")
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), wanted) <= 2.0**-51
    stored, made = (
        load_file(tmp_path / "b" / "adapter_model.safetensors"),
        config_of(tmp_path / "b"),
    )
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        path = f"{PREFIX}.{leaf}".removeprefix("base_model.model.")
        rank = made.get("rank_pattern", {}).get(path, made["r"])
        alpha = made.get("alpha_pattern", {}).get(path, made["lora_alpha"])
        a, b = (stored[f"{PREFIX}.{leaf}.lora_{x}.weight"].astype(float) for x in "AB")
        assert a.shape[1] == b.shape[2] == rank
        scale = alpha / (np.sqrt(rank) if made["use_rslora"] else rank)
        for e in range(change.experts):
            delta = wanted[leaf.removesuffix("_proj"), e]
            np.testing.assert_allclose(scale * b[e] @ a[e], delta, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", ["0.18", "0.19.1"])
@pytest.mark.parametrize("source", ["mlx", "gguf"])
def test_a_layout_of_a_release_is_named_in_what_came_from_another_format(source, layout, tmp_path):
    """A square of 0.18 without its release is read as one of today."""
    change = Change(width=8, inner=8)
    model = base(tmp_path / "base", change, stacks=True, head_dim=4)
    folder = save(tmp_path / "a", each(change))
    held = tmp_path / ("a.gguf" if source == "gguf" else "held")
    lt.convert(folder, base=model, to=source, output=held)
    asked = {"to": "peft", "experts": "stacked", "peft_layout": layout}
    lt.convert(held, base=model, output=tmp_path / "b", **asked)
    assert config_of(tmp_path / "b")["peft_version"].startswith(layout)
    adapter = read_adapter(tmp_path / "b")
    assert {c.layer.swapped for c in adapter.modules.values()} == {layout == "0.18"}
    assert largest_error(read_deltas(adapter), change.deltas()) == 0.0


def test_single_experts_of_names_of_4_are_layers(tmp_path):
    """They were parameters, since classes of 5 have no layer that is called so."""
    change = Change()
    model = base(tmp_path / "base", change, stacks=False)
    folder = save(tmp_path / "a", each(change))
    lt.convert(folder, base=model, names_of="4", output=tmp_path / "b")
    made = config_of(tmp_path / "b")
    assert not made.get("target_parameters")
    assert any(name.endswith("down_proj") for name in made["target_modules"])
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), change.deltas()) == 0.0


def test_mlx_has_no_single_experts_of_a_class_that_is_not_known(tmp_path):
    """They were written under PEFT's names, which mlx-lm stops at."""
    change = Change()
    config = {"model_type": "tomorrow_moe", "architectures": ["TomorrowMoeForCausalLM"]}
    model = base(tmp_path / "base", change, stacks=False, **config)
    folder = save(tmp_path / "a", each(change))
    with pytest.raises(UnsupportedError, match="has no model of this type") as told:
        lt.convert(folder, to="mlx", base=model, output=tmp_path / "b")
    assert "loratools fuse" in told.value.hint


@pytest.mark.parametrize(
    "asked", [{"experts": "3d"}, {"experts": "shared-outer"}, {"to": "tinker"}]
)
@pytest.mark.parametrize("write", [each, stacked])
def test_one_expert_has_no_axis_for_experts(write, asked, tmp_path):
    """It was written, and the reader of what was written could not tell how many there are."""
    change = Change(experts=1)
    model = base(tmp_path / "base", change, stacks=True)
    folder = save(tmp_path / "a", write(change))
    with pytest.raises(UnsupportedError, match="a layer of one expert"):
        lt.convert(folder, base=model, output=tmp_path / "b", **asked)
    flags = [word for key, value in asked.items() for word in (f"--{key}", value)]
    given = ["convert", str(folder), *flags, "--base", str(model), "-o", str(tmp_path / "b")]
    error = CliRunner().invoke(cli, given).exception
    words = shlex.split(error.hint.rpartition("exact: ")[2])
    assert words[:5] == ["loratools", "convert", str(folder), "--to", "peft"]
    assert CliRunner().invoke(cli, words[1:], catch_exceptions=False).exit_code == 0
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), change.deltas()) == 0.0


@pytest.mark.parametrize(("rank", "down"), [(4, 4), (4, 2), (2, 2)])
def test_a_squeezed_file_gives_each_parameter_its_own_rank(rank, down, tmp_path):
    """Down was taken for gate_up where their ranks became equal, and the old ranks stayed."""
    change = Change(rank=4, alpha=4.0, width=16, inner=12)
    tensors, config = stacked(change, peft_version="0.21.2")
    a, b = (tensors[f"{PREFIX}.lora_{side}.weight"] for side in "AB")
    tensors[f"{PREFIX}.lora_A.weight"] = a.reshape(3, 4, 12)[:, :down].reshape(-1, 12)
    tensors[f"{PREFIX}.lora_B.weight"] = b.reshape(16, 4, 3)[:, :down].reshape(16, -1)
    config |= {"r": down, "lora_alpha": down, "rank_pattern": {"experts.gate_up_proj": 4},
               "alpha_pattern": {"experts.gate_up_proj": 4}}  # fmt: skip
    folder = save(tmp_path / "a", (tensors, config))
    result = lt.squeeze(folder, rank=rank, output=tmp_path / "b")
    adapter, made = read_adapter(tmp_path / "b"), config_of(tmp_path / "b")
    leaves = {c.layer.parameters for c in adapter.modules.values()}
    assert len(leaves) == 2
    stored = load_file(tmp_path / "b" / "adapter_model.safetensors")
    for leaf, path in (("gate_up_proj", f"{PREFIX}.base_layer"), ("down_proj", PREFIX)):
        patterns = made.get("rank_pattern", {})
        wanted = next((r for key, r in patterns.items() if key.endswith(leaf)), made["r"])
        assert stored[f"{path}.lora_A.weight"].shape[0] == 3 * wanted
    whole, small = read_deltas(read_adapter(folder)), read_deltas(adapter)
    square = sum(((whole[key] - small[key]) ** 2).sum() for key in whole)
    error = (square / sum((delta**2).sum() for delta in whole.values())) ** 0.5
    assert error == pytest.approx(result.relative_error, rel=1e-5, abs=1e-7)


def test_two_stacks_are_not_one_parameter(tmp_path):
    """Both have the rank of gate_up alone, and PEFT stops at that of down."""
    tensors, config = stacked(Change(rank=2), peft_version="0.21.2")
    config |= {"r": 4, "rank_pattern": {"experts.gate_up_proj": 2}}
    with pytest.raises(AdapterError, match="rank in the file and rank in the config differ"):
        read_adapter(save(tmp_path / "a", (tensors, config)))
