"""Files that change while they are used: copies of one moment, and names that lead elsewhere."""

import os

import pytest

from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk import files
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile, copy_whole


def test_a_file_that_is_replaced_or_goes_is_in_place_no_more(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    file = RegularFile(path)
    file.check_in_place()
    (tmp_path / "y").write_bytes(b"two")
    os.replace(tmp_path / "y", path)
    file.check_unchanged()
    with pytest.raises(AdapterError, match="replaced"):
        file.check_in_place()
    path.unlink()
    with pytest.raises(AdapterError, match="went away"):
        file.check_in_place()


def test_a_copy_is_of_one_moment(tmp_path, monkeypatch):
    source, size = tmp_path / "x", 1 << 20
    source.write_bytes(b"a" * size)
    copy_whole(source, tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == b"a" * size

    def written_meanwhile(*_):
        with source.open("r+b") as file:
            file.write(b"b")
        os.utime(source, ns=(1, 1))
        return 0

    monkeypatch.setattr(files, "_copied_in_kernel", written_meanwhile)
    with pytest.raises(AdapterError, match="changed while"):
        copy_whole(source, tmp_path / "z")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_checkpoint_is_held_to_the_configuration_and_index_that_were_read(name, tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.ones(2, "f4")}, tmp_path / "model-1.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "model-1.safetensors"}}'
    )
    base = read_checkpoint(tmp_path)
    base.check_unchanged()
    (tmp_path / "other").write_text("{}")
    os.replace(tmp_path / "other", tmp_path / name)
    with pytest.raises(AdapterError, match="replaced"):
        base.check_unchanged()
