"""Names, places and streams: which must work, and which are refused with nothing changed."""

import json
import os
import shutil

import pytest
import torch
from safetensors.numpy import load_file

WEIGHTS, CONFIG, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
WRITTEN = {WEIGHTS, CONFIG, "provenance.json"}


@pytest.fixture
def source(make_folder):
    return make_folder()


def assert_squeezed(out):
    """Check that a folder holds a whole adapter of rank 2."""
    assert set(os.listdir(out)) == WRITTEN
    shapes = sorted(tensor.shape for tensor in load_file(out / WEIGHTS).values())
    assert shapes == [(2, 20), (24, 2)]
    assert json.loads((out / CONFIG).read_text())["r"] == 2


def assert_done(run, out):
    assert run.code == 0
    assert run.remarks == []
    assert_squeezed(out)


def content(folder):
    """Return everything below a folder: the bytes of files, the targets of links."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


ODD_NAMES = {
    "spaces": "with  space ",
    "dash": "-leading",
    "option": "--rank=3",
    "unicode": "Adapter-模型-ß",
    "255 bytes": "n" * 255,
    "255 bytes of 3-byte characters": "模" * 85,
    "not UTF-8": os.fsdecode(b"\xff\xfe-latin"),
    "newline": "two\nlines",
    "escape": "red\x1b[31m",
    "weights": "adapter_model.v2",
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_names(name, source, tmp_path, loratools):
    place = tmp_path / "in"
    place.mkdir()
    source.rename(place / name)
    out = tmp_path / name
    run = loratools("squeeze", "--rank", "2", f"--output={name}", "--", f"in/{name}", cwd=tmp_path)
    assert run.code == 0
    assert_squeezed(out)
    assert all(line.isprintable() for line in run.err.splitlines())
    assert len(run.err.splitlines()) == 1
    again = loratools("squeeze", "--rank", "2", f"--output={name}", f"./in/{name}", cwd=tmp_path)
    assert again.code == 2
    (line,) = again.err.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()


def test_paths_of_weight_files(source, tmp_path, loratools):
    run = loratools("squeeze", source / WEIGHTS, "-o", tmp_path / "out", "--rank", "2")
    assert_done(run, tmp_path / "out")


def test_hugging_face_cache(source, tmp_path, loratools):
    snapshot = tmp_path / "models--user--repo" / "snapshots" / "abc"
    blobs = tmp_path / "models--user--repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(source.iterdir()):
        file.rename(blobs / f"{index}")
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    assert_done(loratools("squeeze", snapshot, "-o", tmp_path / "o", "--rank", "2"), tmp_path / "o")


def test_links_inside_the_folder_and_to_it(source, tmp_path, loratools):
    (source / WEIGHTS).rename(source / "w")
    (source / WEIGHTS).symlink_to("w")
    (tmp_path / "link").symlink_to(source)
    run = loratools("squeeze", tmp_path / "link", "-o", tmp_path / "out", "--rank", "2")
    assert_done(run, tmp_path / "out")


def test_pickle_beside_safetensors_is_noted(source, tmp_path, loratools):
    (source / PICKLED).write_bytes(b"never opened")
    run = loratools("squeeze", source, "-o", tmp_path / "out", "--rank", "2")
    assert_done(run, tmp_path / "out")
    assert f"note: {PICKLED} lies beside" in run.err


def test_notes_of_hostile_names(source, tmp_path, loratools):
    shutil.copytree(source, source / "sub\nerror: \x1b[31mred")
    run = loratools("squeeze", source, "-o", tmp_path / "out", "--rank", "2")
    assert_done(run, tmp_path / "out")
    assert all(line.isprintable() for line in run.err.splitlines())


MARKER = "open({!r}, 'w').close()\n"


def test_auto_mapping_is_not_imported(make_folder, tmp_path, loratools):
    marker = tmp_path / "marker"
    (tmp_path / "evil.py").write_text(MARKER.format(str(marker)))
    mapping = {"base_model_class": "Model", "parent_library": "evil"}
    folder = make_folder(auto_mapping=mapping)
    run = loratools(
        "squeeze", folder, "-o", "out", "--rank", "2", cwd=tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert_done(run, tmp_path / "out")
    assert not marker.exists()


def test_pickle_with_modules_of_its_own(source, tmp_path, loratools):
    """Squeezing the current folder must import nothing from it."""
    tensors = load_file(source / WEIGHTS)
    torch.save(
        {name: torch.from_numpy(tensor.astype("f4")) for name, tensor in tensors.items()},
        source / PICKLED,
    )
    (source / WEIGHTS).unlink()
    marker = tmp_path / "marker"
    for name in ("torch", "safetensors", "zipfile", "re"):
        (source / f"{name}.py").write_text(MARKER.format(str(marker)))
    run = loratools("squeeze", ".", "-o", "../out", "--rank", "2", cwd=source)
    assert_done(run, tmp_path / "out")
    assert not marker.exists()


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_locale(locale, source, tmp_path, loratools):
    out = tmp_path / "模"
    run = loratools("squeeze", source, "-o", out, "--rank", "2", LC_ALL=locale, PYTHONUTF8="0")
    assert_done(run, out)
    assert "8" in run.out


# Where nothing may be written.


def existing_folder(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("not empty, which would be taken")
    return tmp_path / "out"


def existing_file(source, tmp_path):
    (tmp_path / "out").write_text("mine")
    return tmp_path / "out"


def existing_link(source, tmp_path):
    (tmp_path / "out").symlink_to("nothing")
    return tmp_path / "out"


def below_a_file(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file" / "out"


def name_too_long(source, tmp_path):
    return tmp_path / ("n" * 256)


PLACES = {
    "an existing folder": (existing_folder, "exists"),
    "an existing file": (existing_file, "exists"),
    "a dangling link": (existing_link, "exists"),
    "the input": (lambda source, tmp_path: source, "exists"),
    "inside the input": (lambda source, tmp_path: source / "out", "inside the input"),
    "around the input": (lambda source, tmp_path: tmp_path, "exists"),
    "below a file": (below_a_file, "file"),
    "a name too long": (name_too_long, "long"),
}


@pytest.mark.parametrize("place", PLACES)
def test_refused_places(place, source, tmp_path, loratools):
    choose, word = PLACES[place]
    out = choose(source, tmp_path)
    before = content(tmp_path)
    run = loratools("squeeze", source, "-o", out, "--rank", "2")
    assert run.code == 2
    (line,) = run.err.splitlines()
    assert line.startswith("error: ")
    assert "--traceback" not in line
    assert word in line
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "foreign", "around", "link to itself"])
def test_refused_in_spite_of_overwrite(kind, source, tmp_path, loratools):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "foreign":
        out.mkdir()
        (out / "training_args.bin").write_text("mine")
    elif kind == "around":
        out = tmp_path
    else:
        out.symlink_to("out")
    before = content(tmp_path)
    run = loratools("squeeze", source, "-o", out, "--rank", "2", "--overwrite")
    assert run.code == 2
    (line,) = run.err.splitlines()
    assert line.startswith("error: ")
    assert "--traceback" not in line
    assert content(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(source, tmp_path, loratools):
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    run = loratools("squeeze", source, "-o", place / "out", "--rank", "2")
    assert run.code == 2
    assert "Permission denied" in run.err
    assert os.listdir(place) == []


def test_output_is_the_input(source, tmp_path, loratools):
    before = content(source)
    run = loratools("squeeze", source, "-o", source, "--rank", "2", "--overwrite")
    assert (run.code, content(source)) == (2, before)
    assert "inputs are never changed" in run.err
    run = loratools("squeeze", source, "--in-place", "--rank", "2")
    assert_done(run, source)
    assert os.listdir(tmp_path) == [source.name]


def test_output_link_is_followed(source, tmp_path, loratools):
    (tmp_path / "link").symlink_to("real")
    shutil.copytree(source, tmp_path / "real")
    run = loratools("squeeze", source, "-o", tmp_path / "link", "--rank", "2", "--overwrite")
    assert_done(run, tmp_path / "real")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("room", [1, 4096, 100_000, 229_500])
@pytest.mark.parametrize("old", [False, True])
def test_disk_full(room, old, make_folder, tmp_path, loratools):
    """A limit on the size of files stands in for a full disk."""
    source, out = make_folder(modules={"q": (4096, 4096, 8)}, dtype="f32"), tmp_path / "out"
    if old:
        shutil.copytree(source, out)
    before = content(tmp_path)
    run = loratools(
        *("squeeze", source, "-o", out, "--rank", "7", "--overwrite"),
        stdout="/dev/null",
        limits={"RLIMIT_FSIZE": room},
    )
    assert run.code == 2
    assert content(tmp_path) == before
    (line,) = run.err.splitlines()
    assert line.startswith("error: ")
    assert "File too large" in line


def test_stdout_closed(source, tmp_path, loratools):
    run = loratools("squeeze", source, "-o", tmp_path / "out", "--rank", "2", stdout="closed")
    assert_done(run, tmp_path / "out")


def test_stdout_without_reader(source, tmp_path, loratools):
    how = {"stdout": "without reader"}
    run = loratools("squeeze", source, "-o", tmp_path / "out", "--rank", "2", **how)
    assert_squeezed(tmp_path / "out")
    assert run.remarks == []
    assert run.code == 0


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_stdout_full(source, tmp_path, loratools, more):
    run = loratools("info", source, *more, stdout="/dev/full")
    assert run.code == 2
    assert run.err.splitlines() == ["error: No space left on device"]


def test_stdout_full_when_the_error_is_told(tmp_path, loratools):
    run = loratools("info", tmp_path / "no", "--json", stdout="/dev/full")
    assert run.code == 2
    assert run.err.splitlines() == [f"error: {tmp_path / 'no'}: no such file or folder"]
