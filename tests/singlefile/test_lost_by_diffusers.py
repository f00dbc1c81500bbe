"""What `check` says that diffusers loses of kohya's files is what diffusers loses.

`make test` takes some architectures, `pytest --models` all that a table of diffusers speaks of.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny_diffusion as tiny
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.cli import cli
from loratools.naming.tables import find_table, flattened

pytestmark = pytest.mark.filterwarnings("ignore")

SILENT = ("sd3", "auraflow", "lumina2", "hunyuan_video15", "hunyuan_image", "ltx_video", "ltx2",
          "cosmos2", "anima", "hidream", "krea2", "ideogram4", "wan_animate2")  # fmt: skip
PARTLY = ("flux2", "z_image", "qwen_image")
SAMPLE = ("sd3", "ltx_video", *PARTLY)


def pytest_generate_tests(metafunc):
    if metafunc.function is test_modules_without_a_converter_are_named:
        every = metafunc.config.getoption("models")
        metafunc.parametrize("name", (*SILENT, *PARTLY) if every else SAMPLE)


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


def about(path, **options):
    found = lt.check(path, target=["diffusers"], **options).findings
    return [finding for finding in found if finding.target]


def ratios(found, wanted):
    """Return by what factor each change is not the wanted one, where it is not."""
    factors = {path: (found[path] * change).sum() / (change**2).sum()
               for path, change in wanted.items()}  # fmt: skip
    for path, change in wanted.items():
        np.testing.assert_allclose(found[path], factors[path] * change, atol=1e-5)
    return {path: factor for path, factor in factors.items() if abs(factor - 1) > 1e-5}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("alphas", ["alike", "ranks", "any"])
def test_attention_of_a_unet_gets_the_commonest_alpha(name, alphas, tmp_path):
    shapes, table = tiny.layers(tiny.make_model(name)), find_table(name)
    tensors, changes = tiny.adapter(name, shapes, "kohya")
    generator, spelled = np.random.default_rng(5), {}
    for module, _, parts in tiny._rows(table, shapes, "kohya"):
        key = f"lora_unet_{flattened(module)}"
        rank = tensors[f"{key}.lora_down.weight"].shape[0]
        alpha = {"alike": 3.0, "ranks": rank, "any": generator.integers(1, 9)}[alphas]
        tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
        for path, _ in parts:
            changes[path] = changes[path] * alpha / 3.0
            spelled[path] = key
    path = tmp_path / "kohya.safetensors"
    save_file(tensors, path)
    wrong = ratios(tiny.loaded(name, tiny.make_model(name), path), changes)
    findings = [f for f in about(path) if f.code == "LT506"]
    assert len(findings) == (alphas != "alike")
    if not findings:
        assert not wrong
        return
    (found,) = findings
    assert f"the alphas of {len(wrong)} of {len(changes)} modules" in found.message
    (first,) = (p for p in wrong if spelled[p] == found.where)
    own = changes[first], tensors[f"{found.where}.alpha"]
    rank = tensors[f"{found.where}.lora_down.weight"].shape[0]
    assert f"by {wrong[first] * own[1] / rank:g} instead of {own[1] / rank:g}" in found.message
    fixed = tmp_path / "fixed.safetensors"
    again = lt.check(path, target=["diffusers"], fix=True, output=fixed)
    assert not [f for f in again.findings if f.target]
    assert not ratios(tiny.loaded(name, tiny.make_model(name), fixed), changes)


def unet_file(name, folder, alpha):
    """Save a kohya file of all modules of a UNet; return its path, and a module's names in both."""
    model = tiny.make_model(name)
    shapes, table = tiny.layers(model), find_table(name)
    tensors, changes = tiny.adapter(name, shapes, "kohya", ranks=(4,))
    spelled = {}
    for module, _, parts in tiny._rows(table, shapes, "kohya"):
        key = f"lora_unet_{flattened(module)}"
        value = alpha(key)
        tensors[f"{key}.alpha"] = np.array(value, np.float32)
        for path, _ in parts:
            changes[path] = changes[path] * value / 3.0
            spelled[path] = key
    path = folder / "kohya.safetensors"
    save_file(tensors, path)
    return path, changes, spelled


def of_convolutions(key):
    return 1.0 if "conv" in key else 16.0


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("alpha", [lambda key: 6.0, of_convolutions], ids=["one", "two"])
def test_diffusers_reads_mixed_ranks_of_a_squeezed_unet(name, alpha, tmp_path):
    path, _, spelled = unet_file(name, tmp_path, alpha)
    output = tmp_path / "squeezed.safetensors"
    result = lt.squeeze(path, budget="60%", output=output)
    assert len({module.rank_out for module in result.modules}) > 1
    written = lt.read(output)
    wanted = {full: lt.delta(written, key) for full, key in spelled.items()}
    assert not ratios(tiny.loaded(name, tiny.make_model(name), output), wanted)
    assert not result.notes
    assert not [f for f in about(output) if f.code == "LT506"]


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_diffusers_reads_mixed_ranks_of_a_merge_and_of_other_kinds(name, tmp_path):
    path, _, spelled = unet_file(name, tmp_path, lambda key: 6.0)
    some = {k: v for k, v in load_file(path).items() if "attn" in k}
    save_file(some, tmp_path / "attention.safetensors")
    merged = lt.merge(
        [path, tmp_path / "attention.safetensors"], energy=0.8, output=tmp_path / "m.safetensors"
    )
    assert len({module.rank_out for module in merged.modules}) > 1
    assert not merged.notes
    written = lt.read(tmp_path / "m.safetensors")
    wanted = {full: lt.delta(written, key) for full, key in spelled.items()}
    model = tiny.make_model(name)
    assert not ratios(tiny.loaded(name, model, tmp_path / "m.safetensors"), wanted)


def test_what_diffusers_would_misread_is_told_by_what_writes_it(tmp_path):
    attention = iter(range(3, 1000))
    path, changes, spelled = unet_file(
        "sd1", tmp_path, lambda key: float(next(attention)) if "attn" in key else 6.0
    )
    output = tmp_path / "squeezed.safetensors"
    result = lt.squeeze(path, energy=1.0, output=output)
    written = lt.read(output)
    wanted = {full: lt.delta(written, key) for full, key in spelled.items()}
    wrong = ratios(tiny.loaded("sd1", tiny.make_model("sd1"), output), wanted)
    (told,) = (each for each in result.findings if each.code == "alpha-of-others")
    assert f"the alphas of {len(wrong)} of {len(changes)} modules" in told.message
    command = told.hint.partition("loratools ")[2].replace("OUTPUT", str(output)).split()
    fixed = tmp_path / command.pop()
    done = CliRunner().invoke(cli, [*command, str(fixed)], catch_exceptions=False)
    assert done.exit_code == 0
    assert not ratios(tiny.loaded("sd1", tiny.make_model("sd1"), fixed), wanted)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "lora_te2_"])
def test_a_text_encoder_gets_the_commonest_alpha(prefix, tmp_path):
    import torch
    import transformers
    from diffusers.loaders import lora_pipeline

    second = prefix == "lora_te2_"
    sort = transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=50, projection_dim=12, max_position_embeddings=10,
    )  # fmt: skip
    model, tensors, changes = sort(config), {}, {}
    generator = np.random.default_rng(0)
    linear = [(p, m) for p, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for index, (path, layer) in enumerate(linear):
        rank, alpha = 2 + index % 2, float(generator.integers(1, 9))
        full = path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"
        key = prefix + flattened(full)
        a = generator.standard_normal((rank, layer.in_features)).astype(np.float32)
        b = generator.standard_normal((layer.out_features, rank)).astype(np.float32)
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = a, b
        tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
        changes[path] = alpha / rank * (b.astype(float) @ a)
    file = tmp_path / "text.safetensors"
    save_file(tensors, file)
    kind = "StableDiffusionLoraLoaderMixin" if prefix == "lora_te_" else (
        "StableDiffusionXLLoraLoaderMixin"
    )  # fmt: skip
    loader = getattr(lora_pipeline, kind)
    state, alphas, _ = loader.lora_state_dict(
        str(tmp_path), weight_name=file.name, return_lora_metadata=True
    )
    encoder = "text_encoder_2" if second else "text_encoder"
    loader.load_lora_into_text_encoder(state, alphas, model, prefix=encoder)
    wrong = ratios(tiny._added(model), changes)
    assert wrong
    (found,) = (f for f in about(file) if f.code == "LT506")
    assert f"the alphas of {len(wrong)} of {len(changes)} modules" in found.message


def test_modules_without_a_converter_are_named(name, tmp_path):
    shapes = tiny.layers(tiny.make_model(name))
    tensors, changes = tiny.adapter(tiny.CLASSES[name][0], shapes, "kohya", ranks=(2,))
    path = tmp_path / "kohya.safetensors"
    save_file(tensors, path)
    loaded = tiny.loaded(name, tiny.make_model(name), path)
    found = [f for f in about(path) if f.code == "LT518"]
    if loaded.keys() == changes.keys():
        assert not found
        return
    (finding,) = found
    if name in SILENT:
        assert not loaded
        assert "loads nothing" in finding.message
    else:
        lost = len(changes) - len(loaded)
        assert finding.message.endswith(f"{finding.where} and {lost - 1} more")
        assert finding.where in {key.partition(".")[0] for key in load_file(path)}
