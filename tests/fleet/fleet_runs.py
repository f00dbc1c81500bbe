"""What the tests of fleets share: small adapters, the program as a process, a cluster of Dask."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
PLUGIN = HERE / "plugin"


def environment(**more):
    """Return variables for a child process: the plugin is there, and no batch system."""
    before = os.environ.get("PYTHONPATH", "")
    found = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JOB_COMPLETION"))}
    path = os.pathsep.join(filter(None, (str(PLUGIN), before)))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**found, "PYTHONPATH": path, **threads, **more}


def write_adapters(folder, count, *, rank=4, size=16, modules=2):
    """Write small PEFT folders, each with numbers of its own, and return them."""
    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        place = folder / f"a{number:04}"
        place.mkdir(parents=True)
        tensors = {}
        for module in range(modules):
            name = f"base_model.model.layers.{module}.q"
            for part, shape in (("lora_A", (rank, size)), ("lora_B", (size, rank))):
                values = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
                tensors[f"{name}.{part}.weight"] = values
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        values = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q"]}
        (place / "adapter_config.json").write_text(json.dumps(values))
        made.append(place)
    return made


def write_slow(folder, adapters, **told):
    """Write a folder for each adapter that takes its time; see the plugin."""
    made = []
    for adapter in adapters:
        place = folder / adapter.name
        place.mkdir(parents=True)
        (place / "slow.json").write_text(json.dumps({"source": str(adapter), **told}))
        made.append(place)
    return made


def start(*arguments, cwd, **more):
    """Start `loratools` as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "loratools", *map(str, arguments)],
        cwd=cwd, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(*arguments, cwd, **more):
    """Run `loratools` as a process; returns the exit code, and both streams."""
    process = start(*arguments, cwd=cwd, **more)
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def fleet(*arguments, cwd, code=0, **more):
    """Run a fleet as a process, and return its result."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given = ["fleet", *arguments[:cut], "--json", *arguments[cut:]]
    returned, out, err = run(*given, cwd=cwd, **more)
    assert returned == code, err or out
    return json.loads(out)


def contents(folder, *, manifests=False):
    """Return the bytes of all files below a folder, by name; without manifests."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (manifests or path.suffix != ".jsonl")
    }


def wait_until(condition, seconds=60):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Cluster:
    """A scheduler and workers of Dask, each a process on loopback.

    Args:
        folder: for their files.
        workers: how many.
        more: further variables of theirs.
        options: of `dask scheduler`.
    """

    def __init__(self, folder, workers, more=None, options=()):
        self._folder, self.address, self._more = folder, None, more or {}
        self._workers = workers
        self._processes = []
        file = folder / "scheduler.json"
        self._start("scheduler", "--host", "127.0.0.1", "--port", "0",
                    "--scheduler-file", file, "--no-dashboard", *options)  # fmt: skip
        try:
            wait_until(file.exists)
        except BaseException:
            self.close()
            raise
        self.address = json.loads(file.read_text())["address"]
        for _ in range(workers):
            self._start("worker", self.address, "--nthreads", "1", "--no-dashboard",
                        "--host", "127.0.0.1", "--local-directory", folder)  # fmt: skip

    def _start(self, kind, *arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", kind, *map(str, arguments)], cwd=self._folder,
            env=environment(**self._more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self._processes.append(process)

    def pids(self):
        """Return the processes that do the work, below their nannies."""
        from distributed import Client

        with Client(self.address) as client:
            client.wait_for_workers(self._workers, timeout=60)  # on a busy machine they come late
            return list(client.run(os.getpid).values())

    def close(self):
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
