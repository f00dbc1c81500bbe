"""Pickled weights that are sound; the unsound ones are in tests/robustness."""

import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from loratools_formats import read_adapter
from loratools_formats.containers.pickles import read_bin
from loratools_formats.containers.torch_states import tensors_in
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import AdapterError

STORED = torch.arange(24, dtype=torch.float32).reshape(4, 6)
TENSORS = {
    "plain": STORED,
    "transposed": STORED.T,
    "part": STORED[1:3, ::2],
    "bfloat16": STORED.to(torch.bfloat16),
    "half": STORED.half(),
    "scalar": torch.tensor(1.5),
    "tied to plain": STORED,
    "parameter": torch.nn.Parameter(torch.ones(3)),
}


@pytest.fixture(autouse=True)
def temporaries(tmp_path, monkeypatch):
    """Put temporary files where leftovers would be seen."""
    folder = tmp_path / "temporaries"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("archive", [True, False])
def test_every_tensor(archive, tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "w.bin", _use_new_zipfile_serialization=archive)
    monkeypatch.chdir(tmp_path)
    weights = read_bin((tmp_path / "w.bin").relative_to(tmp_path))
    assert set(weights.tensors) == set(TENSORS)
    for name, tensor in weights.tensors.items():
        same(tensor, TENSORS[name])
    assert weights.file.nbytes == (tmp_path / "w.bin").stat().st_size


def same(read, expected):
    """Assert that a tensor is what torch has, bit for bit."""
    assert read.shape == expected.shape
    assert read.torch().dtype == expected.dtype
    bits = torch.uint8
    got, bytes_expected = read.torch().contiguous(), expected.detach().contiguous()
    assert torch.equal(got.reshape(-1).view(bits), bytes_expected.reshape(-1).view(bits))


OF_OLD = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64", "C64")
LAYOUTS = [(code, True) for code, dtype in DTYPES.items() if dtype.torch and dtype.bits > 4]


@pytest.mark.slow
@pytest.mark.parametrize(("code", "archive"), LAYOUTS + [(code, False) for code in OF_OLD])
def test_every_type_in_every_layout_as_torch_loads_it(code, archive, tmp_path):
    random = torch.Generator().manual_seed(len(code))
    stored = getattr(torch, DTYPES[code].torch)
    width = torch.empty(0, dtype=stored).element_size()
    raw = torch.randint(0, 2 if code == "BOOL" else 256, (4 * 6 * width,), generator=random)
    whole = raw.to(torch.uint8).view(stored).reshape(4, 6)
    views = {
        "whole": whole, "turned": whole.T, "rows": whole[1:3], "columns": whole[:, 1::2],
        "one": whole[2, 3], "line": whole[:, 4], "folded": whole.reshape(2, 2, 6).permute(2, 0, 1),
        "repeated": whole[:1, :2].expand(3, 2), "nothing": whole[:0], "none": whole[:, :0].T,
    }  # fmt: skip
    file = tmp_path / "w.pt"
    torch.save(OrderedDict(views), file, _use_new_zipfile_serialization=archive)
    expected, read = torch.load(file, weights_only=True), read_bin(file).tensors
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        same(read[name], tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(protocol, tmp_path):
    torch.save(TENSORS, tmp_path / "w.bin", pickle_protocol=protocol)
    read = read_bin(tmp_path / "w.bin").tensors
    assert list(read) == list(TENSORS)
    for name, tensor in read.items():
        same(tensor, TENSORS[name])


def test_the_state_of_a_model_with_a_tied_weight(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    state = model.state_dict()
    state["1.weight"].note = "an attribute"
    torch.save(state, tmp_path / "w.pt")
    read = read_bin(tmp_path / "w.pt").tensors
    assert list(read) == list(state)
    for name, tensor in state.items():
        same(read[name], tensor)
    assert read["0.weight"].offset == read["1.weight"].offset


def test_a_bank_that_many_modules_share_is_read_from_one_place(tmp_path):
    bank = torch.arange(3000.0)
    torch.save({f"{i}.bank": bank for i in range(40)} | {"part": bank[1:]}, tmp_path / "w.bin")
    weights = read_bin(tmp_path / "w.bin")
    assert len({weights.tensors[f"{i}.bank"].offset for i in range(40)}) == 1
    assert all(torch.equal(weights.tensors[f"{i}.bank"].torch(), bank) for i in range(40))
    assert torch.equal(weights.tensors["part"].torch(), bank[1:])
    assert not weights.metadata


def test_adapter(make_folder):
    folder = make_folder(dtype="f32")
    before = read_adapter(folder)
    (delta,) = before.modules.values()
    tensors = {tensor.key: tensor.torch() for tensor in before.tensors()}
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    adapter = read_adapter(folder)
    (read,) = adapter.modules.values()
    assert read.direction.a.raw() == delta.direction.a.raw()
    assert read.direction.b.raw() == delta.direction.b.raw()
    assert adapter.remarks == ("weights are pickled (adapter_model.bin)",)
    assert adapter.inputs[0].path.name == "adapter_model.bin"
    adapter.check_unchanged()
    (folder / "adapter_model.bin").touch()
    with pytest.raises(AdapterError, match="changed"):
        adapter.check_unchanged()


def test_without_torch(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "w.bin")
    (tmp_path / "modules").mkdir()
    for name in ("torch", "numpy"):
        (tmp_path / "modules" / f"{name}.py").write_text("raise SystemExit(9)")
    paths = [str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    assert set(read_bin(tmp_path / "w.bin").tensors) == set(TENSORS)


REFUSED = {
    "sparse": (torch.eye(3).to_sparse(), "sparse"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "QInt8"),
    "complex of 128 bits": (torch.ones(2, dtype=torch.complex128), "ComplexDouble"),
    "negated": (torch.ones(2, dtype=torch.complex64).conj().imag, "conjugate or negated"),
    "on no device": (torch.empty(3, device="meta"), "meta"),
    "a number": (1.5, "float"),
    "text": ("text", "str"),
    "a list": ([torch.ones(2)], "list"),
    "an array": (np.ones(3), "numpy"),
    "a map": ({"inner": torch.ones(2)}, "dict"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_dense_tensor_is_refused_by_its_kind(case, tmp_path):
    value, word = REFUSED[case]
    value = value() if callable(value) else value
    torch.save({"x": value, "y": torch.ones(1)}, tmp_path / "w.bin")
    with pytest.raises(AdapterError, match=word):
        read_bin(tmp_path / "w.bin")


def test_a_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(AdapterError, match="torch"):
        read_bin(tmp_path / "w.pt")


def test_every_prefix_is_refused(tmp_path):
    for archive in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "w.bin", _use_new_zipfile_serialization=archive)
        data = (tmp_path / "w.bin").read_bytes()
        for length in range(0, len(data), 1 if not archive else 7):
            with pytest.raises(AdapterError):
                tensors_in(InMemory(data[:length]))


@dataclass
class InMemory:
    """Bytes as a file."""

    data: bytes

    @property
    def nbytes(self):
        return len(self.data)

    def read_at(self, offset, nbytes):
        if offset + nbytes > len(self.data):
            raise AdapterError("ends early")
        return self.data[offset : offset + nbytes]


CONFINED = """
import errno, os, socket, sys
from loratools_formats.containers.confined import refuse_calls
if not refuse_calls():
    os._exit(5)
def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return error.errno == errno.EPERM
    return False
ok = refused(os.open, sys.argv[1], os.O_RDONLY) and refused(socket.socket) and refused(os.fork)
ok = ok and refused(os.open, sys.argv[1] + "2", os.O_WRONLY | os.O_CREAT)
ok = ok and refused(os.unlink, sys.argv[1]) and refused(os.kill, 1, 0)
os.write(1, b"still here")
os._exit(0 if ok else 1)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in {"x86_64", "aarch64"},
    reason="the system has no such filter",
)
def test_the_child_can_open_and_start_nothing(tmp_path):
    (tmp_path / "file").write_text("kept")
    command = [sys.executable, "-c", CONFINED, str(tmp_path / "file")]
    run = subprocess.run(command, capture_output=True, timeout=60)
    if run.returncode == 5:
        pytest.skip("this kernel does not let a process install a filter")
    assert (run.returncode, run.stdout) == (0, b"still here"), run.stderr
    assert not (tmp_path / "file2").exists()


def test_an_archive_of_a_later_version_is_refused(tmp_path):
    """As torch refuses it: what it means by the same names, nobody knows yet."""
    torch.save(TENSORS, tmp_path / "w.bin")
    with (
        zipfile.ZipFile(tmp_path / "w.bin") as old,
        zipfile.ZipFile(tmp_path / "x.bin", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name, b"11\n" if name.endswith("/version") else old.read(name))
    with pytest.raises(RuntimeError, match="version 11"):
        torch.load(tmp_path / "x.bin", weights_only=True)
    with pytest.raises(AdapterError, match="not known; got 11; expected at most 10"):
        read_bin(tmp_path / "x.bin")
