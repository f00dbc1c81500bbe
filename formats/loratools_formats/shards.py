"""Writing checkpoints shard by shard: many tensors, filled in parallel, none held whole.

A shard is planned from names, types and shapes alone, so every byte has its place before the
first is written. Tensors that stay as they are get copied inside the kernel; others are filled by a
function, block by block. What goes where does not depend on the number of threads. A header is
used again, byte for byte, where the tensors have the names, types and shapes of the source's.

Nothing here is atomic: the folder to write into is a temporary one that the caller publishes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loratools_formats.dtypes import DType
from loratools_formats.errors import AdapterError, OutputError
from loratools_formats.files import RegularFile
from loratools_formats.safetensors_io import (
    SafetensorsFile,
    check_names,
    check_written,
    header_bytes,
    header_of,
    in_file_order,
)
from loratools_formats.tensors import Buffer, TensorRef

_COPY_CHUNK_BYTES = 32 << 20
_FLUSH_SECONDS = 0.03
_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class Sink(Protocol):
    """The place of one tensor in the shard that is being written."""

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write bytes `offset` bytes into the tensor."""


@dataclass(frozen=True)
class Blank:
    """A tensor to be filled.

    Attributes:
        key: its name.
        dtype: element type.
        shape: dimensions.
        is_text: it is U8, its length is only known when it is written, and `shape` is the most it
            can be; it is written once, whole. Such tensors lie last in their shard.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    is_text: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes; of text, the most it can be."""
        nbytes = self.dtype.nbytes(self.shape)
        if nbytes is None:
            raise AdapterError(
                f"a tensor of {self.dtype.code} must fill whole bytes",
                tensor=self.key,
                got=list(self.shape),
            )
        return nbytes


@dataclass(frozen=True)
class Made:
    """Tensors that one function computes together, such as a weight and its scales.

    Attributes:
        blanks: the tensors.
        fill: writes every byte of each, given their sinks by key; called once, from any thread.
    """

    blanks: tuple[Blank, ...]
    fill: Callable[[Mapping[str, Sink]], None] = field(compare=False)


Part = TensorRef | Made


def part_nbytes(part: Part) -> int:
    """Return the size of a part of a shard in bytes; of text, the most it can be."""
    return part.nbytes if isinstance(part, TensorRef) else sum(b.nbytes for b in part.blanks)


@dataclass(frozen=True)
class Shard:
    """One file to write.

    Attributes:
        name: file name.
        parts: tensors copied bit for bit under the key of their reference, and made ones.
        template: a file whose header is used again if the tensors have the same names, types and
            shapes as there.
        metadata: for the header otherwise.
    """

    name: str
    parts: Sequence[Part]
    template: SafetensorsFile | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def copied(self) -> Iterator[TensorRef]:
        """The tensors that are copied."""
        return (part for part in self.parts if isinstance(part, TensorRef))

    @property
    def blanks(self) -> Iterator[Blank]:
        """The tensors that are made."""
        return (b for part in self.parts if isinstance(part, Made) for b in part.blanks)

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes; with text, the most it can be."""
        return _Layout(self).end


class _Layout:
    """Where everything in a shard lies, text and its place in the header apart."""

    def __init__(self, shard: Shard) -> None:
        self.metadata = shard.metadata
        self.texts = sorted((b for b in shard.blanks if b.is_text), key=lambda b: b.key)
        fixed: list[TensorRef | Blank] = [*shard.copied]
        fixed += [blank for blank in shard.blanks if not blank.is_text]
        self.ordered = [*in_file_order(fixed), *self.texts]
        check_names(self.ordered)
        found = {t.key: (t.dtype, t.shape) for t in self.ordered}
        template = shard.template
        if template is not None and not self.texts and found == _signature(template):
            self.header = header_of(template)
            self.offsets = {key: ref.offset for key, ref in template.tensors.items()}
        else:
            self.header = header_bytes(self.ordered, self.metadata)
            self.offsets = {}
            position = len(self.header)
            for tensor in self.ordered:
                self.offsets[tensor.key] = position
                position += tensor.nbytes
        self.text_start = min((self.offsets[b.key] for b in self.texts), default=0)
        self.end = len(self.header) + sum(tensor.nbytes for tensor in self.ordered)

    def with_texts(
        self, texts: Mapping[str, bytes]
    ) -> tuple[bytes, bytes, list[TensorRef | Blank]]:
        """Return the header in the space kept for it, the texts, and all tensors as they are."""
        known = [
            Blank(t.key, t.dtype, (len(texts[t.key]),)) if t.key in texts else t
            for t in self.ordered
        ]
        header = header_bytes(known, self.metadata, nbytes=len(self.header))
        return header, b"".join(texts[blank.key] for blank in self.texts), known


def _signature(file: SafetensorsFile) -> dict[str, tuple[DType, tuple[int, ...]]]:
    return {key: (ref.dtype, ref.shape) for key, ref in file.tensors.items()}


class _Stopped(Exception):  # noqa: N818 - no error: another task has failed
    """Another task failed; this one need not go on."""


class _Output:
    """An open shard.

    Its bytes are flushed to the disk while others are computed, by whoever calls `flush`; when all
    are there, `completed` is called, and sees to it that `finish` is.
    """

    def __init__(
        self,
        path: Path,
        shard: Shard,
        stop: threading.Event,
        completed: Callable[[_Output], None],
    ) -> None:
        self.path = path
        self.layout = _Layout(shard)
        self.stop = stop
        self.texts: dict[str, bytes] = {}
        self._remaining = len(shard.parts)
        self._completed = completed
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _allocate(self.fd, self.layout.end)
            self.write_at(0, self.layout.header)
        except BaseException:
            os.close(self.fd)
            raise
        if not shard.parts:
            completed(self)

    def write_at(self, position: int, data: Buffer) -> None:
        if self.stop.is_set():
            raise _Stopped
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(self.fd, view, position)
            view, position = view[written:], position + written

    def copy(self, tensor: TensorRef) -> None:
        start = self.layout.offsets[tensor.key]
        if tensor.file is None:
            self.write_at(start, tensor.raw())
            return
        for done in range(0, tensor.nbytes, _COPY_CHUNK_BYTES):
            if self.stop.is_set():
                raise _Stopped
            count = min(_COPY_CHUNK_BYTES, tensor.nbytes - done)
            if isinstance(tensor.file, RegularFile):
                tensor.file.copy_at(tensor.offset + done, count, self.fd, start + done)
            else:
                self.write_at(start + done, tensor.file.read_at(tensor.offset + done, count))

    def make(self, part: Made) -> None:
        sinks = {b.key: _Text(self, b) if b.is_text else _Place(self, b) for b in part.blanks}
        part.fill(sinks)
        for sink in sinks.values():
            sink.check_filled()

    def do(self, part: Part) -> None:
        if isinstance(part, TensorRef):
            self.copy(part)
        else:
            self.make(part)
        with self._lock:
            self._remaining -= 1
            is_complete = self._remaining == 0
        if is_complete:
            self._completed(self)

    def finish(self) -> None:
        """Write what was not known before, flush, close and check."""
        layout = self.layout
        ordered = layout.ordered
        if layout.texts:
            header, text, ordered = layout.with_texts(self.texts)
            self.write_at(0, header)
            self.write_at(layout.text_start, text)
            os.ftruncate(self.fd, layout.text_start + len(text))
        os.fsync(self.fd)
        self.close()
        check_written(self.path, ordered)

    def flush(self) -> None:
        with self._closing:
            if self.fd >= 0:
                os.fsync(self.fd)

    def close(self) -> None:
        with self._closing:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


class _Place:
    """Sink of a tensor of known size."""

    def __init__(self, output: _Output, blank: Blank) -> None:
        self._output, self._blank = output, blank
        self._start = output.layout.offsets[blank.key]
        self._written = 0

    def write_at(self, offset: int, data: Buffer) -> None:
        nbytes = memoryview(data).nbytes
        if offset < 0 or offset + nbytes > self._blank.nbytes:
            raise AdapterError(
                "bytes beyond the end of a tensor",
                tensor=self._blank.key,
                got=offset + nbytes,
                expected=f"at most {self._blank.nbytes}",
            )
        self._output.write_at(self._start + offset, data)
        self._written += nbytes

    def check_filled(self) -> None:
        if self._written != self._blank.nbytes:
            raise AdapterError(
                "tensor was not filled",
                tensor=self._blank.key,
                got=f"{self._written} bytes",
                expected=self._blank.nbytes,
            )


class _Text:
    """Sink of a text, which is kept until its shard is complete."""

    def __init__(self, output: _Output, blank: Blank) -> None:
        self._output, self._blank = output, blank

    def write_at(self, offset: int, data: Buffer) -> None:
        text = bytes(data)
        if offset or len(text) > self._blank.nbytes:
            raise AdapterError(
                "text is longer than was planned",
                tensor=self._blank.key,
                got=offset + len(text),
                expected=f"at most {self._blank.nbytes}",
            )
        self._output.texts[self._blank.key] = text

    def check_filled(self) -> None:
        if self._blank.key not in self._output.texts:
            raise AdapterError("tensor was not filled", tensor=self._blank.key)


def _allocate(fd: int, nbytes: int) -> None:
    """Take the space now, so that a full disk shows before work is done."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
        else:
            return
    os.ftruncate(fd, nbytes)


def check_space(folder: Path, nbytes: int) -> None:
    """Raise `OutputError` if fewer than `nbytes` bytes are free in a folder's file system."""
    if not hasattr(os, "statvfs"):
        return
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < nbytes:
        raise OutputError(
            "not enough space for the output",
            path=folder,
            got=f"{free} bytes free",
            expected=nbytes,
            hint="Nothing was written",
        )


def write_shards(
    folder: Path,
    shards: Sequence[Shard],
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write all shards into an existing folder; tensors are the unit of parallel work.

    Args:
        folder: where; normally a temporary one that is published when all is done.
        shards: what.
        workers: threads.
        progress: called with (bytes done, bytes in all).

    Raises:
        OutputError: not enough space, found before the first byte is written where the system
            tells; or a written file does not read back.
        OSError: writing failed.
        AdapterError: a source file is truncated, names clash, or a tensor was not filled.
    """
    check_space(folder, sum(shard.nbytes for shard in shards))
    stop = threading.Event()
    opened: list[_Output] = []
    endings: list[Future[None]] = []
    total = sum(part_nbytes(part) for shard in shards for part in shard.parts)
    done = 0
    with (
        _flushing(opened),
        ThreadPoolExecutor(1) as finisher,
        ThreadPoolExecutor(workers) as pool,
    ):
        running: dict[Future[None], int] = {}

        def completed(output: _Output) -> None:
            endings.append(finisher.submit(output.finish))

        try:
            for output, part in _tasks(folder, shards, stop, opened, completed):
                running[pool.submit(output.do, part)] = part_nbytes(part)
                while len(running) > 2 * workers:
                    done += _finished(running)
                    if progress is not None:
                        progress(done, total)
            while running:
                done += _finished(running)
                if progress is not None:
                    progress(done, total)
            for ending in endings:
                ending.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            finisher.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            for output in opened:
                output.close()


@contextlib.contextmanager
def _flushing(opened: list[_Output]) -> Iterator[None]:
    """Keep the disk busy with what has been written, so that little is left to wait for.

    Errors are left to the flush at each shard's end.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(_FLUSH_SECONDS):
            for output in list(opened):
                with contextlib.suppress(OSError):
                    output.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tasks(
    folder: Path,
    shards: Sequence[Shard],
    stop: threading.Event,
    opened: list[_Output],
    completed: Callable[[_Output], None],
) -> Iterator[tuple[_Output, Part]]:
    """Yield what is to be done, shard by shard, large tensors first; keeps `opened` up to date."""
    for shard in shards:
        output = _Output(folder / shard.name, shard, stop, completed)
        opened[:] = [*(o for o in opened if o.fd >= 0), output]
        for part in sorted(shard.parts, key=part_nbytes, reverse=True):
            yield output, part


def _finished(running: dict[Future[None], int]) -> int:
    """Wait for a task to end; return the size of those that did. Raises what one raised."""
    ended, _ = wait(running, return_when=FIRST_COMPLETED)
    failed = [f.exception() for f in ended if f.exception() is not None]
    for error in failed:
        if error is not None and not isinstance(error, _Stopped):
            raise error
    return sum(running.pop(future) for future in ended)
