"""Split GGUF models: read as one, and refused when parts are missing or of others."""

import json

import gguf
import numpy as np
import pytest

from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.gguf import GgufFuseOptions, GgufFusion
from loratools_formats import read_adapter
from loratools_formats.containers.gguf.container import read_gguf
from loratools_formats.containers.gguf.splits import read_model
from loratools_formats.disk.errors import (
    AdapterError,
    LoratoolsError,
    MissingFileError,
    OutputExistsError,
)
from loratools_formats.formats.gguf.base import read_base

rng = np.random.default_rng(0)
TENSORS = {f"blk.{i}.attn_v.weight": rng.standard_normal((16, 16)).astype("f4") for i in range(5)}


def write_model(path, tensors=TENSORS, per_part=2, **options):
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_part, **options)
    writer.add_type("model")
    writer.add_head_count(2)
    writer.add_embedding_length(16)
    writer.add_token_list(["a", "bc"])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name(f"{path.stem}-00001-of-00003.gguf")


def write_part(path, *keys, tensors=()):
    """Write one part with keys (name, value, type name)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()
    for name, value, kind in keys:
        writer.add_key_value(name, value, gguf.GGUFValueType[kind])
    for name in tensors:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_parts_are_read_as_one_model(tmp_path):
    model = read_model(write_model(tmp_path / "model.gguf"))
    assert [part.file.path.name for part in model.parts] == [
        f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)
    ]
    assert list(model.tensors) == list(TENSORS)
    for name, values in TENSORS.items():
        assert bytes(model.tensors[name].raw()) == values.tobytes()
    base = read_base(model.path)
    assert (base.sizes.heads, len(base.shapes)) == (2, 5)


def test_a_first_part_without_tensors_is_read(tmp_path):
    write_model(tmp_path / "model.gguf", per_part=3, small_first_shard=True)
    model = read_model(tmp_path / "model-00001-of-00003.gguf")
    assert [len(part.tensors) for part in model.parts] == [0, 3, 2]


@pytest.mark.parametrize(("missing", "named"), [(2, "00002"), (3, "00003")])
def test_missing_parts_are_named(tmp_path, missing, named):
    path = write_model(tmp_path / "model.gguf")
    (tmp_path / f"model-0000{missing}-of-00003.gguf").unlink()
    with pytest.raises(MissingFileError, match=f"part {missing} of 3 is missing") as caught:
        read_model(path)
    assert named in str(caught.value)


def test_another_part_than_the_first_leads_to_the_first(tmp_path):
    write_model(tmp_path / "model.gguf")
    with pytest.raises(AdapterError, match=r"not the first part.*model-00001-of-00003\.gguf"):
        read_model(tmp_path / "model-00002-of-00003.gguf")


def test_parts_under_other_names_are_refused(tmp_path):
    path = write_model(tmp_path / "model.gguf")
    for name in ("renamed.gguf", "model-00001-of-00004.gguf"):
        path = path.rename(tmp_path / name)
        with pytest.raises(AdapterError, match=r"another name.*expected NAME-00001-of-00003\.gguf"):
            read_model(path)


SECOND = [("split.no", 1, "UINT16"), ("split.count", 3, "UINT16")]
FOREIGN = {
    "another number": ([("split.no", 2, "UINT16"), SECOND[1]], ["x", "y"], "got split.no 2"),
    "another count": ([SECOND[0], ("split.count", 4, "UINT16")], ["x", "y"], "got split.count 4"),
    "no number": ([SECOND[1]], ["x", "y"], "got split.no None"),
    "number of another type": ([("split.no", 1, "INT32"), SECOND[1]], ["x"], "wrong type; got i32"),
    "keys of its own": ([*SECOND, ("general.name", "a", "STRING")], ["x", "y"], "keys of its own"),
    "too few tensors": (SECOND, ["x"], "got 4; expected split.tensors.count 5"),
    "too many tensors": (SECOND, ["x", "y", "z"], "got 6; expected split.tensors.count 5"),
    "the same tensor": (SECOND, ["x", "blk.4.attn_v.weight"], "in two parts"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_parts_that_do_not_belong_together_are_refused(tmp_path, name):
    keys, tensors, message = FOREIGN[name]
    path = write_model(tmp_path / "model.gguf")
    write_part(tmp_path / "model-00002-of-00003.gguf", *keys, tensors=tensors)
    with pytest.raises(AdapterError, match=message):
        read_model(path)


@pytest.mark.parametrize("count", [0, 513, 65535])
def test_counts_beyond_reason_are_refused(tmp_path, count):
    path = tmp_path / f"model-00001-of-{count:05d}.gguf"
    write_part(path, ("split.no", 0, "UINT16"), ("split.count", count, "UINT16"))
    with pytest.raises(AdapterError, match=r"split\.count is wrong"):
        read_model(path)


def test_a_split_model_becomes_one_file_with_its_keys(tmp_path):
    path = write_model(tmp_path / "model.gguf")
    write_adapter(tmp_path / "lora.gguf")
    given = FuseInput(read_adapter(tmp_path / "lora.gguf"), 1.0, "lora")
    fusion = GgufFusion(read_model(path), [given], GgufFuseOptions())
    result = fusion.write(tmp_path / "out.gguf")
    (finding,) = result.findings
    assert finding.message == "the 3 parts of the model became one file"
    before, after = read_gguf(path), read_gguf(tmp_path / "out.gguf")
    split = {"split.no", "split.count", "split.tensors.count"}
    assert list(after.keys) == [key for key in before.keys if key not in split]
    for key, entry in after.keys.items():
        assert after.load(entry) == before.load(before.keys[key])
    changed = {
        name for name in TENSORS if bytes(after.tensors[name].raw()) != TENSORS[name].tobytes()
    }
    assert changed == {"blk.3.attn_v.weight"}
    statement = json.loads((tmp_path / "out.gguf.provenance.json").read_text())
    inputs = statement["predicate"]["inputs"]
    assert [i["name"] for i in inputs if i["role"] == "base"] == [
        f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)
    ]


@pytest.mark.parametrize("part", [1, 2])
def test_a_part_of_the_model_is_not_replaced(tmp_path, part):
    path = write_model(tmp_path / "model.gguf")
    write_adapter(tmp_path / "lora.gguf")
    given = FuseInput(read_adapter(tmp_path / "lora.gguf"), 1.0, "lora")
    fusion = GgufFusion(read_model(path), [given], GgufFuseOptions())
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(OutputExistsError, match="one part of the model"):
        fusion.write(tmp_path / f"model-0000{part}-of-00003.gguf", overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def write_adapter(path, **options):
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.3.attn_v.weight.lora_a", np.ones((2, 16), np.float32))
    writer.add_tensor("blk.3.attn_v.weight.lora_b", np.ones((16, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_split_adapters_are_refused(tmp_path):
    write_adapter(tmp_path / "lora.gguf", split_max_tensors=1)
    with pytest.raises(LoratoolsError, match="split into several files"):
        read_adapter(tmp_path / "lora-00001-of-00002.gguf")
