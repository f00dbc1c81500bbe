"""Converting between formats: what is written, what is refused, and the error that is printed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rounding import assert_equal_products
from safetensors.numpy import load_file
from whole_delta import effective_delta

from loratools.cli import cli
from loratools.operations.convert.operation import prepare, write
from loratools_formats import (
    Context,
    Format,
    Loss,
    format_for_output,
    read_adapter,
    registered_formats,
)
from loratools_formats.disk.errors import OptionError, UnknownFormatError, UnsupportedError


@pytest.fixture
def plugins(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "plugin"))
    registered_formats.cache_clear()
    yield
    registered_formats.cache_clear()


def deltas(adapter):
    return {
        name: effective_delta(name, delta, delta.shape) for name, delta in adapter.modules.items()
    }


def run(*arguments):
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)], catch_exceptions=False)


MODULES = {"layers.0.q": (24, 20, 8), "layers.1.q": (24, 20, 4), "layers.1.v.proj": (6, 20, 8)}


@pytest.mark.usefixtures("plugins")
def test_ranks_and_scales_survive_a_format_without_configuration(make_folder, tmp_path):
    folder = make_folder(
        modules=MODULES,
        use_rslora=True,
        rank_pattern={"layers.1.q": 4},
        alpha_pattern={"proj": 5.5},
        target_modules=["q", "proj"],
        base_model_name_or_path="somebody/model",
    )
    assert run(folder, tmp_path / "out.demo.json").exit_code == 0
    assert run(tmp_path / "out.demo.json", tmp_path / "back").exit_code == 0
    before, after = deltas(read_adapter(folder)), deltas(read_adapter(tmp_path / "back"))
    assert set(before) == set(after) == set(MODULES)
    for name, delta in before.items():
        assert_equal_products(after[name], delta, 8)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(MODULES)
    assert config["use_rslora"] is False


@pytest.mark.usefixtures("plugins")
def test_losses_are_refused_and_left_out_when_allowed(make_folder, tmp_path, monkeypatch):
    import loratools_demo_plugin

    folder = make_folder()
    monkeypatch.setattr(
        loratools_demo_plugin.Demo,
        "losses",
        lambda self, adapter: [Loss("layers.0.q", "has no place in a test")],
    )
    with pytest.raises(UnsupportedError, match=r"layers\.0\.q has no place"):
        prepare(read_adapter(folder), "demo")
    conversion = prepare(read_adapter(folder), "demo", allow_lossy=True)
    assert [loss.name for loss in conversion.losses] == ["layers.0.q"]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_error_printed_is_that_of_the_file(make_folder, tmp_path, dtype):
    folder = make_folder(modules=MODULES, dtype="f32", rank_pattern={"layers.1.q": 4})
    conversion = prepare(read_adapter(folder), "peft", Context(dtype=dtype))
    check = write(conversion, tmp_path / "out")
    before, after = deltas(read_adapter(folder)), deltas(read_adapter(tmp_path / "out"))
    errors = {n: np.linalg.norm(before[n] - after[n]) / np.linalg.norm(before[n]) for n in before}
    assert {m.name: m.relative_error for m in check.modules} == pytest.approx(errors, rel=1e-6)
    assert min(errors.values()) > 1e-5
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype.name for tensor in stored.values()} == {
        {"f16": "float16", "bf16": "bfloat16"}[dtype]
    }


def test_error_above_the_limit_leaves_no_output(make_folder, tmp_path):
    folder = make_folder(dtype="f32")
    arguments = [folder, tmp_path / "out", "--outtype", "bf16", "--max-error", "1e-6"]
    command = [sys.executable, "-c", "from loratools.cli import main; main()", "convert"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing was written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_dry_run_writes_nothing(make_folder, tmp_path):
    done = run(make_folder(), tmp_path / "out", "--dry-run", "--json")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert (result["from"], result["to"], result["relative_error"]) == ("peft", "peft", None)
    assert not (tmp_path / "out").exists()


def test_unknown_types_and_names_are_refused(make_folder, tmp_path):
    adapter = read_adapter(make_folder())
    with pytest.raises(OptionError, match="f32 or f16 or bf16"):
        prepare(adapter, "peft", Context(dtype="q4_0"))
    with pytest.raises(UnknownFormatError, match="Name one with `to`"):
        format_for_output("adapter.xyz")
    assert isinstance(format_for_output("adapter"), Format)


@pytest.mark.usefixtures("plugins")
def test_a_base_that_is_not_needed_is_a_note(make_folder, tmp_path):
    conversion = prepare(read_adapter(make_folder()), "demo", Context(base=tmp_path / "missing"))
    assert "base-unused" in [finding.code for finding in conversion.findings]


@pytest.mark.parametrize(
    ("init", "target"),
    [("pissa", "demo"), ({"alora_invocation_tokens": [1]}, "demo")],
    ids=["pissa", "alora"],
)
@pytest.mark.usefixtures("plugins")
def test_adapters_without_a_true_delta_are_refused(make_folder, init, target):
    config = init if isinstance(init, dict) else {"init_lora_weights": init}
    with pytest.raises(UnsupportedError, match="needs the true weight change"):
        prepare(read_adapter(make_folder(**config)), target)
