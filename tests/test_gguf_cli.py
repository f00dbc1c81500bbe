"""The commands on GGUF files: info, squeeze, merge, convert and fuse, from the shell."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loratools_formats import read_adapter

EXAMPLES = Path(__file__).parent.parent / "examples" / "tiny-llama"


def loratools(*arguments):
    command = [sys.executable, "-c", "from loratools.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def succeeded(*arguments):
    done = loratools(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with two GGUF adapters for the bundled tiny Llama."""
    folder = tmp_path_factory.mktemp("gguf")
    for name in ("lora", "rslora"):
        out = folder / f"{name}.gguf"
        succeeded("convert", EXAMPLES / name, out, "--base", EXAMPLES / "model")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a GGUF model that the bundled adapters fit, of random values."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    adapter = read_adapter(EXAMPLES / "lora")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_embedding_length(128)
    rng = np.random.default_rng(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for path_, delta in adapter.modules.items():
        values = 0.05 * rng.standard_normal(delta.shape).astype(np.float32)
        writer.add_tensor(f"{names.get_name(path_)}.weight", values)
    writer.add_tensor("output_norm.weight", np.ones(128, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_info_shows_a_gguf_adapter(files):
    shown = json.loads(succeeded("info", files / "lora.gguf", "--json"))
    assert (shown["format"], shown["base_model"]) == ("gguf", "loratools/tiny-llama")
    assert {(m["rank"], m["alpha"], m["scale"]) for m in shown["modules"]} == {(32, 64.0, 2.0)}
    assert shown["modules"][0]["name"] == "blk.0.attn_k"


@pytest.mark.slow
def test_squeeze_gives_a_gguf_adapter_of_the_same_error(files, tmp_path):
    for source, out in ((files / "lora.gguf", "a.gguf"), (EXAMPLES / "lora", "a")):
        succeeded("squeeze", source, "-o", tmp_path / out, "--rank", 8)
    errors = [
        json.loads(succeeded("squeeze", source, "--rank", 8, "--dry-run", "--json"))
        for source in (files / "lora.gguf", EXAMPLES / "lora")
    ]
    ours, wanted = (e["relative_error"] for e in errors)
    assert ours == pytest.approx(wanted, rel=1e-4)
    assert {d.rank for d in read_adapter(tmp_path / "a.gguf").modules.values()} == {8}


@pytest.mark.slow
def test_merge_writes_its_recipe_beside_the_file_and_can_repeat_it(files, tmp_path):
    for name in ("lora.gguf", "rslora.gguf"):
        shutil.copy(files / name, tmp_path / name)
    given = [f"{tmp_path / 'lora.gguf'}:0.7", f"{tmp_path / 'rslora.gguf'}:0.3"]
    succeeded("merge", *given, "-o", tmp_path / "both.gguf", "--rank", 12)
    recipe = tmp_path / "both.gguf.recipe.yaml"
    succeeded("merge", "--recipe", recipe, "-o", tmp_path / "again.gguf")
    assert (tmp_path / "both.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


@pytest.mark.slow
def test_what_the_first_format_cannot_hold_has_two_ways_out(files, tmp_path):
    """The hint was to convert it, which failed as the merge did."""
    saved = shutil.copytree(EXAMPLES / "lora", tmp_path / "saved")
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    norm = {"base_model.model.model.norm.weight": np.full(128, 1.5, np.float32)}
    save_file(load_file(weights) | norm, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["norm"]}))
    base = ("--base", EXAMPLES / "model", "-o", tmp_path / "both.gguf")
    refused = loratools("merge", files / "lora.gguf", saved, *base)
    assert refused.returncode == 2
    assert "name this adapter first, and all become peft" in refused.stderr
    command = refused.stderr.partition("convert it first: loratools ")[2].strip()
    out = command.replace("BASE", str(EXAMPLES / "model")).replace(
        "-o converted.gguf", f"-o {tmp_path / 'c.gguf'}"
    )
    succeeded(*out.split())
    succeeded("merge", files / "lora.gguf", tmp_path / "c.gguf", *base)
    succeeded("merge", saved, files / "lora.gguf", *base[:2], "-o", tmp_path / "both")
    assert "norm" in str(list(read_adapter(tmp_path / "both").replacements))


@pytest.mark.slow
def test_fuse_reports_and_names_what_it_writes(model, files, tmp_path):
    preview = json.loads(
        succeeded("fuse", model, files / "lora.gguf", "--dry-run", "--json", "--outtype", "q8_0")
    )
    out = tmp_path / "out.gguf"
    result = json.loads(
        succeeded("fuse", model, files / "lora.gguf", "-o", out, "--json", "--outtype", "q8_0")
    )
    assert preview["bytes_out"] == result["bytes_out"] == out.stat().st_size
    assert {t["dtype"] for t in preview["tensors"]} == {t["dtype"] for t in result["tensors"]}
    assert (len(result["tensors"]), result["copied"]) == (28, 1)
    assert 0.99 < result["surviving"] < 1.01
    shown = succeeded("fuse", model, EXAMPLES / "lora", "-o", tmp_path / "two.gguf")
    assert "lost to rounding: 0.00%" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--base-mode", "dequant"], ["--requantize"], ["--max-shard-size", "1GB"]]
)
def test_options_for_checkpoints_are_refused(model, files, options):
    done = loratools("fuse", model, files / "lora.gguf", "--dry-run", *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has no meaning for a GGUF model" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fallback", "f16"], "--fallback has no meaning for a safetensors checkpoint"),
        (["--dtype", "q8_0"], "no such type; got q8_0; expected f32 or f16 or bf16"),
    ],
)
def test_options_for_gguf_are_refused(options, message):
    done = loratools("fuse", EXAMPLES / "model", EXAMPLES / "lora", "--dry-run", *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_model_is_no_adapter(model):
    done = loratools("squeeze", model, "--rank", "2", "--dry-run")
    assert done.returncode == 2
    assert "not a LoRA adapter" in done.stderr
    assert f"or: loratools fuse {model} ADAPTER -o fused.gguf" in done.stderr


def test_info_tells_what_a_model_is(model):
    done = loratools("info", model)
    assert done.returncode == 0
    assert "model       llama" in done.stdout


def test_an_existing_output_is_kept(files, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    arguments = ["convert", EXAMPLES / "lora", out, "--base", EXAMPLES / "model"]
    assert loratools(*arguments).returncode == 2
    assert out.read_text() == "mine"
    assert loratools(*arguments, "--overwrite").returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out.gguf", "out.gguf.provenance.json"}


def test_factors_are_stored_in_another_type_without_a_base(files, tmp_path):
    out = tmp_path / "narrow.gguf"
    shown = succeeded("convert", files / "lora.gguf", out, "--outtype", "q8_0", "--json")
    result = json.loads(shown)
    assert (result["from"], result["to"]) == ("gguf", "gguf")
    assert 1e-4 < result["relative_error"] < 0.02
    assert result["bytes_out"] == out.stat().st_size < 0.3 * (files / "lora.gguf").stat().st_size
    done = loratools("convert", files / "lora.gguf", out, "--base", EXAMPLES / "model")
    assert done.returncode == 2
