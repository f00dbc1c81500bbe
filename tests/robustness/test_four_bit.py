"""Four-bit checkpoints from strangers: one line, exit code 2, nothing written."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama" / "model"
FILE = "model.safetensors"
KEY = "model.layers.0.mlp.up_proj.weight"
STATE = f"{KEY}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    """A small four-bit checkpoint; not to be changed."""
    from loratools.operations.quantize import QuantizeOptions, quantize
    from loratools_formats.checkpoints.checkpoint import read_checkpoint

    folder = tmp_path_factory.mktemp("four-bit") / "model"
    options = QuantizeOptions(skip=(r"layers\.[123]", "self_attn"))
    base = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(EXAMPLE, base)
    tensors = {k: v for k, v in _raw(base / FILE).items() if "layers.0" in k}
    save_file(tensors, base / FILE)
    quantize(read_checkpoint(base), folder, options)
    return folder


def _raw(path):
    from loratools_formats.containers.safetensors_read import read_safetensors

    return {key: np.array(ref.load()) for key, ref in read_safetensors(path).tensors.items()}


def text(value):
    return np.frombuffer(value if isinstance(value, bytes) else value.encode(), np.uint8)


def state(tensors, **values):
    found = json.loads(bytes(tensors[STATE]))
    return text(json.dumps({k: v for k, v in (found | values).items() if v is not None}))


DEFECTS = {
    "no absmax": (lambda t: t.pop(f"{KEY}.absmax"), "missing", f"{KEY}.absmax"),
    "no codebook": (lambda t: t.pop(f"{KEY}.quant_map"), "missing", f"{KEY}.quant_map"),
    "no codes": (lambda t: t.pop(KEY), "missing", KEY),
    "no state": (lambda t: t.pop(STATE), "no quant_state", KEY),
    "no nested": (
        lambda t: [t.pop(f"{KEY}.nested_{n}") for n in ("absmax", "quant_map")],
        "missing",
        f"{KEY}.nested_absmax",
    ),
    "half nested": (lambda t: t.pop(f"{KEY}.nested_quant_map"), "missing", "nested_quant_map"),
    "short absmax": (
        lambda t: t.update({f"{KEY}.absmax": t[f"{KEY}.absmax"][:-1]}),
        "wrong shape",
        f"{KEY}.absmax",
    ),
    "square absmax": (
        lambda t: t.update({f"{KEY}.absmax": t[f"{KEY}.absmax"].reshape(2, -1)}),
        "saved after running on a CPU",
        f"{KEY}.absmax",
    ),
    "float absmax": (
        lambda t: t.update({f"{KEY}.absmax": t[f"{KEY}.absmax"].astype(np.float32)}),
        "wrong type",
        "expected U8",
    ),
    "short codes": (lambda t: t.update({KEY: t[KEY][:-1]}), "packed codes", KEY),
    "short nested": (
        lambda t: t.update({f"{KEY}.nested_absmax": np.ones(7, np.float32)}),
        "wrong shape",
        "nested_absmax",
    ),
    "NaN nested": (
        lambda t: t.update({f"{KEY}.nested_absmax": t[f"{KEY}.nested_absmax"] * np.float32("nan")}),
        "NaN or infinite",
        "nested_absmax",
    ),
    "another codebook": (
        lambda t: t.update({f"{KEY}.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}),
        "codebook",
        f"{KEY}.quant_map",
    ),
    "no JSON": (lambda t: t.update({STATE: text('{"quant_type"')}), "not sound JSON", STATE),
    "no UTF-8": (lambda t: t.update({STATE: text(b"\xff{}")}), "not UTF-8", STATE),
    "twice a key": (
        lambda t: t.update({STATE: text('{"blocksize": 64, "blocksize": 32}')}),
        "duplicate key",
        STATE,
    ),
    "a list": (lambda t: t.update({STATE: text("[1]")}), "not a JSON object", STATE),
    "a long text": (lambda t: t.update({STATE: text(" " * 5000)}), "not a short text", STATE),
    "blocksize 48": (lambda t: t.update({STATE: state(t, blocksize=48)}), "blocksize", STATE),
    "blocksize true": (lambda t: t.update({STATE: state(t, blocksize=True)}), "blocksize", STATE),
    "no dtype": (lambda t: t.update({STATE: state(t, dtype=None)}), "dtype", STATE),
    "dtype list": (lambda t: t.update({STATE: state(t, dtype=[])}), "dtype", STATE),
    "huge shape": (
        lambda t: t.update({STATE: state(t, shape=[1 << 40, 1 << 40])}),
        "packed codes",
        KEY,
    ),
    "negative shape": (lambda t: t.update({STATE: state(t, shape=[-352, -128])}), "shape", STATE),
    "other type inside": (
        lambda t: t.update({STATE: state(t, quant_type="fp4")}),
        "quant_type",
        STATE,
    ),
    "unknown type": (
        lambda t: t.update({STATE.replace("nf4", "int4"): t.pop(STATE)}),
        "unknown quantisation type",
        "int4",
    ),
    "two types": (
        lambda t: t.update({STATE.replace("nf4", "fp4"): state(t, quant_type="fp4")}),
        "two ways",
        KEY,
    ),
    "nested groups": (lambda t: t.update({STATE: state(t, nested_blocksize=128)}), "256", STATE),
    "nested in int8": (
        lambda t: t.update({STATE: state(t, nested_dtype="int8")}),
        "nested_dtype",
        STATE,
    ),
    "offset text": (lambda t: t.update({STATE: state(t, nested_offset="0")}), "offset", STATE),
    "huge offset": (
        lambda t: t.update(
            {STATE: text(re.sub(rb'(offset": )[^}]+', rb"\g<1>1e999", bytes(state(t))))}
        ),
        "too large for float64",
        STATE,
    ),
}


@pytest.fixture
def refused(loratools, tmp_path):
    """Return a function that runs a command on a checkpoint and checks that it refuses it."""

    def check(command, folder, *words):
        before = sorted(tmp_path.rglob("*"))
        run = loratools(command, folder, "-o", tmp_path / "out")
        (line,) = run.remarks
        assert line.startswith("error: ")
        assert line.isprintable()
        assert "--traceback" not in line, "an exception that is not ours"
        for word in words:
            assert word in line
        assert (run.code, run.out) == (2, "")
        assert sorted(tmp_path.rglob("*")) == before
        assert run.seconds < 15
        assert run.peak_bytes < 300_000_000

    return check


@pytest.mark.parametrize("defect", DEFECTS)
def test_malformed_weights(defect, four_bit, refused, tmp_path):
    spoil, *words = DEFECTS[defect]
    folder = tmp_path / "spoiled"
    shutil.copytree(four_bit, folder)
    tensors = _raw(folder / FILE)
    spoil(tensors)
    save_file(tensors, folder / FILE)
    refused("dequantize", folder, *words)


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_truncated_file(command, four_bit, refused, tmp_path):
    folder = tmp_path / "spoiled"
    shutil.copytree(four_bit, folder)
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: len(data) // 2])
    refused(command, folder, "truncated")


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_missing_input(command, refused, tmp_path):
    refused(command, tmp_path / "nothing", "no such file or folder")


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_a_gguf_model_is_named_as_one(command, refused, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(command, tmp_path / "model.gguf", "is a GGUF file", "safetensors")


def test_codes_stored_as_floats_are_read(four_bit, loratools, tmp_path):
    """As `bnb_4bit_quant_storage` makes them for FSDP."""
    folder = tmp_path / "viewed"
    shutil.copytree(four_bit, folder)
    tensors = _raw(folder / FILE)
    tensors[KEY] = tensors[KEY].reshape(-1).view(np.float32).reshape(-1, 1)
    save_file(tensors, folder / FILE)
    for source, out in ((four_bit, "one"), (folder, "two")):
        assert loratools("dequantize", source, "-o", tmp_path / out).code == 0
    one, two = (_raw(tmp_path / name / FILE) for name in ("one", "two"))
    assert all(np.array_equal(one[key], two[key]) for key in one.keys() | two.keys())


def test_memory_is_that_of_a_few_pieces(loratools, tmp_path):
    """A weight of 128 MB in float32 needs little more than start-up does."""
    folder = tmp_path / "large"
    folder.mkdir()
    values = np.random.default_rng(0).standard_normal((8192, 4096), dtype=np.float32)
    save_file({"model.up.weight": values}, folder / FILE)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    quantized = loratools("quantize", folder, "-o", tmp_path / "four")
    plain = loratools("dequantize", tmp_path / "four", "-o", tmp_path / "plain")
    for run in (quantized, plain):
        assert run.code == 0
        assert run.peak_bytes < 90_000_000


def test_streams_and_json(four_bit, loratools, tmp_path):
    run = loratools("quantize", EXAMPLE, "--dry-run", "--json")
    report = json.loads(run.out)
    assert report["schema"] == 1
    assert report["operation"] == "quantize"
    assert len(report["tensors"]) == 28
    assert run.err == "note: dry run, nothing was written\n"
    run = loratools("dequantize", four_bit, "-o", tmp_path / "plain", "--json", "-q")
    assert json.loads(run.out)["tensors"][0]["quant_type"] == "nf4"
    assert run.err == ""
    run = loratools("dequantize", four_bit, "-o", tmp_path / "plain")
    assert (run.code, run.out) == (2, "")
    assert "--overwrite" in run.err
    run = loratools("quantize", EXAMPLE, "-o", EXAMPLE / "inside")
    assert "inside the input" in run.err


def test_options_out_of_range(loratools, tmp_path):
    for option, word in (
        ("--blocksize=48", "no such blocksize"),
        ("--quant-type=int4", "int4"),
        ("--skip=(", "regular expression"),
        ("--max-shard-size=0", "size"),
        ("--workers=0", "workers"),
    ):
        run = loratools("quantize", EXAMPLE, "-o", tmp_path / "out", option)
        assert run.code == 2
        assert word in run.err
    assert not (tmp_path / "out").exists()
