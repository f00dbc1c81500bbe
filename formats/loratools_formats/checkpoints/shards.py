"""Writing checkpoints shard by shard: many tensors, filled in parallel, none held whole.

Tensors that stay as they are get copied inside the kernel; others are filled by a function, block
by block. What goes where does not depend on the number of threads.

Nothing here is atomic: the folder to write into is a temporary one that the caller publishes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from loratools_formats.checkpoints.shard_plan import (
    Blank,
    Layout,
    Made,
    NewTensor,
    Shard,
    new_nbytes,
)
from loratools_formats.containers.safetensors_write import check_written
from loratools_formats.core.tensors import Buffer, TensorRef
from loratools_formats.disk.errors import AdapterError, OutputError
from loratools_formats.disk.files import RegularFile, create, write_at

_COPY_CHUNK_BYTES = 32 << 20
_FLUSH_SECONDS = 0.03
_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


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
        self.layout = Layout(shard)
        self.stop = stop
        self.texts: dict[str, bytes] = {}
        self._remaining = len(shard.parts)
        self._completed = completed
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._failure: OSError | None = None
        self.fd = create(path)
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
        write_at(self.fd, position, memoryview(data).cast("B"))

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
        sinks = {
            b.key: _TextSink(self, b) if b.is_text else _TensorSink(self, b) for b in part.blanks
        }
        part.fill(sinks)
        for sink in sinks.values():
            sink.check_filled()

    def do(self, part: NewTensor) -> None:
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
        if self._failure is not None:
            raise self._failure
        check_written(self.path, ordered)

    def flush(self) -> None:
        """Flush so far; `finish` raises what fails, which the system reports only once."""
        with self._closing:
            if self.fd >= 0:
                try:
                    os.fsync(self.fd)
                except OSError as error:
                    self._failure = error

    def close(self) -> None:
        with self._closing:
            descriptor, self.fd = self.fd, -1
            if descriptor >= 0:
                os.close(descriptor)


class _TensorSink:
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


class _TextSink:
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
    total = sum(new_nbytes(part) for shard in shards for part in shard.parts)
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
                running[pool.submit(output.do, part)] = new_nbytes(part)
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

    Errors are raised at each shard's end.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(_FLUSH_SECONDS):
            for output in list(opened):
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
) -> Iterator[tuple[_Output, NewTensor]]:
    """Yield what is to be done, shard by shard, large tensors first; keeps `opened` up to date."""
    for shard in shards:
        output = _Output(folder / shard.name, shard, stop, completed)
        opened[:] = [*(o for o in opened if o.fd >= 0), output]
        for part in sorted(shard.parts, key=new_nbytes, reverse=True):
            yield output, part


def _finished(running: dict[Future[None], int]) -> int:
    """Wait for a task to end; return the size of those that did. Raises what one raised."""
    ended, _ = wait(running, return_when=FIRST_COMPLETED)
    failed = [f.exception() for f in ended if f.exception() is not None]
    for error in failed:
        if error is not None and not isinstance(error, _Stopped):
            raise error
    return sum(running.pop(future) for future in ended)
