"""Describe the machine and the software that a benchmark ran on, naming no folder of it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

_LIBRARIES = """
import json, numpy, threadpoolctl, torch
blas = [f"{i['internal_api']} {i['version']} ({i.get('architecture') or i['prefix']})"
        for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"]
config = torch.__config__.show().splitlines()
mkl = [line.strip(" -") for line in config if "Kernel Library" in line]
print(json.dumps({
    "numpy": numpy.__version__, "numpy_blas": ", ".join(blas), "torch": torch.__version__,
    "torch_blas": ", ".join(mkl) or "not MKL", "torch_threads": torch.get_num_threads(),
}))
"""


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _system() -> str:
    with contextlib.suppress(OSError):
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
        return f"{name}, {platform.system()} {platform.release()}"
    return platform.platform()


def _revision() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = bool(git("status", "--porcelain", ":/loratools", ":/formats"))
    except OSError:
        return "unknown"
    return f"{commit or 'unknown'}{', with uncommitted changes' if changed else ''}"


def describe() -> list[str]:
    """Return lines about processor, memory, system, versions and how busy the machine is."""
    found = subprocess.run([sys.executable, "-c", _LIBRARIES], capture_output=True, check=True)
    versions = json.loads(found.stdout)
    torch = f"torch {versions['torch']}, {versions['torch_threads']} threads"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return [
        f"Processor: {_cpu()}, {os.cpu_count()} cores, {platform.machine()}; {memory:.0f} GiB RAM",
        f"System: {_system()}; Python {platform.python_version()}",
        f"NumPy {versions['numpy']}, BLAS: {versions['numpy_blas']}",
        f"{torch}, BLAS: {versions['torch_blas']}",
        f"loratools: commit {_revision()}",
        f"Load average when started: {os.getloadavg()[0]:.2f}",
    ]
