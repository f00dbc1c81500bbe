"""Bad inputs, one defect each: one line on stderr, exit code 2, no output, little time and memory.

The table is section 3 of the robustness notes, as far as PEFT folders and safetensors files go.
"""

import io
import json
import math
import os
import pickle
import socket
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
import torch
from handmade import BOMBS, DEFECTS, HTML, LFS_POINTER, SOUND, VALUES, A, B, container, entry
from safetensors.numpy import load_file, save_file

WEIGHTS, CONFIG, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"

SECONDS, SECONDS_WITH_TORCH, PEAK_BYTES = 5, 10, 500_000_000


@pytest.fixture
def refused(loratools, tmp_path):
    """Return a function that runs squeeze and checks everything a refusal promises."""

    def check(source, *words, seconds=SECONDS, peak_bytes=PEAK_BYTES, **how):
        before = sorted(tmp_path.rglob("*"))
        run = loratools("squeeze", source, "-o", tmp_path / "out", "--rank", "2", **how)
        (line,) = run.remarks
        assert line.startswith("error: ")
        assert line.isprintable()
        assert "Traceback" not in line
        assert "--traceback" not in line, "an exception that is not ours"
        for word in words:
            assert word in line
        assert run.code == 2
        assert run.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        assert run.seconds < seconds
        assert run.peak_bytes < peak_bytes
        return run

    return check


def factors(a_shape=(8, 20), b_shape=(24, 8), dtype="F32", nbytes=4, fill=b"\x01"):
    """Return a sound container of factors with unsound shapes or types."""
    middle = int(math.prod(a_shape) * nbytes)
    end = middle + int(math.prod(b_shape) * nbytes)
    header = {
        A: entry(dtype, list(a_shape), 0, middle),
        B: entry(dtype, list(b_shape), middle, end),
    }
    return container(header, (fill * end)[:end])


BAD_WEIGHTS = DEFECTS | {
    "factors of type F4": (factors(dtype="F4", nbytes=0.5), "F4"),
    "factors of type F6": (factors(dtype="F6_E2M3", nbytes=0.75), "F6_E2M3"),
    "factors of type I32": (factors(dtype="I32"), "I32"),
    "factors of type BOOL": (factors(dtype="BOOL", nbytes=1), "BOOL"),
    "ranks differ": (factors(b_shape=(24, 4)), "factors do not fit"),
    "vectors": (factors((8,), (8,)), "factors do not fit"),
    "scalars": (factors((), ()), "rank"),
    "no columns": (factors((8, 0)), "empty"),
    "no rows": (factors(b_shape=(0, 8)), "empty"),
    "kernel in the second factor": (factors((8, 20, 3), (24, 8, 3)), "kernel"),
    "NaN": (factors(fill=b"\xff"), "NaN"),
    "signalling NaN": (factors(fill=b"\x01\x00\x80\x7f"), "NaN"),
    "one infinity": (container(SOUND, VALUES[:-4] + b"\x00\x00\x80\x7f"), "infinite"),
    "infinities": (factors(dtype="F8_E5M2", nbytes=1, fill=b"\x7c"), "infinite"),
    "no tensors": (container(b"{}"), "no tensors"),
}


@pytest.mark.parametrize("defect", BAD_WEIGHTS)
def test_weights(defect, make_folder, refused):
    folder = make_folder()
    content, word = BAD_WEIGHTS[defect]
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, word)


BAD_TENSORS = {
    "A without B": ([A], {}, "lacks one"),
    "B without A": ([B], {}, "lacks one"),
    "something unknown beside the factors": (
        [A, B],
        {"base_model.model.layers.0.q.lora_C.weight": np.ones((8, 8), "f4")},
        "lora_C",
    ),
    "linear and embedding factors": (
        [A, B],
        {
            "base_model.model.layers.0.q.lora_embedding_A": np.ones((8, 20), "f4"),
            "base_model.model.layers.0.q.lora_embedding_B": np.ones((24, 8), "f4"),
        },
        "embedding",
    ),
    "embedding factors in a stack": (
        [],
        {
            "base_model.model.embed.lora_embedding_A": np.ones((8, 8, 20), "f4"),
            "base_model.model.embed.lora_embedding_B": np.ones((8, 24, 8), "f4"),
        },
        "embedding",
    ),
    "modules that differ by case": (
        [A, B],
        {A.replace(".q.", ".Q."): np.ones((8, 20), "f4")}
        | {B.replace(".q.", ".Q."): np.ones((24, 8), "f4")},
        "case",
    ),
    "magnitude without use_dora": (
        [A, B],
        {"base_model.model.layers.0.q.lora_magnitude_vector": np.ones(24, "f4")},
        "use_dora",
    ),
}


@pytest.mark.parametrize("defect", BAD_TENSORS)
def test_tensors(defect, make_folder, refused):
    folder = make_folder(dtype="f32")
    kept, added, word = BAD_TENSORS[defect]
    stored = load_file(folder / WEIGHTS)
    save_file({name: stored[name] for name in kept} | added, folder / WEIGHTS)
    refused(folder, word)


BAD_SETTINGS = {
    "r 0": ({"r": 0}, "r is wrong"),
    "r negative": ({"r": -4}, "r is wrong"),
    "r float": ({"r": 8.5}, "r is wrong"),
    "r string": ({"r": "8"}, 'r is wrong; got "8"'),
    "r true": ({"r": True}, "r is wrong; got true"),
    "r null": ({"r": None}, "r is wrong; got null"),
    "r 2^31": ({"r": 1 << 31}, "r is wrong"),
    "r not that of the tensors": ({"r": 4}, "differ"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha is wrong"),
    "alpha string": ({"lora_alpha": "16"}, "lora_alpha is wrong"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha is wrong"),
    "alpha huge": ({"lora_alpha": 1e308}, "overflow float64"),
    "rank_pattern a list": ({"rank_pattern": [1]}, "rank_pattern is wrong"),
    "rank_pattern of strings": ({"rank_pattern": {"q": "8"}}, "rank_pattern is wrong"),
    "rank_pattern of 0": ({"rank_pattern": {"q": 0}}, "rank_pattern is wrong"),
    "rank_pattern no regex": ({"rank_pattern": {"(": 8}}, "regular expression is wrong"),
    "rank_pattern catastrophic": ({"rank_pattern": {r"(\w+\.?)+#": 8}}, "too long to match"),
    "rank_pattern of 513 characters": ({"rank_pattern": {"q" * 513: 8}}, "too long"),
    "target_modules a number": ({"target_modules": 5}, "target_modules is wrong"),
    "target_modules nested": ({"target_modules": [["q"]]}, "target_modules is wrong"),
    "peft_type unknown": ({"peft_type": "FUTURE"}, "FUTURE"),
    "peft_type null": ({"peft_type": None}, "peft_type"),
    "peft_type a list": ({"peft_type": ["LORA"]}, "peft_type"),
    "use_dora without magnitudes": ({"use_dora": True}, "magnitude"),
    "unknown key that is set": ({"use_quantum_lora": True}, "use_quantum_lora"),
    "nested 900 deep": ({"eva_config": json.loads("[" * 900 + "]" * 900)}, "deep"),
}


@pytest.mark.parametrize("defect", BAD_SETTINGS)
def test_settings(defect, make_folder, refused):
    values, word = BAD_SETTINGS[defect]
    refused(make_folder(modules={f"layers.{'0' * 40}.q": (24, 20, 8)}, **values), word)


def config(**values):
    """Return a configuration file's text with raw JSON values."""
    raw = {"peft_type": '"LORA"', "r": "8", "lora_alpha": "16"} | values
    members = ", ".join(f'"{key}": {value}' for key, value in raw.items())
    return f"{{{members}}}"


BAD_CONFIG_FILES = {
    "empty": (b"", "is an empty file"),
    "not JSON": (b"peft_type: LORA", "JSON"),
    "byte order mark": (b"\xef\xbb\xbf" + config().encode(), "byte order mark"),
    "UTF-16": (config().encode("utf-16"), "UTF-8"),
    "not UTF-8": (config(revision='"\udcff"').encode("utf-8", "surrogateescape"), "UTF-8"),
    "lone surrogate": (config(revision=r'"\udcff"').encode(), "surrogate"),
    "list": (b"[]", "not a JSON object"),
    "string": (b'"LORA"', "not a JSON object"),
    "no r": (b'{"peft_type": "LORA", "lora_alpha": 16}', "lacks r"),
    "no alpha": (b'{"peft_type": "LORA", "r": 8}', "lacks lora_alpha"),
    "no peft_type": (b'{"r": 8, "lora_alpha": 16}', "peft_type"),
    "r twice": (config(bias='"none", "r": 4').encode(), "duplicate key 'r'"),
    "duplicate deep inside": (config(rank_pattern='{"q": 8, "q": 4}').encode(), "duplicate"),
    "alpha NaN": (config(lora_alpha="NaN").encode(), "NaN"),
    "alpha -Infinity": (config(lora_alpha="-Infinity").encode(), "-Infinity"),
    "alpha 1e1000": (config(lora_alpha="1e1000").encode(), "too large for float64"),
    "r of 100,000 digits": (config(r="1" * 100_000).encode(), "100000 digits"),
    "nested deeply": (config(x="[" * 100_000).encode(), "deep"),
    "over 1 MiB": (config(revision='"%s"' % ("x" * (1 << 20))).encode(), "large"),
    "LFS pointer": (LFS_POINTER, "git lfs pull"),
    "HTML page": (HTML, "is a web page"),
}


@pytest.mark.parametrize("defect", BAD_CONFIG_FILES)
def test_config_file(defect, make_folder, refused):
    folder = make_folder()
    content, word = BAD_CONFIG_FILES[defect]
    (folder / CONFIG).write_bytes(content)
    refused(folder, word)


@pytest.mark.parametrize("defect", BOMBS)
def test_bombs(defect, make_folder, refused):
    folder = make_folder()
    make, word = BOMBS[defect]
    (folder / WEIGHTS).write_bytes(make())
    refused(folder, word)


def test_missing_config(make_folder, refused):
    folder = make_folder()
    (folder / CONFIG).unlink()
    refused(folder, f"{CONFIG} is not")


def test_missing_weights(make_folder, refused):
    folder = make_folder()
    (folder / WEIGHTS).unlink()
    refused(folder, "no weights")


def test_missing_input(tmp_path, refused):
    refused(tmp_path / "nothing", "no such file or folder")


def test_dense_1_tib(make_folder, refused):
    """A sparse file of 1 TiB that one factor fills."""
    folder = make_folder()
    columns = 1 << 35
    end = 8 * columns * 4
    header = {A: entry("F32", [8, columns], 0, end), B: entry("F32", [24, 8], end, end + 768)}
    content = container(header)
    with open(folder / WEIGHTS, "wb") as file:
        file.write(content)
        file.truncate(len(content) + end + 768)
    refused(folder, "too large")


def test_many_patterns_and_modules(make_folder, refused):
    """Patterns that each need a look-up of their own, times modules, would take minutes."""
    folder = make_folder(modules={f"layers.{i:011}.q": (1, 1, 1) for i in range(10_000)}, r=1)
    patterns = {
        "".join("." if i >> bit & 1 else "0" for bit in range(15)): 1 for i in range(20_000)
    }
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | {"rank_pattern": patterns}))
    refused(folder, "too long to match")


def replace_by(kind, path):
    """Put something that is no regular file at a path."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # the path of a socket must be short
            server.bind(path.name)
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to(path.with_name("gone"))
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a file elsewhere":
        elsewhere = path.parent.parent / "secret"
        elsewhere.write_text("{}")
        path.symlink_to(elsewhere)


SPECIAL = [
    "fifo",
    "socket",
    "folder",
    "link to nothing",
    "link to itself",
    "link to a device",
    "link to a file elsewhere",
]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, PICKLED])
def test_no_regular_file(kind, name, make_folder, refused):
    folder = make_folder()
    if name == PICKLED:
        (folder / WEIGHTS).unlink()
    replace_by(kind, folder / name)
    refused(folder)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/dev/null"])
def test_input_is_a_device(path, refused):
    refused(path, "is no regular file")


def test_attachment_linked_from_elsewhere(make_folder, refused):
    folder = make_folder()
    replace_by("link to a file elsewhere", folder / "README.md")
    refused(folder, "README.md", "leads out")


class MarkerMaker:
    """Unpickling this runs a shell command in the current folder."""

    def __reduce__(self):
        return os.system, ("touch marker",)


# {((((), ()), ((), ())), ...): 1}, a key whose hash takes 2^60 steps.
ENDLESS_HASH = b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s."


def archive(path, pickled, compression=zipfile.ZIP_STORED, data=b""):
    """Write the zip archive that torch.save makes, of any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", data)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")


class Views(pickle.Pickler):
    """Writes a map of names to views of one storage of floats, as torch.save does."""

    def __init__(self, stream, count):
        super().__init__(stream, protocol=2)
        self.count = count

    def persistent_id(self, item):
        return ("storage", torch.FloatStorage, "0", "cpu", self.count) if item is Views else None

    def reducer_override(self, item):
        if not isinstance(item, View):
            return NotImplemented
        return torch._utils._rebuild_tensor_v2, (Views, 0, *item, False, {})


class View(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def views(count, shape, stride):
    """Return the pickle of a map from one name to a view of a storage of `count` floats."""
    return pickled_views(count, {A: View(shape, stride)})


def pickled_views(count, by_name):
    stream = io.BytesIO()
    Views(stream, count).dump(by_name)
    return stream.getvalue()


def plain(pickled):
    """Return a function that writes a pickle, given a path."""
    return lambda path: path.write_bytes(pickled)


def in_archive(pickled, *how, **more):
    """Return a function that writes a pickle into an archive, given a path."""
    return lambda path: archive(path, pickled, *how, **more)


CODE = pickle.dumps(MarkerMaker(), 2)
MANY_VIEWS = pickled_views(1 << 20, {f"x{i}": View((2**20 - i,), (1,)) for i in range(1000)})
MANY_NAMES = pickled_views(1 << 20, {f"x{i}": View((1 << 20,), (1,)) for i in range(5000)})
LARGE = views(1 << 24, (1 << 24,), (1,))

BAD_PICKLES = {
    "not a pickle": (plain(b"\x93NUMPY" * 10), "is a NumPy array"),
    "empty": (plain(b""), "is an empty file"),
    "LFS pointer": (plain(LFS_POINTER), "git lfs pull"),
    "code": (plain(CODE), "posix.system"),
    "code in an archive": (in_archive(CODE), "posix.system"),
    "no archive": (plain(b"PK\x03\x04" + bytes(100)), "archive"),
    "a list": (in_archive(pickle.dumps([1], 2)), "content is of type list"),
    "entries that are no tensors": (in_archive(pickle.dumps({A: [1]}, 2)), "is of type list"),
    "compressed": (in_archive(LARGE, zipfile.ZIP_DEFLATED, data=bytes(1 << 26)), "compressed"),
    "tensor larger than its storage": (
        in_archive(views(1, (1 << 36,), (0,)), data=bytes(4)),
        "claims 274877906944 bytes",
    ),
    "storage larger than the file": (
        in_archive(views(1 << 40, (1 << 40,), (1,)), data=bytes(4)),
        "4398046511104",
    ),
    "many views of one storage": (in_archive(MANY_VIEWS, data=bytes(1 << 22)), "share storage"),
    "many names of one tensor": (
        in_archive(MANY_NAMES, data=bytes(1 << 22)),
        "4999 tensors have several names",
    ),
    "key that takes for ever to hash": (in_archive(ENDLESS_HASH), "a key that is a tuple"),
}


@pytest.mark.parametrize("defect", BAD_PICKLES)
def test_pickle(defect, make_folder, refused, tmp_path):
    folder = make_folder()
    (folder / WEIGHTS).unlink()
    write, word = BAD_PICKLES[defect]
    write(folder / PICKLED)
    refused(folder, PICKLED, word, seconds=SECONDS_WITH_TORCH, cwd=tmp_path)
    assert not (tmp_path / "marker").exists()
