"""What the system does to a running command: signals that end it, calls that it does not have."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

RNG = np.random.default_rng(0)
PREFIX = "base_model.model.model.layers.{}.mlp.up_proj"


def run(*arguments, code="from loratools.cli import main; main()", **settings):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
    )


def adapter(path, layers, in_, out, rank):
    path.mkdir()
    tensors = {}
    for layer in range(layers):
        name = PREFIX.format(layer)
        tensors[f"{name}.lora_A.weight"] = RNG.standard_normal((rank, in_)).astype("f4")
        tensors[f"{name}.lora_B.weight"] = RNG.standard_normal((out, rank)).astype("f4")
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["up_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_leaves_nothing_behind(tmp_path, name):
    source = adapter(tmp_path / "lora", 16, 1024, 2048, 32)
    (tmp_path / "out").mkdir()
    command = ["squeeze", source, "-o", tmp_path / "out" / "small", "--energy", "0.999", "-q"]
    process = run(*command)
    while process.poll() is None and not os.listdir(tmp_path / "out"):
        time.sleep(0.002)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=300)
    left = os.listdir(tmp_path / "out")
    number = getattr(signal, name)
    if process.returncode != 0:  # else it was done before
        assert process.returncode == (130 if name == "SIGINT" else 128 + number)
        assert "Traceback" not in errors
        assert left == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shortens a pipe, as Linux can")
@pytest.mark.parametrize("form", [["--json"], []])
def test_a_signal_ends_a_command_whose_reader_is_slow(tmp_path, form):
    """What was printed before stays, and no second object follows half of the first."""
    import fcntl

    source = adapter(tmp_path / "lora", 300, 4, 4, 1)
    command = [sys.executable, "-m", "loratools", "spectrum", str(source), *form]
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    while not select.select([reader], [], [], 0.1)[0]:
        assert process.poll() is None
    time.sleep(0.5)  # until the pipe is full
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "interrupted\n")
    with open(reader, "rb") as told:
        assert len(told.read()) <= 4096


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_that_the_shell_ignores_stays_ignored(tmp_path):
    """`nohup` sets SIGHUP to be ignored."""
    code = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from loratools.cli import signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signals.stop_on_signals()\n"
        "os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    )
    assert run(code=code).communicate(timeout=60)[0] == "alive\n"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_meets_a_destructor_stops_the_run_all_the_same(name):
    """Python throws away what is raised in one, and would go on."""
    code = (
        "import os, signal, time\n"
        "from loratools.cli import signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signals.stop_on_signals()\n"
        "class Removed:\n"
        "    def __del__(self):\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        time.sleep(0.1)\n"
        "try:\n"
        "    Removed()\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped')\n"
    )
    told, errors = run(code=code).communicate(timeout=60)
    assert (told, errors) == ("stopped\n", "")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("place", ["threading", "concurrent.futures._base", "importlib._bootstrap"])
def test_a_signal_leaves_no_lock_taken_that_threads_wait_for(place):
    """`Condition.__enter__` takes a lock in Python code, and may be interrupted there."""
    code = (
        "import os, signal, threading, time\n"
        "from loratools.cli import signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signals.stop_on_signals()\n"
        "held, done = threading.Lock(), []\n"
        "def take():\n"
        "    held.acquire()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    done.append(1)\n"
        "class Taken:\n"
        "    def __enter__(self):\n"
        "        take()\n"
        "        done.append(2)\n"
        "    def __exit__(self, *_):\n"
        "        held.release()\n"
        "def start():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    threading.Event().wait(0.1)\n"
        "    done.append(3)\n"
        f"names = {{**globals(), '__name__': {place!r}}}\n"
        "taken = type(take)(take.__code__, names)\n"
        "Taken.__enter__ = type(take)(Taken.__enter__.__code__, {**names, 'take': taken})\n"
        "try:\n"
        "    with Taken(): time.sleep(60)\n"
        "except KeyboardInterrupt: print(held.locked(), done)\n"
        "try:\n"
        "    type(take)(start.__code__, {**names, '__name__': 'threading'})()\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt: print(done)\n"
    )
    told, errors = run(code=code).communicate(timeout=60)
    assert (told, errors) == ("False [1, 2]\n[1, 2, 3]\n", "")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_stopped_run_that_hangs_ends_all_the_same():
    code = (
        "import os, signal, time\n"
        "from loratools.cli import signals\n"
        "signals._LAST_SECONDS = 0.2\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signals.stop_on_signals()\n"
        "try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "except KeyboardInterrupt: time.sleep(60)\n"
    )
    process = run(code=code)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.startswith("error: stopped without clearing away")


WITHOUT = (
    "import os\n"
    "for name in ('pread', 'preadv', 'pwrite', 'posix_fallocate', 'copy_file_range', 'statvfs'):\n"
    "    delattr(os, name) if hasattr(os, name) else None\n"
    "from loratools.cli import main\nmain()"
)


@pytest.mark.parametrize("verb", ["fuse", "quantize", "squeeze"])
def test_a_system_without_positioned_writes_gives_the_same_bytes(tmp_path, verb):
    """Windows has none of these calls."""
    source = adapter(tmp_path / "lora", 2, 64, 96, 4)
    weights = {
        f"model.layers.{layer}.mlp.up_proj.weight": RNG.standard_normal((96, 64)).astype("f4")
        for layer in range(2)
    }
    base = tmp_path / "base"
    base.mkdir()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    given = {"fuse": [base, source], "quantize": [base], "squeeze": [source, "--rank", "2"]}[verb]
    found = []
    for name, code in (("with", "from loratools.cli import main; main()"), ("without", WITHOUT)):
        process = run(verb, *given, "-o", tmp_path / name, "-q", code=code)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        (file,) = (tmp_path / name).glob("*.safetensors")
        found.append(load_file(file))
    for key, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][key])
