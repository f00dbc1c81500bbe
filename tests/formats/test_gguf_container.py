"""The GGUF reader: what it finds, what it refuses, and that both are quick."""

import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratools_formats import read_adapter
from loratools_formats.containers.gguf.container import read_gguf
from loratools_formats.containers.gguf.cursor import VALUE_CODES
from loratools_formats.containers.gguf.ggml_types import BY_NAME, TYPES, decode, encode
from loratools_formats.disk.errors import AdapterError, LoratoolsError

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
F32_TENSOR = 0


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, kind, value):
    return string(name) + struct.pack("<I", kind) + value


def tensor(name, sizes, kind=F32_TENSOR, offset=0):
    dims = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def build(keys=(), tensors=(), data=b"", *, version=3, counts=None, magic=b"GGUF", align=32):
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, tensor_count, key_count)
    head += b"".join(keys) + b"".join(tensors)
    return head.ljust(-(-len(head) // align) * align, b"\0") + data


ONE = tensor("t", [8])
EIGHT = bytes(32)
MALFORMED = {
    "empty": b"",
    "short": b"GGUF\3\0\0\0",
    "magic": build(magic=b"GGML"),
    "version 0": build(version=0),
    "version 1": build(version=1),
    "version 99": build(version=99),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "key count 2^63": build(counts=(0, 1 << 63)),
    "tensor count 2^63": build(counts=(1 << 63, 0)),
    "ends inside a key": build([key("a" * 20, U64, bytes(8))])[:60],
    "key is empty": build([key("", U32, bytes(4))]),
    "key is no UTF-8": build([key(b"\xff", U32, bytes(4))]),
    "key twice": build([key("a", U32, bytes(4))] * 2),
    "string of 2^63": build([string("a") + struct.pack("<IQ", STRING, 1 << 63)]),
    "string beyond the end": build([string("a") + struct.pack("<IQ", STRING, 999)]),
    "text is no UTF-8": build([key("a", STRING, string(b"\xc3\x28"))]),
    "unknown key type": build([key("a", 13, bytes(8))]),
    "truth value 2": build([key("a", BOOL, b"\2")]),
    "truth values 2": build([key("a", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\1\2")]),
    "array of 2^63": build([key("a", ARRAY, struct.pack("<IQ", U8, 1 << 63))]),
    "array of 2^61 wide": build([key("a", ARRAY, struct.pack("<IQ", U64, 1 << 61))]),
    "strings of 2^40": build([key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 40))]),
    "string in array too long": build(
        [key("a", ARRAY, struct.pack("<IQ", STRING, 1) + struct.pack("<Q", 1 << 62))], data=EIGHT
    ),
    "strings beyond the limit": build(
        [key("a", ARRAY, struct.pack("<IQ", STRING, (1 << 22) + 1))], data=bytes(8 << 22)
    ),
    "key of 1025 bytes": build([key("k" * 1025, U32, bytes(4))]),
    "nested arrays": build([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000)]),
    "alignment 0": build([key("general.alignment", U32, bytes(4))]),
    "alignment 3": build([key("general.alignment", U32, struct.pack("<I", 3))]),
    "alignment 2^31": build([key("general.alignment", U32, struct.pack("<I", 1 << 31))]),
    "alignment is text": build([key("general.alignment", STRING, string("32"))]),
    "no dimensions": build((), [tensor("t", [])], EIGHT),
    "five dimensions": build((), [tensor("t", [1] * 5)], EIGHT),
    "a million dimensions": build(
        (), [string("t") + struct.pack("<I", 1_000_000) + bytes(64)], EIGHT
    ),
    "dimension 0": build((), [tensor("t", [8, 0])]),
    "dimension 2^63": build((), [tensor("t", [1 << 63])], EIGHT),
    "product wraps": build((), [tensor("t", [1 << 32, 1 << 32, 2])], EIGHT),
    "unknown type": build((), [tensor("t", [8], 250)], EIGHT),
    "removed type": build((), [tensor("t", [32], 4)], EIGHT),
    "row is no whole block": build((), [tensor("t", [33], 8)], bytes(64)),
    "offset not aligned": build((), [tensor("t", [8], offset=4)], bytes(64)),
    "offset 2^64-32": build((), [tensor("t", [8], offset=(1 << 64) - 32)], EIGHT),
    "offset beyond the end": build((), [tensor("t", [8], offset=1 << 20)], EIGHT),
    "overlap": build((), [ONE, tensor("u", [8])], EIGHT),
    "hole": build((), [ONE, tensor("u", [8], offset=64)], bytes(128)),
    "data truncated": build((), [ONE], bytes(16)),
    "data missing": build((), [tensor("t", [1 << 40])], EIGHT),
    "bytes after the end": build((), [ONE], bytes(4096)),
    "no tensors counted": build((), [ONE], EIGHT, counts=(0, 0)),
    "name twice": build((), [ONE, tensor("t", [8], offset=32)], bytes(64)),
    "name is empty": build((), [tensor("", [8])], EIGHT),
    "name of 64 bytes": build((), [tensor("x" * 64, [8])], EIGHT),
    "name with control characters": build((), [tensor("a\x1b[31m", [8])], EIGHT),
    "tensor twice as long as the header": build((), [ONE], EIGHT, counts=(2, 0)),
}
REASONS = {
    "is an empty file": "empty",
    "truncated GGUF header": "short, ends inside a key",
    "is not a GGUF file": "magic",
    "version is not supported": "version 0, version 1, version 99",
    "is big-endian": "big-endian",
    "too many keys": "key count 2^63",
    "too many tensors": "tensor count 2^63",
    "key is empty": "key is empty",
    "string is not UTF-8": "key is no UTF-8, text is no UTF-8",
    "key a is listed twice": "key twice",
    "string is longer than the file": (
        "string of 2^63, string beyond the end, string in array too long"
    ),
    "key a has an unknown type": "unknown key type",
    "neither 0 nor 1": "truth value 2, truth values 2",
    "array of key a is longer": (
        "array of 2^63, array of 2^61 wide, strings of 2^40, strings beyond the limit"
    ),
    "string too long": "key of 1025 bytes",
    "key a holds an array of arrays": "nested arrays",
    "general.alignment is wrong": "alignment 0, alignment 3, alignment 2^31, alignment is text",
    "wrong number of dimensions": "no dimensions, five dimensions, a million dimensions",
    "tensor has a wrong shape": (
        "dimension 0, dimension 2^63, product wraps, row is no whole block"
    ),
    "tensor has an unknown type": "unknown type, removed type",
    "does not lie behind": (
        "offset not aligned, offset 2^64-32, offset beyond the end, overlap, hole"
    ),
    "lies beyond the end of the file": "data truncated, data missing",
    "bytes after the last tensor": "bytes after the end, no tensors counted",
    "tensor is listed twice": "name twice",
    "name is empty, too long or not printable": (
        "name is empty, name of 64 bytes, name with control characters, "
        "tensor twice as long as the header"
    ),
}
CASES = [(name, reason) for reason, names in REASONS.items() for name in names.split(", ")]


def test_every_malformed_file_has_its_reason():
    assert sorted(name for name, _ in CASES) == sorted(MALFORMED)


@pytest.mark.parametrize(("name", "reason"), CASES)
def test_malformed_files_are_one_kind_of_error(tmp_path, name, reason):
    path = tmp_path / "file.gguf"
    path.write_bytes(MALFORMED[name])
    start = time.monotonic()
    tracemalloc.start()
    with pytest.raises(AdapterError) as caught:
        read_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20  # the window through which it is read is half of it
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5  # a hang is what this is about


@pytest.mark.parametrize("version", [2, 3])
def test_a_sound_file_is_read(tmp_path, version):
    path = tmp_path / "file.gguf"
    keys = [
        key("general.alignment", U32, struct.pack("<I", 64)),
        key("words", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("bc")),
        key("numbers", ARRAY, struct.pack("<IQ3I", U32, 3, 7, 8, 9)),
        key("yes", BOOL, b"\1"),
        key("half", F32, struct.pack("<f", 0.5)),
        key("text", STRING, string("é")),
    ]
    tensors = [tensor("x" * 63, [4, 2]), tensor("q", [32, 2], 8, offset=64)]
    path.write_bytes(build(keys, tensors, bytes(range(64)) + bytes(68), align=64, version=version))
    file = read_gguf(path)
    assert file.get("half", "f32") == 0.5
    assert file.get("yes", "bool") is True
    assert file.get("text", "string") == "é"
    assert file.load(file.keys["words"]) == ["a", "bc"]
    assert file.load(file.keys["numbers"]) == [7, 8, 9]
    assert [(t.name, t.shape, t.kind.name) for t in file.tensors.values()] == [
        ("x" * 63, (2, 4), "F32"),
        ("q", (2, 32), "Q8_0"),
    ]
    assert bytes(file.tensors["x" * 63].raw()) == bytes(range(32))
    with pytest.raises(AdapterError, match="wrong type"):
        file.get("half", "u32")


@pytest.mark.slow
def test_a_large_vocabulary_is_stepped_over(tmp_path):
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    words = [f"word{i * 2654435761 % 99991}{'x' * (i % 40)}" for i in range(262_144)]
    writer.add_array("tokenizer.ggml.tokens", words)
    writer.add_array("tokenizer.ggml.scores", np.zeros(262_144, np.float32).tolist())
    writer.add_uint32("after", 5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = time.process_time()
    file = read_gguf(path)
    spent = time.process_time() - start
    assert file.get("after", "u32") == 5
    entry = file.keys["tokenizer.ggml.tokens"]
    assert (entry.count, entry.value) == (262_144, None)
    assert file.load(entry)[-3:] == words[-3:]
    assert spent < 1  # a twentieth of it here; gguf-py takes seconds


def test_the_tables_are_those_of_ggml():
    sizes = {t.code: (t.block, t.block_nbytes) for t in TYPES.values()}
    assert sizes == {int(t): size for t, size in gguf.GGML_QUANT_SIZES.items()}
    assert {t.name: t.code for t in TYPES.values()} == {
        t.name: int(t) for t in gguf.GGML_QUANT_SIZES
    }
    long = {"u": "UINT", "i": "INT", "f": "FLOAT"}
    for name, code in VALUE_CODES.items():
        spelled = long.get(name[0], "") + name[1:] if name[1:].isdecimal() else name.upper()
        assert gguf.GGUFValueType(code).name == spelled
    assert sorted(VALUE_CODES.values()) == sorted(int(kind) for kind in gguf.GGUFValueType)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_types_survive_decoding_and_encoding(name):
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    stored = encode(values, BY_NAME[name])
    assert len(stored) == BY_NAME[name].nbytes((4, 64))
    found = decode(stored.data, BY_NAME[name], (4, 64)).astype(np.float32)
    assert np.linalg.norm(found - values) / np.linalg.norm(values) < 0.11
    np.testing.assert_array_equal(encode(found, BY_NAME[name]), stored)


SAMPLE = build(
    [
        key("general.architecture", STRING, string("llama")),
        key("general.type", STRING, string("adapter")),
        key("adapter.type", STRING, string("lora")),
        key("adapter.lora.alpha", F32, struct.pack("<f", 8)),
        key("general.tags", ARRAY, struct.pack("<IQ", STRING, 1) + string("lora")),
    ],
    [
        tensor("blk.0.attn_q.weight.lora_a", [8, 2]),
        tensor("blk.0.attn_q.weight.lora_b", [2, 4], offset=64),
    ],
    np.ones(24, np.float32).tobytes(),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, len(SAMPLE) - 1), value=st.integers(0, 255), cut=st.booleans())
def test_a_changed_byte_gives_an_adapter_or_our_error(tmp_path, place, value, cut):
    path = tmp_path / "file.gguf"
    data = SAMPLE[:place] + bytes([value]) + SAMPLE[place + 1 :]
    path.write_bytes(data[:place] if cut else data)
    try:
        adapter = read_adapter(path, "gguf")
    except LoratoolsError:
        return
    assert sum(t.numel for t in adapter.tensors()) == 24
