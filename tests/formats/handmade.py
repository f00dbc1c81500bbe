"""Safetensors files put together by hand, and a table of those with one defect each."""

import json
import struct

import numpy as np

A, B = (f"base_model.model.layers.0.q.lora_{letter}.weight" for letter in "AB")


def entry(dtype, shape, begin, end):
    """Return the header entry of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def container(header, data=b"", *, length=None):
    """Return a file: a header (a dict, or its exact text) with its length before it, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


SOUND = {A: entry("F32", [8, 20], 0, 640), B: entry("F32", [24, 8], 640, 1408)}
VALUES = np.linspace(-1, 1, 352, dtype="f4").tobytes()


def with_entry(**changes):
    """Return a container whose second entry differs in some fields."""
    return container(SOUND | {B: SOUND[B] | changes}, VALUES)


def with_text(old, new):
    """Return a sound container with one replacement in the text of its header."""
    text = json.dumps(SOUND).encode()
    assert old in text
    return container(text.replace(old, new, 1), VALUES)


def one_more(name=b'"x"', value=b'{"dtype":"U8","shape":[0],"data_offsets":[1408,1408]}'):
    """Return a sound container with a further, harmless member at the header's end."""
    return with_text(b"]}}", b"]}," + name + b":" + value + b"}")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Not found</title></head></html>\n"
DEEP = b"[" * 100_000

# Name of the defect: the file, and a word of the error.
DEFECTS = {
    "empty": (b"", "is an empty file"),
    "seven bytes": (VALUES[:7], "7 bytes"),
    "LFS pointer": (LFS_POINTER, "git lfs pull"),
    "HTML page": (HTML, "is a web page"),
    "JSON page": (b'{"error": "Repository not found"}', "error"),
    "length 2^63": (container(SOUND, VALUES, length=1 << 63), "header length"),
    "length 2^64-1": (container(SOUND, VALUES, length=(1 << 64) - 1), "header length"),
    "length 99 MB in a short file": (
        container(SOUND, VALUES, length=99_000_000),
        "ends within its header",
    ),
    "space before the brace": (container(b" " + json.dumps(SOUND).encode(), VALUES), "object"),
    "list": (container(b"[]      "), "object"),
    "not UTF-8": (one_more(b'"\xff"'), "UTF-8"),
    "lone surrogate": (one_more(rb'"\ud800"'), "surrogate"),
    "byte order mark": (container(b"\xef\xbb\xbf" + json.dumps(SOUND).encode(), VALUES), "object"),
    "same tensor twice": (with_text(b"lora_B", b"lora_A"), "duplicate"),
    "same tensor twice, escaped": (with_text(b"lora_B", rb"lora_\u0041"), "duplicate"),
    "same field twice": (with_text(b'"dtype"', b'"dtype": "F32", "dtype"'), "duplicate"),
    "same metadata twice": (one_more(b'"__metadata__"', b'{"k":"1","k":"2"}'), "duplicate"),
    "metadata of numbers": (one_more(b'"__metadata__"', b'{"k":1}'), "__metadata__"),
    "metadata a list": (one_more(b'"__metadata__"', b"[]"), "__metadata__"),
    "nested deeply": (one_more(value=DEEP), "deep"),
    "unknown field": (with_entry(extra=1), "fields"),
    "entry is a list": (one_more(value=b"[1]"), "fields"),
    "integer of 100,000 digits": (with_text(b"1408", b"1" * 100_000), "100000 digits"),
    "offset NaN": (with_text(b"1408", b"NaN"), "NaN"),
    "offset 1e1000": (with_text(b"1408", b"1e1000"), "too large for float64"),
    "offset negative": (with_entry(data_offsets=[-1, 768]), "offsets"),
    "offset float": (with_entry(data_offsets=[640.0, 1408]), "offsets"),
    "offset true": (with_entry(data_offsets=[True, 1408]), "offsets"),
    "offset 2^64": (with_entry(data_offsets=[640, 1 << 64]), "fit the data"),
    "offsets backwards": (with_entry(data_offsets=[1408, 640]), "offsets"),
    "three offsets": (with_entry(data_offsets=[640, 1408, 1408]), "offsets"),
    "overlap": (with_entry(data_offsets=[636, 1404]), "overlaps"),
    "same bytes": (with_entry(shape=[20, 8], data_offsets=[0, 640]), "overlaps"),
    "hole": (with_entry(shape=[23, 8], data_offsets=[672, 1408]), "hole"),
    "bytes after the last tensor": (container(SOUND, VALUES + b"PK\x03\x04"), "after the last"),
    "truncated": (container(SOUND, VALUES[:-1]), "truncated"),
    "shape too small": (with_entry(shape=[23, 8]), "fit the data"),
    "shape overflows 2^64": (with_entry(shape=[1 << 40, 1 << 40]), "fit the data"),
    "shape wraps to 0": (with_entry(shape=[1 << 32, 1 << 32], data_offsets=[640, 640]), "fit"),
    "shape 0 × 2^63": (with_entry(shape=[0, 1 << 63], data_offsets=[640, 640]), "fit the data"),
    "shape float": (with_entry(shape=[24.0, 8]), "shape"),
    "shape negative": (with_entry(shape=[-24, -8]), "shape"),
    "nine dimensions": (with_entry(shape=[24, 8, 1, 1, 1, 1, 1, 1, 1]), "shape"),
    "100,000 dimensions": (with_entry(shape=[24, 8] + [1] * 99_998), "shape"),
    "unknown dtype": (with_entry(dtype="F128"), "F128"),
    "dtype null": (with_entry(dtype=None), "dtype"),
    "name with ESC": (one_more(rb'"\u001b[2Jx"'), "control"),
    "name with NUL": (one_more(rb'"a\u0000"'), "control"),
    "name with bidi override": (one_more('"\u202eexe"'.encode()), "control"),
    "name of 513 bytes": (one_more(b'"' + b"n" * 513 + b'"'), "name"),
}


def too_many_tensors():
    """Return a file of 300,001 empty tensors."""
    value = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    entries = (b'"%x":%s' % (number, value) for number in range(300_001))
    return container(b"{" + b",".join(entries) + b"}")


# The same, made when needed because of their size.
BOMBS = {
    "length over the limit": (
        lambda: container(SOUND, bytes(42 << 20), length=41 << 20),
        "too long",
    ),
    "9 MB of metadata": (
        lambda: one_more(b'"__metadata__"', b'{"k":"' + b"x" * (9 << 20) + b'"}'),
        "much",
    ),
    "16 MB of empty lists": (
        lambda: one_more(value=b"[" + b"[]," * 5_500_000 + b"[]]"),
        "too many",
    ),
    "16 MB of dimensions": (lambda: one_more(value=b"[" + b"0," * 8_300_000 + b"0]"), "too many"),
    "300,001 tensors": (too_many_tensors, "too many"),
}
