"""Files that may be anything: opened without blocking, held, and watched for change."""

import hashlib
import os
import pathlib
import socket
import threading

import pytest

from loratools_formats.disk.errors import AdapterError, MissingFileError
from loratools_formats.disk.files import RegularFile, inside, read_small_file
from loratools_formats.disk.first_bytes import refuse_other_file


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16)
    return path


def test_read_at(path):
    file = RegularFile(path)
    assert file.nbytes == 4096
    assert file.read_at(250, 10) == bytes([*range(250, 256), *range(4)])
    assert file.read_at(4096, 0) == b""
    file.check_unchanged()


def test_reads_past_the_end(path):
    file = RegularFile(path)
    for offset, nbytes in ((4090, 7), (4096, 1), (1 << 62, 1)):
        with pytest.raises(AdapterError, match="ended"):
            file.read_at(offset, nbytes)


def test_short_reads_are_completed(path, monkeypatch):
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: original(fd, min(count, 100), at))
    assert RegularFile(path).read_at(0, 4096) == path.read_bytes()


def test_without_pread(path, monkeypatch):
    monkeypatch.delattr(os, "pread")
    file = RegularFile(path)
    assert file.read_at(10, 5) == bytes(range(10, 15))
    with pytest.raises(AdapterError, match="ended"):
        file.read_at(4090, 7)


def test_errors_of_the_disk(path, monkeypatch):
    file = RegularFile(path)

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(AdapterError, match="Input/output error"):
        file.read_at(0, 1)


def test_digest(path):
    assert RegularFile(path).sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_keeps_the_file_it_opened(path):
    file = RegularFile(path)
    path.unlink()
    path.write_bytes(b"another")
    assert file.read_at(0, 4) == bytes(range(4))


@pytest.mark.parametrize("change", ["write", "append", "truncate", "touch"])
def test_changes_are_seen(change, path):
    file = RegularFile(path)
    if change == "write":
        os.utime(path, ns=(0, 0))
        file = RegularFile(path)
        path.write_bytes(path.read_bytes()[::-1])
    elif change == "append":
        path.write_bytes(path.read_bytes() + b"x")
    elif change == "truncate":
        os.truncate(path, 4095)
    else:
        os.utime(path, ns=(0, 0))
    with pytest.raises(AdapterError, match="changed"):
        file.check_unchanged()


def test_closed(path):
    file = RegularFile(path)
    file.close()
    file.close()
    with pytest.raises(AdapterError):
        file.read_at(0, 1)


def test_descriptors_are_closed_with_their_objects(path):
    before = os.listdir("/dev/fd")
    held = [RegularFile(path) for _ in range(5)]
    assert len(os.listdir("/dev/fd")) == len(before) + 5
    held.clear()
    assert os.listdir("/dev/fd") == before


def test_not_passed_on_to_children(path):
    file = RegularFile(path)
    assert not os.get_inheritable(file._fd)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socket"])
def test_no_regular_file(kind, tmp_path, monkeypatch):
    target = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    elif kind == "device":
        target = pathlib.Path("/dev/zero")
    else:
        monkeypatch.chdir(tmp_path)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x")
    with pytest.raises(AdapterError) as caught:
        RegularFile(target)
    assert caught.value.path == str(target)


def test_a_fifo_with_a_writer_is_not_read(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    opened = threading.Event()

    def write():
        with open(fifo, "wb"):
            opened.set()

    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    assert opened.wait(5)
    with pytest.raises(AdapterError, match="not a regular file"):
        RegularFile(fifo)
    thread.join(30)
    assert not thread.is_alive()
    os.close(reader)


@pytest.mark.parametrize("name", ["missing", "nul\0byte", "missing/below"])
def test_missing(name, tmp_path):
    with pytest.raises(MissingFileError) as caught:
        RegularFile(tmp_path / name)
    assert isinstance(caught.value, FileNotFoundError)
    assert str(caught.value).isprintable()


def test_names_that_cannot_be(path, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in ("n" * 256, "file/below", "loop"):
        with pytest.raises(AdapterError, match="cannot be opened"):
            RegularFile(tmp_path / name)


def test_small_files(path):
    assert read_small_file(path, 4096) == path.read_bytes()
    with pytest.raises(AdapterError, match="too large"):
        read_small_file(path, 4095)


def test_lfs_pointers():
    with pytest.raises(AdapterError, match="git lfs pull"):
        refuse_other_file(b"version https://git-lfs.github.com/spec/v1\noid", 46, "x")
    refuse_other_file(b"{}", 2, "x", is_text=True)


class TestInside:
    """Symbolic links may not lead out of an adapter's folder."""

    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "models--user--repo" / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (folder / "plain").write_text("")
        (tmp_path / "secret").write_text("")
        blobs = tmp_path / "models--user--repo" / "blobs"
        blobs.mkdir()
        (blobs / "0123").write_text("")
        return folder

    @pytest.mark.parametrize("target", ["plain", "../abc/plain", "../../blobs/0123", "missing"])
    def test_allowed(self, target, folder):
        (folder / "link").symlink_to(target)
        assert inside(folder, "link") == folder / "link"

    @pytest.mark.parametrize(
        "target", ["/dev/zero", "../../../secret", "../../../models--user--repo2", "/"]
    )
    def test_refused(self, target, folder):
        (folder / "link").symlink_to(target)
        with pytest.raises(AdapterError, match="leads out"):
            inside(folder, "link")

    def test_chain_of_links(self, folder):
        (folder / "one").symlink_to("two")
        (folder / "two").symlink_to("../../../secret")
        with pytest.raises(AdapterError, match="leads out"):
            inside(folder, "one")

    def test_blobs_of_a_folder_that_is_no_cache(self, folder):
        plain = folder.parents[1].rename(folder.parents[2] / "models")
        (plain / "snapshots" / "abc" / "link").symlink_to("../../blobs/0123")
        with pytest.raises(AdapterError, match="leads out"):
            inside(plain / "snapshots" / "abc", "link")

    def test_folder_reached_by_a_link(self, folder, tmp_path):
        (tmp_path / "alias").symlink_to(folder)
        (folder / "link").symlink_to("plain")
        assert inside(tmp_path / "alias", "link") == tmp_path / "alias" / "link"
