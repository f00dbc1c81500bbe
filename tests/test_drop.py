"""Modules that leave: what is left is as it was, and whatever was of the module is gone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.cli import cli
from loratools_formats.disk.errors import AdapterError, OptionError

_K, _IMG = "diffusion_model.blocks.0.cross_attn.k", "diffusion_model.blocks.0.cross_attn.k_img"


def _run(*words: object) -> str:
    done = CliRunner().invoke(cli, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.output


def _file(path: Path, *, nan: bool = False) -> Path:
    generator = np.random.default_rng(0)
    tensors = {}
    for module in (_K, _IMG):
        for part, shape in (("lora_down", (2, 8)), ("lora_up", (8, 2))):
            values = generator.standard_normal(shape).astype(np.float32)
            tensors[f"{module}.{part}.weight"] = values
    tensors[f"{_IMG}.diff_b"] = generator.standard_normal(8).astype(np.float32)
    if nan:
        tensors[f"{_IMG}.lora_up.weight"][0] = np.nan
    save_file(tensors, path)
    return path


def _delta(path: Path, module: str = _K) -> np.ndarray:
    return lt.delta(lt.read(path), module)


def _share(path: Path) -> float:
    norms = {module: np.linalg.norm(_delta(path, module)) ** 2 for module in (_K, _IMG)}
    return norms[_IMG] / sum(norms.values())


@pytest.mark.parametrize("nan", [False, True], ids=["finite", "nan"])
@pytest.mark.parametrize(
    "command",
    [
        ["squeeze", "A", "--rank", "2", "--drop", "k_img"],
        ["squeeze", "A", "--rank", "2", "--keep", "cross_attn.k$"],
        ["merge", "A", "--drop", "k_img"],
        ["merge", "A", "--weight-pattern", "k_img=0"],
        ["merge", "A", "--method", "ties", "--rank", "2", "--weight-pattern", "k_img=0"],
        ["to-lora", "A", "--drop", "k_img"],
        ["convert", "A", "--drop", "k_img"],
    ],
    ids=lambda command: " ".join(command[:1] + command[2:]),
)
def test_everything_of_the_module_leaves(tmp_path: Path, command: list[str], *, nan: bool) -> None:
    source = _file(tmp_path / "a.safetensors", nan=nan)
    output = tmp_path / "out.safetensors"
    _run(*(source if word == "A" else word for word in command), "-o", output)
    assert {name.rpartition(".lora_")[0] for name in load_file(output)} <= {_K, ""}
    assert not any("k_img" in name for name in load_file(output))
    if "ties" not in command:
        np.testing.assert_allclose(_delta(output), _delta(source), rtol=0, atol=1e-6)


def test_energy_of_what_left_is_stated(tmp_path: Path) -> None:
    source = _file(tmp_path / "a.safetensors")
    result = lt.squeeze(source, rank=1, drop="k_img")
    assert f"taken out: {_IMG}; {_share(source):.2%} of the energy" in " ".join(result.notes)
    nan = _file(tmp_path / "nan.safetensors", nan=True)
    told = _run("squeeze", nan, "--rank", "1", "--drop", "k_img", "--dry-run")
    assert f"taken out: {_IMG}; the energy of {_IMG} is not known" in told


def test_fuse_leaves_out_what_the_base_has_not(tmp_path: Path) -> None:
    source = _file(tmp_path / "a.safetensors")
    base = np.zeros((8, 8), np.float32)
    save_file({"blocks.0.cross_attn.k.weight": base}, tmp_path / "base.safetensors")
    result = lt.fuse(tmp_path / "base.safetensors", source, drop="k_img", output=tmp_path / "f")
    assert any("taken out" in note for note in result.notes)
    fused = load_file(tmp_path / "f")["blocks.0.cross_attn.k.weight"]
    np.testing.assert_allclose(fused, _delta(source), atol=1e-6)


def test_nothing_left_and_nothing_found_are_errors(tmp_path: Path) -> None:
    source = _file(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="no module would be left"):
        lt.squeeze(source, rank=1, drop="blocks")
    with pytest.raises(AdapterError, match="no module would be left"):
        lt.convert(source, to="diffusers", keep="nowhere")
    with pytest.raises(OptionError, match="finds no module"):
        lt.merge([source], drop="nowhere")
    with pytest.raises(OptionError, match="nothing would be left"):
        lt.merge([source], weight_pattern=["cross_attn=0"])
    with pytest.raises(OptionError, match="not a regular expression"):
        lt.merge([source], drop="(")


def test_recipe_repeats_it_and_the_output_records_it(tmp_path: Path) -> None:
    source = _file(tmp_path / "a.safetensors")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    recipe = tmp_path / "recipe.yaml"
    _run("merge", source, "--drop", "k_img", "--save-recipe", recipe, "-o", first)
    _run("merge", "--recipe", recipe, "-o", second)
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, "np") as opened:
        dropped = json.loads(opened.metadata()["loratools.dropped"])
    assert list(dropped.values()) == [["drop k_img"]]


def test_peft_configuration_names_what_is_left(tmp_path: Path) -> None:
    source = Path("examples/tiny-llama/lora")
    lt.squeeze(source, rank=4, drop=r"layers\.0|v_proj", output=tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    left = lt.read(tmp_path / "out")
    assert config["target_modules"] == sorted(left.modules)
    assert len(left.modules) == sum(
        "v_proj" not in name and "layers.0" not in name for name in lt.read(source).modules
    )
    assert not [f for f in left.findings if f.code in ("not-targeted", "target-without-tensors")]
