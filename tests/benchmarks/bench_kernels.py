"""Bytes of outputs under each matrix kernel that OpenBLAS can be told to use here.

Every command runs once under each kernel, and once with NumPy's own vector code held to SSE4.2.
What differs from the first kernel is counted in stored values and measured in ‖ΔW‖.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import synthetic_base
from report import Report, Row, Table, Target

from loratools_formats.containers.safetensors_read import read_safetensors

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
KERNELS = ("Haswell", "SkylakeX", "Zen", "Nehalem")
NARROW = "Nehalem, NumPy at SSE4.2"
_WIDE_FEATURES = "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"

TINY = {
    "squeeze, bf16": "squeeze LORA --rank 8",
    "squeeze, f32": "squeeze LORA --rank 8 --dtype f32",
    "squeeze, rsvd, f32": "squeeze LORA --rank 8 --dtype f32 --method rsvd",
    "merge, linear, all ranks": "merge LORA:0.7 RSLORA:0.3",
    "merge, linear, energy 0.9": "merge LORA:0.7 RSLORA:0.3 --energy 0.9",
    "merge, ties": "merge LORA RSLORA --method ties --density 0.3 --rank 16",
    "to-lora of a DoRA": "to-lora DORA --base MODEL --rank 8",
    "to-dora": "to-dora LORA --base MODEL",
    "fuse, as the base": "fuse MODEL LORA",
    "fuse, f32": "fuse MODEL LORA --dtype f32",
    "fuse of a DoRA": "fuse MODEL DORA",
    "extract": "extract MODEL fuse-as-the-base --rank 8",
    "quantize": "quantize MODEL",
    "dequantize": "dequantize quantize",
}
LARGE = {
    "squeeze, f32": "squeeze LARGE --rank 16 --dtype f32",
    "squeeze, rsvd, f32": "squeeze LARGE --rank 16 --dtype f32 --method rsvd",
    "merge, linear, f32": "merge LARGE:0.7 OTHER:0.3 --rank 16 --dtype f32",
    "fuse, as the base": "fuse BASE ADAPTER",
    "fuse, f32": "fuse BASE ADAPTER --dtype f32",
    "extract, f32": "extract BASE fuse-f32 --rank 16 --dtype f32",
}


def run(workdir: Path) -> Report:
    """Run every command under every kernel and compare what they wrote."""
    settings = {kernel: {"OPENBLAS_CORETYPE": kernel} for kernel in KERNELS}
    settings[NARROW] = settings["Nehalem"] | {"NPY_DISABLE_CPU_FEATURES": _WIDE_FEATURES}
    first, *others = settings
    inputs = _inputs(workdir)
    used = {name: _architecture(extra) for name, extra in settings.items()}
    tables, repeated = [], True
    for title, commands in (
        ("examples/tiny-llama", TINY),
        ("two layers of a 7B-shaped and a 1.1B-shaped Llama", LARGE),
    ):
        where = workdir / str(len(tables))
        made = {
            name: _outputs(where / used_as(name), commands, inputs, extra)
            for name, extra in settings.items()
        }
        again = _outputs(where / "again", commands, inputs, settings[first], workers=1)
        repeated &= all(_bytes(made[first][name]) == _bytes(again[name]) for name in commands)
        rows = [
            Row(name, [_difference(made[first][name], made[other][name]) for other in others])
            for name in commands
        ]
        tables.append(Table(title, ["command", *others], rows))
        shutil.rmtree(where)
    return Report(
        title="the same bytes: across kernels and processors",
        text="Share of the stored values that differ from those written under Haswell's kernel,\n"
        "and the difference ‖Δ − Δ'‖/‖Δ‖ of all changes, or of all weights of a model. All ran on\n"
        "one processor; OpenBLAS took for each name the kernel that it has: "
        + ", ".join(f"{name} → {kernel}" for name, kernel in used.items())
        + ".",
        targets=[
            Target(
                "equal bytes under one kernel with 1 worker and with 2",
                f"{len(TINY) + len(LARGE)} commands compared",
                repeated,
            )
        ],
        tables=tables,
    )


def _inputs(workdir: Path) -> dict[str, Path]:
    """Make the larger inputs; return all of them by the names that the commands have for them."""
    synthetic.make(workdir / "large", 64, layers=2)
    synthetic.make(workdir / "other", 64, layers=2, seed=1)
    synthetic_base.make_base(workdir / "base", 2)
    synthetic_base.make_adapter(workdir / "adapter", 2)
    named = {name.upper(): workdir / name for name in ("large", "other", "base", "adapter")}
    return named | {n.upper(): EXAMPLES / n for n in ("lora", "rslora", "dora", "model")}


def used_as(name: str) -> str:
    """Return a setting's name as that of a folder."""
    return name.replace(" ", "-").replace(",", "")


def _architecture(extra: dict[str, str]) -> str:
    code = (
        "import numpy, threadpoolctl; "
        "print(*(i['architecture'] for i in threadpoolctl.threadpool_info()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | extra, capture_output=True, text=True
    )
    return done.stdout.strip()


def _outputs(
    folder: Path,
    commands: dict[str, str],
    inputs: dict[str, Path],
    extra: dict[str, str],
    workers: int = 2,
) -> dict[str, Path]:
    folder.mkdir(parents=True)
    made: dict[str, Path] = {}
    for name, command in commands.items():
        made[name] = folder / used_as(name)
        words = [_found(word, inputs, folder) for word in command.split()]
        words += ["-o", str(made[name]), "--quiet", "--workers", str(workers)]
        code = "from loratools.cli import main; main()"
        subprocess.run([sys.executable, "-c", code, *words], env=os.environ | extra, check=True)
        if not _files(made[name]):
            raise RuntimeError(f"{command} wrote no weights")
    return made


def _found(word: str, inputs: dict[str, Path], folder: Path) -> str:
    """Return an input's path for its name, with the weight after it, or an earlier output's."""
    name, colon, weight = word.partition(":")
    if name in inputs:
        return f"{inputs[name]}{colon}{weight}"
    return str(folder / word) if (folder / word).is_dir() else word


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _bytes(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in _files(folder)]


def _difference(before: Path, after: Path) -> str:
    """Return how many stored values differ, and by how much the changes do."""
    if _bytes(before) == _bytes(after):
        return "same bytes"
    old, new = _tensors(before), _tensors(after)
    differing = sum(int(np.count_nonzero(old[key] != new[key])) for key in old)
    total = sum(value.size for value in old.values())
    lost = norm = 0.0
    for (_, was), (_, now) in zip(_changes(old), _changes(new), strict=True):
        lost += float(np.sum((was - now) ** 2))
        norm += float(np.sum(was**2))
    return f"{differing / total:.2%}, {(lost / norm) ** 0.5:.1e}"


def _tensors(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in _files(folder):
        stored = read_safetensors(path).tensors
        found |= {key: tensor.load(np.float64) for key, tensor in stored.items()}
    return found


def _changes(tensors: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield ΔW of every pair of factors of scale 1, and every other tensor as it is."""
    for key, value in sorted(tensors.items()):
        if ".lora_A." in key:
            yield key, tensors[key.replace(".lora_A.", ".lora_B.")] @ value
        elif ".lora_B." not in key:
            yield key, value
