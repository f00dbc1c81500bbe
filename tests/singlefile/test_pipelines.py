"""Whole pipelines: adapters of several components fused at once, as diffusers' `fuse_lora` does."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from dialect_files import KOHYA, DialectFile, save
from safetensors.numpy import load_file, save_file
from test_diffusers import COMPONENTS, UNET, UNET_XL, applied, pipelines, unet_file, xl_file  # noqa: F401

from loratools.cli import cli
from loratools.naming.tables import filled, find_table

pytestmark = pytest.mark.filterwarnings("ignore")

_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}


def run(*words):
    done = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def state(pipeline):
    """Return every tensor of a pipeline's components."""
    models = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    return {
        name: {key: tensor.numpy() for key, tensor in model.state_dict().items()}
        for name, model in models.items()
        if model is not None
    }


def expected(make, path):
    """Return the tensors of a pipeline into which diffusers has fused a file."""
    whole, changes = state(make()), applied(make, path)
    assert {name.partition(".")[0] for name in changes} == set(whole)
    for name, change in changes.items():
        component, _, module = name.partition(".")
        key = f"{module}.weight"
        whole[component][key] = whole[component][key] + change.reshape(whole[component][key].shape)
    return whole


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_allclose(found[key], tensor, rtol=0, atol=1e-6, err_msg=key)


def original(unet, table):
    """Return a UNet's tensors under the names of its original checkpoint."""
    found = {}
    for key, tensor in unet.items():
        module, _, leaf = key.rpartition(".")
        place = find_table(table).locate(module, flat=False, schemes=("diffusers",))
        assert place is not None, module
        found[f"{filled(place.row.original, place.numbers)}.{leaf}"] = tensor
    return found


def open_clip(encoder):
    """Return a CLIP text encoder as OpenCLIP has it."""
    found = {}
    for key, tensor in encoder.items():
        name = key.removeprefix("text_model.")
        module, _, leaf = name.rpartition(".")
        if name == "text_projection.weight":
            found["text_projection"] = np.ascontiguousarray(tensor.T)
        elif name == "embeddings.position_embedding.weight":
            found["positional_embedding"] = tensor
        elif name.startswith("embeddings.token_embedding"):
            found["token_embedding.weight"] = tensor
        elif name.startswith("final_layer_norm"):
            found[f"ln_final.{leaf}"] = tensor
        elif "self_attn.q_proj" in name:
            parts = [encoder[key.replace("q_proj", f"{c}_proj")] for c in "qkv"]
            layer = module.split(".")[2]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = np.concatenate(parts)
        elif "_proj" not in module or "out_proj" in module:
            _, _, layer, rest = module.split(".", 3)
            found[f"transformer.resblocks.{layer}.{_CLIP_LAYER[rest]}.{leaf}"] = tensor
    return found


def below(prefix, tensors):
    return {f"{prefix}{key}": np.ascontiguousarray(tensor) for key, tensor in tensors.items()}


def outer(encoder):
    """Return a text encoder with the outer module that transformers 5 dropped."""
    return {
        k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v
        for k, v in encoder.items()
    }


def all_in_one(kind, whole):
    """Return a pipeline's tensors as Stability AI's and ComfyUI's checkpoints have them."""
    table = {"sd1": "sd1", "sd2": "sd1"}.get(kind, "sdxl")
    found = below("model.diffusion_model.", original(whole["unet"], table))
    first = outer(whole["text_encoder"])
    if kind == "sd1":
        found |= below("cond_stage_model.transformer.", first)
    elif kind == "sd2":
        found |= below("cond_stage_model.model.", open_clip(first))
    else:
        found |= below("conditioner.embedders.0.transformer.", first)
        found |= below("conditioner.embedders.1.model.", open_clip(outer(whole["text_encoder_2"])))
    return found | {"first_stage_model.decoder.conv_in.weight": np.ones((2, 2), np.float32)}


@pytest.fixture
def make(pipelines, request):  # noqa: F811
    return pipelines[{"sdxl": "xl"}.get(request.param, "unet")], request.param


def lora(kind, tmp_path):
    return save(xl_file(2.0) if kind == "sdxl" else sd_file(), tmp_path / "lora.safetensors")


def sd_file():
    file = unet_file(2.0)
    for name, out, in_ in (
        ("self_attn_q_proj", 12, 12),
        ("self_attn_v_proj", 12, 12),
        ("self_attn_out_proj", 12, 12),
        ("mlp_fc1", 16, 12),
    ):
        file.pair(f"lora_te_text_model_encoder_layers_0_{name}", out, in_, 4, KOHYA, alpha=2.0)
    for name, tensor in file.tensors.items():
        file.tensors[name] = tensor.astype(np.float32) * (0.05 if tensor.ndim else 1.0)
    return file


@pytest.mark.parametrize("make", ["sd1", "sdxl"], indirect=True)
def test_all_components_of_a_pipelines_folder(make, tmp_path):
    pipeline, kind = make
    path = lora(kind, tmp_path)
    pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe/vae").mkdir()
    (tmp_path / "pipe/vae/diffusion_pytorch_model.safetensors").write_bytes(b"as it is")
    run("fuse", tmp_path / "pipe", path, "-o", tmp_path / "fused")
    for component, wanted in expected(pipeline, path).items():
        (weights,) = (tmp_path / "fused" / component).glob("*.safetensors")
        found = load_file(weights)
        assert_same(found, {key: tensor for key, tensor in wanted.items() if key in found})
        assert len(found) >= len(wanted) - 1  # position_ids
    assert (tmp_path / "fused/vae/diffusion_pytorch_model.safetensors").read_bytes() == b"as it is"
    index = json.loads((tmp_path / "fused/model_index.json").read_text())
    assert index == json.loads((tmp_path / "pipe/model_index.json").read_text())


@pytest.mark.parametrize("make", ["sd1", "sd2", "sdxl"], indirect=True)
@pytest.mark.parametrize("ending", ["kohya", "diffusers", "comfyui"])
def test_all_components_of_one_file(make, tmp_path, ending):
    pipeline, kind = make
    path = lora(kind, tmp_path)
    base = all_in_one(kind, state(pipeline()))
    save_file(base, tmp_path / "base.safetensors")
    wanted = all_in_one(kind, expected(pipeline, path))
    source = path
    if ending != "kohya":
        source = tmp_path / f"{ending}.safetensors"
        run("convert", path, "-o", source, "--to", ending)
    run("fuse", tmp_path / "base.safetensors", source, "-o", tmp_path / "fused.safetensors")
    assert_same(load_file(tmp_path / "fused.safetensors"), wanted)


def test_diffusers_reads_the_file_that_these_tests_call_all_in_one(pipelines):  # noqa: F811
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    pipeline = pipelines["xl"]()
    whole = state(pipeline)
    base = {k: torch.from_numpy(v) for k, v in all_in_one("sdxl", whole).items()}
    config = {**pipeline.unet.config, "use_linear_projection": True}
    assert_same(
        {k: v.numpy() for k, v in convert_ldm_unet_checkpoint(base, config).items()}, whole["unet"]
    )


def test_a_component_that_the_base_lacks_is_left_out_as_the_hint_says(pipelines, tmp_path):  # noqa: F811
    path = lora("sdxl", tmp_path)
    whole = state(pipelines["xl"]())
    save_file(original(whole["unet"], "sdxl"), tmp_path / "unet.safetensors")
    done = CliRunner().invoke(
        cli, ["fuse", str(tmp_path / "unet.safetensors"), str(path), "-o", str(tmp_path / "f")]
    )
    assert done.exit_code != 0
    hint = done.exception.hint
    (pattern,) = shlex.split(hint.partition("`drop`: ")[2])
    assert pattern, hint
    run("fuse", tmp_path / "unet.safetensors", path, "-o", tmp_path / "f", "--drop", pattern)


def test_an_adapter_of_a_component_that_the_pipeline_lacks(pipelines, tmp_path):  # noqa: F811
    pipelines["unet"]().save_pretrained(tmp_path / "pipe")
    file = DialectFile("kohya", {"kohya"})
    file.pair("lora_unet_down_blocks_0_attentions_0_proj_in", 8, 8, 2, KOHYA, alpha=1.0)
    file.pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 16, 12, 2, KOHYA, alpha=1.0)
    path = save(file, tmp_path / "a.safetensors")
    done = CliRunner().invoke(
        cli, ["fuse", str(tmp_path / "pipe"), str(path), "-o", str(tmp_path / "f")]
    )
    assert "belong to a component that the base does not have" in str(done.exception)
    run("fuse", tmp_path / "pipe", path, "-o", tmp_path / "f", "--drop", "^lora_te2_")


@pytest.fixture
def fused(pipelines, request, tmp_path):  # noqa: F811
    """Return a pipeline's folder, an adapter of all its components, and the fused pipeline."""
    kind = request.param
    path = lora(kind, tmp_path)
    pipelines["xl" if kind == "sdxl" else "unet"]().save_pretrained(tmp_path / "pipe")
    run("fuse", tmp_path / "pipe", path, "-o", tmp_path / "fused")
    return tmp_path / "pipe", path, tmp_path / "fused"


def weights(pipe):
    """Return every tensor of a pipeline's folder."""
    return {
        f"{file.parent.name}.{key}": tensor
        for file in pipe.glob("*/*.safetensors")
        for key, tensor in load_file(file).items()
    }


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_allclose(found[key], tensor, rtol=0, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("fused", ["sd1", "sdxl"], indirect=True)
@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_extract_between_whole_pipelines(fused, tmp_path, to):
    pipe, _, tuned = fused
    out = tmp_path / "x.safetensors"
    run("extract", pipe, tuned, "-o", out, "--to", to, "--rank", "8")
    run("fuse", pipe, out, "-o", tmp_path / "again")
    assert_close(weights(tmp_path / "again"), weights(tuned))
    done = CliRunner().invoke(cli, ["extract", str(pipe), str(tuned), "-o", str(tmp_path / "p")])
    assert done.exit_code != 0


@pytest.mark.parametrize("fused", ["sdxl"], indirect=True)
def test_extract_of_a_pipeline_to_peft_says_what_to_pass(fused, tmp_path):
    pipe, _, tuned = fused
    words = ["extract", str(pipe), str(tuned), "--rank", "8", "-o", str(tmp_path / "p.safetensors")]
    done = CliRunner().invoke(cli, words)
    assert "a PEFT folder is of one model" in str(done.exception)
    assert 'Pass `to="diffusers"`' in done.exception.hint
    run(*words, "--to", "diffusers")


@pytest.mark.parametrize("fused", ["sd1", "sdxl"], indirect=True)
def test_verify_whole_pipelines(fused, tmp_path):
    pipe, path, tuned = fused
    assert "adapter: contained" in run("verify", tuned, "--base", pipe, "--adapter", path)
    words = ["verify", str(pipe), "--base", str(pipe), "--adapter", str(path)]
    assert "adapter: not contained" in CliRunner().invoke(cli, words).output
    # What no adapter changes is compared, too.
    other = next((tuned / "text_encoder").glob("*.safetensors"))
    tensors = load_file(other)
    changed = next(key for key in tensors if "fc2.weight" in key)
    save_file(tensors | {changed: tensors[changed] + 1}, other)
    words[1] = str(tuned)
    told = CliRunner().invoke(cli, words).output
    assert "adapter: not contained" in told
    assert f"text_encoder/{changed}" in told


@pytest.mark.parametrize("fused", ["sd1", "sdxl"], indirect=True)
def test_commands_that_read_a_base_take_a_whole_pipeline(fused, tmp_path):
    """A DoRA is made with the pipeline, and plain LoRAs of it, which make the same pipeline."""
    pipe, path, tuned = fused
    dora, plain, merged = (tmp_path / f"{name}.safetensors" for name in ("dora", "plain", "merged"))
    run("to-dora", path, "--base", pipe, "-o", dora)
    run("to-lora", dora, "--base", pipe, "-o", plain, "--rank", "32")
    run("merge", dora, "--base", pipe, "-o", merged, "--rank", "32")
    for number, one in enumerate((dora, plain, merged)):
        run("fuse", pipe, one, "-o", tmp_path / f"fused-{number}")
        assert_close(weights(tmp_path / f"fused-{number}"), weights(tuned))
    found = json.loads(run("spectrum", path, "--base", pipe, "--json"))
    assert all(module["base"]["relative_change"] > 0 for module in found["modules"])
    run("compare", path, dora, "--base", pipe)
    run("convert", path, "--base", pipe, "--to", "diffusers", "-o", tmp_path / "d.safetensors")
    run("fuse", pipe, tmp_path / "d.safetensors", "-o", tmp_path / "of-diffusers")
    assert_close(weights(tmp_path / "of-diffusers"), weights(tuned))


@pytest.mark.parametrize("fused", ["sd1", "sdxl"], indirect=True)
@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_extract_of_each_component_alone(fused, tmp_path, to):
    """Together the files of all components make the fused pipeline."""
    pipe, _, tuned = fused
    made = []
    for folder in sorted(path.parent for path in pipe.glob("*/*.safetensors")):
        out = tmp_path / f"{folder.name}.safetensors"
        words = ("extract", folder, tuned / folder.name, "-o", out, "--to", to, "--rank", "8")
        run(*words)
        made.append(out)
    run("fuse", pipe, *made, "-o", tmp_path / "again")
    assert_close(weights(tmp_path / "again"), weights(tuned))


@pytest.mark.parametrize("fused", ["sd1"], indirect=True)
def test_a_text_encoder_of_no_pipeline_is_extracted_as_the_hint_says(fused, tmp_path, monkeypatch):
    """Its kohya name depends on the architecture, which it does not tell."""
    pipe, _, tuned = fused
    monkeypatch.chdir(tmp_path)
    for name, source in (("before", pipe), ("after", tuned)):
        (source / "text_encoder").rename(tmp_path / name)
    words = ["extract", "before", "after", "--rank", "8", "-o", "x.safetensors", "--to"]
    done = CliRunner().invoke(cli, [*words, "kohya"])
    assert "the names fit several architectures" in str(done.exception)
    assert 'Extract it with `to="diffusers"`' in done.exception.hint
    run(*words, "diffusers")
    command = shlex.split(done.exception.hint.partition("loratools ")[2])
    given = {"EXTRACTED": "x.safetensors", "TABLE": "sd1", "OUT.safetensors": "out.safetensors"}
    run(*(given.get(word, word) for word in command))
    assert all(key.startswith("lora_te_") for key in load_file("out.safetensors"))
