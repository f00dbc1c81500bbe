"""Changes to the bytes of a file, each decided by a number alone.

Half of them know the container: they change the JSON of a safetensors header, a JSON file, or
text; the other half change bytes of anything. Truncations are tried at every length by `run`.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
from typing import Any

ODD_NUMBERS = [
    0, -1, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**19, 10**30, -(2**63), 0.0, -0.0, 0.5,
    1e-320, 1e-45, 1e38, 1e300, float("inf"), float("-inf"), float("nan"), 1e999,
]  # fmt: skip
ODD_TEXTS = [
    "", " ", "a", "\x00", "\x1b[31m", "\u202e", "é", "\ud800", "a" * 600, "..", "/", "../x", "*",
    "(", ".*", "((a|a)+)+#", "F32", "BF16", "F64", "I64", "BOOL", "F4", "F8_E4M3", "LORA", "LOHA",
    "ADALORA", "OFT", "VERA", "none", "all", "1", "1e5", "nan", "null", "__metadata__", "weight",
    "model.layers.0.self_attn.q_proj", "lora_unet_", "blk.0.attn_q.weight", "{}", "{}{}",
]  # fmt: skip
ODD_BYTES = [
    b"\x00", b"\xff", b"\x00" * 8, b"\xff" * 8, b"\x80", b"\x80\x02", b".", b"\n", b'"', b"{", b"}",
    b"[", b"]", b",", b":", b"PK\x03\x04", b"PK\x05\x06", b"PK\x01\x02", b"GGUF", b"\xef\xbb\xbf",
    struct.pack("<Q", 2**63), struct.pack("<I", 2**31), b"cposix\nsystem\n", b"\x93", b"R", b"b",
    b"0x" + b"f" * 50, b"1:30", b"&a", b"*a", b"<<: ", b"!!python/name:os.system",
]  # fmt: skip


def mutated(data: bytes, name: str, number: int) -> bytes:
    """Return the mutation of some bytes with a number; the same for the same name and number."""
    draw = random.Random(f"{name} {number}")
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if draw.random() < 0.6 and name.endswith(".safetensors"):
            data = _in_header(data, draw)
        elif draw.random() < 0.7 and name.endswith(".json"):
            data = _in_json(data, draw)
        else:
            data = _in_bytes(data, draw)
    return data


def _in_header(data: bytes, draw: random.Random) -> bytes:
    if len(data) < 8:
        return _in_bytes(data, draw)
    (length,) = struct.unpack("<Q", data[:8])
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return _in_bytes(data, draw)
    text = _dumped(_changed(header, draw))
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _in_json(data: bytes, draw: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _in_bytes(data, draw)
    return _dumped(_changed(value, draw))


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _changed(value: Any, draw: random.Random) -> Any:
    """Return a value with one place in it changed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.6:
            return value | {key: _changed(value[key], draw)}
        rest = {k: v for k, v in value.items() if k != key}
        if kind < 0.7:
            return rest
        if kind < 0.8:
            return rest | {draw.choice(ODD_TEXTS): value[key]}
        if kind < 0.9:
            return value | {key + draw.choice(ODD_TEXTS): value[key]}
        return value | {key: value[draw.choice(list(value))]}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.7:
            return [*value[:place], _changed(value[place], draw), *value[place + 1 :]]
        return value[:place] if kind < 0.85 else [*value, *value[place:]]
    return _odd(value, draw)


def _odd(value: Any, draw: random.Random) -> Any:
    kind = draw.random()
    if isinstance(value, str) and value[:1] in ("{", "[") and kind < 0.7:
        with contextlib.suppress(ValueError, RecursionError):  # metadata hold JSON as text
            return json.dumps(_changed(json.loads(value), draw))
    if kind < 0.4 and isinstance(value, int | float):
        return value + draw.choice((-1, 1, 8, -8)) if draw.random() < 0.5 else -value
    if kind < 0.6 and isinstance(value, str) and value:
        place = draw.randrange(len(value))
        return value[:place] + draw.choice(ODD_TEXTS) + value[place + 1 :]
    choices: list[Any] = [None, True, False, [], {}, [[]], {"a": 1}]
    return draw.choice([*choices, *ODD_NUMBERS, *ODD_TEXTS])


def _in_bytes(data: bytes, draw: random.Random) -> bytes:
    if not data:
        return draw.choice(ODD_BYTES)
    # Headers are at the beginning, zip directories at the end; most files are numbers between.
    near = draw.choice((len(data), 64, 512, 4096))
    place = draw.randrange(min(near, len(data)))
    place = len(data) - 1 - place if draw.random() < 0.3 else place
    kind = draw.random()
    if kind < 0.3:
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    if kind < 0.5:
        odd = draw.choice(ODD_BYTES)
        return data[:place] + odd + data[place + len(odd) :]
    if kind < 0.65:
        return data[:place] + draw.choice(ODD_BYTES) + data[place:]
    size = draw.choice((1, 2, 4, 8, 64, 512))
    if kind < 0.8:
        return data[:place] + data[place + size :]
    if kind < 0.9:
        return data[:place]
    other = draw.randrange(len(data))
    return data[:place] + data[other : other + size] + data[place + size :]
