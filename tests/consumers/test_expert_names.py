"""Names of a version of transformers beside a layout of experts, from PEFT's and MLX's spelling."""

import pytest
from expert_models import ROUNDING, Model, off
from safetensors.numpy import load_file

import loratools as lt
from loratools_formats.disk.errors import OptionError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "User", "Runtime")
]
PREFIX = "base_model.model.model"


def stored(folder):
    names = load_file(folder / "adapter_model.safetensors")
    return {name.removesuffix(".lora_A.weight") for name in names if ".lora_A." in name}


@pytest.mark.parametrize("experts", ["each", None])
def test_names_of_a_version_hold_beside_single_experts(experts, tmp_path):
    """Mixtral's router, `mlp.gate` in transformers 5, was `block_sparse_moe.gate`."""
    model = Model("MixtralForCausalLM", 24, tmp_path)
    adapter = model.adapter("a", [*model.parameters, "mlp.gate.weight"], use_rslora=False)
    wanted = model.change(adapter)
    asked = {} if experts is None else {"experts": experts}
    for version, router in (("4", "block_sparse_moe.gate"), ("5", "mlp.gate")):
        out = tmp_path / version
        lt.convert(adapter, names_of=version, base=model.base, output=out, **asked)
        assert f"{PREFIX}.layers.0.{router}" in stored(out)
        single = f"{PREFIX}.layers.0.block_sparse_moe.experts.0.w1" in stored(out)
        assert single == (experts == "each" or version == "4")
        assert off(model.fused(out), wanted) <= ROUNDING


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("Qwen3_5MoeForConditionalGeneration", "model.language_model.layers.0.mlp.experts.0"),
        ("MixtralForCausalLM", "model.layers.0.block_sparse_moe.experts.0"),
        ("NemotronHForCausalLM", "model.layers.1.mixer.experts.0"),
    ],
)
def test_experts_of_mlx_have_the_names_of_the_models_files(name, owner, tmp_path):
    model = Model(name, 24, tmp_path)
    adapter = model.adapter("a", target_modules=["q_proj", "o_proj"])
    wanted = model.change(adapter)
    lt.convert(adapter, to="mlx", base=model.base, output=tmp_path / "mlx")
    leaf = "w2" if "block_sparse" in owner else "down_proj"
    for index, asked in enumerate(({"experts": "each"}, {"names_of": "4"}, {"experts": "3d"})):
        out = tmp_path / str(index)
        lt.convert(tmp_path / "mlx", to="peft", base=model.base, output=out, **asked)
        assert off(model.fused(out), wanted) <= ROUNDING, asked
        attention = {path for path in stored(out) if path.endswith("q_proj")}
        if "names_of" not in asked:
            assert attention == {path for path in stored(adapter) if path.endswith("q_proj")}
        if asked.get("experts") != "3d":
            own = owner.replace("model.", "backbone.") if "mixer" in owner else owner
            path = own if "names_of" in asked else owner
            assert f"base_model.model.{path}.{leaf}" in stored(out)
            assert max(module.rank for module in lt.info(out).modules) == 4
    if name == "MixtralForCausalLM":  # whose own names show that they are single experts'
        lt.convert(tmp_path / "mlx", to="peft", experts="each", output=tmp_path / "no base")
        assert f"base_model.model.{owner}.{leaf}" in stored(tmp_path / "no base")


@pytest.mark.parametrize("experts", ["3d", "shared-outer", "stacked"])
def test_names_that_a_layout_has_not_are_refused(experts, tmp_path):
    model = Model("MixtralForCausalLM", 24, tmp_path)
    adapter = model.adapter("a")
    with pytest.raises(OptionError, match=f"(?s)names_of.*{experts}|{experts}.*names_of"):
        lt.convert(adapter, names_of="4", experts=experts, base=model.base, output=tmp_path / "no")


@pytest.mark.slow
def test_shared_experts_of_three_parameters_stay_beside_every_layout(tmp_path):
    """Inkling's shared experts are a module with gate, up and down, each a stack of one."""
    model = Model("InklingForCausalLM", 24, tmp_path)
    adapter = model.adapter("a", target_modules=["q_proj"])
    wanted = model.change(adapter)
    assert off(model.fused(adapter), wanted) <= ROUNDING
    for index, asked in enumerate((
        {"experts": "each"}, {"experts": "3d"}, {"to": "tinker"}, {"names_of": "4"},
    )):  # fmt: skip
        out = tmp_path / str(index)
        lt.convert(adapter, base=model.base, output=out, **asked)
        assert off(model.fused(out), wanted) <= ROUNDING, asked
        lt.convert(out, base=model.base, for_="peft", output=f"{out} back")
        assert off(model.change(f"{out} back"), wanted) <= ROUNDING, asked
    lt.squeeze(adapter, rank=4, output=tmp_path / "squeezed")
    assert off(model.change(tmp_path / "squeezed"), wanted) <= ROUNDING


def test_files_that_alternate_what_the_class_has_in_halves(tmp_path):
    """Inkling 2's files hold gate and up by turns in `w13_weight`, and its class in halves."""
    model = Model("Inkling2ForCausalLM", 24, tmp_path)
    assert any(name.endswith("w13_weight") for name in load_file(model.base / "model.safetensors"))
    adapter = model.adapter("a", target_modules=["q_proj"])
    wanted = model.change(adapter)
    for index, asked in enumerate(({"to": "peft"}, {"experts": "each"}, {"experts": "3d"})):
        out = tmp_path / str(index)
        lt.convert(adapter, base=model.base, output=out, **asked)
        assert off(model.fused(out), wanted) <= ROUNDING, asked
    lt.merge([adapter, tmp_path / "1"], base=model.base, output=tmp_path / "both")
    assert off(model.change(tmp_path / "both"), wanted, wanted) <= 2.0**-48
    lt.fuse(model.base, adapter, output=tmp_path / "fused")
    lt.extract(model.base, tmp_path / "fused", rank=4, output=tmp_path / "extracted")
    assert off(model.change(tmp_path / "extracted"), wanted) <= 4 * ROUNDING
