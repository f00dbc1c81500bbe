"""Same bytes from every command that writes, whatever surrounds it.

Threads, the seed of hashes, locale, time zone, umask and working directory change nothing in any
file, statements included. One process per surrounding runs all commands. Only modes may follow the
umask. `test_bytes_do_not_depend_on_workers` elsewhere covers a few operations on other inputs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# Outputs by name. {llama}, {flux} and {out} are folders; {workers} is --workers=N.
COMMANDS = {
    "squeezed": "squeeze {llama}/lora -o {out}/squeezed --energy 0.9 {workers}",
    "sketched": "squeeze {llama}/lora -o {out}/sketched --rank 4 --svd rsvd {workers}",
    "linear": "merge {llama}/lora:0.5 {llama}/rslora -o {out}/linear {workers}",
    "ties": "merge {llama}/lora {llama}/rslora -o {out}/ties --method ties --rank 8 {workers}",
    "dare": "merge {llama}/lora {llama}/rslora -o {out}/dare --method dare_ties --rank 8 {workers}",
    "plain": "to-lora {llama}/dora -o {out}/plain --base {llama}/model --rank 8 {workers}",
    "dora": "to-dora {llama}/lora -o {out}/dora --base {llama}/model {workers}",
    "fused": "fuse {llama}/model {llama}/lora -o {out}/fused {workers}",
    # The adapter names its base: without --base-name, by the path on the command line.
    "extracted": "extract {llama}/model {out}/fused -o {out}/extracted --rank 8 --base-name tiny"
    " {workers}",
    "adapter.gguf": "convert {llama}/lora -o {out}/adapter.gguf --to gguf --base {llama}/model",
    "unet.safetensors": "convert {flux}/kohya.safetensors {out}/unet.safetensors --to diffusers",
    "kohya.safetensors": "convert {out}/unet.safetensors {out}/kohya.safetensors --to kohya",
    "mlx": "convert {llama}/lora -o {out}/mlx --to mlx",
    "four": "quantize {llama}/model -o {out}/four {workers}",
    "sixteen": "dequantize {out}/four -o {out}/sixteen {workers}",
    "repaired": "repair {llama}/lora -o {out}/repaired --base {llama}/model --rebalance {workers}",
    "again": "replay {out}/ties -o {out}/again --input {llama}",
    "ran": "run {recipe} -o {out}/ran {workers}",
    "small.safetensors": "squeeze {flux}/kohya.safetensors -o {out}/small.safetensors --rank 2"
    " {workers}",
    "shared.safetensors": "fleet share {llama}/lora {llama}/rslora -o {out}/shared.safetensors"
    " --rank 8 {workers}",
    "more.safetensors": "fleet add {out}/shared.safetensors {out}/squeezed --name more"
    " -o {out}/more.safetensors {workers}",
    "apart": "fleet unshare {out}/more.safetensors --all -o {out}/apart {workers}",
    "many": "fleet squeeze {llama}/*lora -o {out}/many --workers=1 -- --energy 0.8",
    "index": "fleet index {llama}/lora {llama}/rslora -o {out}/index {workers}",
    "baseline.json": "check {llama}/lora --write-baseline {out}/baseline.json {workers}",
    "page.html": "spectrum {llama}/lora --base {llama}/model --html {out}/page.html {workers}",
    **{
        name: f"merge {{llama}}/lora {{llama}}/rslora -o {{out}}/{name} --method {name} --rank 8"
        " {workers}"
        for name in (
            "breadcrumbs",
            "dare_linear",
            "della",
            "iso",
            "karcher",
            "knots",
            "magnitude_prune",
            "slerp",
            "tsv",
        )
    },
}
REPORTS = ("fleet-squeeze.jsonl",)
"""Files that say how long something took, and where."""

# In the process: all commands, one after another; their reports do not matter here.
RUN = """
import json, os, sys
job = json.load(sys.stdin)
os.umask(job["umask"])
from loratools.cli import cli
for command in job["commands"]:
    cli.main(command, standalone_mode=False)
"""

RECIPE = """version: 1
variables: {llama: LLAMA}
steps:
- {name: small, do: squeeze, source: "${llama}/lora", energy: 0.9}
- {name: both, do: merge, adapters: ["${small}", "${llama}/rslora"], method: ties, rank: 4}
"""

SURROUNDINGS = {
    "one worker": {"workers": 1},
    "two workers": {"workers": 2},
    "eight workers": {"workers": 8},
    "workers by default": {"workers": None},
    "another seed of hashes": {"PYTHONHASHSEED": "1"},
    "locale C": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "German": {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8", "LANGUAGE": "de"},
    "other time zone": {"TZ": "Pacific/Kiritimati"},
    "umask 000": {"umask": 0o000},
    "umask 077": {"umask": 0o077},
    "elsewhere": {"cwd": str(EXAMPLES)},
    "all of that": {
        "workers": 8, "PYTHONHASHSEED": "77", "LC_ALL": "C", "PYTHONUTF8": "0",
        "TZ": "America/Lima", "umask": 0o027, "cwd": str(EXAMPLES),
    },
}  # fmt: skip


def outputs(out, *, workers=1, umask=0o022, cwd=None, **environment):
    """Run all commands in one process and return the bytes of all files by command."""
    recipe = out.with_name(f"{out.name}.yaml")
    recipe.write_text(RECIPE.replace("LLAMA", str(EXAMPLES / "tiny-llama")))
    places = {"llama": EXAMPLES / "tiny-llama", "flux": EXAMPLES / "tiny-flux", "out": out}
    places["recipe"] = recipe
    threads = f"--workers={workers}" if workers else ""
    texts = {name: Path(os.path.relpath(path, cwd)) for name, path in places.items()}
    commands = [
        [word.format(**texts, workers=threads) for word in command.split()]
        for command in COMMANDS.values()
    ]
    known = {
        "PYTHONHASHSEED": "0",
        "TZ": "UTC",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps({"commands": [[w for w in c if w] for c in commands], "umask": umask}),
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        cwd=cwd,
        env=os.environ | known | environment,
    )
    assert done.returncode == 0, done.stderr
    found = {name: {} for name in COMMANDS}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        inside = path.relative_to(out)
        if path.name in REPORTS:
            continue
        name = next(n for n in COMMANDS if inside.parts[0] in (n, f"{n}.provenance.json"))
        found[name][str(inside)] = path.read_bytes()
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, inside
    assert all(found.values())
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return outputs(tmp_path_factory.mktemp("expected"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_bytes_do_not_depend_on(name, expected, tmp_path):
    found = outputs(tmp_path, **SURROUNDINGS[name])
    with_paths = {"baseline.json", "page.html"} if "cwd" in SURROUNDINGS[name] else set()
    different = {command for command in COMMANDS if found[command] != expected[command]}
    assert different <= with_paths  # which hold paths as they were given


def test_what_is_compared_holds_statements_and_weights(expected):
    for name, files in expected.items():
        if name in ("baseline.json", "index", "page.html"):
            continue
        assert any(file.endswith("provenance.json") for file in files), name
        assert any(file.endswith((".safetensors", ".gguf")) for file in files), name
