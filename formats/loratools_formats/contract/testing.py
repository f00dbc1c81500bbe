"""The conformance kit: what every format must do, as tests that a plugin's authors inherit.

Subclass `FormatConformance` in a module that pytest collects, say which format it is and how to
make a sample, and pytest runs the rest:

    class TestMyFormat(FormatConformance):
        format = my_package.FORMAT

        def make_sample(self, folder):
            ...
            return folder / "sample.mine"

The kit needs the format to be registered, since it reads and writes through the same functions
that users of it do. Nothing here imports pytest.
"""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from loratools_formats.contract.files import read_adapter, write_adapter
from loratools_formats.contract.format import Format
from loratools_formats.contract.registry import find_format, get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.disk.errors import LoratoolsError, OutputExistsError


class FormatConformance(abc.ABC):
    """Tests of one format.

    Attributes:
        format: the format under test, readable and writable.
    """

    format: Format

    @abc.abstractmethod
    def make_sample(self, folder: Path) -> Path:
        """Make an adapter of this format inside an empty folder and return its path."""

    @abc.abstractmethod
    def stored_keys(self, path: Path) -> set[str]:
        """Return the names of all tensors in an adapter, found without the format's own reader."""

    def test_is_registered(self) -> None:
        """The registry hands out this very format under its name."""
        assert get_format(self.format.name) is self.format

    def test_recognises_its_sample(self, tmp_path: Path) -> None:
        """The sample is recognised, and by this format alone."""
        assert find_format(self.make_sample(tmp_path)) is self.format

    def test_sniff_rejects_what_is_not_its_own(self, tmp_path: Path) -> None:
        """Sniffing other things says no, without raising."""
        empty_folder = tmp_path / "folder"
        empty_folder.mkdir()
        assert not self.format.sniff(empty_folder)
        assert not self.format.sniff(tmp_path / "missing")
        for content in (b"", b"{}", b"<html></html>", bytes(range(256))):
            for suffix in ("", *self.format.suffixes):
                path = tmp_path / f"other{suffix}"
                path.write_bytes(content)
                assert not self.format.sniff(path), content

    def test_every_tensor_is_in_one_place(self, tmp_path: Path) -> None:
        """Every tensor of the file is found in one place of the adapter, none twice."""
        path = self.make_sample(tmp_path)
        keys = [tensor.key for tensor in read_adapter(path).tensors()]
        assert len(keys) == len(set(keys))
        assert set(keys) == self.stored_keys(path)

    def test_read_then_write_keeps_every_bit(self, tmp_path: Path) -> None:
        """Writing what was read and reading it again gives equal tensors, scales and metadata."""
        first = read_adapter(self._sample(tmp_path))
        self._write(first, tmp_path / "out")
        second = read_adapter(tmp_path / "out", self.format.name)
        assert _contents(second) == _contents(first)
        assert second.base_model == first.base_model
        assert dict(second.metadata) == dict(first.metadata)

    def test_own_sample_has_no_losses(self, tmp_path: Path) -> None:
        """A format can hold what it read."""
        adapter = read_adapter(self._sample(tmp_path))
        assert self.format.losses(adapter) == []

    def test_equal_input_gives_equal_bytes(self, tmp_path: Path) -> None:
        """Writing twice gives the same files."""
        sample = self._sample(tmp_path)
        self._write(read_adapter(sample), tmp_path / "one")
        self._write(read_adapter(sample), tmp_path / "two")
        assert _digests(tmp_path / "one") == _digests(tmp_path / "two")

    def test_input_is_not_changed(self, tmp_path: Path) -> None:
        """Reading and writing leave the input as it was."""
        sample = self._sample(tmp_path)
        before = _digests(sample)
        self._write(read_adapter(sample), tmp_path / "out")
        assert _digests(sample) == before

    def test_existing_output_is_refused(self, tmp_path: Path) -> None:
        """Writing over an output needs to be asked for, and then works."""
        adapter = read_adapter(self._sample(tmp_path))
        self._write(adapter, tmp_path / "out")
        before = _digests(tmp_path / "out")
        try:
            self._write(adapter, tmp_path / "out")
        except OutputExistsError:
            pass
        else:
            raise AssertionError("an existing output was replaced without being asked to")
        write_adapter(adapter, tmp_path / "out", self.format.name, overwrite=True)
        assert _digests(tmp_path / "out") == before

    def test_planned_size_is_the_size(self, tmp_path: Path) -> None:
        """The size foretold for the weight file is that of the largest file written."""
        adapter = read_adapter(self._sample(tmp_path))
        self._write(adapter, tmp_path / "out")
        sizes = [path.stat().st_size for path in _files(tmp_path / "out")]
        assert self.format.weights_nbytes(adapter) in sizes

    def test_truncated_weights_are_an_error(self, tmp_path: Path) -> None:
        """A file cut short is refused with one of our errors, wherever it is cut."""
        sample = self._sample(tmp_path)
        largest = max(_files(sample), key=lambda path: path.stat().st_size)
        content = largest.read_bytes()
        for share in (0.0, 0.1, 0.5, 0.99):
            largest.write_bytes(content[: int(len(content) * share)])
            try:
                adapter = read_adapter(sample, self.format.name)
                for tensor in adapter.tensors():
                    tensor.raw()
            except LoratoolsError:
                continue
            raise AssertionError(f"{largest.name} cut to {share:.0%} was read without an error")

    def _sample(self, tmp_path: Path) -> Path:
        folder = tmp_path / "sample"
        folder.mkdir()
        return self.make_sample(folder)

    def _write(self, adapter: Adapter, path: Path) -> None:
        write_adapter(adapter, path, self.format.name)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [Path(root) / name for root, _, names in os.walk(path) for name in names]


def _digests(path: Path) -> dict[str, str]:
    return {
        os.path.relpath(file, path): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(_files(path))
    }


def _contents(adapter: Adapter) -> list[tuple[object, ...]]:
    return sorted(_parts(adapter), key=repr)


def _parts(adapter: Adapter) -> Iterator[tuple[object, ...]]:
    for name, delta in adapter.modules.items():
        yield name, *_described(delta)
        for tensor in delta.tensors():
            yield name, tensor.dtype.code, tensor.shape, bytes(tensor.raw())
    for key, tensor in adapter.shared.items():
        yield key, tensor.dtype.code, tensor.shape, bytes(tensor.raw())
    for key, addition in adapter.additions.items():
        tensor = addition.tensor
        yield key, addition.target, tensor.dtype.code, tensor.shape, bytes(tensor.raw())
    for key, replacement in adapter.replacements.items():
        tensor = replacement.tensor
        yield key, replacement.kind, replacement.target, replacement.rows, tensor.shape
        yield key, tensor.dtype.code, bytes(tensor.raw())
    for key, tensor in adapter.carried.items():
        yield key, tensor.dtype.code, tensor.shape, bytes(tensor.raw())


def _described(delta: ModuleChange) -> tuple[object, ...]:
    other = delta.kind_delta
    told = sorted(other.settings.items()) if other is not None else delta.require_factors().scale
    return delta.kind, delta.shape, delta.layer.kind, delta.layer.kernel, delta.is_dora, told
