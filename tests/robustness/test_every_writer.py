"""Every command that writes, with each of its system calls failing in turn.

After each: one error of ours, the old output or the new one, whole; inputs bit for bit as they
were; nothing else left. The suite tries a sample of calls; FAULTS_PER_COMMAND=100000 all of them.
"""

import contextlib
import os
import shutil
from pathlib import Path

import faults
import pytest
from fuse_bases import state

import loratools
from loratools_formats.disk.errors import LoratoolsError

LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"
SINGLE = Path(__file__).parents[1] / "golden" / "singlefile" / "xlabs.safetensors"
LORA, DORA, MODEL = LLAMA / "lora", LLAMA / "dora", LLAMA / "model"
SAMPLES = int(os.environ.get("FAULTS_PER_COMMAND", "4"))

WRITERS = {
    "squeeze a folder": lambda out, rank: loratools.squeeze(LORA, rank=rank, **out("lora")),
    "squeeze a file": lambda out, rank: loratools.squeeze(
        SINGLE, rank=rank, **out("x.safetensors")
    ),
    "convert": lambda out, rank: loratools.convert(
        LORA, to="gguf", base=MODEL, dtype=("f16", "f32")[rank - 1], **out("x.gguf")
    ),
    "merge": lambda out, rank: loratools.merge({LORA: 1.0}, rank=rank, **out("merged")),
    "to_lora": lambda out, rank: loratools.to_lora(DORA, base=MODEL, rank=rank, **out("plain")),
    "fuse": lambda out, rank: loratools.fuse(MODEL, {LORA: rank / 2}, **out("fused")),
}


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_each_call_that_fails(name, overwrite, tmp_path, monkeypatch):
    write = WRITERS[name]
    inputs = [state(path) for path in (LORA, DORA, MODEL, SINGLE.parent)]

    def work(rank, *, again=False):
        write(lambda file: {"output": tmp_path / file, "overwrite": again}, rank)

    empty = {}
    if overwrite:
        work(1)
        empty = tree(tmp_path)
    with monkeypatch.context() as patch:
        made = faults.watch(patch)
        work(2, again=overwrite)
    new = tree(tmp_path)
    assert new != empty
    places = sorted({round(i * (len(made) - 1) / max(1, SAMPLES - 1)) for i in range(SAMPLES)})
    for place in places:
        reset(tmp_path, work, overwrite=overwrite)
        before = tree(tmp_path)
        with monkeypatch.context() as patch:
            made = faults.watch(patch, place)
            with contextlib.suppress(LoratoolsError):
                work(2, again=overwrite)
        # A run may make a call less, where the system copies more at once.
        allowed = (before, new) if len(made) > place else (new,)
        assert tree(tmp_path) in allowed, f"{name}: call {place} of {made}"
    assert [state(path) for path in (LORA, DORA, MODEL, SINGLE.parent)] == inputs


def tree(folder):
    """Return the bytes of all files in a folder but the statements, which hold times."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not path.name.endswith("provenance.json")
    }


def reset(folder, work, *, overwrite):
    """Leave the folder as it was before the work."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if overwrite:
        work(1)
