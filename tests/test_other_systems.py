"""Windows has no POSIX modules and calls: everything imports, and commands run, without them."""

import subprocess
import sys
from pathlib import Path

import pytest

LLAMA = Path(__file__).parents[1] / "examples" / "tiny-llama"
# What Python has on POSIX only; the standard library itself needs `posix`, which stays.
MODULES = ("fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty", "pty", "readline")
CALLS = (
    "chown", "copy_file_range", "fchmod", "fchown", "fork", "getpgid", "getuid", "killpg",
    "memfd_create", "mkfifo", "posix_fallocate", "posix_fadvise", "pread", "preadv", "pwrite",
    "pwritev", "sched_getaffinity", "setsid", "statvfs", "sysconf", "uname",
    "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK", "O_NOCTTY",
)  # fmt: skip
SIGNALS = ("SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "alarm", "setitimer", "ITIMER_PROF")
WITHOUT = f"""
import os, signal, subprocess, sys
# Other packages ask for the system that is really here.
import click, ml_dtypes, msgspec, multiprocessing.pool, numpy, platform, safetensors.numpy
import shutil, tempfile, threadpoolctl, threading, tqdm, yaml
class Blocked:
    def find_spec(self, name, *_):
        if name in {MODULES}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
for name in {MODULES}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Blocked())
def run(*arguments):
    from loratools.cli import cli
    with cli.make_context("loratools", list(arguments)) as context:
        code = cli.invoke(context)
    assert not code, (arguments, code)
"""
REMOVE = f"""
for name in {CALLS}:
    os.__dict__.pop(name, None)
for name in {SIGNALS}:
    signal.__dict__.pop(name, None)
"""
# transformers, which training imports, is not ours to judge.
IMPORT_ALL = """
import importlib, pkgutil, loratools, loratools_formats
OTHERS = (".page.plot", "loratools.training")
for package in (loratools, loratools_formats):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__") and not any(o in found.name for o in OTHERS):
            importlib.import_module(found.name)
"""


def child(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_module_imports_without_posix_modules(tmp_path):
    child(WITHOUT + REMOVE + IMPORT_ALL, tmp_path)


@pytest.mark.slow
def test_commands_run_without_posix_calls(tmp_path):
    runs = [
        ["squeeze", f"{LLAMA}/lora", "-o", "small", "--rank", "4"],
        ["fuse", f"{LLAMA}/model", "small", "-o", "fused"],
        ["verify", "fused", f"{LLAMA}/model", "small"],
        ["quantize", f"{LLAMA}/model", "-o", "nf4"],
        ["extract", f"{LLAMA}/model", "fused", "-o", "again", "--rank", "4"],
        ["merge", f"{LLAMA}/lora", f"{LLAMA}/rslora", "-o", "both", "--rank", "8"],
        ["convert", "small", "mlx", "--to", "mlx"],
        ["squeeze", f"{LLAMA}/lora", "-o", "small", "--rank", "2", "--overwrite"],
        ["check", "small", "--no-config", "--fail-on", "never"],
        ["replay", "both", "--input", f"{LLAMA}"],
    ]
    calls = "".join(f"run(*{arguments})\n" for arguments in runs)
    child(WITHOUT + REMOVE + calls, tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"small", "fused", "nf4", "again", "both", "mlx"}
