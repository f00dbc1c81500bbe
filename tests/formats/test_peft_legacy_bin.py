"""Pickled weights that are sound; the unsound ones are in tests/robustness."""

import tempfile

import pytest
import torch

from loratools_formats import read_adapter
from loratools_formats.containers.pickles import read_bin
from loratools_formats.disk.errors import AdapterError, MissingDependencyError

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
    weights, original = read_bin((tmp_path / "w.bin").relative_to(tmp_path))
    assert set(weights.tensors) == set(TENSORS)
    for name, tensor in weights.tensors.items():
        read = tensor.torch()
        assert read.dtype == TENSORS[name].dtype
        assert torch.equal(read, TENSORS[name])
    assert original.nbytes == (tmp_path / "w.bin").stat().st_size


def test_a_bank_that_many_modules_share_is_read_once(tmp_path):
    bank = torch.arange(3000.0)
    torch.save({f"{i}.bank": bank for i in range(40)} | {"part": bank[1:]}, tmp_path / "w.bin")
    weights, _ = read_bin(tmp_path / "w.bin")
    assert weights.file.nbytes < 40 * 3000 * 4 / 10
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
    (tmp_path / "modules" / "torch.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    with pytest.raises(MissingDependencyError, match="pip install torch"):
        read_bin(tmp_path / "w.bin")
